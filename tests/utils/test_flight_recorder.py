import os
from pathlib import Path

import pytest

from gpt.utils import flight_recorder
from gpt.utils.flight_recorder import RECORD_PREFIX, FlightRecorder
from gpt.utils.launch import record_collectives

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_recorder_is_on_and_its_files_are_in_the_folder(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, 3)
    prefix = str(tmp_path / RECORD_PREFIX)
    assert [os.environ[name] for name in NAMES] == ["2000", prefix, prefix, "1"]
    assert recorder.note == f"; {prefix}* hold the last collectives of each rank"
    recorder.write()
    assert (tmp_path / f"{RECORD_PREFIX}3").read_bytes().startswith(b"\x80")


def test_settings_of_the_user_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/elsewhere/r")
    assert record_collectives(str(tmp_path)) == "/elsewhere/r"
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"


def test_record_that_cannot_be_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FlightRecorder(tmp_path / "absent", 0).write()
    monkeypatch.setattr(flight_recorder, "DUMP_FUNCTIONS", ())
    FlightRecorder(tmp_path, 0).write()
    assert list(tmp_path.iterdir()) == []
