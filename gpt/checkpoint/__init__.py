"""A run's state on disk, and the folder it lives in."""
