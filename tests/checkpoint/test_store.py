from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gpt.checkpoint import store
from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.manifest import MODEL, OPTIMIZER
from gpt.checkpoint.store import load_checkpoint, read_weights, take_snapshot, verify_and_load
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
    store.write_checkpoint(path, take_snapshot(state, metrics or {}), config_json)


def test_a_state_loads_bit_exactly(tmp_path: Path) -> None:
    saved, loaded = trained_state(scaled=True), make_state(9, scaled=True)
    write_checkpoint(tmp_path / "step", saved, "{}")
    verify_and_load(tmp_path / "step", loaded)
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


def test_loading_without_verification_does_not_read_the_manifest(tmp_path: Path) -> None:
    saved, loaded = trained_state(), make_state(9)
    write_checkpoint(tmp_path / "step", saved, "{}")
    (tmp_path / "step" / "manifest.json").unlink()
    load_checkpoint(tmp_path / "step", loaded)
    assert loaded.progress_json() == saved.progress_json()
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        verify_and_load(tmp_path / "step", loaded)
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        read_weights(tmp_path / "step")


def test_another_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", trained_state(), "{}")
    with pytest.raises(
        UserError, match=r"another architecture: h.0.attn.c_attn.bias has shape \(24,\) in the checkpoint and \(48,\)"
    ):
        verify_and_load(tmp_path / "step", make_state(1, n_embd=16))
