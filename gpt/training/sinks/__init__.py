"""Where a run is written to."""
