"""Small parts that know nothing of models, data or training."""
