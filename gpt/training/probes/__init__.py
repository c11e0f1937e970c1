"""Measurements of parameters and gradients inside the training step."""
