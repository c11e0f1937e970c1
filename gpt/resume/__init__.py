"""Resuming: find where a run starts, and check what may change."""
