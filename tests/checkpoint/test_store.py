import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gpt.checkpoint import store
from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.store import (
    CHECKPOINT_MANIFEST,
    MODEL,
    OPTIMIZER,
    environment_mismatch,
    read_checkpoint,
    read_weights,
    snapshot_of,
    verify,
)
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.errors import UserError
from gpt.models.gpt import GPT
from gpt.ops import attention_cpu
from gpt.optim.build import build_optimizer


def make_state(seed: int, n_embd: int = 8, *, scaled: bool = False) -> AppState:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=n_embd, block_size=4, vocab_size=11), seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(), max_lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**seed)
    return AppState(model, optimizer, scaler, torch.tensor(seed), {"the corpus's SHA-256": "a"})


def trained_state(seed: int = 3, n_embd: int = 8, *, scaled: bool = False) -> AppState:
    state = make_state(seed, n_embd, scaled=scaled)
    for _ in range(2):
        tokens = torch.randint(11, (2, 4))
        state.scaler.scale(state.model(tokens, tokens)).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.progress = Progress(2, 16)
    return state


def write_checkpoint(path: Path, state: AppState, config_json: str, metrics: dict[str, float] | None = None) -> None:
    store.write_checkpoint(path, snapshot_of(state, metrics or {}), config_json)


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved, loaded = trained_state(scaled=True), make_state(9, scaled=True)
    write_checkpoint(tmp_path / "step", saved, "{}")
    read_checkpoint(tmp_path / "step", loaded)
    for ours, theirs in (
        (saved.model_tensors(), loaded.model_tensors()),
        (saved.optimizer_tensors(), loaded.optimizer_tensors()),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.progress_json() == saved.progress_json()
    assert loaded.progress == Progress(2, 16)
    assert (int(loaded.skipped_updates), loaded.scaler.get_scale()) == (3, saved.scaler.get_scale())


def test_files_are_safetensors_and_json_with_canonical_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), '{"seed": 1}')
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json",
    ]  # fmt: skip
    with safe_open(tmp_path / "step" / MODEL, "pt") as file:
        assert "h.0.attn.c_attn.weight" in file.keys()  # noqa: SIM118
    with safe_open(tmp_path / "step" / OPTIMIZER, "pt") as file:
        assert {"wte.weight.exp_avg", "wte.weight.exp_avg_sq", "wte.weight.step"} <= set(file.keys())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "config.json"])
def test_a_flipped_bit_is_found_in_every_file(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    path = tmp_path / "step" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: damaged: SHA-256 [0-9a-f]+ instead of [0-9a-f]+; delete"):
        verify(tmp_path / "step")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _newer(path: Path) -> None:
    path.write_text(json.dumps({"format_version": 99, "files": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (MODEL, Path.unlink, "missing from the checkpoint"),
        (MODEL, _cut, r"model.safetensors: damaged: \d+ bytes instead of \d+"),
        (CHECKPOINT_MANIFEST, Path.unlink, "No such file"),
        (CHECKPOINT_MANIFEST, _cut, "not valid JSON"),
        (CHECKPOINT_MANIFEST, _newer, "checkpoint format 99; this version reads formats 1 to 2, a newer one"),
    ],
)
def test_a_missing_cut_or_newer_file_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    damage(tmp_path / "step" / name)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "step")


def test_another_architecture_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    with pytest.raises(
        UserError, match=r"another architecture: h.0.attn.c_attn.bias has shape \(24,\) there and \(48,\)"
    ):
        read_checkpoint(tmp_path / "step", make_state(1, n_embd=16))


def test_a_manifest_that_names_no_files_vouches_for_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    for content in ({}, {"format_version": 1}, {"format_version": 1, "files": []}, {"format_version": 1, "files": {}}):
        (tmp_path / "step" / CHECKPOINT_MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"checkpoint format 'unknown'|damaged: it does not name 'config.json'"):
            verify(tmp_path / "step")


def test_the_manifest_says_what_the_bits_depend_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}", {"val/loss": 1.5, "broken": float("nan")})
    content = json.loads((tmp_path / "step" / CHECKPOINT_MANIFEST).read_text())
    assert content["environment"] == {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_attention": attention_cpu.in_use(),
        "world_size": 1,
    }
    assert content["identity"] == {"the corpus's SHA-256": "a"}
    assert content["metrics"] == store.read_checkpoint_manifest(tmp_path / "step").metrics == {"val/loss": 1.5}


def test_another_machine_is_told_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    assert environment_mismatch(tmp_path / "step") is None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        told = environment_mismatch(tmp_path / "step")
    finally:
        torch.set_num_threads(threads)
    assert told == f"not bitwise: step was written with threads per process {threads} there and {threads + 1} here"


def as_format_1(path: Path) -> None:
    """Make of a checkpoint what version 1 of the format wrote."""
    files = json.loads((path / CHECKPOINT_MANIFEST).read_text())["files"]
    (path / CHECKPOINT_MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}, indent=2))


def test_the_older_format_loads_to_the_bit(tmp_path: Path) -> None:
    saved, loaded = trained_state(), make_state(9)
    write_checkpoint(tmp_path / "step", saved, "{}")
    as_format_1(tmp_path / "step")
    read_checkpoint(tmp_path / "step", loaded)
    for ours, theirs in zip(saved.model_tensors().values(), loaded.model_tensors().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.progress_json() == saved.progress_json()
    assert environment_mismatch(tmp_path / "step") is None


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path, bit: int) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}", {"val/loss": 1.5})
    path = tmp_path / "step" / CHECKPOINT_MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"manifest\.json: (damaged|not valid JSON)|checkpoint format"):
            store.read_checkpoint_manifest(tmp_path / "step")
