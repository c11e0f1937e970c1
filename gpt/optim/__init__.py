"""Optimizers: AdamW and Muon, and the parameter groups that they train."""
