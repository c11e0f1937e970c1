"""Observers that ship with the Trainer."""
