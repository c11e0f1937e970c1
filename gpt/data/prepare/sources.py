"""Sources -> files: what a source consists of, told by content, and its fingerprint. No text is kept."""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.data.prepare.formats import Format, dataset_of, extra, format_of, is_dataset, stream_of
from gpt.errors import UserError
from gpt.utils.helper import sha256_of_file

STDLIB = "stdlib"
STDLIB_LEFT_OUT = frozenset(
    # The tables of `encodings` and `pydoc_data` would flatter the loss; tests repeat the code that they test.
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
HUB = "hf:"

Kind = Format | Literal["python", "dataset", "hub"]


@dataclass(frozen=True)
class File:
    """A file of a source, or a dataset that is read as one."""

    name: str
    """Path inside the source."""
    path: Path
    kind: Kind
    size: int
    """Bytes; rows of a dataset, shards of a stream."""


@dataclass(frozen=True)
class Source:
    """What is read for one `--data.source`."""

    name: str
    """For people, and for `val/loss/NAME`."""
    files: tuple[File, ...]
    sha256: str
    """Digest of the files' names and contents."""


def find_source(source: str, flag: str = "--data.source") -> Source:
    """Look at a source; its files are in the order of their names.

    In a folder, hidden and binary files are left out.

    Raises:
        UserError: there is no such source, it holds nothing to read, or a file cannot be read.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _source(STDLIB, list(_stdlib_files(root)))
    if source.startswith(HUB):
        return _hub_source(source.removeprefix(HUB))
    path = Path(source)
    if not _is_folder(path, flag):
        kind = format_of(path)
        if kind == "token-index":
            raise UserError(f"{flag} {source}: an index; name the .bin file beside it")
        if not path.stat().st_size:
            raise UserError(f"{flag} {source}: the file is empty; name one with text in it")
        return _source(path.stem, [File(path.name, path, "text" if kind == "binary" else kind, path.stat().st_size)])
    name = path.resolve().name
    if is_dataset(path):
        return _source(name, [File("", path, "dataset", len(dataset_of(path)))])
    files = list(_folder_files(path))
    if not files:
        raise UserError(f"{flag} {source}: the folder holds no text; name one with text in it")
    return _source(name, files)


def _source(name: str, files: list[File]) -> Source:
    return Source(name, tuple(files), _fingerprint(files))


def _fingerprint(files: Sequence[File]) -> str:
    """SHA-256 over names and contents."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        contents = threads.map(_content_sha256, files)
    digest = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        name = os.fsencode(file.name)
        digest.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(content))
    return digest.hexdigest()


def _content_sha256(file: File) -> str:
    try:
        if file.kind == "dataset":
            return _sha256_of_files(_files_below(file.path))
        index = file.path.with_suffix(".idx")
        if file.kind == "tokens" and index.is_file():  # Megatron's: it says where documents begin
            return _sha256_of_files([file.path, index])
        return sha256_of_file(file.path)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error


def _sha256_of_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def _hub_source(address: str) -> Source:
    """A dataset of the hub, at the revision that it has today; a local folder is told by its files."""
    name = address.split(":")[0]
    if not name:
        raise UserError(f"hf:{address}: name a dataset: hf:NAME[:CONFIG[:SPLIT]]")
    n_shards = max(1, int(stream_of(address).num_shards))
    if Path(name).is_dir():
        content = "".join(sha256_of_file(path) for path in _files_below(Path(name)))
    else:
        api = extra("huggingface_hub", "datasets", f"hf:{address}").HfApi()
        content = str(api.dataset_info(name).sha)
    sha256 = hashlib.sha256(f"{address.partition(':')[2]}\n{content}".encode()).hexdigest()
    return Source(Path(name).name, (File(address, Path(address), "hub", n_shards),), sha256)


def _is_folder(path: Path, flag: str) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file or folder; name a text file, a folder or stdlib") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UserError(f"{flag} {path}: neither a file nor a folder")
    return stat.S_ISDIR(mode)


def _stdlib_files(root: Path) -> Iterator[File]:
    for path in _files_below(root):
        name = path.relative_to(root)
        if path.suffix == ".py" and not STDLIB_LEFT_OUT.intersection(name.parts) and path.stat().st_size:
            yield File(name.as_posix(), path, "python", path.stat().st_size)


def _folder_files(root: Path) -> Iterator[File]:
    for path in _files_below(root):
        size = path.stat().st_size
        if size and (kind := format_of(path)) not in ("binary", "token-index"):
            yield File(path.relative_to(root).as_posix(), path, kind, size)


def _files_below(root: Path) -> Iterator[Path]:
    """Files in the order of their paths, whatever the file system's own order is."""
    found = []
    for folder, folders, names in os.walk(root, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    regular = (path for path in found if path.is_file())  # no pipes, sockets or links to nowhere
    return iter(sorted(regular, key=lambda path: path.relative_to(root).parts))


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
