"""Files -> parts: pieces of a source that are read, and prepared, each by itself.

Where a source is cut depends on the source alone, so the parts, and the shards made of them, are the same whatever
number of processes works on them and however often they are interrupted.
"""

import itertools
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gpt.data.prepare.documents import Document, TextDocument, TokenDocument
from gpt.data.prepare.formats import (
    Records,
    is_compressed,
    read_dataset,
    read_json_lines,
    read_parquet,
    read_stream,
    read_text,
    reraise_as_user_error,
    row_groups,
)
from gpt.data.prepare.sources import File, Kind
from gpt.data.prepare.split import held_out
from gpt.data.prepare.token_files import open_tokens
from gpt.data.tokenizer import Tokenizer
from gpt.data.word_boundaries import LOOKBEHIND_BYTES, WORD_BOUNDARY_IN_UTF8

PART_BYTES = 2**22
"""Bytes of a part: small enough to be held in memory, large enough for a shard."""
MAX_PARTS = 2**14
"""Of a larger source each part is larger, so that files stay countable."""
ROWS = 2**15
"""Rows of a dataset in one part."""

Role = Literal["train", "val"]


@dataclass(frozen=True)
class Part:
    """A piece of a source: whole small files, or a range of one."""

    kind: Kind
    files: tuple[tuple[str, str], ...]
    """(name, path)."""
    size: int
    """Bytes, for the progress bar."""
    start: int = 0
    stop: int | None = None
    """Range of bytes, row groups, rows, shards or tokens; None: the whole file."""
    role: Role | None = None
    """Where all of it goes; None: some of its documents are held out."""
    continues: bool = False
    """The first document is a further piece of the last one of the part before."""
    number: int = 0
    """Position among all parts of the preparation; names the part's files."""

    def to_json(self) -> dict[str, Any]:
        """A plain value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """The part that `to_json` wrote."""
        return cls(**value | {"files": tuple((name, path) for name, path in value["files"])})


def cut_into_parts(
    files: Sequence[File], records: Records, *, val_fraction: float, role: Role | None, tokenizer: Tokenizer | None
) -> list[Part]:
    """The parts of a source.

    Args:
        files: of the source, in order.
        records: names the text column of Parquet files.
        val_fraction: of a text file larger than a part, the tail that is held out.
        role: where all of the source goes; None: both.
        tokenizer: that of token files; it names what separates their documents.
    """
    limit = max(PART_BYTES, sum(file.size for file in files) // MAX_PARTS)
    roles = _roles_of_texts(files, limit, val_fraction) if role is None else {}
    parts: list[Part] = []
    together: dict[Role | None, list[File]] = {}

    def close(role: Role | None) -> None:
        if group := together.pop(role, None):
            named = tuple((file.name, str(file.path)) for file in group)
            parts.append(Part(group[0].kind, named, sum(file.size for file in group), role=role))

    for file in files:
        its_role = roles.get(file.name, role)
        if _is_text(file) and (file.size <= limit or is_compressed(file.path)):
            group = together.get(its_role, [])
            if group and (group[0].kind != file.kind or sum(other.size for other in group) + file.size > limit):
                close(its_role)
            together.setdefault(its_role, []).append(file)
        else:
            for each in list(together):
                close(each)
            parts += _ranges(file, records, limit, val_fraction, its_role, tokenizer)
    for each in list(together):
        close(each)
    return parts


def read_part(part: Part, records: Records, tokenizer: Tokenizer | None = None) -> Iterator[Document]:
    """The documents of a part that are not empty; those of token files need their tokenizer.

    Raises:
        UserError: a file or a record cannot be read; names the place.
    """
    name, place = part.files[0]
    path = Path(place)
    match part.kind:
        case "text" if part.stop is None:
            for name, place in part.files:
                yield from read_text(Path(place), name)
        case "text":
            yield from read_text(path, f"{name}:{part.start}", part.start, part.stop)
        case "python":
            for name, place in part.files:
                with (
                    reraise_as_user_error(Path(place)),
                    tokenize.open(place) as file,
                ):  # honours a source file's own encoding line
                    yield TextDocument(name, file.read())
        case "json-lines":
            yield from read_json_lines(path, name, records, part.start, part.stop)
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
            tokens = open_tokens(path)
            tokens.check(part.start, part.stop, tokenizer.vocab_size)
            for number, ids in enumerate(tokens.documents(part.start, part.stop, tokenizer.end_of_text)):
                yield TokenDocument(f"{name}:{part.start}:{number}", ids)
        case kind:
            raise AssertionError(f"nothing reads {kind}")


def _is_text(file: File) -> bool:
    return file.kind in ("text", "python")


def _roles_of_texts(files: Sequence[File], limit: int, val_fraction: float) -> dict[str, Role]:
    """Where each text goes, if they are too many for one part: of a part with two of them half would be held out."""
    texts = [file for file in files if _is_text(file)]
    if not val_fraction or len(texts) < 2 or sum(file.size for file in texts) <= limit:
        return {}
    chosen = held_out(texts, val_fraction)
    return {file.name: "val" if index in chosen else "train" for index, file in enumerate(texts)}


def _ranges(
    file: File, records: Records, limit: int, val_fraction: float, role: Role | None, tokenizer: Tokenizer | None
) -> Iterator[Part]:
    whole = Part(file.kind, ((file.name, str(file.path)),), file.size, role=role)
    match file.kind:
        case "text":
            yield from _text_ranges(whole, limit, val_fraction)
        case "json-lines" if is_compressed(file.path):
            yield whole
        case "json-lines":
            yield from _pieces(whole, _cuts(file.path, 0, file.size, limit, _line_end))
        case "parquet":
            yield from _group_ranges(whole, row_groups(file.path, records), limit)
        case "dataset":
            for start in range(0, file.size, ROWS):
                yield replace(whole, start=start, stop=min(start + ROWS, file.size), size=0)
        case "hub":
            for shard in range(file.size):
                yield replace(whole, start=shard, stop=file.size, size=0)
        case "tokens":
            assert tokenizer is not None
            tokens = open_tokens(file.path)
            width = tokens.tokens.itemsize
            for start, stop in tokens.cuts(limit // width, tokenizer.end_of_text):
                yield replace(whole, start=start, stop=stop, size=(stop - start) * width)
        case kind:
            raise AssertionError(f"nothing cuts {kind}")


def _text_ranges(whole: Part, limit: int, val_fraction: float) -> Iterator[Part]:
    """A large text in pieces; what is held out is its tail, as nanoGPT has it."""
    path = Path(whole.files[0][1])
    border = whole.size
    if whole.role is None and val_fraction:
        border = _character_start(path, int(whole.size * (1 - val_fraction)))
    for start, stop, role in ((0, border, whole.role or "train"), (border, whole.size, "val")):
        if start < stop:
            yield from _pieces(replace(whole, role=role), _cuts(path, start, stop, limit, _word_start), joined=True)


def _pieces(whole: Part, cuts: Sequence[int], *, joined: bool = False) -> Iterator[Part]:
    for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
        yield replace(whole, start=start, stop=stop, size=stop - start, continues=joined and index > 0)


def _group_ranges(whole: Part, sizes: list[int], limit: int) -> Iterator[Part]:
    start, held = 0, 0
    for group, size in enumerate(sizes):
        if held and held + size > limit:
            yield replace(whole, start=start, stop=group, size=held)
            start, held = group, 0
        held += size
    if sizes:
        yield replace(whole, start=start, stop=len(sizes), size=held)


def _cuts(path: Path, start: int, stop: int, limit: int, find: Any) -> list[int]:
    """`start`, `stop`, and between them the places nearest after every equal share that `find` allows."""
    n_parts = max(1, -(-(stop - start) // limit))
    cuts = [start]
    with reraise_as_user_error(path), path.open("rb") as file:
        for index in range(1, n_parts):
            target = start + (stop - start) * index // n_parts
            if target > cuts[-1]:
                cuts.append(min(stop, find(file, target)))
    return [*dict.fromkeys(cuts), stop] if cuts[-1] < stop else cuts


def _line_end(file: Any, target: int) -> int:
    """The first beginning of a line at or after `target`."""
    file.seek(target - 1)
    while (block := file.readline(2**20)) and not block.endswith(b"\n"):
        pass
    return int(file.tell())


def _word_start(file: Any, target: int) -> int:
    """The first place at or after `target` where the text may be cut: see gpt.data.word_boundaries."""
    at = max(0, target - LOOKBEHIND_BYTES)
    file.seek(at)
    seen = b""
    while block := file.read(2**16):
        seen += block
        if found := WORD_BOUNDARY_IN_UTF8.search(seen, target - at):
            return at + found.start()
        at, seen = at + len(seen[:-LOOKBEHIND_BYTES]), seen[-LOOKBEHIND_BYTES:]
    return int(file.tell())


def _character_start(path: Path, at: int) -> int:
    """The last beginning of a UTF-8 character at or before `at`."""
    with reraise_as_user_error(path), path.open("rb") as file:
        file.seek(max(0, at - 3))
        block = file.read(min(at, 3) + 1)
    while len(block) > 1 and block[-1] & 0xC0 == 0x80:
        block, at = block[:-1], at - 1
    return at
