"""Damaged and malicious checkpoints: none is loaded, none of their code runs, none of their paths is followed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, MODEL, PROGRESS, read_checkpoint_manifest, verify
from gpt.checkpoint.store import verify_and_load
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.errors import UserError
from gpt.utils.sealed_json import write_sealed_json
from tests.checkpoint.test_store import make_state, trained_state, write_checkpoint
from tests.checkpoint.test_tensor_file import MALICIOUS
from tests.conftest import read_files

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).resolve().parents[2]


def test_each_of_a_thousand_flipped_bits_is_found(tmp_path: Path) -> None:
    step = tmp_path / "step"
    write_checkpoint(step, trained_state(), '{"seed": 1}', {"val/loss": 1.5})
    files = {path: path.read_bytes() for path in step.iterdir()}
    bits = [(path, bit) for path, content in files.items() for bit in range(8 * len(content))]
    for path, bit in random.Random(0).sample(bits, 1000):
        content = bytearray(files[path])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError) as error_info:
            verify(step)
        assert str(step) in str(error_info.value)
        path.write_bytes(files[path])
    verify(step)


def sign(step: Path) -> None:
    """Recompute every digest, as anyone who can write the files can."""
    manifest = json.loads((step / CHECKPOINT_MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        if (step / name).is_file():
            content = (step / name).read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    write_signed(step, manifest)


def write_signed(step: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    write_sealed_json(step / CHECKPOINT_MANIFEST, manifest)


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        manifest = json.loads((step / CHECKPOINT_MANIFEST).read_text())
        change(manifest)
        write_signed(step, manifest)

    return apply


def replace_text(name: str, text: str, *, signed: bool = True) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        (step / name).write_text(text)
        if signed:
            sign(step)

    return apply


def change_progress(**changes: Any) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        progress = json.loads((step / PROGRESS).read_text())
        (step / PROGRESS).write_text(json.dumps(progress | changes))
        sign(step)

    return apply


def format_former_manifest(digest: str) -> str:
    """Return a manifest of format version 2 with a digest that is already escaped for JSON."""
    return f'{{"format_version": 2, "manifest_sha256": "{digest}"}}'


def replace_by_link(step: Path) -> None:
    (step / MODEL).rename(step.parent / "elsewhere")
    (step / MODEL).symlink_to(step.parent / "elsewhere")


def replace_by_pipe(step: Path) -> None:
    (step / MODEL).unlink()
    os.mkfifo(step / MODEL)


def link_folder(step: Path) -> None:
    step.rename(step.parent / "elsewhere")
    step.symlink_to(step.parent / "elsewhere", target_is_directory=True)


MALICIOUS_CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent path": (change_manifest(lambda m: m["files"].update({"../x": {}})), r"names '\.\./x'"),
    "absolute path": (change_manifest(lambda m: m["files"].update({"/etc/passwd": {}})), "names '/etc/passwd'"),
    "pickle": (change_manifest(lambda m: m["files"].update({"model.pt": {}})), r"names 'model\.pt'"),
    "missing file": (change_manifest(lambda m: m["files"].pop(MODEL)), "does not name 'model.safetensors'"),
    "files as a list": (change_manifest(lambda m: m.update(files=[MODEL])), "does not name"),
    "size as a string": (change_manifest(lambda m: m["files"][MODEL].update(size="1")), "no size and SHA-256"),
    "long digest": (change_manifest(lambda m: m["files"][MODEL].update(sha256="0" * 10**5)), "no size and SHA-256"),
    "version as a string": (change_manifest(lambda m: m.update(format_version="2")), "checkpoint format '2'"),
    "version 0": (change_manifest(lambda m: m.update(format_version=0)), "checkpoint format 0"),
    "version as a list": (change_manifest(lambda m: m.update(format_version=[[[2]]])), "checkpoint format"),
    "deeply nested manifest": (replace_text(CHECKPOINT_MANIFEST, "[" * 10**5, signed=False), "not valid JSON"),
    "long manifest": (replace_text(CHECKPOINT_MANIFEST, " " * 2**21, signed=False), "longer than"),
    "manifest as a list": (replace_text(CHECKPOINT_MANIFEST, "[]", signed=False), "not a JSON object"),
    "lone surrogate": (
        replace_text(CHECKPOINT_MANIFEST, format_former_manifest("\\ud800"), signed=False),
        "damaged: SHA-256",
    ),
    "empty former digest": (
        replace_text(CHECKPOINT_MANIFEST, format_former_manifest(""), signed=False),
        "damaged: SHA-256",
    ),
    "empty digest": (
        replace_text(CHECKPOINT_MANIFEST, '{"format_version": 3, "sha256": ""}', signed=False),
        "damaged",
    ),
    "missing digest": (replace_text(CHECKPOINT_MANIFEST, '{"format_version": 3}', signed=False), "damaged: SHA-256"),
    "former version with the present digest": (
        change_manifest(lambda m: m.update(format_version=1)),
        "had no such digest",
    ),
    "linked file": (replace_by_link, "not a regular file"),
    "linked folder": (link_folder, "symbolic link"),
    "pipe": (replace_by_pipe, "not a regular file"),
    "deeply nested progress": (replace_text(PROGRESS, "[" * 10**5), "not valid JSON"),
    "progress as a list": (replace_text(PROGRESS, "[1]"), "not a JSON object"),
    "negative step": (change_progress(step=-1), "progress is damaged: step is -1"),
    "scaler as a number": (change_progress(scaler=3), "not a checkpoint of this program"),
    "scaler without its scale": (change_progress(scaler={"_growth_tracker": 1}), "not a checkpoint of this program"),
    "observers as a list": (change_progress(observers=[1]), "not a checkpoint of this program"),
}


@pytest.mark.parametrize("case", MALICIOUS_CHANGES)
def test_malicious_checkpoint_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    change, message = MALICIOUS_CHANGES[case]
    write_checkpoint(tmp_path / "step", trained_state(scaled=True), "{}")
    change(tmp_path / "step")
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as error_info:
        verify_and_load(tmp_path / "step", make_state(1, scaled=True))
    assert "\n" not in str(error_info.value)
    assert len(str(error_info.value)) < 600
    assert time.monotonic() - started < 2


def test_metrics_that_are_not_finite_numbers_are_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    metrics = {"a": 10**400, "b": float("nan"), "c": "1", "val/loss": 1.5, "d": 2}
    change_manifest(lambda manifest: manifest.update(metrics=metrics))(tmp_path / "step")
    assert read_checkpoint_manifest(tmp_path / "step").metrics == {"val/loss": 1.5, "d": 2.0}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_tensor_header_with_correct_digests_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    (tmp_path / "step" / MODEL).write_bytes(MALICIOUS[case]())
    sign(tmp_path / "step")
    verify(tmp_path / "step")
    with pytest.raises(UserError, match=r"model\.safetensors: not a valid safetensors file"):
        verify_and_load(tmp_path / "step", make_state(1))


AUDIT_SCRIPT = """
import sys
from pathlib import Path

allowed_folders, violations = tuple(sys.argv[1].split("\\t")), []


def audit(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
                 "socket.connect"):
        violations.append((event, str(arguments)[:200]))
    writes = event == "open" and (arguments[2] or 0) & 3 and isinstance(arguments[0], (str, bytes))
    if writes and not str(arguments[0]).startswith((*allowed_folders, "/dev/null")):
        violations.append((event, str(arguments)[:200]))
    if event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.rmdir"):
        if not str(arguments[0]).startswith(allowed_folders):
            violations.append((event, str(arguments)[:200]))


from gpt.main import main
import gpt.pipeline, gpt.commands.sample, gpt.commands.verify, gpt.commands.train
import torch.optim, torch._dynamo  # before the hook, which would report what torch imports on first use

sys.dont_write_bytecode = True
sys.addaudithook(audit)
status = [main(command.split("\\t")) for command in sys.argv[2:]]
print("STATUS", status)
print("VIOLATIONS", violations)
"""

PICKLE = b"cos\nsystem\n(S'touch %b'\ntR."


def test_malicious_run_folder_runs_no_code_and_writes_nothing_outside(
    finished_run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Use a folder with pickles under every name that other programs load, and with links."""
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(finished_run, run_dir)
    pickle = PICKLE % bytes(marker)
    for folder in (run_dir, *(run_dir / "checkpoints").iterdir()):
        for name in ("model.pt", "optimizer.pt", "pytorch_model.bin", ".metadata", "data.pkl"):
            (folder / name).write_bytes(pickle)
    newest = run_dir / "checkpoints/step_00000008"
    (newest / MODEL).write_bytes(pickle)
    sign(newest)
    older = run_dir / "checkpoints/step_00000004"
    (run_dir / "checkpoints/step_00000006").symlink_to(tmp_path, target_is_directory=True)
    commands = [
        ["verify", str(run_dir)],
        ["sample", str(newest), "--device", "cpu"],
        ["sample", str(older), "--device", "cpu", "--max-new-tokens", "4"],
        ["train", "--config", str(run_dir / "config.json"), "--run-dir", str(run_dir), "--max-steps", "9"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", AUDIT_SCRIPT, f"{tmp_path}\t{cache_dir}", *("\t".join(command) for command in commands)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert "STATUS [1, 2, 0, " in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "VIOLATIONS []"
    assert not marker.exists()
    assert set(read_files(tmp_path)) - set(read_files(run_dir)) <= {f"run/{name}" for name in read_files(run_dir)}


def test_tokenizer_with_an_exponential_regular_expression_is_stopped() -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = json.loads(build_byte_tokenizer().definition)
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tokenizer = Tokenizer(json.dumps(definition))
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        started = time.monotonic()
        with pytest.raises(UserError, match="the tokenizer cannot encode the text: ") as error_info:
            encode("a" * 60 + "b")
        assert time.monotonic() - started < 2
        assert "\n" not in str(error_info.value)
