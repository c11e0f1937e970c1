"""A GPT training pipeline: `gpt.run` resolves and checks a run, `gpt.pipeline` builds it, `gpt.main` starts it."""

__version__ = "0.1.0"
