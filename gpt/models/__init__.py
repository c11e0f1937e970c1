"""The model and its loss; it knows nothing of ranks, devices or files."""
