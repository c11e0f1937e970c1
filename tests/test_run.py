"""Opening a run: at step 0, from a checkpoint, or from another run's weights."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt import run
from gpt.checkpoint import manifest
from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import MachineFacts
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.inference.load import load_for_inference
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import Event, StepEnd, Stop
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext
from tests.conftest import read_files

Configure = Callable[..., TrainConfig]


def read_metric(run_dir: Path, key: str) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}


def test_finished_run_is_recognised_and_a_longer_one_trains_on(tiny: Configure, finished_run: Path) -> None:
    assert open_run(tiny(finished_run, checkpoint={"interval": 4}), dry_run=True).finished_at == 8
    assert open_run(tiny(finished_run, max_steps=5), dry_run=True).finished_at == 8
    longer = open_run(tiny(finished_run, max_steps=9), dry_run=True)
    assert longer.finished_at is None
    assert longer.start.checkpoint == finished_run / "checkpoints/step_00000008"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "the corpus's SHA-256 is"),
        ({"dtype": "bfloat16"}, "another configuration: dtype is float32 in the run .* add --resume-with-changes"),
        ({"tokens_per_step": 0, "micro_batch_size": 2}, "another configuration: tokens_per_step"),
    ],
)
def test_resume_on_other_data_or_another_batch_is_refused(
    tiny: Configure, tmp_path: Path, change: dict[str, object] | None, message: str
) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 300)
    settings = {"data": {"source": str(source)}, "max_steps": 1}
    build_trainer(open_run(tiny(tmp_path / "run", **settings))).train()
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    if change is None:
        source.write_text("same text " * 300)
    for max_steps in (1, 2):  # also where there is nothing left to train
        with pytest.raises(UserError, match=message):
            open_run(tiny(tmp_path / "run", **settings | {"max_steps": max_steps} | (change or {})), dry_run=True)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_longer_horizon_that_changes_past_learning_rates_needs_the_flag(tiny: Configure, tmp_path: Path) -> None:
    build_trainer(open_run(tiny(tmp_path, max_steps=4, lr={"decay_steps": 0}))).train()
    longer = {"max_steps": 8, "lr": {"decay_steps": 0}}
    with pytest.raises(UserError) as error:
        open_run(tiny(tmp_path, **longer), dry_run=True)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints/step_00000004 cannot be resumed: its 4 steps had the learning rates of a run of "
        "4 steps, and a run of 8 steps has others; --lr.decay-steps 2 keeps the former decay, or "
        "--resume-with-changes accepts them"
    )
    assert open_run(tiny(tmp_path, resume_with_changes=True, **longer), dry_run=True).plan.notes == (
        "changed at step 4: max_steps 4 -> 8 (safe where the steps taken keep their learning rates)",
        "the first 4 steps had other learning rates than this schedule gives them",
    )
    assert open_run(tiny(tmp_path, max_steps=8, lr={"decay_steps": 2}), dry_run=True).plan.notes == (
        "changed at step 4: max_steps 4 -> 8 (safe where the steps taken keep their learning rates)",
        "changed at step 4: lr.decay_steps 0 -> 2 (safe where the steps taken keep their learning rates)",
    )


def test_decay_that_has_begun_cannot_be_kept(tiny: Configure, tmp_path: Path) -> None:
    wsd = {"schedule": "wsd", "decay_steps": 2}
    build_trainer(open_run(tiny(tmp_path, max_steps=4, lr=wsd))).train()
    with pytest.raises(UserError, match="steps has others; --resume-with-changes accepts them"):
        open_run(tiny(tmp_path, max_steps=8, lr=wsd), dry_run=True)


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("current", ["float32", "bfloat16", "float16"])
def test_run_resumes_in_another_dtype_with_the_flag(tiny: Configure, tmp_path: Path, saved: str, current: str) -> None:
    settings = {"optimizer": {"name": "muon"}, "eval": {"interval": 0}}
    build_trainer(open_run(tiny(tmp_path, dtype=saved, max_steps=2, **settings))).train()
    build_trainer(open_run(tiny(tmp_path, dtype=current, max_steps=4, resume_with_changes=True, **settings))).train()
    assert read_metric(tmp_path, "train/loss").keys() == {1, 2, 3, 4}


def test_changed_optimizer_settings_take_effect(tiny: Configure, tmp_path: Path) -> None:
    build_trainer(open_run(tiny(tmp_path, max_steps=2))).train()
    change = {"optimizer": {"beta2": 0.5, "weight_decay": 0.7}, "lr": {"max_lr": 0.5}, "model": {"dropout": 0.3}}
    trainer = build_trainer(open_run(tiny(tmp_path, max_steps=3, resume_with_changes=True, **change)))
    trainer.train()
    decayed, *_ = trainer._state.optimizer.param_groups
    assert (decayed["betas"], decayed["weight_decay"]) == ((0.9, 0.5), 0.7)
    assert read_metric(tmp_path, "lr")[3] > 0.1


class StopAtStep3(Observer):
    """Observer that stops a run as a signal does."""

    def on_event(self, event: Event) -> list[Stop]:
        return [Stop("SIGTERM")] if isinstance(event, StepEnd) and event.step == 3 else []


def test_run_ending_at_the_interrupted_step_is_evaluated_once(tiny: Configure, tmp_path: Path) -> None:
    trainer = build_trainer(open_run(tiny(tmp_path)))
    trainer.attach(StopAtStep3())
    assert trainer.train() == "SIGTERM"
    assert "val/loss" not in (tmp_path / "metrics.jsonl").read_text()
    before = read_files(tmp_path / "checkpoints")

    ending = tiny(tmp_path, max_steps=3)
    run = open_run(ending)
    assert (run.finished_at, run.plan.evaluates_first) == (None, True)
    assert build_trainer(run).train() == "finished"
    assert list(read_metric(tmp_path, "val/loss")) == [3]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["step"] == 3
    assert read_files(tmp_path / "checkpoints") == before
    assert open_run(ending).finished_at == 3

    build_trainer(open_run(tiny(tmp_path / "reference", max_steps=3))).train()
    for key in ("val/loss", "train/loss"):
        assert read_metric(tmp_path, key) == read_metric(tmp_path / "reference", key)


def test_run_without_a_validation_set_is_finished_without_evaluation(tiny: Configure, tmp_path: Path) -> None:
    trainer = build_trainer(open_run(tiny(tmp_path, data={"val_fraction": 0.0})))
    trainer.attach(StopAtStep3())
    trainer.train()
    assert open_run(tiny(tmp_path, data={"val_fraction": 0.0}, max_steps=3)).finished_at == 3


def test_dry_run_writes_nothing(tiny: Configure, tmp_path: Path) -> None:
    assert open_run(tiny(tmp_path / "new"), dry_run=True).plan.max_steps == 8
    assert not (tmp_path / "new").exists()


def test_init_from_loads_only_the_weights(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    trainer = build_trainer(open_run(tiny(tmp_path, init_from=finished_run, max_steps=1)))
    saved = load_file(finished_run / "checkpoints/step_00000008/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer._state.model.state_dict().items())
    assert trainer._state.progress.step == 0
    assert trainer._state.optimizer_tensors() == {}
    trainer.train()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"n_head": 4}, "n-head is 2 there and 4 in this command"),
        ({"position": "rotary"}, "position is learned there and rotary in this command"),
        ({"mlp": "relu2"}, "mlp is gelu there and relu2 in this command"),
        ({"logit_softcap": 5}, "logit-softcap is 0.0 there and 5.0 in this command"),
    ],
)
def test_init_from_another_architecture_is_refused_before_the_corpus_is_read(
    tiny: Configure, finished_run: Path, tmp_path: Path, change: dict[str, object], difference: str
) -> None:
    config = tiny(tmp_path, init_from=finished_run, model=change, data={"source": "/no/such/file"})
    with pytest.raises(UserError, match=f"another architecture: --model.{difference}"):
        open_run(config)


def test_init_from_another_tokenizer_names_the_one_to_use(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, init_from=finished_run, data={"tokenizer": "char"})
    with pytest.raises(UserError, match=r"another tokenizer; add --data.tokenizer .*tokenizer.json"):
        open_run(config, dry_run=True)


def test_damaged_checkpoint_is_refused(tiny: Configure, tmp_path: Path) -> None:
    build_trainer(open_run(tiny(tmp_path, max_steps=1))).train()
    weights = tmp_path / "checkpoints/step_00000001/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=f"{weights}: damaged"):
        build_trainer(open_run(tiny(tmp_path, max_steps=2)))


def test_resume_from_a_named_checkpoint_forks_into_a_new_folder(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    checkpoint = finished_run / "checkpoints/step_00000004"
    config = tiny(tmp_path / "fork", resume=str(checkpoint))
    trainer = build_trainer(open_run(config))
    assert trainer._state.progress.step == 4
    trainer.train()
    forked, reference = (
        [
            json.loads(line)["train/loss"]
            for line in (path / "metrics.jsonl").read_text().splitlines()
            if "train/" in line
        ]
        for path in (tmp_path / "fork", finished_run)
    )
    assert forked == reference[4:]
    assert open_run(config, dry_run=True).finished_at == 8


def test_corpus_without_validation_set_trains_without_evaluation(tiny: Configure, tmp_path: Path) -> None:
    run = open_run(tiny(tmp_path, data={"val_fraction": 0.0}, max_steps=3))
    assert run.plan.notes == ("no validation set: val/loss is not reported",)
    build_trainer(run).train()
    assert "val/loss" not in (tmp_path / "metrics.jsonl").read_text()


def test_padded_vocabulary_trains_and_samples_only_tokenizer_ids(tiny: Configure, tmp_path: Path) -> None:
    build_trainer(open_run(tiny(tmp_path, model={"vocab_size": 320}, max_steps=1))).train()
    model = load_for_inference(tmp_path, "cpu")
    assert (model.model.config.vocab_size, model.tokenizer.vocab_size) == (320, 257)
    assert not model.model.training


def test_prompt_that_cannot_be_tokenized_is_refused_before_training(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"tokenizer": "char"}, sample={"prompts": ("Ω",)})
    with pytest.raises(
        UserError, match=r"--sample\.prompts 'Ω': the character 'Ω' is not in the tokenizer's vocabulary"
    ):
        build_trainer(open_run(config))


def test_default_prompt_becomes_empty_if_the_tokenizer_lacks_its_characters(tiny: Configure, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("甲乙丙丁" * 200)
    data = {"source": str(tmp_path / "t.txt"), "tokenizer": "char"}
    sample = {"prompts": TextSampleConfig().prompts}
    build_trainer(open_run(tiny(tmp_path / "run", data=data, sample=sample, max_steps=1))).train()
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text())["prompt"] == ""


def test_fork_past_the_horizon_is_refused(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is at step 8 already, and this run would end at 5"):
        open_run(tiny(tmp_path / "fork", resume=str(finished_run), max_steps=5))


def test_dry_run_reports_a_run_folder_that_cannot_be_made(tiny: Configure, text_file: Path) -> None:
    with pytest.raises(UserError, match="is not a writable folder"):
        open_run(tiny(text_file / "run"), dry_run=True)


def test_environment_and_config_describe_the_run(tiny: Configure, finished_run: Path) -> None:
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["libraries"]["torch"] == torch.__version__
    saved = TrainConfig.model_validate_json((finished_run / "config.json").read_text())
    assert saved == tiny(finished_run, checkpoint={"interval": 4})


def test_resumed_start_reads_config_and_manifest_once_and_verifies_once(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_trainer(open_run(tiny(tmp_path, max_steps=2))).train()
    checkpoint = tmp_path / "checkpoints/step_00000002"
    reads: Counter[Path] = Counter()
    hashed: Counter[Path] = Counter()

    def count(path: Path, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
        reads[path] += 1
        return read(path, *args, **options)

    for name in ("read_text", "read_bytes"):
        read = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda path, *args, read=read, **options: count(path, read, *args, **options))
    sha256 = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda path: hashed.update([path]) or sha256(path))
    build_trainer(open_run(tiny(tmp_path, max_steps=3)))
    assert reads[checkpoint / "config.json"] == 1
    assert reads[checkpoint / "manifest.json"] == 1
    assert hashed == Counter({checkpoint / name: 1 for name in manifest.FILES})


def test_gpu_is_set_up_before_ranks_meet_and_described_afterwards(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Ranks(DistContext):
        def __init__(self, device: str, step_timeout: float, **settings: Any):
            calls.append(f"join with {device}")
            super().__init__("cpu", step_timeout, **settings)

    def set_up(*, reproducible: bool) -> dict[str, bool]:
        calls.append("set up")
        return {"deterministic": reproducible}

    monkeypatch.setattr(run, "choose_device", lambda *arguments: ("cuda", ("a remark",)))
    monkeypatch.setattr(run, "set_up_cuda", set_up)
    monkeypatch.setattr(run, "DistContext", Ranks)
    monkeypatch.setattr(run, "uses_tf32", lambda: calls.append("describe") is None)
    monkeypatch.setattr(run, "detect_machine", lambda *arguments: MachineFacts("cuda", "Tesla T4", False, gpu_count=2))
    _, machine = run.open_machine(tiny(tmp_path, parallel={"reproducible": True}))
    assert calls == ["set up", "join with cuda", "describe"]
    assert machine.runtime["deterministic"] is machine.runtime["tf32"] is True
    assert machine.notes == ("a remark",)
