"""Files -> parts: pieces of a source that are each read and prepared by themselves.

A source is cut at positions that depend on the source alone. So the parts, and their shards, are the same for any
number of processes and after any interruption.
"""

import itertools
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gpt.data.prepare.compression import is_compressed
from gpt.data.prepare.documents import Document, TextDocument, TokenDocument
from gpt.data.prepare.formats import read_json, read_json_lines, read_text
from gpt.data.prepare.records import BadFileError, Records, name_left_out, name_reason, reraise_as_user_error
from gpt.data.prepare.sources import File, Kind
from gpt.data.prepare.split import choose_held_out
from gpt.data.prepare.tables import read_dataset, read_parquet, read_row_group_sizes, read_stream, read_table
from gpt.data.prepare.token_files import open_tokens
from gpt.data.tokenizer import Tokenizer
from gpt.data.word_boundaries import LOOKBEHIND_BYTES, WORD_BOUNDARY_IN_UTF8

PART_BYTES = 2**22
"""Bytes of a part: it fits in memory and makes a shard of useful size."""
MAX_PARTS = 2**14
"""Parts of a source; the parts of a larger source are larger, to limit the number of files."""
ROWS_PER_PART = 2**15
"""Rows of a dataset in one part."""

Role = Literal["train", "val"]


@dataclass(frozen=True)
class Part:
    """A piece of a source: whole small files, or a range of one file."""

    kind: Kind
    files: tuple[tuple[str, str], ...]
    """(name, path) of each file."""
    size: int
    """Bytes, for the progress bar."""
    start: int = 0
    stop: int | None = None
    """End of the range of bytes, row groups, rows, shards or tokens; None reads the whole file."""
    role: Role | None = None
    """Split that all of it belongs to; None holds out some of its documents."""
    continues: bool = False
    """The first document is a further piece of the last one of the part before."""
    number: int = 0
    """Position among all parts of the preparation; names the part's files."""

    def to_json(self) -> dict[str, Any]:
        """Return the part as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """Return the part that `to_json` wrote."""
        return cls(**value | {"files": tuple((name, path) for name, path in value["files"])})


def cut_into_parts(
    files: Sequence[File], records: Records, *, val_fraction: float, role: Role | None, tokenizer: Tokenizer | None
) -> list[Part]:
    """Cut the files of a source into parts.

    Args:
        files: the files of the source, in order.
        records: names the column of Parquet files, and counts files that cannot be cut.
        val_fraction: tail to hold out of a text file that is larger than a part.
        role: split that all of the source belongs to; None for both.
        tokenizer: the tokenizer of token files; its end-of-text token separates their documents.
    """
    max_bytes = max(PART_BYTES, sum(file.size for file in files) // MAX_PARTS)
    roles = _assign_roles(files, max_bytes, val_fraction) if role is None else {}
    parts: list[Part] = []
    open_groups: dict[Role | None, list[File]] = {}
    group_bytes: dict[Role | None, int] = {}

    def close(role: Role | None) -> None:
        if group := open_groups.pop(role, None):
            named = tuple((file.name, str(file.path)) for file in group)
            parts.append(Part(group[0].kind, named, group_bytes.pop(role), role=role))

    for file in files:
        file_role = roles.get(file.name, role)
        if _is_text(file) and (file.size <= max_bytes or is_compressed(file.path)):
            group = open_groups.get(file_role, [])
            if group and (group[0].kind != file.kind or group_bytes[file_role] + file.size > max_bytes):
                close(file_role)
            open_groups.setdefault(file_role, []).append(file)
            group_bytes[file_role] = group_bytes.get(file_role, 0) + file.size
        else:
            for open_role in list(open_groups):
                close(open_role)
            try:
                parts += _cut_file(file, records.text_field, max_bytes, val_fraction, file_role, tokenizer)
            except BadFileError as error:
                records.refuse_file(error)
    for open_role in list(open_groups):
        close(open_role)
    return parts


def leave_out_foreign_tokens(files: Sequence[File], tokenizer: Tokenizer | None) -> tuple[list[File], list[str]]:
    """Return the files of a source without those that look like tokens but are of another kind than the others.

    Beside text, a file of tokens has to hold tokens of the given tokenizer. Any .bin of even size could be nanoGPT's.

    Args:
        files: the files of the source.
        tokenizer: the tokenizer of token files; None if it is learned from the text.

    Returns:
        the files, and the names of those that are left out.
    """
    if all(file.kind == "tokens" for file in files):
        return list(files), []
    reasons = {file.name: _find_token_fault(file.path, tokenizer) for file in files if file.kind == "tokens"}
    left_out = [name_left_out(name, reason) for name, reason in reasons.items() if reason]
    return [file for file in files if not reasons.get(file.name)], left_out


def _find_token_fault(path: Path, tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None:
        return "tokens beside text"
    try:
        tokens = open_tokens(path)
        tokens.check_ids(0, len(tokens.tokens), tokenizer.vocab_size)
    except BadFileError as error:
        return name_reason(str(error), path)
    return None


def read_part(part: Part, records: Records, tokenizer: Tokenizer | None = None) -> Iterator[Document]:
    """Yield the documents of a part that are not empty; token files need their tokenizer.

    Raises:
        UserError: a file or a record cannot be read; names the place.
    """
    name, place = part.files[0]
    path = Path(place)
    match part.kind:
        case "text" if part.stop is None:
            for name, place in part.files:
                with records.refuse_bad_file(Path(place)):
                    yield from read_text(Path(place), name)
        case "text":
            yield from read_text(path, f"{name}:{part.start}", part.start, part.stop)
        case "python":
            for name, place in part.files:
                # tokenize.open honours the encoding line of a source file.
                with reraise_as_user_error(Path(place)), tokenize.open(place) as file:
                    yield TextDocument(name, file.read())
        case "json-lines":
            yield from read_json_lines(path, name, records, part.start, part.stop)
        case "json":
            yield from read_json(path, name, records)
        case "table":
            yield from read_table(path, name, records)
        case "parquet":
            assert part.stop is not None
            yield from read_parquet(path, name, records, part.start, part.stop)
        case "dataset":
            assert part.stop is not None
            yield from read_dataset(path, records, part.start, part.stop)
        case "hub":
            assert part.stop is not None
            yield from read_stream(place, records, part.start, part.stop)
        case "tokens":
            assert part.stop is not None and tokenizer is not None
            with records.refuse_bad_file(path):
                tokens = open_tokens(path)
                tokens.check_ids(part.start, part.stop, tokenizer.vocab_size)
                for number, ids in enumerate(tokens.documents(part.start, part.stop, tokenizer.end_of_text)):
                    yield TokenDocument(f"{name}:{part.start}:{number}", ids)
        case kind:
            raise AssertionError(f"nothing reads {kind}")


def _is_text(file: File) -> bool:
    return file.kind in ("text", "python")


def _assign_roles(files: Sequence[File], max_bytes: int, val_fraction: float) -> dict[str, Role]:
    """Return the split of each text file, if they are too many for one part; none if each part is split by itself.

    A part with two texts would hold out half of its bytes.
    """
    texts = [file for file in files if _is_text(file)]
    if not val_fraction or len(texts) < 2 or sum(file.size for file in texts) <= max_bytes:
        return {}
    chosen = choose_held_out(texts, val_fraction)
    return {file.name: "val" if index in chosen else "train" for index, file in enumerate(texts)}


def _cut_file(
    file: File, text_field: str, max_bytes: int, val_fraction: float, role: Role | None, tokenizer: Tokenizer | None
) -> Iterator[Part]:
    uncut = Part(file.kind, ((file.name, str(file.path)),), file.size, role=role)
    match file.kind:
        case "text":
            yield from _cut_text(uncut, max_bytes, val_fraction)
        case "json" | "table":
            yield uncut
        case "json-lines" if is_compressed(file.path):
            yield uncut
        case "json-lines":
            yield from _make_ranges(uncut, _find_cuts(file.path, 0, file.size, max_bytes, _find_line_start))
        case "parquet":
            yield from _cut_row_groups(uncut, read_row_group_sizes(file.path, text_field), max_bytes)
        case "dataset":
            for start in range(0, file.size, ROWS_PER_PART):
                yield replace(uncut, start=start, stop=min(start + ROWS_PER_PART, file.size), size=0)
        case "hub":
            for shard in range(file.size):
                yield replace(uncut, start=shard, stop=file.size, size=0)
        case "tokens":
            assert tokenizer is not None
            tokens = open_tokens(file.path)
            width = tokens.tokens.itemsize
            for start, stop in tokens.find_ranges(max_bytes // width, tokenizer.end_of_text):
                yield replace(uncut, start=start, stop=stop, size=(stop - start) * width)
        case kind:
            raise AssertionError(f"nothing cuts {kind}")


def _cut_text(uncut: Part, max_bytes: int, val_fraction: float) -> Iterator[Part]:
    """Cut a large text at word boundaries; its tail is held out, as in nanoGPT."""
    path = Path(uncut.files[0][1])
    border = uncut.size
    if uncut.role is None and val_fraction:
        border = _find_character_start(path, int(uncut.size * (1 - val_fraction)))
    for start, stop, role in ((0, border, uncut.role or "train"), (border, uncut.size, "val")):
        if start < stop:
            cuts = _find_cuts(path, start, stop, max_bytes, _find_word_boundary)
            yield from _make_ranges(replace(uncut, role=role), cuts, is_one_document=True)


def _make_ranges(uncut: Part, cuts: Sequence[int], *, is_one_document: bool = False) -> Iterator[Part]:
    for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
        yield replace(uncut, start=start, stop=stop, size=stop - start, continues=is_one_document and index > 0)


def _cut_row_groups(uncut: Part, sizes: list[int], max_bytes: int) -> Iterator[Part]:
    start, part_bytes = 0, 0
    for group, size in enumerate(sizes):
        if part_bytes and part_bytes + size > max_bytes:
            yield replace(uncut, start=start, stop=group, size=part_bytes)
            start, part_bytes = group, 0
        part_bytes += size
    if sizes:
        yield replace(uncut, start=start, stop=len(sizes), size=part_bytes)


def _find_cuts(
    path: Path, start: int, stop: int, max_bytes: int, find_next: Callable[[BinaryIO, int], int]
) -> list[int]:
    """Return `start`, `stop`, and between them the cuts that divide the range into nearly equal pieces.

    Args:
        path: the file.
        start: beginning of the range.
        stop: end of the range.
        max_bytes: size of a piece, about.
        find_next: returns the first position at or after another where the file may be cut.
    """
    n_parts = max(1, -(-(stop - start) // max_bytes))
    cuts = [start]
    with reraise_as_user_error(path), path.open("rb") as file:
        for index in range(1, n_parts):
            target = start + (stop - start) * index // n_parts
            if target > cuts[-1]:
                cuts.append(min(stop, find_next(file, target)))
    return [*dict.fromkeys(cuts), stop] if cuts[-1] < stop else cuts


def _find_line_start(file: BinaryIO, target: int) -> int:
    """Return the first start of a line at or after `target`."""
    file.seek(target - 1)
    while (block := file.readline(2**20)) and not block.endswith(b"\n"):
        pass
    return int(file.tell())


def _find_word_boundary(file: BinaryIO, target: int) -> int:
    """Return the first word boundary at or after `target`."""
    at = max(0, target - LOOKBEHIND_BYTES)
    file.seek(at)
    seen = b""
    while block := file.read(2**16):
        seen += block
        if boundary := WORD_BOUNDARY_IN_UTF8.search(seen, target - at):
            return at + boundary.start()
        at, seen = at + len(seen[:-LOOKBEHIND_BYTES]), seen[-LOOKBEHIND_BYTES:]
    return int(file.tell())


def _find_character_start(path: Path, at: int) -> int:
    """Return the last start of a UTF-8 character at or before `at`."""
    with reraise_as_user_error(path), path.open("rb") as file:
        file.seek(max(0, at - 3))
        block = file.read(min(at, 3) + 1)
    while len(block) > 1 and block[-1] & 0xC0 == 0x80:
        block, at = block[:-1], at - 1
    return at
