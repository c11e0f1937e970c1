import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.verification.compare import Difference, compare

LAST = "checkpoints/step_00000008"


@pytest.fixture
def other(finished_run: Path, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to change."""
    return RunFolder(Path(shutil.copytree(finished_run, tmp_path / "other")))


def change_tensor(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)


def flip_lowest_bit(at: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int32)[at] ^= 1
        return tensor

    return flip


def change_record(file: Path, index: int, **values: object) -> None:
    lines = file.read_text().splitlines()
    lines[index] = json.dumps(json.loads(lines[index]) | values)
    file.write_text("".join(line + "\n" for line in lines))


def test_equal_runs_are_equal_and_it_is_told_what_was_compared(finished_run: Path, other: RunFolder) -> None:
    change_record(other.metrics, 0, tokens_per_second=1.0, mfu=0.5)
    found = compare(RunFolder(finished_run), other)
    assert found.differences == []
    assert (found.losses, found.evaluations, found.texts) == (8, 2, 2)
    tensors = [load_file(finished_run / LAST / f"{name}.safetensors") for name in ("model", "optimizer")]
    assert found.tensors == sum(map(len, tensors))
    assert found.nbytes == sum(tensor.nbytes for file in tensors for tensor in file.values())


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_one_flipped_bit_is_told_with_name_index_and_both_values(
    file: str, finished_run: Path, other: RunFolder
) -> None:
    name = {"model": "h.1.ln_1.weight", "optimizer": "wte.weight.exp_avg"}[file]
    at = {"model": (3,), "optimizer": (97, 5)}[file]
    path = other.path / LAST / f"{file}.safetensors"
    before = load_file(path)[name][at].item()
    change_tensor(path, name, flip_lowest_bit(at))
    after = load_file(path)[name][at].item()
    assert before != after
    place = f"step_00000008/{file}.safetensors: {name}{list(at)}"
    assert compare(RunFolder(finished_run), other).differences == [Difference(place, repr(before), repr(after))]


def test_a_difference_of_many_values_is_one_with_their_count(finished_run: Path, other: RunFolder) -> None:
    change_tensor(other.path / LAST / "model.safetensors", "wte.weight", lambda tensor: tensor + 1)
    (found,) = compare(RunFolder(finished_run), other).differences
    assert found.count == load_file(finished_run / LAST / "model.safetensors")["wte.weight"].numel()
    assert found.where.endswith("wte.weight[0, 0]")


def test_zero_and_minus_zero_and_other_shapes_differ(finished_run: Path, other: RunFolder) -> None:
    reference = RunFolder(finished_run)
    path = other.path / LAST / "model.safetensors"
    change_tensor(path, "h.0.ln_1.bias", lambda tensor: tensor.reshape(4, 4))
    assert str(compare(reference, other).differences[0]).endswith(
        "h.0.ln_1.bias: torch.float32 (16,) in the reference, torch.float32 (4, 4) in the resumed run"
    )
    tensors = load_file(path)
    tensors["new"] = tensors.pop("h.0.ln_1.bias")
    save_file(tensors, path)
    assert [found.resumed for found in compare(reference, other).differences] == ["nothing", "new"]


def test_losses_texts_and_progress_are_compared(finished_run: Path, other: RunFolder) -> None:
    change_record(other.samples, 1, text="another")
    progress = json.loads((other.path / LAST / "progress.json").read_text())
    progress["observers"] = {"guard": {"seen": 3}}
    (other.path / LAST / "progress.json").write_text(json.dumps(progress))
    change_record(other.metrics, 5, **{"train/loss": 1.25})
    found = compare(RunFolder(finished_run), other).differences
    assert found[0].where == "metrics.jsonl, step 5: train/loss"  # the sixth record: step 4 has an evaluation, too
    assert found[0].resumed == "1.25"
    assert found[1].where == "samples.jsonl, step 8: text"
    assert "step_00000008/progress.json: observers.guard.seen" in [difference.where for difference in found]


def test_a_missing_record_is_one_difference(finished_run: Path, other: RunFolder) -> None:
    lines = other.metrics.read_text().splitlines(keepends=True)
    other.metrics.write_text("".join(lines[:3] + lines[4:]))
    (found,) = compare(RunFolder(finished_run), other).differences
    assert found.where == "metrics.jsonl, record 4"


def test_a_run_of_another_seed_differs_from_the_first_step_on(
    tiny: Callable[..., TrainConfig], finished_run: Path, tmp_path: Path
) -> None:
    build_trainer(open_run(tiny(tmp_path / "run", checkpoint={"interval": 4}, seed=1))).train()
    found = compare(RunFolder(finished_run), RunFolder(tmp_path / "run")).differences
    assert found[0].where.startswith("metrics.jsonl, step 1: ")
    assert sum(difference.count for difference in found) > 1000


def test_runs_of_another_length_differ(finished_run: Path, other: RunFolder) -> None:
    shutil.rmtree(other.path / LAST)
    found = compare(RunFolder(finished_run), other).differences
    assert str(found[-1]) == ("last checkpoint: step_00000008 in the reference, step_00000004 in the resumed run")
