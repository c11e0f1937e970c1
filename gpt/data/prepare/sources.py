"""Sources -> files: the files of a source, their formats, and a fingerprint of their content."""

import hashlib
import logging
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gpt.configs.data_config import HUB_PREFIX, SHAKESPEARE, STDLIB, PreparationConfig
from gpt.data.prepare.file_state import FileState, read_file_state
from gpt.data.prepare.folders import Found, find_files, is_run, walk_files
from gpt.data.prepare.foreign import find_foreign_chunks, name_foreign_note
from gpt.data.prepare.formats import (
    JSON_OBJECT_START,
    Format,
    detect_format,
    has_json_lines_name,
    read_first_values,
    require_utf8,
)
from gpt.data.prepare.optional import import_extra
from gpt.data.prepare.records import BadFileError, join, name_left_out, name_reason, shorten
from gpt.data.prepare.shakespeare import FILE_NAME, fetch_shakespeare
from gpt.data.prepare.tables import (
    ColumnError,
    is_dataset,
    open_dataset,
    open_stream,
    read_table_header,
    require_column,
)
from gpt.data.prepare.token_files import HEAD_BYTES
from gpt.errors import UserError
from gpt.utils.helper import plural

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
    states: tuple[FileState, ...] = field(default=(), compare=False)
    """State of every file when its content was digested."""
    left_out: tuple[str, ...] = ()
    """Files and folders that are no text of this source, each with what it is."""
    bad_files: tuple[str, ...] = ()
    """Messages about files that `--data.on-error skip` leaves out."""


def find_source(
    source: str,
    flag: str = "--data.source",
    cache_dir: Path | None = None,
    *,
    text_field: str = "text",
    skip_bad: bool = False,
) -> Source:
    """Find the files of a source, in the order of their names, and fingerprint them.

    Hidden and binary files of a folder are left out. So are folders of runs, prepared folders, and files that are no
    text: `Source.left_out` names them.

    Args:
        source: a name or a path.
        flag: option that names it, for messages.
        cache_dir: folder for texts that are downloaded; None for the default one.
        text_field: key or column that holds the text of a record.
        skip_bad: leaves out and names a file of a folder that cannot be read.

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
        return _find_file(source, path, flag, text_field)
    if is_run(path) or _holds_checkpoints(path):
        raise UserError(f"{flag} {source} is the folder of a run, not of texts; name the texts")
    if chunks := find_foreign_chunks(path):
        raise UserError(f"{flag} {shorten(source)} is {chunks[0]}; {chunks[1]}")
    name = path.resolve().name
    if is_dataset(path):
        return _make_source(name, [File("", path, "dataset", len(open_dataset(path)))])
    files, left_out, bad_files = _find_files_of_folder(path, text_field, skip_bad=skip_bad)
    if not files:
        reason = f" ({(left_out + bad_files)[0]})" if left_out or bad_files else ""
        raise UserError(f"{flag} {shorten(source)}: the folder holds no text{reason}; name one with text in it")
    return replace(_make_source(name, files), left_out=tuple(left_out), bad_files=tuple(bad_files))


def _find_file(source: str, path: Path, flag: str, text_field: str) -> Source:
    """Return the source that is a single file."""
    kind = detect_format(path, text_field)
    if kind == "token-index":
        raise UserError(f"{flag} {source} is the index of a token file; name the .bin file beside it")
    if not path.stat().st_size:
        raise UserError(f"{flag} {source}: the file is empty; name one with text in it")
    if kind == "table":
        read_table_header(path, text_field)
    if kind == "text" and JSON_OBJECT_START.match(_read_head(path)):
        _refuse_json_without_text(path, text_field)
    return _make_source(path.stem, [File(path.name, path, "text" if kind == "binary" else kind, path.stat().st_size)])


def _refuse_json_without_text(path: Path, text_field: str) -> None:
    """Refuse a JSON object without a text, which would be trained on with its keys and braces."""
    try:
        first = read_first_values(path, 1)
    except (ValueError, RecursionError):
        return
    for record in (value for value in first if isinstance(value, dict)):
        raise UserError(
            f"{shorten(path)}: a JSON object with no text under {text_field!r}; "
            f"set --data.text-field to one of: {join(record)}"
        )


def _find_files_of_folder(root: Path, text_field: str, *, skip_bad: bool) -> tuple[list[File], list[str], list[str]]:
    """Return the files of a folder, names of what is no text of it, and messages about files that cannot be read."""
    found = find_files(root)
    if found.runs:
        shown = ", ".join(map(shorten, found.runs[:MAX_SHOWN_RUNS])) + (
            ", ..." if len(found.runs) > MAX_SHOWN_RUNS else ""
        )
        log.info("%s: left out %s: %s", root, plural(len(found.runs), "run"), shown)
    files: list[File] = []
    foreign: list[tuple[Path, str]] = []
    bad_files: list[str] = []
    for path in found.paths:
        file = _describe_path(found, root, path, text_field)
        if isinstance(file, File):
            message = None if file.kind == "dataset" else _describe_file_without_text(file, text_field)
            if message is None:
                files.append(file)
            else:
                foreign.append((path, message))
        elif isinstance(file, BadFileError):
            if file.is_foreign:
                foreign.append((path, str(file)))
            elif skip_bad:
                bad_files.append(str(file))
            else:
                raise UserError(f"{file} (--data.on-error skip leaves such files out)") from file
    if any(file.kind == "text" for file in files):
        # Beside text, records without the column are fixtures of a source tree.
        messages = {file: _find_missing_column(file, text_field) for file in files}
        foreign += [(file.path, message) for file, message in messages.items() if message]
        files = [file for file in files if not messages[file]]
    if not files and len(foreign) == 1 and not found.left_out:
        raise UserError(foreign[0][1])
    left_out = [
        name_left_out(path.relative_to(root).as_posix(), name_reason(message, path)) for path, message in foreign
    ]
    return files, left_out + found.left_out, bad_files


def _describe_path(found: Found, root: Path, path: Path, text_field: str) -> File | BadFileError | None:
    """Return the file or saved dataset at a path, its error, or None if it is empty, binary or an index."""
    name = path.relative_to(root).as_posix()
    try:
        if path in found.datasets:
            return File(name, path, "dataset", len(open_dataset(path)))
        size = path.stat().st_size
        if size and (kind := detect_format(path, text_field)) not in ("binary", "token-index"):
            return File(name, path, kind, size)
    except BadFileError as error:
        return error
    return None


def _describe_file_without_text(file: File, text_field: str) -> str | None:
    """Return a message on a file that is no text of the folder that holds it; None if it is one."""
    try:
        match file.kind:
            case "text":
                require_utf8(file.path)
                note = name_foreign_note(file.path, _read_head(file.path))
                return f"{shorten(file.path)} is {note}" if note else None
            case "table":
                read_table_header(file.path, text_field)
            case "json" | "json-lines" if not has_json_lines_name(file.path):
                # A single value without a text, such as a notebook's, is no file of records; nor is a .json that
                # begins with one.
                first = read_first_values(file.path, 1 if file.path.suffix.lower() == ".json" else 2)
                keys = [key for value in first if isinstance(value, dict) for key in value]
                if len(first) < 2 and text_field not in keys:
                    remedy = f"; set --data.text-field to one of: {join(keys)}" if keys else ""
                    return f"{shorten(file.path)}: no record with {text_field!r}{remedy}"
    except BadFileError as error:
        return str(error)
    except (ValueError, RecursionError):
        return None  # a record that is damaged is an error of its own
    return None


def _find_missing_column(file: File, text_field: str) -> str | None:
    """Return a message on a Parquet file or a dataset without the column of the text; None for all others."""
    if file.kind not in ("parquet", "dataset"):
        return None
    try:
        require_column(file.path, text_field)
    except ColumnError as error:
        return str(error)
    except BadFileError:
        return None  # a damaged file is an error of its own
    return None


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


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
    """Fingerprint the files: the SHA-256 of all names and contents."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        states_of_files = list(threads.map(_read_states, files))
    digest = hashlib.sha256()
    for file, states in zip(files, states_of_files, strict=True):
        # Files of these kinds were raw text in former corpora, which a cache may still hold.
        file_name = os.fsencode(file.name) + (file.kind.encode() if file.kind in ("json", "table") else b"")
        digest.update(len(file_name).to_bytes(8, "little") + file_name + bytes.fromhex(_join_digests(file, states)))
    return Source(
        name, tuple(files), digest.hexdigest(), tuple(state for states in states_of_files for state in states)
    )


def _read_states(file: File) -> list[FileState]:
    """Digest a file and those that belong to it: all of a dataset, or Megatron's index with its tokens."""
    if file.kind == "dataset":
        return [read_file_state(path) for path in walk_files(file.path)]
    index = file.path.with_suffix(".idx")
    has_index = file.kind == "tokens" and index.is_file()
    return [read_file_state(path) for path in ((file.path, index) if has_index else (file.path,))]


def _join_digests(file: File, states: Sequence[FileState]) -> str:
    """Return the digest of a file, or that of the digests of several."""
    if len(states) == 1 and file.kind != "dataset":
        return states[0].sha256
    return hashlib.sha256(b"".join(bytes.fromhex(state.sha256) for state in states)).hexdigest()


def _find_hub_source(address: str) -> Source:
    """Find a dataset of the hub at its current revision; the fingerprint of a local folder comes from its files."""
    name = address.split(":")[0]
    if not name:
        raise UserError(f"hf:{address}: name a dataset: hf:NAME[:CONFIG[:SPLIT]]")
    n_shards = max(1, int(open_stream(address).num_shards))
    states: tuple[FileState, ...] = ()
    if Path(name).is_dir():
        states = tuple(read_file_state(path) for path in walk_files(Path(name)))
        content = "".join(state.sha256 for state in states)
    else:
        api = import_extra("huggingface_hub", "datasets", f"hf:{address}").HfApi()
        content = str(api.dataset_info(name).sha)
    sha256 = hashlib.sha256(f"{address.partition(':')[2]}\n{content}".encode()).hexdigest()
    return Source(Path(name).name, (File(address, Path(address), "hub", n_shards),), sha256, states)


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
    for path in walk_files(root):
        name = path.relative_to(root)
        if path.suffix == ".py" and not EXCLUDED_FROM_STDLIB.intersection(name.parts) and path.stat().st_size:
            yield File(name.as_posix(), path, "python", path.stat().st_size)
