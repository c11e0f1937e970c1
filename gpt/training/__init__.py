"""The Trainer (a Subject), the training step that it repeats, and its observers, sinks and probes."""
