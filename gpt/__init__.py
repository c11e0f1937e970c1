"""A GPT training pipeline: `gpt.pipeline.build(TrainConfig())` composes a run, `gpt.main` is its command line."""

__version__ = "0.1.0"
