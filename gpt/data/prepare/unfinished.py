"""The folder in which a preparation works, and what survives in it when the program is killed.

    preparation.json       what is prepared; written first, removed last
    tokenizer.json         written when it is built or learned
    parts/sources.txt      digest of the sizes and times of the sources' files
    parts/N.digests        digests of the documents of part N            with deduplication
    parts/N.kept           mask of the documents of part N to keep       with deduplication
    train-N.safetensors    shards of part N
    val-N.safetensors
    parts/N.json           record of part N, written when its shards are on the disk: the part is done
    corpus.json            the manifest, written when all parts are done

Every file gets its name when it is complete, so a file that exists is not written a second time.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gpt.configs.base import Config
from gpt.data.prepare.parts import Part
from gpt.data.shards import ShardInfo
from gpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync, write_json, write_text

IDENTITY_FILE = "preparation.json"
PARTS_FOLDER = "parts"
STATES_FILE = "sources.txt"


class PartRecord(Config):
    """Result of a part, written when its shards are on the disk."""

    train: ShardInfo | None
    val: ShardInfo | None
    skipped_records: int
    duplicates: int
    skipped_reasons: tuple[str, ...] = ()
    """Messages of the first bad records."""
    unrepresented: int = 0
    first_unrepresented: str = ""


class UnfinishedFolder:
    """The folder of an unfinished preparation.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    def claim(self, identity: dict[str, Any], states: str = "") -> None:
        """Make the folder, or keep in it what an interrupted preparation of the same identity has finished.

        Args:
            identity: everything that decides the content of the prepared folder.
            states: digest of the sizes and times of the sources. If a source was written since, and has its former
                content again, the finished parts may be of another content: they are removed.

        Raises:
            UserError: it holds another preparation.
        """
        identity_path, states_path = self.path / IDENTITY_FILE, self.path / PARTS_FOLDER / STATES_FILE
        if (
            states_path.exists()
            and states_path.read_text(encoding="utf-8") != states
            and _holds(identity_path, identity)
        ):
            shutil.rmtree(self.path)
        if not identity_path.exists():  # killed before it was written, or just before the end
            shutil.rmtree(self.path, ignore_errors=True)
            (self.path / PARTS_FOLDER).mkdir(parents=True)
            write_text(states_path, states)
            write_json(identity_path, identity)
        elif json.loads(identity_path.read_text(encoding="utf-8")) != identity:
            raise UserError(
                f"{self.path} holds an unfinished preparation of other sources or settings; "
                "finish it with the same command, or delete it"
            )

    def load_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that is saved in the folder, if there is one."""
        return Tokenizer.from_folder(self.path) if (self.path / TOKENIZER_FILE).exists() else None

    def load_or_save_tokenizer(self, build: Callable[[], Tokenizer]) -> Tokenizer:
        """Return the tokenizer that is saved in the folder, built and saved first if there is none."""
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            tokenizer = build()
            tokenizer.save(self.path)
        return tokenizer

    def shard_path(self, part: Part, role: Literal["train", "val"]) -> Path:
        """Return the path of a part's shard."""
        return self.path / f"{role}-{part.number:06d}.safetensors"

    def digests_path(self, part: Part) -> Path:
        """Return the path of the digests of a part's documents."""
        return self.path / PARTS_FOLDER / f"{part.number:06d}.digests"

    def keep_mask_path(self, part: Part) -> Path:
        """Return the path of the mask of a part's documents that are no duplicates."""
        return self.path / PARTS_FOLDER / f"{part.number:06d}.kept"

    def write_record(self, part: Part, record: PartRecord) -> None:
        """Record that a part is done."""
        write_text(self._record_path(part), record.model_dump_json())

    def read_record(self, part: Part) -> PartRecord:
        """Read the record of a part that is done."""
        return PartRecord.model_validate_json(self._record_path(part).read_text(encoding="utf-8"))

    def is_done(self, part: Part) -> bool:
        """Return whether a part has a record and the shards that it names."""
        try:
            record = self.read_record(part)
            shards = [shard for shard in (record.train, record.val) if shard]
            return all((self.path / shard.file).stat().st_size == shard.size for shard in shards)
        except (OSError, ValidationError):
            return False

    def finish(self) -> None:
        """Remove all that is no part of a prepared corpus; the identity last, for it claims the folder."""
        shutil.rmtree(self.path / PARTS_FOLDER, ignore_errors=True)
        for file in self.path.iterdir():
            if file.suffix in (".tokens", ".tmp"):  # of a worker that was killed
                file.unlink()
            else:
                fsync(file)
        (self.path / IDENTITY_FILE).unlink()
        fsync(self.path)

    def _record_path(self, part: Part) -> Path:
        return self.path / PARTS_FOLDER / f"{part.number:06d}.json"


def _holds(identity_path: Path, identity: dict[str, Any]) -> bool:
    return identity_path.exists() and bool(json.loads(identity_path.read_text(encoding="utf-8")) == identity)
