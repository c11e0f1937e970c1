"""A run's corpus: prepared into the cache or named as prepared folders, then opened as token streams."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.configs.data_config import DataConfig
from gpt.configs.run_plan import CorpusFacts, StreamFacts
from gpt.data.corpus_notes import compare_end_of_text, list_notes
from gpt.data.end_of_text import take_id
from gpt.data.manifest import CORPUS_MANIFEST, CorpusManifest, read_corpus_manifest
from gpt.data.order import Mixture
from gpt.data.packing import Packing, load_or_pack
from gpt.data.prepare.compression import require_complete_zstd
from gpt.data.prepare.folders import find_prepared_folders
from gpt.data.prepare.formats import COMPRESSIBLE_KINDS
from gpt.data.prepare.preparation import prepare_folder
from gpt.data.prepare.preparation_plan import PreparationPlan, plan_preparation
from gpt.data.prepare.sources import require_apart
from gpt.data.sequences import MixedSources, PackedDocuments, TraceableSequences, Windows
from gpt.data.shards import ShardInfo, TokenStream
from gpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from gpt.errors import UserError
from gpt.utils.atomic_io import require_writable
from gpt.utils.distributed import DistContext
from gpt.utils.helper import unique_names

ShardsByName = Mapping[str, list[tuple[Path, ShardInfo]]]
"""Name of a stream -> its shards: the folder and the entry in the manifest there."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened."""

    tokenizer: Tokenizer
    train: Mapping[str, TokenStream]
    """Training streams by name: one for each source if sources have weights, else one for all together."""
    val: Mapping[str, TokenStream]
    """Validation streams by the name of their source."""
    packings: Mapping[str, Packing]
    """Packing of each training stream; empty without packing."""
    facts: CorpusFacts
    source_of: Mapping[Path, str]
    """Source that each training shard was prepared from."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""


def load_corpus(config: DataConfig, block_size: int, dist: DistContext) -> Corpus:
    """Prepare and pack the corpus on one process of each machine, then open it on every rank.

    Raises:
        UserError: a source cannot be read, the cache cannot be written, or a prepared file was changed.
    """
    own_folders: list[str] = []

    def prepare() -> list[str]:
        own_folders.extend(map(str, prepare_corpus(config)))
        return own_folders

    found = dist.on_local_main(prepare)
    dist.on_every_rank(lambda: _require_same_data(own_folders or found, found))
    folders = [Path(folder) for folder in found]
    corpus = dist.local_main_first(lambda: open_corpus(folders, config, block_size))  # the first packs
    expected = dist.broadcast(corpus.facts.sha256)
    dist.on_every_rank(lambda: _require_same_data(corpus.facts.sha256, expected))
    return corpus


def _require_same_data(own: str | Sequence[str], expected: str | Sequence[str]) -> None:
    """Compare the prepared data of this rank's machine with that of rank 0, which may be on another one.

    Args:
        own: folders or digest of this rank.
        expected: those of rank 0.

    Raises:
        UserError: they differ.
    """
    if own != expected:
        raise UserError(
            f"the data of --data.source differs from that of rank 0: {_join(own)} here, {_join(expected)} there; give "
            "every machine the same files"
        )


def _join(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def prepare_corpus(config: DataConfig) -> list[Path]:
    """Return the prepared folders: those that the configuration names, or one in the cache, prepared if missing.

    Raises:
        UserError: a source cannot be read, or the cache not written.
    """
    prepared = {source: find_prepared_folders(Path(source)) for source in config.source}
    first = next((source for source, folders in prepared.items() if folders), None)
    if first is not None and (not all(prepared.values()) or config.val_source):
        raise UserError(
            f"--data.source {first} is prepared and others are not; prepare all of them together: "
            "gpt prepare SOURCE... --out DIR"
        )
    if first is not None:
        return [folder for source in config.source for folder in prepared[source]]
    if config.weights and len(config.weights) != len(config.source):
        raise UserError(f"--data.weights: {len(config.weights)} for {len(config.source)} sources; give one for each")
    require_apart(config.cache_dir, "--data.cache-dir", (*config.source, *config.val_source), below_only=True)
    if not any(config.cache_dir.glob(f"*/{CORPUS_MANIFEST}")):  # before the sources are read, which may take long
        require_writable(config.cache_dir, "--data.cache-dir")
    plan = plan_preparation(config.source, config)
    folder = config.cache_dir / plan.key
    if not (folder / CORPUS_MANIFEST).is_file():  # a prepared corpus needs no lock, and may be in a read-only cache
        require_writable(config.cache_dir, "--data.cache-dir")
        prepare_folder(folder, plan, "--data.cache-dir")
    elif plan.on_error == "raise":
        _require_complete_files(plan)
    return [folder]


def _require_complete_files(plan: PreparationPlan) -> None:
    """Check the compressed files that a cached corpus was made of.

    A corpus of an earlier version may lack the rest of a zstd file that was cut short.

    Raises:
        UserError: a file ends in the middle of a frame.
    """
    for file in (file for source in plan.sources for file in source.files if file.kind in COMPRESSIBLE_KINDS):
        require_complete_zstd(file.path)


def open_corpus(folders: Sequence[Path], config: DataConfig, block_size: int) -> Corpus:
    """Open prepared folders. Shards are mapped when they are first read, which only packing does here.

    Args:
        folders: from `prepare_corpus`.
        config: weights and packing.
        block_size: length of a sequence.

    Raises:
        UserError: a file is missing or was changed, or the folders have different tokenizers.
    """
    manifests = [read_corpus_manifest(folder) for folder in folders]
    tokenizer = _read_tokenizer(folders, manifests)
    train_shards, val_shards = _group_shards(folders, manifests)
    train = _open_streams(_join_unless_weighted(train_shards, config.weights), tokenizer)
    val = _open_streams(val_shards, tokenizer)
    digests = [manifest.sha256 for manifest in manifests]
    packings = _load_packings(train, tokenizer, digests, config, block_size) if config.packing == "best-fit" else {}
    return Corpus(
        tokenizer,
        train,
        val,
        packings,
        facts=CorpusFacts(
            vocab_size=tokenizer.vocab_size,
            streams=tuple(
                StreamFacts(name, len(stream), packings[name].n_sequences if packings else 0)
                for name, stream in train.items()
            ),
            sha256=" ".join(digests),
            content_sha256=" ".join(manifest.content_sha256 for manifest in manifests),
            tokenizer_sha256=tokenizer.sha256,
            val_tokens=sum(len(stream) for stream in val.values()),
            val_bytes=sum(stream.text_bytes for stream in val.values()),
            val_documents=sum(stream.n_documents for stream in val.values()),
            xz_bits_per_byte=manifests[0].xz_bits_per_byte if len(folders) == 1 else None,
        ),
        source_of={folder / shard.file: name for name, shards in train_shards.items() for folder, shard in shards},
        notes=tuple(_collect_notes(folders, manifests, tokenizer, config)),
    )


def _group_shards(folders: Sequence[Path], manifests: Sequence[CorpusManifest]) -> tuple[ShardsByName, ShardsByName]:
    """Return the training shards and the validation shards by the unique name of their source, if it has any."""
    in_folders = [
        (folder, entry) for folder, manifest in zip(folders, manifests, strict=True) for entry in manifest.sources
    ]
    names = unique_names(entry.name for _, entry in in_folders)
    train: dict[str, list[tuple[Path, ShardInfo]]] = {}
    val: dict[str, list[tuple[Path, ShardInfo]]] = {}
    for name, (folder, entry) in zip(names, in_folders, strict=True):
        if entry.train:
            train[name] = [(folder, shard) for shard in entry.train]
        if sum(shard.tokens for shard in entry.val) > 1:  # one token has no target
            val[name] = [(folder, shard) for shard in entry.val]
    return train, val


def _collect_notes(
    folders: Sequence[Path], manifests: Sequence[CorpusManifest], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[str]:
    """Yield the notes for the user: how the folders differ from the configuration, and what they lack.

    Raises:
        UserError: the configuration names another tokenizer or end of text than a folder that it names.
    """
    first_source = Path(config.source[0])
    is_named = folders[0] == first_source or first_source in folders[0].parents
    # A folder that is not named is in the cache, and was prepared for this configuration.
    compare = _compare_tokenizers if is_named else compare_end_of_text
    notes = [compare(config, manifests[0], tokenizer), manifests[0].vocab_note]
    yield from (note for note in notes if note)
    for manifest in manifests:
        yield from list_notes(manifest)


def _read_tokenizer(folders: Sequence[Path], manifests: Sequence[CorpusManifest]) -> Tokenizer:
    """Read the tokenizer that all folders share."""
    path = folders[0] / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(path, take_id(manifests[0].special_ids.get("end_of_text")))
    if tokenizer.sha256 != manifests[0].tokenizer_sha256:
        raise UserError(
            f"{path}: not the tokenizer of this corpus: its SHA-256 is {tokenizer.sha256}, not "
            f"{manifests[0].tokenizer_sha256}; restore it, or delete the folder and prepare it again"
        )
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{folder} was prepared with another tokenizer than {folders[0]}; prepare it with the same")
        if manifest.special_ids != manifests[0].special_ids:
            raise UserError(
                f"{folder} was prepared with another end-of-text token than {folders[0]}; prepare it with the same "
                "--end-of-text"
            )
    return tokenizer


def _compare_tokenizers(config: DataConfig, manifest: CorpusManifest, tokenizer: Tokenizer) -> str | None:
    """Return a note for the user if a prepared folder has another tokenizer than the configuration names.

    A kind of tokenizer may come from a preset, so a note is enough; a file is always named on purpose.

    Raises:
        UserError: the configuration names a tokenizer.json that differs from the folder's.
    """
    end_of_text = tokenizer.end_of_text
    if config.end_of_text is not None and (
        end_of_text is None or tokenizer.name_token(end_of_text) != config.end_of_text
    ):
        raise UserError(
            f"--data.end-of-text {config.end_of_text}: {config.source[0]} was prepared with "
            f"{'no such token' if end_of_text is None else tokenizer.name_token(end_of_text)}; "
            "leave out the flag, or prepare the folder again"
        )
    if Path(config.tokenizer).is_file():
        if Tokenizer.from_file(Path(config.tokenizer)).sha256 != tokenizer.sha256:
            raise UserError(
                f"--data.tokenizer {config.tokenizer}: {config.source[0]} was prepared with another tokenizer, "
                f"of SHA-256 {tokenizer.sha256}; leave out the flag, or prepare the folder again"
            )
        return None
    if config.tokenizer in (manifest.settings.get("tokenizer"), DataConfig().tokenizer):
        return None
    return f"the tokenizer is that of {config.source[0]}, not {config.tokenizer}"


def _join_unless_weighted(shards: ShardsByName, weights: Sequence[float]) -> ShardsByName:
    """Join the shards of all sources, unless each source has a weight."""
    if not weights:
        return {", ".join(shards): [shard for of_source in shards.values() for shard in of_source]}
    if len(weights) != len(shards):
        raise UserError(f"--data.weights: {len(weights)} for the sources {', '.join(shards)}; give one for each")
    return shards


def _open_streams(shards: ShardsByName, tokenizer: Tokenizer) -> dict[str, TokenStream]:
    return {name: TokenStream(of_stream, tokenizer.vocab_size) for name, of_stream in shards.items()}


def _load_packings(
    train: Mapping[str, TokenStream], tokenizer: Tokenizer, digests: Sequence[str], config: DataConfig, block_size: int
) -> dict[str, Packing]:
    """Return the packing of each training stream, from the cache."""
    packings = {}
    for index, (name, stream) in enumerate(train.items()):
        settings = json.dumps([list(digests), bool(config.weights), index, block_size]).encode()
        path = config.cache_dir / f"{hashlib.sha256(settings).hexdigest()[:20]}-best-fit.safetensors"
        packings[name] = load_or_pack(stream, block_size, ends_are_targets=tokenizer.end_of_text is not None, path=path)
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
