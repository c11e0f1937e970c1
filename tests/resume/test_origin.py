import json
import shutil
from pathlib import Path

from gpt.checkpoint.run_folder import RunFolder
from gpt.resume.origin import find_origin
from gpt.utils.helper import sha256_of_file


def write_lineage(folder: RunFolder, *digests: str | None) -> RunFolder:
    folder.path.mkdir()
    folder.lineage.write_text("".join(json.dumps({"manifest_sha256": digest}) + "\n" for digest in digests))
    return folder


def test_origin_is_found_by_the_digest_of_its_manifest(finished_run: Path, tmp_path: Path) -> None:
    first, last = (RunFolder(finished_run).checkpoint_path(step) for step in (4, 8))
    folder = write_lineage(RunFolder(tmp_path / "fork"), sha256_of_file(first / "manifest.json"))
    moved = Path(shutil.copytree(finished_run, tmp_path / "moved"))
    assert find_origin(folder, finished_run) == first
    assert find_origin(folder, moved) == RunFolder(moved).checkpoint_path(4)
    assert find_origin(folder, RunFolder(moved).checkpoint_path(4)) == RunFolder(moved).checkpoint_path(4)
    assert find_origin(folder, last) is None
    assert find_origin(folder, tmp_path / "none") is None


def test_only_the_first_launch_has_the_origin(finished_run: Path, tmp_path: Path) -> None:
    digest = sha256_of_file(RunFolder(finished_run).checkpoint_path(8) / "manifest.json")
    folder = write_lineage(RunFolder(tmp_path / "run"), None, digest)
    assert find_origin(folder, finished_run) is None
    folder.lineage.unlink()
    assert find_origin(folder, finished_run) is None
