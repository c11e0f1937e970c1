"""Recorders of a run: the console and files."""
