"""Frozen pydantic models and pure derivation from them; nothing here imports torch."""
