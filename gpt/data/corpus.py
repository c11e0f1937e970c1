"""Prepared corpora: found in the cache or made, opened, and what they hold."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.configs.data_config import DataConfig
from gpt.configs.run_plan import CorpusFacts, StreamFacts
from gpt.data.manifest import CORPUS_MANIFEST, TOKENIZER_FILE, CorpusManifest, read_corpus_manifest
from gpt.data.order import Mixture
from gpt.data.packing import Packing, packing_of
from gpt.data.prepare.preparation import plan_preparation, prepare_folder
from gpt.data.sequences import MixedSources, PackedDocuments, TraceableSequences, Windows
from gpt.data.shards import ShardInfo, TokenStream
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.utils.atomic_io import require_writable
from gpt.utils.distributed import DistContext
from gpt.utils.helper import unique_names


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened."""

    tokenizer: Tokenizer
    train: Mapping[str, TokenStream]
    """What is trained on: each source by its name where they have weights, else all of them as one."""
    val: Mapping[str, TokenStream]
    """What is validated on, by source."""
    packings: Mapping[str, Packing]
    """How the documents of each training stream are packed; empty where windows are cut."""
    facts: CorpusFacts
    source_of: Mapping[Path, str]
    """The source that each shard was made of."""


def load_corpus(config: DataConfig, block_size: int, dist: DistContext) -> Corpus:
    """Prepare and pack the corpus on one process of each machine, then open it on every rank.

    Raises:
        UserError: a source cannot be read, the cache cannot be written, or a prepared file was changed.
    """

    def prepare_and_pack() -> list[str]:
        folders = prepare_corpus(config)
        open_corpus(folders, config, block_size)  # which packs its documents where the configuration asks for it
        return [str(folder) for folder in folders]

    folders = [Path(folder) for folder in dist.on_local_main(prepare_and_pack)]
    return open_corpus(folders, config, block_size)


def prepare_corpus(config: DataConfig) -> list[Path]:
    """Return the prepared folders: those that the configuration names, or one in the cache, prepared if missing.

    Raises:
        UserError: a source cannot be read, or the cache not written.
    """
    prepared = [source for source in config.source if (Path(source) / CORPUS_MANIFEST).is_file()]
    if prepared and (len(prepared) < len(config.source) or config.val_source):
        raise UserError(
            f"--data.source {prepared[0]} is prepared and others are not; prepare all of them together: "
            "gpt prepare SOURCE... --out DIR"
        )
    if prepared:
        return [Path(source) for source in prepared]
    if config.weights and len(config.weights) != len(config.source):
        raise UserError(f"--data.weights: {len(config.weights)} for {len(config.source)} sources; give one for each")
    require_writable(config.cache_dir, "--data.cache-dir")
    plan = plan_preparation(config.source, config)
    folder = config.cache_dir / plan.key
    prepare_folder(folder, plan, "--data.cache-dir")
    return [folder]


def open_corpus(folders: Sequence[Path], config: DataConfig, block_size: int) -> Corpus:
    """Map prepared folders; nothing of their shards is read yet, but for packing.

    Args:
        folders: from `prepare_corpus`.
        config: how sequences are made of them.
        block_size: length of a sequence.

    Raises:
        UserError: a file is missing or was changed, or the folders have different tokenizers.
    """
    manifests = [read_corpus_manifest(folder) for folder in folders]
    tokenizer = _tokenizer(folders[0], manifests[0])
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{folder} was prepared with another tokenizer than {folders[0]}; prepare it with the same")
    entries = [
        (folder, entry) for folder, manifest in zip(folders, manifests, strict=True) for entry in manifest.sources
    ]
    names = unique_names(entry.name for _, entry in entries)

    def stream(shards: Iterable[tuple[Path, ShardInfo]]) -> TokenStream:
        return TokenStream(list(shards), tokenizer.vocab_size)

    each = {
        name: stream((folder, shard) for shard in entry.train)
        for name, (folder, entry) in zip(names, entries, strict=True)
        if entry.train
    }
    together = {", ".join(each): stream((folder, shard) for folder, entry in entries for shard in entry.train)}
    if config.weights and len(config.weights) != len(each):
        raise UserError(f"--data.weights: {len(config.weights)} for the sources {', '.join(each)}; give one for each")
    train = each if config.weights else together
    val = {
        name: stream((folder, shard) for shard in entry.val)
        for name, (folder, entry) in zip(names, entries, strict=True)
        if sum(shard.tokens for shard in entry.val) > 1
    }
    digests = [manifest.sha256 for manifest in manifests]
    packings = _packings(train, tokenizer, digests, config, block_size)
    facts = CorpusFacts(
        vocab_size=tokenizer.vocab_size,
        streams=tuple(
            StreamFacts(name, len(stream), packings[name].n_sequences if packings else 0)
            for name, stream in train.items()
        ),
        sha256=" ".join(digests),
        tokenizer_sha256=tokenizer.sha256,
        val_tokens=sum(len(stream) for stream in val.values()),
        val_bytes=sum(stream.text_bytes for stream in val.values()),
        val_documents=sum(stream.n_documents for stream in val.values()),
        xz_bits_per_byte=manifests[0].xz_bits_per_byte if len(folders) == 1 else None,
    )
    source_of = {
        folder / shard.file: name for name, (folder, entry) in zip(names, entries, strict=True) for shard in entry.train
    }
    return Corpus(tokenizer, train, val, packings, facts, source_of)


def _packings(
    train: Mapping[str, TokenStream], tokenizer: Tokenizer, digests: Sequence[str], config: DataConfig, block_size: int
) -> dict[str, Packing]:
    """How the documents of each stream are packed; nothing where windows are cut."""
    if config.packing == "stream":
        return {}
    require_writable(config.cache_dir, "--data.cache-dir")
    packings = {}
    for index, (name, stream) in enumerate(train.items()):
        settings = json.dumps([list(digests), bool(config.weights), index, block_size]).encode()
        path = config.cache_dir / f"{hashlib.sha256(settings).hexdigest()[:20]}-best-fit.safetensors"
        packings[name] = packing_of(stream, block_size, ends_are_targets=tokenizer.end_of_text is not None, path=path)
    return packings


def build_sequences(corpus: Corpus, config: DataConfig, block_size: int, seed: int) -> TraceableSequences:
    """Return the training sequences of a run, in its order."""
    each: list[TraceableSequences] = [
        PackedDocuments(
            stream,
            corpus.packings[name],
            block_size,
            seed=seed,
            end_of_text=corpus.tokenizer.end_of_text,
            document_mask=config.document_mask,
        )
        if corpus.packings
        else Windows(stream, block_size, seed=seed, document_mask=config.document_mask)
        for name, stream in corpus.train.items()
    ]
    return MixedSources(each, Mixture(config.weights, seed)) if config.weights else each[0]


def tokenizer_mismatch_note(config: DataConfig, corpus: Corpus) -> str | None:
    """What to tell where a folder prepared before brings another tokenizer than the configuration names.

    A preset names a kind of tokenizer for those who prepare; a file is named by someone who means that one.

    Raises:
        UserError: the configuration names a tokenizer.json, and the folder was prepared with another, if only by one
            merge.
    """
    if not (Path(config.source[0]) / CORPUS_MANIFEST).is_file():
        return None
    if Path(config.tokenizer).is_file():
        if Tokenizer.from_file(Path(config.tokenizer)).sha256 != corpus.tokenizer.sha256:
            raise UserError(
                f"--data.tokenizer {config.tokenizer}: {config.source[0]} was prepared with another one, of SHA-256 "
                f"{corpus.tokenizer.sha256}; leave the flag out, or prepare it again"
            )
        return None
    named = read_corpus_manifest(Path(config.source[0])).settings.get("tokenizer")
    if config.tokenizer in (named, DataConfig().tokenizer):
        return None
    return f"the tokenizer is that of {config.source[0]}, not {config.tokenizer}"


def _tokenizer(folder: Path, manifest: CorpusManifest) -> Tokenizer:
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: not the tokenizer of this corpus: its SHA-256 is {tokenizer.sha256}, not "
            f"{manifest.tokenizer_sha256}; restore it, or delete the folder and prepare it again"
        )
    return tokenizer
