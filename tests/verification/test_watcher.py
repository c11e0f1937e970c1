import json
from pathlib import Path

from gpt.checkpoint.run_folder import RunFolder
from gpt.verification.watcher import RunStatus, RunWatcher


def append_records(path: Path, *records: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def test_watcher_reads_metrics_from_the_start_of_its_own_launch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert RunWatcher(folder).read_status() == RunStatus(False, 0, 0, False, 0)
    append_records(folder.lineage, {"step": 0})
    append_records(
        folder.metrics, {"step": 4, "train/loss": 1.0}, {"step": 4, "val/loss": 1.0}, {"step": 5, "train/loss": 1.0}
    )
    (tmp_path / "checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000006.damaged").mkdir()
    watcher = RunWatcher(folder)
    assert watcher.read_status() == RunStatus(False, 0, 0, False, 4)
    replacement = tmp_path / "replacement"
    append_records(replacement, {"step": 4, "train/loss": 1.0}, {"step": 4, "val/loss": 1.0})
    replacement.replace(folder.metrics)
    append_records(folder.lineage, {"step": 4})
    (tmp_path / "checkpoints/.step_00000008.tmp").mkdir()
    assert watcher.read_status() == RunStatus(True, 4, 4, True, 4)
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "train/loss": 1.0}\n{"step": 6, "tra')
        file.flush()
        assert watcher.read_status().step == 5
        file.write('in/loss": 1.0}\n')
    assert watcher.read_status().step == 6
