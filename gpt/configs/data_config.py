"""What to train on and how it becomes tokens."""

from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field

from gpt.configs.base import Config, FilePath


class DataConfig(Config):
    """The corpus, its split and its tokenizer."""

    source: str = Field("stdlib", min_length=1)
    """File or folder of text, source code, JSON lines or Parquet, a saved dataset, or stdlib: Python's own library."""
    val_source: str | None = Field(None, min_length=1)
    """Source to validate on; without it, a part of the source is held out."""
    text_field: str = Field("text", min_length=1)
    """Key or column that holds the text of a record (JSON lines, Parquet, a saved dataset)."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: name it and end, or leave it out and say how many."""
    val_fraction: float = Field(0.1, ge=0, le=0.5)
    """Part of the source held out: whole documents of a folder, the tail of a single file."""
    cache_dir: FilePath = Path(platformdirs.user_cache_dir("gpt-training-pipeline", appauthor=False))
    """Where prepared tokens are kept for later runs."""
    tokenizer: str = Field("bpe", min_length=1)
    """byte, char, bpe (trained on the corpus), gpt2, or the path of a tokenizer.json."""
    vocab_size: int = Field(8192, ge=257, le=1_000_000)
    """Vocabulary that bpe is trained to: 256 bytes, merges, one end-of-text token."""
