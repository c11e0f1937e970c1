"""What to train on and how it becomes tokens."""

from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import BeforeValidator, Field

from gpt.configs.base import Config, FilePath


def _several(value: object) -> object:
    if value in (None, "none", ("none",)):
        return ()
    return (value,) if isinstance(value, str) else value


Sources = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_several)]
"""Sources that a user names; a single one may be given as it is, and none at all as `none`."""


class PreparationConfig(Config):
    """How sources become tokens."""

    val_source: Sources = ()
    """Sources to validate on; without any, a part of the others is held out."""
    val_fraction: float = Field(0.1, ge=0, le=0.5)
    """Part of the sources held out: whole documents, or the tail of a single large text."""
    text_field: str = Field("text", min_length=1)
    """Key or column that holds the text of a record (JSON lines, Parquet, datasets)."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: name it and end, or leave it out and say how many."""
    deduplicate: bool = False
    """Leave out documents that are equal, to the byte, to one before them."""
    tokenizer: str = Field("bpe", min_length=1)
    """byte, char, bpe (trained on the corpus), gpt2, or the path of a tokenizer.json."""
    vocab_size: int = Field(8192, ge=257, le=1_000_000)
    """Vocabulary that bpe is trained to: 256 bytes, merges, one end-of-text token."""
    workers: int = Field(0, ge=0, le=4096)
    """Processes that prepare; 0: as many as there are cores. What they make is the same at any number."""


class DataConfig(PreparationConfig):
    """The corpus, its split and its tokenizer, and how sequences are cut from it."""

    source: Sources = Field(("stdlib",), min_length=1)
    """Files or folders of text, source code, JSON lines, Parquet or tokens; saved datasets; hf:NAME[:CONFIG[:SPLIT]];
    folders of gpt prepare; or stdlib: Python's own library."""
    weights: tuple[Annotated[float, Field(gt=0, le=1_000_000)], ...] = ()
    """Shares of the sources in training; without them each has the share of its length."""
    packing: Literal["stream", "best-fit"] = "stream"
    """stream: sequences are windows of the documents one after another; best-fit: whole documents, packed."""
    document_mask: bool = False
    """Keep attention inside documents."""
    cache_dir: FilePath = Path(platformdirs.user_cache_dir("gpt-training-pipeline", appauthor=False))
    """Where prepared tokens are kept for later runs."""
