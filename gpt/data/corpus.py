"""Source -> prepared corpus: split, tokenized and written once into a cache keyed by content and settings."""

import hashlib
import json
import logging
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError

from gpt.configs.data_config import DataConfig
from gpt.configs.run_plan import CorpusFacts
from gpt.data.formats import Document, Records
from gpt.data.readers import fingerprint, read_source
from gpt.data.shards import ShardInfo, TokenStream, shard_to_json, token_dtype, write_shards
from gpt.data.tokenizer import Ids, Tokenizer, build_tokenizer
from gpt.errors import UserError
from gpt.utils.atomic_io import new_folder, remove_folder, require_writable, write_json
from gpt.utils.helper import first_line, plural, si
from gpt.utils.progress import progress_bar

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "corpus.json"
LARGEST_SHARE = 0.05
"""No document makes up more than this part of a validation set, where the corpus allows it."""
XZ_LIMIT = 16 * 2**20
"""Bytes of validation text above which xz would keep the user waiting for longer than the number is worth."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    facts: CorpusFacts


def prepare(config: DataConfig) -> Path:
    """The folder of the prepared corpus; made if it is not there, under a lock, so that processes do it once.

    Raises:
        UserError: the source cannot be read, or the cache not written.
    """
    documents = read_source(config.source, _records(config))
    held_out = read_source(config.val_source, _records(config), "--data.val-source") if config.val_source else []
    key = _cache_key(config, documents, held_out)
    folder = config.cache_dir / key
    if (folder / MANIFEST).exists():
        return folder
    require_writable(config.cache_dir, "--data.cache-dir")
    with FileLock(config.cache_dir / f"{key}.lock"):
        if not (folder / MANIFEST).exists():
            size = sum(document.n_bytes for document in (*documents, *held_out))
            count = plural(len(documents) + len(held_out), "document")
            log.info("preparing %s: %s, %s of text", config.source, count, f"{si(size)}B")
            train, val = (documents, held_out) if held_out else split(documents, config.val_fraction)
            try:
                if folder.exists():  # somebody deleted its manifest
                    remove_folder(folder)
                with new_folder(folder) as unfinished:
                    _prepare_into(unfinished, config, train, val)
            except (OSError, SafetensorError) as error:
                raise UserError(f"--data.cache-dir {folder}: cannot be written: {first_line(error)}") from error
    return folder


def open_corpus(folder: Path) -> Corpus:
    """Map a prepared folder.

    Raises:
        UserError: a file of it is missing or was changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = {name: [ShardInfo(**entry) for entry in manifest["splits"][name]] for name in ("train", "val")}
        xz_bits_per_byte, source_sha256 = manifest["xz_bits_per_byte"], manifest["source_sha256"]
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared corpus here; do all machines read the same source?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged; delete the folder to prepare it again") from error
    streams = {name: TokenStream(folder, entries) for name, entries in shards.items()}
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    facts = CorpusFacts(
        vocab_size=tokenizer.vocab_size,
        train_tokens=len(streams["train"]),
        source_sha256=source_sha256,
        tokenizer_sha256=tokenizer.sha256,
        val_tokens=len(streams["val"]),
        val_bytes=sum(shard.text_bytes for shard in shards["val"]),
        val_documents=sum(shard.documents for shard in shards["val"]),
        xz_bits_per_byte=xz_bits_per_byte,
    )
    return Corpus(tokenizer, streams["train"], streams["val"], facts)


def split(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, the same on every machine.

    Whole documents, in the order of their names' hashes, until their bytes reach the fraction; one that would be too
    large a share of it waits until no other is left. Of a single document the tail is taken, as nanoGPT does.
    """
    if not val_fraction:
        return list(documents), []
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = int(len(text) * (1 - val_fraction))
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    sizes = {document.name: document.n_bytes for document in documents}
    wanted = val_fraction * sum(sizes.values())
    order = sorted(
        documents,
        key=lambda d: (
            sizes[d.name] if sizes[d.name] > LARGEST_SHARE * wanted else 0,
            hashlib.sha256(os.fsencode(d.name)).digest(),
        ),
    )
    chosen: set[str] = set()
    taken = 0
    for document in order[:-1]:  # one is left to train on
        if taken >= wanted:
            break
        chosen.add(document.name)
        taken += sizes[document.name]
    return [d for d in documents if d.name not in chosen], [d for d in documents if d.name in chosen]


def _records(config: DataConfig) -> Records:
    return Records(config.text_field, skip_bad=config.on_error == "skip")


def _cache_key(config: DataConfig, documents: list[Document], held_out: list[Document]) -> str:
    settings: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "source": fingerprint(documents),
        "val": fingerprint(held_out) if held_out else config.val_fraction,
        "tokenizer": config.tokenizer,
    }
    if config.tokenizer == "bpe":
        settings["vocab_size"] = config.vocab_size
    elif Path(config.tokenizer).is_file():
        settings["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def _prepare_into(folder: Path, config: DataConfig, train: list[Document], val: list[Document]) -> None:
    splits = {"train": train, "val": val}
    size = sum(document.n_bytes for document in (*train, *val))
    learning = config.tokenizer in ("char", "bpe")
    with progress_bar("learning the tokenizer", total=size if learning else 0) as advance:
        tokenizer = build_tokenizer(
            config.tokenizer,
            config.vocab_size,
            corpus=_texts([*train, *val], advance),
            training=_texts(train, advance),
            has_documents=max(len(train), len(val)) > 1,
        )
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    dtype = token_dtype(tokenizer.vocab_size)
    with progress_bar("tokenizing", total=size) as advance:
        shards = {
            name: write_shards(folder, name, _encoded(tokenizer, documents, advance), dtype)
            for name, documents in splits.items()
        }
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "source_sha256": fingerprint(train + val),
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "dtype": np.dtype(dtype).name,
            "xz_bits_per_byte": _xz_bits_per_byte(val),
            "splits": {name: [shard_to_json(shard) for shard in shards[name]] for name in shards},
        },
    )


def _texts(documents: list[Document], advance: Callable[[int], None]) -> Iterator[str]:
    for document in documents:
        yield document.text
        advance(document.n_bytes)


def _encoded(
    tokenizer: Tokenizer, documents: list[Document], advance: Callable[[int], None]
) -> Iterator[tuple[Ids, int]]:
    start = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint32)
    for document in documents:
        ids = np.concatenate([start, tokenizer.encode(document.text)])
        if int(ids.max(initial=0)) >= tokenizer.vocab_size:
            raise UserError(f"the tokenizer gave id {ids.max()}, beyond its own vocabulary of {tokenizer.vocab_size}")
        yield ids, document.n_bytes
        advance(document.n_bytes)


def _xz_bits_per_byte(documents: list[Document]) -> float | None:
    """Bits per byte of `xz -9e` on the documents as one stream: what a compressor makes of them without learning."""
    content = "".join(document.text for document in documents).encode()
    if not 0 < len(content) <= XZ_LIMIT:
        return None
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)
