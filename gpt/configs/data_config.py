"""Configuration of the data: sources, tokenizer and packing; `TrainConfig` sets the quickstart run's vocabulary."""

from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import BeforeValidator, Field

from gpt.configs.base import Config, FilePath
from gpt.configs.resume_rule import SAFE


def _as_tuple(value: object) -> object:
    if value in (None, "none", ("none",)):
        return ()
    return (value,) if isinstance(value, str) else value


Sources = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]
"""Sources that a user names; accepts a single one as a string, and `none` for an empty list."""


class PreparationConfig(Config):
    """Preparation of sources: how they become tokens."""

    val_source: Sources = ()
    """Sources for validation; none: a part of each training source is held out."""
    val_fraction: float = Field(0.1, ge=0, le=0.5)
    """Fraction of each source held out for validation: whole documents, or the tail of a single large text."""
    text_field: str = Field("text", min_length=1)
    """Key or column that holds the text of a record (JSON lines, Parquet, datasets)."""
    on_error: Literal["raise", "skip"] = "raise"
    """Unreadable records: raise stops at the first one and names it; skip leaves them out and reports how many."""
    deduplicate: bool = False
    """Leave out documents that repeat an earlier one byte for byte."""
    tokenizer: str = Field("bpe", min_length=1)
    """byte, char, bpe (trained on the corpus), gpt2, or the path of a tokenizer.json."""
    vocab_size: int = Field(8192, ge=257, le=1_000_000)
    """Vocabulary size of a trained bpe tokenizer: 256 bytes, the merges and one end-of-text token."""
    workers: Annotated[int, SAFE] = Field(0, ge=0, le=4096)
    """Processes that prepare the sources; 0: one per core. The result is the same with any number."""


class DataConfig(PreparationConfig):
    """Training data: sources, tokenizer, and how sequences are cut from the tokens."""

    source: Sources = Field(("stdlib",), min_length=1)
    """Files or folders of text, source code, JSON lines, Parquet or tokens; saved datasets; hf:NAME[:CONFIG[:SPLIT]];
    folders made by gpt prepare; or stdlib: Python's own library."""
    weights: tuple[Annotated[float, Field(gt=0, le=1_000_000)], ...] = ()
    """Sampling weight of each source; none: in proportion to the sources' tokens."""
    packing: Literal["stream", "best-fit"] = "stream"
    """stream: cut sequences from the documents in a row; best-fit: pack whole documents into sequences."""
    document_mask: bool = False
    """Restrict attention to tokens of the same document."""
    cache_dir: Annotated[FilePath, SAFE] = Path(platformdirs.user_cache_dir("gpt-training-pipeline", appauthor=False))
    """Folder that keeps prepared tokens for later runs."""
