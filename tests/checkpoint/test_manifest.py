import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manifest import (
    CHECKPOINT_FORMAT_VERSION,
    CHECKPOINT_MANIFEST,
    MODEL,
    NewerFormatError,
    environment_mismatch,
    read_checkpoint_manifest,
    verify,
)
from gpt.checkpoint.store import verify_and_load
from gpt.errors import UserError
from gpt.machine.arithmetic_check import SUSPECTS, digest_matmuls, read_variables
from gpt.ops import attention_cpu
from gpt.utils.helper import sha256_of_file
from tests.checkpoint.test_store import make_state, trained_state, write_checkpoint


def test_verify_returns_the_manifest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}", {"val/loss": 1.5})
    manifest = verify(tmp_path / "step")
    assert manifest == read_checkpoint_manifest(tmp_path / "step")
    assert (manifest.format_version, manifest.metrics) == (CHECKPOINT_FORMAT_VERSION, {"val/loss": 1.5})
    assert manifest.sha256 == sha256_of_file(tmp_path / "step" / CHECKPOINT_MANIFEST)
    for name, record in manifest.files.items():
        file = tmp_path / "step" / name
        assert (record.size, record.sha256) == (file.stat().st_size, sha256_of_file(file))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "config.json"])
def test_verify_finds_a_flipped_bit_in_every_file(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    path = tmp_path / "step" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: damaged: SHA-256 [0-9a-f]+ instead of [0-9a-f]+; delete"):
        verify(tmp_path / "step")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _make_newer(path: Path) -> None:
    path.write_text(json.dumps({"format_version": 99, "files": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (MODEL, Path.unlink, "missing from the checkpoint"),
        (MODEL, _truncate, r"model.safetensors: damaged: \d+ bytes instead of \d+"),
        (CHECKPOINT_MANIFEST, Path.unlink, "No such file"),
        (CHECKPOINT_MANIFEST, _truncate, "damaged: it does not end with its digest"),
        (CHECKPOINT_MANIFEST, _halve, "damaged: not valid JSON"),
        (
            CHECKPOINT_MANIFEST,
            _make_newer,
            "checkpoint format 99, but this version reads formats 1 to 3; use a newer gpt-training-pipeline",
        ),
    ],
)
def test_verify_names_a_missing_truncated_or_newer_file(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    damage(tmp_path / "step" / name)
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "step")


def test_a_manifest_that_names_no_files_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    for content in ({}, {"format_version": 1}, {"format_version": 1, "files": []}, {"format_version": 1, "files": {}}):
        (tmp_path / "step" / CHECKPOINT_MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"checkpoint format 'unknown'|damaged: it does not name 'config.json'"):
            verify(tmp_path / "step")


def test_the_manifest_records_environment_identity_and_finite_metrics(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}", {"val/loss": 1.5, "broken": float("nan")})
    content = json.loads((tmp_path / "step" / CHECKPOINT_MANIFEST).read_text())
    assert content["environment"] == {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_attention": attention_cpu.is_enabled(),
        "matmuls": digest_matmuls(),
        "variables": ", ".join(f"{name}={value}" for name, value in read_variables(SUSPECTS).items()),
        "world_size": 1,
    }
    assert content["identity"] == {"the corpus's SHA-256": "a"}
    assert content["metrics"] == read_checkpoint_manifest(tmp_path / "step").metrics == {"val/loss": 1.5}


def test_environment_mismatch_is_reported_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    manifest = read_checkpoint_manifest(tmp_path / "step")
    assert environment_mismatch(tmp_path / "step", manifest) is None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        mismatch = environment_mismatch(tmp_path / "step", manifest)
    finally:
        torch.set_num_threads(threads)
    assert mismatch == f"not bit-exact: step was written with threads per process {threads} (now {threads + 1})"


def test_another_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    manifest = read_checkpoint_manifest(tmp_path / "step")
    assert environment_mismatch(tmp_path / "step", manifest) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert environment_mismatch(tmp_path / "step", manifest) == (
        "not bit-exact: step was written with GPU 'NVIDIA H100, capability 9.0' (now 'NVIDIA A100, capability 8.0')"
    )
    monkeypatch.undo()
    mismatch = environment_mismatch(tmp_path / "step", manifest)
    assert mismatch is not None
    assert "GPU 'NVIDIA H100, capability 9.0' (now None)" in mismatch


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL has no such variable")
@pytest.mark.parametrize(("name", "value"), [("ONEDNN_MAX_CPU_ISA", "SSE41"), ("MKL_CBWR", "COMPATIBLE")])
def test_variable_that_changes_the_bits_of_matmuls_is_reported(name: str, value: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    script = (
        "import sys, torch; from pathlib import Path; from gpt.checkpoint import manifest; "
        "torch.set_num_threads(int(sys.argv[2])); step = Path(sys.argv[1]); "
        "print(manifest.environment_mismatch(step, manifest.read_checkpoint_manifest(step)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "step"), str(torch.get_num_threads())]

    def mismatch(**variables: str) -> str:
        return subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]

    reported = mismatch(**{name: value})
    assert reported.startswith("not bit-exact: step was written with ")
    assert "the bits of matmuls" in reported and f"{name}={value}" in reported
    assert "the bits of matmuls" not in mismatch()


def test_manifest_without_the_digest_of_matmuls_is_not_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    manifest = read_checkpoint_manifest(tmp_path / "step")
    for name in ("matmuls", "variables"):
        del manifest.environment[name]
    assert environment_mismatch(tmp_path / "step", manifest) is None


def as_version_1(content: dict[str, Any]) -> str:
    """Return a manifest as version 1 of the format wrote it."""
    return json.dumps({"format_version": 1, "files": content["files"]}, indent=2)


def as_version_2(content: dict[str, Any]) -> str:
    """Return a manifest as version 2 of the format wrote it: its digest was taken with zeros in the digest's place."""
    content = {name: value for name, value in content.items() if name != "sha256"} | {"format_version": 2}
    blank = json.dumps(content | {"manifest_sha256": "0" * 64}, indent=2)
    return json.dumps(content | {"manifest_sha256": hashlib.sha256(blank.encode()).hexdigest()}, indent=2)


def write_legacy_checkpoint(path: Path, encode: Callable[[dict[str, Any]], str]) -> AppState:
    """Write a checkpoint with the manifest of an older version, and return its state."""
    state = trained_state()
    write_checkpoint(path, state, "{}", {"val/loss": 1.5})
    manifest = path / CHECKPOINT_MANIFEST
    manifest.write_text(encode(json.loads(manifest.read_text())))
    return state


@pytest.mark.parametrize(
    ("encode", "version", "metrics"), [(as_version_1, 1, {}), (as_version_2, 2, {"val/loss": 1.5})]
)
def test_older_formats_load_bit_exactly(
    tmp_path: Path, encode: Callable[[dict[str, Any]], str], version: int, metrics: dict[str, float]
) -> None:
    saved, loaded = write_legacy_checkpoint(tmp_path / "step", encode), make_state(9)
    manifest = verify(tmp_path / "step")
    assert (manifest.format_version, manifest.metrics) == (version, metrics)
    verify_and_load(tmp_path / "step", loaded)
    for ours, theirs in zip(saved.model_tensors().values(), loaded.model_tensors().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.progress_json() == saved.progress_json()
    assert environment_mismatch(tmp_path / "step", manifest) is None


def test_damaged_version_2_is_refused_with_both_digests(tmp_path: Path) -> None:
    write_legacy_checkpoint(tmp_path / "step", as_version_2)
    file = tmp_path / "step" / CHECKPOINT_MANIFEST
    expected = json.loads(file.read_text())["manifest_sha256"]
    file.write_text(file.read_text().replace('"val/loss": 1.5', '"val/loss": 0.5'))
    found = hashlib.sha256(file.read_text().replace(expected, "0" * 64).encode()).hexdigest()
    with pytest.raises(UserError, match=f"{file}: damaged: SHA-256 {found} instead of '{expected}'; delete"):
        verify(tmp_path / "step")


def test_version_2_without_its_digest_is_refused(tmp_path: Path) -> None:
    write_legacy_checkpoint(tmp_path / "step", as_version_1)
    file = tmp_path / "step" / CHECKPOINT_MANIFEST
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="damaged: it lacks its own digest, manifest_sha256"):
        verify(tmp_path / "step")


@pytest.mark.parametrize("encode", [as_version_2, lambda content: json.dumps(content | {"format_version": 2})])
def test_a_digest_of_another_version_is_refused(tmp_path: Path, encode: Callable[[dict[str, Any]], str]) -> None:
    write_legacy_checkpoint(tmp_path / "step", encode)
    file = tmp_path / "step" / CHECKPOINT_MANIFEST
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(UserError, match="damaged: format_version 1 had no such digest"):
        verify(tmp_path / "step")


def test_a_newer_format_is_not_damage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    (tmp_path / "step" / CHECKPOINT_MANIFEST).write_text(json.dumps({"format_version": CHECKPOINT_FORMAT_VERSION + 1}))
    with pytest.raises(NewerFormatError, match="use a newer gpt-training-pipeline"):
        verify(tmp_path / "step")


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path, bit: int) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}", {"val/loss": 1.5})
    path = tmp_path / "step" / CHECKPOINT_MANIFEST
    valid = path.read_bytes()
    for at in range(len(valid)):
        path.write_bytes(valid[:at] + bytes([valid[at] ^ 1 << bit]) + valid[at + 1 :])
        with pytest.raises(UserError, match=r"manifest\.json: (damaged|not valid JSON)|checkpoint format"):
            read_checkpoint_manifest(tmp_path / "step")
