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
from gpt.verification.compare import BitDifference, _compare_tensors, compare

LAST = "checkpoints/step_00000008"


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> RunFolder:
    """Copy the finished run, so that a test may change it."""
    return RunFolder(Path(shutil.copytree(finished_run, tmp_path / "copy")))


def change_tensor(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)


def flip_lowest_bit(index: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int32)[index] ^= 1
        return tensor

    return flip


def change_record(file: Path, index: int, **values: object) -> None:
    lines = file.read_text().splitlines()
    lines[index] = json.dumps(json.loads(lines[index]) | values)
    file.write_text("".join(line + "\n" for line in lines))


def test_equal_runs_have_no_difference_and_the_compared_values_are_counted(finished_run: Path, copy: RunFolder) -> None:
    change_record(copy.metrics, 0, tokens_per_second=1.0, mfu=0.5)
    comparison = compare(RunFolder(finished_run), copy)
    assert comparison.differences == []
    assert (comparison.n_losses, comparison.n_evaluations, comparison.n_samples) == (8, 2, 2)
    tensors = [load_file(finished_run / LAST / f"{name}.safetensors") for name in ("model", "optimizer")]
    assert comparison.n_tensors == sum(map(len, tensors))
    assert comparison.tensor_bytes == sum(tensor.nbytes for file in tensors for tensor in file.values())


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_flipped_bit_is_reported_with_tensor_index_and_both_values(
    file: str, finished_run: Path, copy: RunFolder
) -> None:
    name = {"model": "h.1.ln_1.weight", "optimizer": "wte.weight.exp_avg"}[file]
    index = {"model": (3,), "optimizer": (97, 5)}[file]
    path = copy.path / LAST / f"{file}.safetensors"
    before = load_file(path)[name][index].item()
    change_tensor(path, name, flip_lowest_bit(index))
    after = load_file(path)[name][index].item()
    assert before != after
    location = f"step_00000008/{file}.safetensors: {name}{list(index)}"
    assert compare(RunFolder(finished_run), copy).differences == [BitDifference(location, repr(before), repr(after))]


def test_differing_values_of_one_tensor_are_one_difference_with_their_count(
    finished_run: Path, copy: RunFolder
) -> None:
    change_tensor(copy.path / LAST / "model.safetensors", "wte.weight", lambda tensor: tensor + 1)
    (difference,) = compare(RunFolder(finished_run), copy).differences
    assert difference.n_values == load_file(finished_run / LAST / "model.safetensors")["wte.weight"].numel()
    assert difference.location.endswith("wte.weight[0, 0]")


def test_changed_shape_and_renamed_tensor_differ(finished_run: Path, copy: RunFolder) -> None:
    reference = RunFolder(finished_run)
    path = copy.path / LAST / "model.safetensors"
    change_tensor(path, "h.0.ln_1.bias", lambda tensor: tensor.reshape(4, 4))
    assert str(compare(reference, copy).differences[0]).endswith(
        "h.0.ln_1.bias: torch.float32 (16,) in the reference, torch.float32 (4, 4) in the resumed run"
    )
    tensors = load_file(path)
    tensors["new"] = tensors.pop("h.0.ln_1.bias")
    save_file(tensors, path)
    assert [difference.resumed for difference in compare(reference, copy).differences] == ["nothing", "new"]


def test_zero_and_negative_zero_differ() -> None:
    difference = _compare_tensors("bias", torch.zeros(2), torch.tensor([0.0, -0.0]))
    assert difference == BitDifference("bias[1]", "0.0", "-0.0")


def test_losses_samples_and_progress_are_compared(finished_run: Path, copy: RunFolder) -> None:
    change_record(copy.samples, 1, text="another")
    progress = json.loads((copy.path / LAST / "progress.json").read_text())
    progress["observers"] = {"guard": {"seen": 3}}
    (copy.path / LAST / "progress.json").write_text(json.dumps(progress))
    change_record(copy.metrics, 5, **{"train/loss": 1.25})  # of step 5, because step 4 also has an evaluation
    differences = compare(RunFolder(finished_run), copy).differences
    assert differences[0].location == "metrics.jsonl, step 5: train/loss"
    assert differences[0].resumed == "1.25"
    assert differences[1].location == "samples.jsonl, step 8: text"
    assert "step_00000008/progress.json: observers.guard.seen" in [difference.location for difference in differences]


def test_missing_record_is_one_difference(finished_run: Path, copy: RunFolder) -> None:
    lines = copy.metrics.read_text().splitlines(keepends=True)
    copy.metrics.write_text("".join(lines[:3] + lines[4:]))
    (difference,) = compare(RunFolder(finished_run), copy).differences
    assert difference.location == "metrics.jsonl, record 4"


def test_run_with_another_seed_differs_from_the_first_step(
    tiny: Callable[..., TrainConfig], finished_run: Path, tmp_path: Path
) -> None:
    build_trainer(open_run(tiny(tmp_path / "run", checkpoint={"interval": 4}, seed=1))).train()
    differences = compare(RunFolder(finished_run), RunFolder(tmp_path / "run")).differences
    assert differences[0].location.startswith("metrics.jsonl, step 1: ")
    assert sum(difference.n_values for difference in differences) > 1000


def test_runs_of_different_length_differ(finished_run: Path, copy: RunFolder) -> None:
    shutil.rmtree(copy.path / LAST)
    differences = compare(RunFolder(finished_run), copy).differences
    assert str(differences[-1]) == "last checkpoint: step_00000008 in the reference, step_00000004 in the resumed run"
