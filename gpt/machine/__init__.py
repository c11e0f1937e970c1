"""Facts and measurements of this machine."""
