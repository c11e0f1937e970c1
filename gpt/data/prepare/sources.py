"""Sources -> files: the files of a source, their formats, and a fingerprint of their content."""

import hashlib
import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.configs.data_config import HUB_PREFIX, SHAKESPEARE, STDLIB, PreparationConfig
from gpt.data.prepare.formats import Format, detect_format, import_extra, is_dataset, open_dataset, open_stream
from gpt.data.prepare.shakespeare import FILE_NAME, fetch_shakespeare
from gpt.errors import UserError
from gpt.utils.helper import plural, sha256_of_file

log = logging.getLogger(__name__)

EXCLUDED_FROM_STDLIB = frozenset(
    # The tables of `encodings` and `pydoc_data` are too easy to predict; tests repeat the code that they test.
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
    }
)
MAX_SHOWN_RUNS = 3

Kind = Format | Literal["python", "dataset", "hub"]


@dataclass(frozen=True)
class File:
    """A file of a source, or a dataset that is treated as one."""

    name: str
    """Path inside the source."""
    path: Path
    kind: Kind
    size: int
    """Bytes of a file, rows of a dataset, or shards of a stream."""


@dataclass(frozen=True)
class Source:
    """The files of one `--data.source`."""

    name: str
    """Name in messages, and in `val/loss/NAME`."""
    files: tuple[File, ...]
    sha256: str
    """Digest of the files' names and contents."""


def find_source(source: str, flag: str = "--data.source", cache_dir: Path | None = None) -> Source:
    """Find the files of a source, in the order of their names, and fingerprint them.

    Hidden and binary files of a folder are left out, and so are the folders of runs.

    Args:
        source: a name or a path.
        flag: option that names it, for messages.
        cache_dir: folder for texts that are downloaded; None for the default one.

    Raises:
        UserError: there is no such source, it has no text, or a file cannot be read.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _make_source(STDLIB, list(_find_stdlib_files(root)))
    if source.startswith(HUB_PREFIX):
        return _find_hub_source(source.removeprefix(HUB_PREFIX))
    path = Path(source)
    if source == SHAKESPEARE and not path.exists():
        path = fetch_shakespeare(flag, cache_dir or PreparationConfig().cache_dir)
    if not _is_folder(path, flag):
        kind = detect_format(path)
        if kind == "token-index":
            raise UserError(f"{flag} {source} is the index of a token file; name the .bin file beside it")
        if not path.stat().st_size:
            raise UserError(f"{flag} {source}: the file is empty; name one with text in it")
        return _make_source(
            path.stem, [File(path.name, path, "text" if kind == "binary" else kind, path.stat().st_size)]
        )
    if is_run(path) or _holds_checkpoints(path):
        raise UserError(f"{flag} {source} is the folder of a run, not of texts; name the texts")
    name = path.resolve().name
    if is_dataset(path):
        return _make_source(name, [File("", path, "dataset", len(open_dataset(path)))])
    files = list(_find_text_files(path))
    if not files:
        raise UserError(f"{flag} {source}: the folder holds no text; name one with text in it")
    return _make_source(name, files)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a training run, whose files are no texts to train on."""
    records = (folder / "lineage.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return records and (folder / "config.json").is_file()


def _holds_checkpoints(path: Path) -> bool:
    """Return whether a folder is the folder of a run's checkpoints, or one of them."""
    folder = path.resolve()
    return any(parent.name == "checkpoints" and is_run(parent.parent) for parent in (folder, folder.parent))


def require_apart(folder: Path, flag: str, sources: Sequence[str], *, below_only: bool = False) -> None:
    """Check that a folder to write to is not at, in or above a source, where its files would be read as texts.

    Args:
        folder: it need not exist.
        flag: option that names it, for messages.
        sources: names and paths; a hidden folder in one is never read.
        below_only: accept a folder above a source.

    Raises:
        UserError: names the source.
    """
    written = folder.resolve()
    for source in (Path(name) for name in sources if name != STDLIB and Path(name).exists()):
        read = source.resolve()
        remedy = "name a folder beside it"
        if written == read:
            raise UserError(f"{flag} {folder} is the source {source} itself; {remedy}")
        inside = written.relative_to(read).parts if read.is_dir() and written.is_relative_to(read) else ()
        if inside and not any(part.startswith(".") for part in inside):
            raise UserError(f"{flag} {folder} lies in the source {source}; {remedy}")
        if read.is_relative_to(written) and not below_only:
            raise UserError(f"{flag} {folder} holds the source {source}; name another folder")


def _make_source(name: str, files: list[File]) -> Source:
    return Source(name, tuple(files), _fingerprint_files(files))


def _fingerprint_files(files: Sequence[File]) -> str:
    """Return the SHA-256 of all names and contents."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        contents = threads.map(_hash_content, files)
    digest = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        name = os.fsencode(file.name)
        digest.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(content))
    return digest.hexdigest()


def _hash_content(file: File) -> str:
    try:
        if file.kind == "dataset":
            return _hash_files(_walk_files(file.path))
        index = file.path.with_suffix(".idx")
        if file.kind == "tokens" and index.is_file():  # Megatron's index says where documents begin
            return _hash_files([file.path, index])
        return sha256_of_file(file.path)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def _find_hub_source(address: str) -> Source:
    """Find a dataset of the hub at its current revision; the fingerprint of a local folder comes from its files."""
    name = address.split(":")[0]
    if not name:
        raise UserError(f"hf:{address}: name a dataset: hf:NAME[:CONFIG[:SPLIT]]")
    n_shards = max(1, int(open_stream(address).num_shards))
    if Path(name).is_dir():
        content = "".join(sha256_of_file(path) for path in _walk_files(Path(name)))
    else:
        api = import_extra("huggingface_hub", "datasets", f"hf:{address}").HfApi()
        content = str(api.dataset_info(name).sha)
    sha256 = hashlib.sha256(f"{address.partition(':')[2]}\n{content}".encode()).hexdigest()
    return Source(Path(name).name, (File(address, Path(address), "hub", n_shards),), sha256)


def _suggest_source(missing: Path) -> str:
    if missing.name == FILE_NAME:
        return f"the source {SHAKESPEARE} downloads it"
    if all(Path(part).exists() for part in str(missing).split(",")):
        return "separate several sources by spaces"
    return "name a text file, a folder or stdlib"


def _is_folder(path: Path, flag: str) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file or folder; {_suggest_source(path)}") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UserError(f"{flag} {path} is neither a file nor a folder; name a text file, a folder or stdlib")
    return stat.S_ISDIR(mode)


def _find_stdlib_files(root: Path) -> Iterator[File]:
    for path in _walk_files(root):
        name = path.relative_to(root)
        if path.suffix == ".py" and not EXCLUDED_FROM_STDLIB.intersection(name.parts) and path.stat().st_size:
            yield File(name.as_posix(), path, "python", path.stat().st_size)


def _find_text_files(root: Path) -> Iterator[File]:
    for path in _walk_files(root):
        size = path.stat().st_size
        if size and (kind := detect_format(path)) not in ("binary", "token-index"):
            yield File(path.relative_to(root).as_posix(), path, kind, size)


def _walk_files(root: Path) -> Iterator[Path]:
    """Return all files below a folder in the order of their paths, which no file system changes."""
    found, runs = [], []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable_folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        runs_here = [name for name in folders if is_run(Path(folder) / name)]
        folders[:] = [name for name in folders if name not in runs_here]
        runs += [str(Path(folder) / name) for name in runs_here]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    if runs:
        shown = ", ".join(runs[:MAX_SHOWN_RUNS]) + (", ..." if len(runs) > MAX_SHOWN_RUNS else "")
        log.info("%s: left out %s: %s", root, plural(len(runs), "run"), shown)
    regular = (path for path in found if path.is_file())  # no pipes, sockets or broken links
    return iter(sorted(regular, key=lambda path: path.relative_to(root).parts))


def _raise_unreadable_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
