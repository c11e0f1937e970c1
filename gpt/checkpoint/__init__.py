"""A run's state on disk, and the folder that holds it; README.md says how it works."""
