"""Activation checkpointing, compile and data parallelism, applied to a model from outside; imports no model."""
