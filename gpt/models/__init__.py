"""The model and its loss; nothing here knows of processes, devices or files."""
