"""Tasks that score a model."""
