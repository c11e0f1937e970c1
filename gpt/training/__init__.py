"""The Trainer (a Subject), the step it repeats, and the Observers that watch it."""
