import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, read_checkpoint, read_weights, verify, write_checkpoint
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.errors import UserError
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer


def make_state(seed: int, n_embd: int = 8, *, scaled: bool = False) -> AppState:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=n_embd, block_size=4, vocab_size=11), seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(), max_lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**seed)
    return AppState(model, optimizer, scaler, torch.tensor(seed), {"the corpus's SHA-256": "a"})


def trained_state(seed: int = 3, *, scaled: bool = False) -> AppState:
    state = make_state(seed, scaled=scaled)
    for _ in range(2):
        tokens = torch.randint(11, (2, 4))
        state.scaler.scale(state.model(tokens, tokens)).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.progress = Progress(2, 16)
    return state


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
        (MODEL, _cut, "damaged"),
        (MANIFEST, Path.unlink, "No such file"),
        (MANIFEST, _cut, "not valid JSON"),
        (MANIFEST, _newer, "checkpoint format 99; this version reads format 1"),
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
        (tmp_path / "step" / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"checkpoint format unknown|damaged: .* instead of None"):
            verify(tmp_path / "step")
