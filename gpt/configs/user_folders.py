"""Folders of the user: home, cache, and the folder for temporary files where there is no home."""

import os
import tempfile
from pathlib import Path

import platformdirs

NAME = "gpt-training-pipeline"


def default_cache_dir() -> Path:
    """Return the folder for prepared tokens: the user's cache, or `temporary_folder` if there is no home folder."""
    try:
        folder = Path(platformdirs.user_cache_dir(NAME, appauthor=False))
    except RuntimeError:  # no home folder is known; before version 4.3 the path began with `~` instead
        return temporary_folder()
    return folder if folder.is_absolute() else temporary_folder()


def temporary_folder() -> Path:
    """Return this user's folder for temporary files, which may not exist yet."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError:  # no folder can be written to; whoever writes a file there reports it
        parent = Path("/tmp")
    folder = parent / f"{NAME}-{user}"
    try:
        is_foreign = hasattr(os, "getuid") and folder.lstat().st_uid != user
    except OSError:
        is_foreign = False
    # Anyone may make a folder of this name. Its files must not reach a run, so this process takes a name of its own.
    return folder.with_name(f"{folder.name}-{os.getpid()}") if is_foreign else folder


def expand_home(path: str) -> str:
    """Replace `~` or `~USER` at the start of a path by the home folder.

    Raises:
        ValueError: no home folder is known.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for ~USER without such a user
    if expanded.partition(os.sep)[0] == "~":
        raise ValueError("no home folder is known; set HOME, or name the folder in full")
    return expanded
