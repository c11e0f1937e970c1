import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from gpt import pipeline
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import (
    CheckpointSaved,
    Command,
    EvalEnd,
    Event,
    MetricsReady,
    RollBack,
    RolledBack,
    Save,
    StepEnd,
    Stop,
    TextSampled,
    TrainEnd,
    TrainStart,
)
from gpt.training.observer import Observer, Sink
from gpt.training.train_step import TrainStep
from tests.conftest import LossRecorder

Configure = Callable[..., TrainConfig]


class Commanding(LossRecorder):
    """Returns commands after a step, once."""

    def __init__(self, step: int, *commands: Command):
        super().__init__()
        self.step, self.commands = step, commands

    def on_event(self, event: Event) -> Iterable[Command]:  # type: ignore[override]
        super().on_event(event)
        if not (isinstance(event, StepEnd) and event.step == self.step):
            return ()
        commands, self.commands = self.commands, ()
        return commands


def list_committed(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_events_come_in_the_documented_order(tiny: Configure, tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = build_trainer(open_run(tiny(tmp_path, max_steps=2, eval={"interval": 0})))
    trainer.attach(recorder)
    assert trainer.train() == "finished"
    kinds = [type(event) for event in recorder.events]
    one_step = [MetricsReady, StepEnd]
    end = [EvalEnd, TextSampled, CheckpointSaved, TrainEnd, type(None)]
    assert kinds == [TrainStart, *one_step, *one_step, *end]
    assert [event.step for event in recorder.events[:-1]] == [0, 1, 1, 2, 2, 2, 2, 2, 2]  # type: ignore[attr-defined]
    assert recorder.events[4].tokens_seen == 256  # type: ignore[attr-defined]


def test_metrics_file_has_the_documented_keys(finished_run: Path) -> None:
    records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    evaluations = [record for record in records if "val/loss" in record]
    assert [record["step"] for record in train] == list(range(1, 9))
    assert [record["step"] for record in evaluations] == [4, 8]
    assert set(train[0]) == {
        "step",
        "time",
        "tokens",
        "epoch",
        "flops",
        "train/loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    }
    assert set(evaluations[0]) == {"step", "val/loss", "val/perplexity", "val/bpb"}
    assert [record["tokens"] for record in train] == [128 * step for step in range(1, 9)]
    assert [record["flops"] for record in train] == [train[0]["flops"] * step for step in range(1, 9)]
    assert [record["epoch"] for record in train] == pytest.approx([train[0]["epoch"] * step for step in range(1, 9)])
    assert 0 < train[0]["time"] <= train[-1]["time"] <= time.time()
    assert [record["lr"] for record in train][:2] == [0.005, 0.01]
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.3


def test_run_folder_has_the_documented_files(finished_run: Path) -> None:
    names = sorted(path.name for path in finished_run.iterdir())
    assert names == [
        ".lock",
        "checkpoints",
        "config.json",
        "environment.json",
        "lineage.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
    ]
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(4, "the"), (8, "the")]


def test_stop_saves_and_ends(tiny: Configure, tmp_path: Path) -> None:
    trainer = build_trainer(open_run(tiny(tmp_path)))
    trainer.attach(Commanding(3, Stop("enough")))
    assert trainer.train() == "enough"
    assert list_committed(tmp_path) == ["step_00000003"]


def test_stop_reports_the_remaining_steps(tiny: Configure, tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = build_trainer(open_run(tiny(tmp_path, log={"interval": 100})))
    trainer.attach(Commanding(3, Stop("enough")))
    trainer.attach(recorder)
    trainer.train()
    assert len(recorder.losses) == 3
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_save_writes_a_checkpoint_and_training_continues(tiny: Configure, tmp_path: Path) -> None:
    trainer = build_trainer(open_run(tiny(tmp_path)))
    trainer.attach(Commanding(3, Save()))
    assert trainer.train() == "finished"
    assert list_committed(tmp_path) == ["step_00000003", "step_00000008"]


def test_error_is_passed_to_every_observer_and_raised(tiny: Configure, tmp_path: Path) -> None:
    class Failing(LossRecorder):
        def on_event(self, event: Event) -> tuple[()]:
            if isinstance(event, StepEnd):
                raise RuntimeError("broken")
            return ()

        def close(self, error: BaseException | None) -> None:
            super().close(error)
            raise OSError("cannot close")

    recorder, failing = LossRecorder(), Failing()
    trainer = build_trainer(open_run(tiny(tmp_path)))
    trainer.attach(recorder)
    trainer.attach(failing)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert isinstance(recorder.events[-1], RuntimeError)
    assert isinstance(failing.events[-1], RuntimeError)
    assert not [event for event in recorder.events if isinstance(event, TrainEnd)]


@pytest.mark.parametrize("kind", [CheckpointSaved, RolledBack])
def test_observer_may_stop_the_run_during_a_rollback(kind: type[Event], tiny: Configure, tmp_path: Path) -> None:
    class Stopping(Observer):
        def on_event(self, event: Event) -> Iterable[Command]:
            return [Stop("enough")] if isinstance(event, kind) else ()

    trainer = build_trainer(open_run(tiny(tmp_path, checkpoint={"interval": 4})))
    trainer.attach(Commanding(5, RollBack("bad", {5: "spike"})))  # the checkpoint of step 4 is announced by then
    trainer.attach(Stopping())
    assert trainer.train() == "enough"
    assert trainer._step == 4
    assert list_committed(tmp_path) == ["step_00000004"]


def test_float16_counts_skipped_updates_apart_from_steps(tiny: Configure, tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = build_trainer(open_run(tiny(tmp_path, dtype="float16", max_steps=2)))
    trainer._state.scaler.load_state_dict(trainer._state.scaler.state_dict() | {"scale": 2.0**120})
    trainer.attach(recorder)
    trainer.train()
    reports = [event for event in recorder.events if isinstance(event, MetricsReady)]
    assert [(report.step, report.metrics["skipped_updates"]) for report in reports] == [(1, 1), (2, 2)]
    progress = json.loads((tmp_path / "checkpoints/step_00000002/progress.json").read_text())
    assert (progress["step"], progress["skipped_updates"]) == (2, 2)


def test_bfloat16_trains(tiny: Configure, record: Callable[..., tuple[list[float], object]], tmp_path: Path) -> None:
    float32, _ = record(tiny(tmp_path / "32"))
    bfloat16, _ = record(tiny(tmp_path / "16", dtype="bfloat16"))
    assert bfloat16 != float32
    assert bfloat16 == pytest.approx(float32, abs=0.05)


def test_rounded_residual_stream_changes_losses_by_rounding_and_loads_in_float32(
    tiny: Callable[..., TrainConfig],
    record: Callable[..., tuple[list[float], dict[str, torch.Tensor]]],
    tmp_path: Path,
) -> None:
    exact, _ = record(tiny(tmp_path / "exact", dtype="bfloat16"))
    rounded, weights = record(tiny(tmp_path / "rounded", dtype="bfloat16", residual_dtype="compute"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_compiled_run_equals_the_eager_run_and_compiles_before_its_first_step(
    tiny: Callable[..., TrainConfig],
    record: Callable[..., tuple[list[float], dict[str, torch.Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_steps": 3, "model": {"n_layer": 1}, "eval": {"interval": 2, "batches": 1}}
    plain, _ = record(tiny(tmp_path / "plain", **settings))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    order: list[str] = []
    trial, step = pipeline.compile_or_fall_back, TrainStep.__call__
    monkeypatch.setattr(pipeline, "compile_or_fall_back", lambda *args: (order.append("trial"), trial(*args))[1])
    monkeypatch.setattr(pipeline, "reset_peak_memory", lambda device: order.append("reset"))
    monkeypatch.setattr(TrainStep, "__call__", lambda *args: (order.append("step"), step(*args))[1])
    compiled, weights = record(tiny(tmp_path / "compiled", compile="on", **settings))
    assert order == ["trial", "reset", "step", "step", "step"]  # the trial's peak of memory is not the run's
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert not [name for name in weights if "_orig_mod" in name]
    # A block and the loss, in training and in evaluation: the trial's graphs, and no others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


class RaisingSink(Sink):
    """Fails to write the report of step 3."""

    events = (MetricsReady,)

    def __init__(self) -> None:
        self.released = threading.Event()

    def write(self, event: Event) -> None:
        torch.rand(1000)
        if event.step == 3:
            raise ConnectionError("the service is down")


class SleepingSink(RaisingSink):
    """Hangs at the report of step 3."""

    def write(self, event: Event) -> None:
        if event.step == 3:
            self.released.wait()


@pytest.mark.parametrize("kind", [RaisingSink, SleepingSink])
def test_broken_sink_of_a_user_changes_no_bit_and_delays_the_run_once(
    kind: type[RaisingSink],
    tiny: Configure,
    record: Callable[..., tuple[list[float], dict[str, torch.Tensor]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = time.monotonic()
    losses, weights = record(tiny(tmp_path / "without"))
    reference_seconds, start = time.monotonic() - start, time.monotonic()
    sink = kind()
    watched_losses, watched_weights = record(tiny(tmp_path / "with", log={"sink_timeout": 1.5}), sink)
    seconds = time.monotonic() - start
    sink.released.set()
    assert watched_losses == losses
    assert all(torch.equal(watched_weights[name], weight) for name, weight in weights.items())
    (message,) = caplog.messages
    assert message.startswith(f"{kind.__name__} stopped recording at step 3: ")
    assert seconds < reference_seconds + 2 * 1.5
    recorded = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("without", "with")]
    assert [json.loads(line)["step"] for line in recorded[0]] == [json.loads(line)["step"] for line in recorded[1]]
