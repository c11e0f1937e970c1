import os
import signal
from pathlib import Path

import pytest

from gpt.verification.processes import launcher_for


def test_signal_to_a_process_that_ends_at_the_same_time_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nothing ever writes to it
    process = launcher_for(1)(["train", "--config", str(pipe)], tmp_path / "log")

    def end_then_look_up(pid: int) -> int:
        process.kill()
        raise ProcessLookupError

    monkeypatch.setattr(os, "getpgid", end_then_look_up)
    process.stop(signal.SIGTERM)
    assert process.poll() == -signal.SIGKILL
    assert not process.was_stopped
