"""Bit-exactness: resuming, observers and seeds."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import Event
from gpt.training.observer import Probe, Sink
from tests.conftest import LossRecorder

Configure = Callable[..., TrainConfig]
Record = Callable[..., tuple[list[float], dict[str, torch.Tensor]]]


class RandomSink(Sink):
    """Uses torch's global generator, as a plot with jitter might."""

    def __init__(self) -> None:
        self.written: list[Event] = []

    def write(self, event: Event) -> None:
        torch.manual_seed(event.step)
        self.written.append(event)


class RandomProbe(Probe):
    """Measures on a random subset of the weights."""

    measured = 0

    def measure(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        self.measured += 1
        weight = parameters["wte.weight"]
        return {"dropped_norm": (weight * torch.rand_like(weight)).norm()}


def read_losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def is_bit_exact(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_of_2n_steps_equals_a_run_of_n_steps_resumed_for_n_more(
    tiny: Configure, record: Record, tmp_path: Path, dtype: str
) -> None:
    settings = {"dtype": dtype, "model": {"dropout": 0.2}, "checkpoint": {"interval": 3}}
    expected_losses, expected_weights = record(tiny(tmp_path / "uninterrupted", max_steps=12, **settings))
    first, _ = record(tiny(tmp_path / "resumed", max_steps=6, **settings))
    second, weights = record(tiny(tmp_path / "resumed", max_steps=12, **settings))
    assert first + second == expected_losses
    assert is_bit_exact(weights, expected_weights)
    assert read_losses(tmp_path / "uninterrupted") == read_losses(tmp_path / "resumed")
    finals = [(tmp_path / name / "checkpoints/step_00000012") for name in ("uninterrupted", "resumed")]
    for file in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        assert (finals[0] / file).read_bytes() == (finals[1] / file).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_with_muon_is_bit_exact(tiny: Configure, record: Record, tmp_path: Path, dtype: str) -> None:
    model = {"position": "rotary", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True, "logit_softcap": 15}
    settings = {"dtype": dtype, "model": model, "optimizer": {"name": "muon"}, "eval": {"interval": 0}}
    expected_losses, expected_weights = record(tiny(tmp_path / "uninterrupted", max_steps=6, **settings))
    first, _ = record(tiny(tmp_path / "resumed", max_steps=3, **settings))
    second, weights = record(tiny(tmp_path / "resumed", max_steps=6, **settings))
    assert first + second == expected_losses
    assert is_bit_exact(weights, expected_weights)
    finals = [(tmp_path / name / "checkpoints/step_00000006") for name in ("uninterrupted", "resumed")]
    for file in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        assert (finals[0] / file).read_bytes() == (finals[1] / file).read_bytes()


def test_resume_with_several_threads_is_bit_exact(tiny: Configure, record: Record, tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 2, "block_size": 64}
    settings = {"model": sizes, "micro_batch_size": 8, "tokens_per_step": 512, "eval": {"interval": 0}}
    torch.set_num_threads(2)
    try:
        expected_losses, expected_weights = record(tiny(tmp_path / "uninterrupted", max_steps=6, **settings))
        first, _ = record(tiny(tmp_path / "resumed", max_steps=3, **settings))
        second, weights = record(tiny(tmp_path / "resumed", max_steps=6, **settings))
    finally:
        torch.set_num_threads(1)
    assert first + second == expected_losses
    assert is_bit_exact(weights, expected_weights)


def test_resume_after_an_interrupt_is_bit_exact(tiny: Configure, record: Record, tmp_path: Path) -> None:
    class Interrupter(LossRecorder):
        def on_event(self, event: object) -> tuple[()]:
            if getattr(event, "losses", None) and event.step == 8:  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            return ()

    expected_losses, expected_weights = record(
        tiny(tmp_path / "uninterrupted", max_steps=10, checkpoint={"interval": 3})
    )
    config = tiny(tmp_path / "interrupted", max_steps=10, checkpoint={"interval": 3})
    with pytest.raises(KeyboardInterrupt):
        record(config, Interrupter())
    losses, weights = record(config)
    assert losses == expected_losses[6:]
    assert is_bit_exact(weights, expected_weights)
    assert read_losses(tmp_path / "interrupted") == read_losses(tmp_path / "uninterrupted")


def test_observers_sinks_and_probes_change_no_bit(tiny: Configure, record: Record, tmp_path: Path) -> None:
    settings = {"model": {"dropout": 0.2}, "max_steps": 6}
    often = {"eval": {"interval": 1, "batches": 0}, "checkpoint": {"interval": 1, "every_minutes": 1e-4}}
    log = {"interval": 1, "grad_norms": True}
    busy = tiny(tmp_path / "busy", profile={"start": 2, "steps": 3}, log=log, **often, **settings)
    sink, probe = RandomSink(), RandomProbe()
    watched, watched_weights = record(busy, LossRecorder(), LossRecorder(), sink, probe)
    assert len(sink.written) > 6 * 4
    assert probe.measured == 6
    assert (tmp_path / "busy" / "trace.json").exists()
    bare = build_trainer(open_run(tiny(tmp_path / "bare", log={"interval": 5}, eval={"interval": 0}, **settings)))
    for observer in tuple(bare._observers):
        bare.detach(observer)
        observer.close(None)
    for guarded in tuple(bare._logger._sinks):
        bare.detach(guarded.sink)
    assert not bare._probes
    recorder = LossRecorder()
    bare.attach(recorder)
    bare.train()
    assert recorder.losses == watched
    assert is_bit_exact(bare._state.model.state_dict(), watched_weights)


def test_micro_batch_size_changes_only_rounding(tiny: Configure, record: Record, tmp_path: Path) -> None:
    few, few_weights = record(tiny(tmp_path / "few", micro_batch_size=8, lr={"max_lr": 1e-3, "min_lr": 0}))
    many, many_weights = record(tiny(tmp_path / "many", micro_batch_size=1, lr={"max_lr": 1e-3, "min_lr": 0}))
    assert few == pytest.approx(many, abs=1e-6)
    for name, weight in few_weights.items():
        torch.testing.assert_close(weight, many_weights[name], atol=1e-4, rtol=0)


def test_seed_determines_the_losses(tiny: Configure, record: Record, tmp_path: Path) -> None:
    runs = [record(tiny(tmp_path / str(i), seed=seed, max_steps=3))[0] for i, seed in enumerate((1, 1, 2))]
    assert runs[0] == runs[1] != runs[2]


def test_training_and_resuming_use_no_pickle(
    tiny: Configure, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, forbidden)
    record(tiny(tmp_path, max_steps=2))
    losses, _ = record(tiny(tmp_path, max_steps=4))
    assert len(losses) == 2
