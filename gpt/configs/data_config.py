"""Configuration of the data: sources, tokenizer and packing; `TrainConfig` sets the quickstart run's vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from gpt.configs.base import Config, FilePath
from gpt.configs.resume_rule import SAFE, SAFE_IF_SAME_CONTENT
from gpt.configs.user_folders import default_cache_dir, expand_home

HUB_PREFIX = "hf:"
"""Prefix of a source that is a dataset of the Hugging Face hub, or a local folder that `datasets` reads."""
STDLIB = "stdlib"
"""Source that is Python's own library."""
SHAKESPEARE = "shakespeare"
"""Source that is downloaded, unless a file or folder has this name."""
TOKENIZER_KINDS = ("byte", "char", "bpe", "gpt2")
"""Values of `tokenizer` that name no file."""


def _as_tuple(value: object) -> object:
    if value in (None, "none", ("none",)):
        return ()
    return (value,) if isinstance(value, str) else value


def _expand_source(source: str) -> str:
    """Expand `~` in a source, also in the folder of `hf:~/FOLDER`."""
    prefix = HUB_PREFIX if source.startswith(HUB_PREFIX) else ""
    return prefix + expand_home(source.removeprefix(prefix))


Source = Annotated[str, Field(min_length=1), AfterValidator(_expand_source)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_tuple)]
"""Sources that a user names; accepts a single one as a string, and `none` for an empty list."""


class PreparationConfig(Config):
    """Preparation of sources: how they become tokens."""

    val_source: Annotated[Sources, SAFE_IF_SAME_CONTENT] = ()
    """Sources for validation; none: a part of each training source is held out."""
    val_fraction: float = Field(0.1, ge=0, le=0.5)
    """Fraction of each source held out for validation: whole documents, or the tail of a single large text."""
    text_field: str = Field("text", min_length=1)
    """Key or column that holds the text of a record (JSON, CSV, Parquet, datasets)."""
    on_error: Literal["raise", "skip"] = "raise"
    """Files and records that cannot be read: raise stops at the first one and names it; skip leaves them out and
    reports how many."""
    deduplicate: bool = False
    """Leave out documents that repeat an earlier one byte for byte."""
    tokenizer: Annotated[str, AfterValidator(expand_home), SAFE_IF_SAME_CONTENT] = Field("bpe", min_length=1)
    """byte, char, bpe (trained on the corpus), gpt2, or the path of a tokenizer.json."""
    end_of_text: str | None = Field(None, min_length=1)
    """Token that separates documents; none: found by its name."""
    vocab_size: int = Field(8192, ge=257, le=1_000_000)
    """Vocabulary size of a trained bpe tokenizer: 256 bytes, the merges and one end-of-text token."""
    workers: Annotated[int, SAFE] = Field(0, ge=0, le=4096)
    """Processes that prepare the sources; 0: one per core. The result is the same with any number."""
    cache_dir: Annotated[FilePath, SAFE] = default_cache_dir()
    """Folder that keeps prepared tokens and downloaded texts for later runs."""


class DataConfig(PreparationConfig):
    """Training data: sources, tokenizer, and how sequences are cut from the tokens."""

    source: Annotated[Sources, SAFE_IF_SAME_CONTENT] = Field((STDLIB,), min_length=1)
    """Files or folders of text, source code, JSON, CSV, Parquet or tokens; saved datasets; hf:NAME[:CONFIG[:SPLIT]];
    folders made by gpt prepare; stdlib: Python's own library; or shakespeare: tinyshakespeare, which is downloaded."""
    weights: tuple[Annotated[float, Field(gt=0, le=1_000_000)], ...] = ()
    """Sampling weight of each source; none: in proportion to the sources' tokens."""
    packing: Literal["stream", "best-fit"] = "stream"
    """stream: cut sequences from the documents in a row; best-fit: pack whole documents into sequences."""
    document_mask: bool = False
    """Restrict attention to tokens of the same document."""

    def map_paths(self, change: Callable[[str], str]) -> Self:
        """Return this section with `change` applied to every path in it."""
        changes = {
            "source": tuple(_map_source(source, change) for source in self.source),
            "val_source": tuple(_map_source(source, change) for source in self.val_source),
            "tokenizer": self.tokenizer if self.tokenizer in TOKENIZER_KINDS else change(self.tokenizer),
            "cache_dir": Path(change(str(self.cache_dir))),
        }
        return self.model_copy(update=changes)


def _map_source(source: str, change: Callable[[str], str]) -> str:
    """Apply `change` to a source that is a path; `stdlib`, `shakespeare` and a dataset of the hub are none."""
    if source == STDLIB or (source == SHAKESPEARE and not Path(source).exists()):
        return source
    if not source.startswith(HUB_PREFIX):
        return change(source)
    name, colon, rest = source.removeprefix(HUB_PREFIX).partition(":")
    return f"{HUB_PREFIX}{change(name)}{colon}{rest}" if name and Path(name).is_dir() else source
