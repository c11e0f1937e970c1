"""Folders -> paths: the files and saved datasets below a folder, through links, without runs and prepared folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt.data.manifest import CORPUS_MANIFEST
from gpt.data.prepare.foreign import find_foreign_chunks
from gpt.data.prepare.records import shorten
from gpt.data.tokenizer import TOKENIZER_FILE
from gpt.errors import UserError


@dataclass
class Found:
    """Paths below a folder, in the order of their names, which no file system changes."""

    paths: list[Path] = field(default_factory=list)
    """Files, and folders of saved datasets."""
    datasets: set[Path] = field(default_factory=set)
    """Those of the paths that are saved datasets."""
    prepared: list[Path] = field(default_factory=list)
    """Folders that `gpt prepare` wrote."""
    runs: list[Path] = field(default_factory=list)
    """Folders of runs."""
    left_out: list[str] = field(default_factory=list)
    """Other folders that are left out, each with what it is."""


def find_files(root: Path) -> Found:
    """Find the files and saved datasets below a folder.

    Linked folders are followed, each real folder once; one that is reached without a link keeps that name.
    """
    found, links, visited = Found(), [root], set[tuple[int, int]]()  # device and inode of a folder
    while links:
        for folder, folders, names in os.walk(links.pop(0), onerror=_raise_unreadable_folder):
            visited.add(_identify(Path(folder)))
            paths = [Path(folder) / name for name in sorted(folders) if not _is_hidden(name)]
            links += [path for path in paths if path.is_symlink()]
            paths = [path for path in paths if not path.is_symlink()]
            new = [path for path in paths if _identify(path) not in visited]  # a link may lead above another folder
            folders[:] = [path.name for path in new if not _take_folder(found, root, path, visited)]
            found.paths += [Path(folder) / name for name in names if not name.startswith(".")]
        while links and (
            _is_gone(links[0]) or _identify(links[0]) in visited or _take_folder(found, root, links[0], visited)
        ):
            links.pop(0)
    regular = [path for path in found.paths if path in found.datasets or path.is_file()]  # no pipes or broken links
    found.paths = sorted(regular, key=lambda path: path.relative_to(root).parts)
    return found


def walk_files(root: Path) -> Iterator[Path]:
    """Return all files below a folder in the order of their paths; links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable_folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return iter(sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts))


def find_prepared_folders(folder: Path) -> list[Path]:
    """Return the prepared folders that a folder consists of: itself, or those below if it holds nothing else."""
    if (folder / CORPUS_MANIFEST).is_file():
        return [folder]
    if not folder.is_dir():
        return []
    found = find_files(folder)
    return [] if found.paths else found.prepared


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a training run, whose files are no texts to train on."""
    records = (folder / "lineage.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return records and (folder / "config.json").is_file()


def _take_folder(found: Found, root: Path, folder: Path, visited: set[tuple[int, int]]) -> bool:
    """Record a folder that is not searched, and return whether it is one."""
    name = shorten(folder.relative_to(root), 60)
    if (folder / "dataset_dict.json").is_file() or all(
        (folder / file).is_file() for file in ("state.json", "dataset_info.json")
    ):
        found.datasets.add(folder)
        found.paths.append(folder)
    elif is_run(folder):
        found.runs.append(folder)
    elif (folder / CORPUS_MANIFEST).is_file() and (folder / TOKENIZER_FILE).is_file():
        found.prepared.append(folder)
        found.left_out.append(f"{name} (a prepared folder)")
    elif chunks := find_foreign_chunks(folder):
        found.left_out.append(f"{name} ({chunks[0]}; {chunks[1]})")
    else:
        return False
    visited.add(_identify(folder))
    return True


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_gone(link: Path) -> bool:
    """Return whether a link leads nowhere, or in a circle."""
    try:
        return not link.is_dir()
    except OSError:
        return True


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _raise_unreadable_folder(error: OSError) -> None:
    raise UserError(f"{shorten(error.filename)}: cannot be read: {error.strerror}") from error
