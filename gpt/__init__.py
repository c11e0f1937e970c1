"""A GPT training pipeline: `gpt.pipeline.build(lay_out(config))` composes a run, `gpt.main` is its command line."""

__version__ = "0.1.0"
