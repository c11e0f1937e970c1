"""Sources -> documents: a file, a folder of files, a dataset on disk, or Python's standard library."""

import hashlib
import logging
import os
import stat
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gpt.data.formats import Document, Records, is_dataset, read_dataset, read_file, read_text
from gpt.errors import UserError
from gpt.utils.helper import plural

log = logging.getLogger(__name__)

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


def read_source(source: str, records: Records, flag: str = "--data.source") -> list[Document]:
    """The documents of a source that hold any text, in the order of their names.

    In a folder, hidden and binary files are left out.

    Raises:
        UserError: there is no such source, it holds no text, or a file cannot be read.
    """
    path = Path(source)
    is_folder = source != STDLIB and _is_folder(path, flag)
    if source == STDLIB:
        found = _stdlib_documents()
    elif is_folder:
        found = read_dataset(path, records) if is_dataset(path) else _folder_documents(path, records)
    else:
        found = read_file(path, path.name, records) or read_text(path, path.name)
    documents = [document for document in found if document.text]
    if records.skipped:
        log.warning("%s: left out %s", source, plural(records.skipped, "bad record"))
    if not documents:
        kind = "folder holds no text" if is_folder else "file is empty"
        raise UserError(f"{flag} {source}: the {kind}; name one with text in it")
    return documents


def fingerprint(documents: list[Document]) -> str:
    """SHA-256 over names and texts."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (os.fsencode(document.name), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


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


def _stdlib_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files_below(root):
        name = path.relative_to(root)
        if path.suffix == ".py" and not STDLIB_LEFT_OUT.intersection(name.parts):
            with tokenize.open(path) as file:  # honours a source file's own encoding line
                yield Document(name.as_posix(), file.read())


def _folder_documents(root: Path, records: Records) -> Iterator[Document]:
    for path in _files_below(root):
        yield from read_file(path, path.relative_to(root).as_posix(), records) or ()


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
