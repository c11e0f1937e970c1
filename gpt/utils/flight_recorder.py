"""NCCL's flight recorder: the last collectives of each rank, written to a file when a run hangs."""

import contextlib
import tempfile
from pathlib import Path

from torch._C import _distributed_c10d as c10d

from gpt.utils import launch

RECORD_PREFIX = "flight_recorder_rank_"
DUMP_FUNCTIONS = ("_dump_nccl_trace", "_dump_fr_trace")
"""Functions of torch that return the record: that of builds with CUDA, and that of others."""


class FlightRecorder:
    """Lets torch record the collectives of this rank; built before the NCCL group.

    torch writes the files itself where NCCL times out; `torchfrtrace` reads them.

    Args:
        folder: folder for the files; None: that of temporary files.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int):
        prefix = (folder or Path(tempfile.gettempdir())).absolute() / RECORD_PREFIX
        self._prefix, self._rank = launch.record_collectives(str(prefix)), rank

    @property
    def note(self) -> str:
        """Part of a message that names the files."""
        return f"; {self._prefix}* hold the last collectives of each rank"

    def write(self) -> None:
        """Write this rank's file, as far as torch and the disk allow it: the rank must end in any case."""
        dump = next((getattr(c10d, name) for name in DUMP_FUNCTIONS if hasattr(c10d, name)), None)
        if dump is not None:
            with contextlib.suppress(OSError, RuntimeError):
                Path(f"{self._prefix}{self._rank}").write_bytes(dump())
