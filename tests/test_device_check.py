"""A device that computes wrongly is caught. The device is the CPU, with operators that are broken on purpose."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import device_check
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.device_check import (
    CheckResult,
    Reference,
    check_device,
    choose_device,
    compute_reference,
    find_wrong_result,
    shrink_model,
)

CPU = torch.device("cpu")
MODEL = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=100, dropout=0.1)
MATMULS = ("aten::mm", "aten::addmm", "aten::linear", "aten::bmm")


class BrokenOperator(TorchDispatchMode):
    """Driver whose operators of some names return what `damage` makes of their result."""

    def __init__(self, names: tuple[str, ...], damage: Callable[[torch.Tensor, tuple[Any, ...]], None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._damage = names, damage

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name in self._names:
            self._damage(result, args)
        return result


@pytest.fixture(scope="module", params=["adamw", "muon"])
def reference(request: pytest.FixtureRequest) -> Reference:
    return compute_reference(shrink_model(MODEL), OptimizerConfig(name=request.param))


def find_wrong(reference: Reference, mode: TorchDispatchMode, dtype: str = "float32") -> list[CheckResult]:
    with mode:
        return [result for result in check_device(CPU, dtype, reference) if not result.is_right]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_device_passes_every_comparison(reference: Reference, dtype: str) -> None:
    results = list(check_device(CPU, dtype, reference))
    assert len(results) == (6 if dtype == "float32" else 10)
    assert all(result.is_right for result in results), results
    assert len({result.name for result in results}) == len(results)
    assert reference.losses[-1] < reference.losses[0] - 0.1  # the steps teach something that a wrong device could miss


def test_matmul_that_is_one_percent_too_large_is_caught(reference: Reference) -> None:
    wrong = find_wrong(reference, BrokenOperator(MATMULS, lambda result, args: result.mul_(1.01)))
    assert wrong[0].name == "forward pass in float32"
    assert wrong[0].error > 1e-3


def test_backward_pass_that_drops_a_row_is_caught(reference: Reference) -> None:
    def drop_row_of_transposed(result: torch.Tensor, args: tuple[Any, ...]) -> None:
        if not args[0].is_contiguous():  # the gradient of a weight multiplies a transposed matrix
            result[0].zero_()

    wrong = find_wrong(reference, BrokenOperator(("aten::mm",), drop_row_of_transposed))
    names = [result.name for result in wrong]
    assert "forward pass in float32" not in names
    assert "gradients in float32" in names


def test_shapes_of_the_batch_before_are_caught(reference: Reference) -> None:
    """Compute right until the batch size changes, then only as many rows as the first batch had."""
    n_rows = 2 * MODEL.block_size

    def compute_first_rows_only(result: torch.Tensor, args: tuple[Any, ...]) -> None:
        if result.shape[0] == 3 * MODEL.block_size:
            result[n_rows:].zero_()

    wrong = find_wrong(reference, BrokenOperator(MATMULS, compute_first_rows_only))
    assert [result.name for result in wrong] == ["gradients of another batch size in float32"]


def test_wrong_optimizer_is_caught(reference: Reference) -> None:
    names = ("aten::_fused_adamw_", "aten::_foreach_lerp_.Scalar", "aten::_foreach_lerp")
    mode = BrokenOperator(names, lambda result, args: args[0][0].mul_(1.01))
    wrong = find_wrong(reference, mode)
    assert f"update by {reference.optimizer.name}" in [result.name for result in wrong]
    assert not any(result.name.startswith(("forward", "gradients")) for result in wrong)


def test_operator_that_the_device_lacks_is_reported_and_not_raised(reference: Reference) -> None:
    def refuse(result: torch.Tensor, args: tuple[Any, ...]) -> None:
        raise NotImplementedError("no kernel for mm\nstack")

    wrong = find_wrong(reference, BrokenOperator(MATMULS, refuse))
    assert wrong[0].detail == "no kernel for mm"
    assert wrong[0].error != wrong[0].error


def test_nan_is_the_largest_error(reference: Reference) -> None:
    wrong = find_wrong(reference, BrokenOperator(MATMULS, lambda result, args: result.fill_(torch.nan)))
    assert "nan" in str(wrong[0])


def test_bfloat16_that_is_wrong_while_float32_is_right_is_caught(reference: Reference) -> None:
    def damage_bfloat16(result: torch.Tensor, args: tuple[Any, ...]) -> None:
        if result.dtype == torch.bfloat16:
            result.mul_(1.1)

    wrong = find_wrong(reference, BrokenOperator(MATMULS, damage_bfloat16), "bfloat16")
    assert {result.name.rpartition(" ")[2] for result in wrong} == {"bfloat16"}


@pytest.fixture
def mps_that_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this machine an MPS device, whose check runs on the CPU."""
    monkeypatch.setattr(device_check, "find_device", lambda wanted: "mps" if wanted == "auto" else wanted)
    plain = device_check.check_device
    monkeypatch.setattr(device_check, "check_device", lambda device, *rest: plain(CPU, *rest))


@pytest.mark.usefixtures("mps_that_is_the_cpu")
def test_auto_takes_mps_where_the_check_passes_and_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device("auto", MODEL, tmp_path) == ("mps", ())
    monkeypatch.setattr(device_check, "check_device", lambda *arguments: pytest.fail("checked again"))
    assert choose_device("auto", MODEL, tmp_path) == ("mps", ())
    for module, name, value in (  # another torch is another device, and so is another driver
        (torch, "__version__", "0.0"),
        (platform, "mac_ver", lambda: ("99.9", ("", "", ""), "arm64")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(pytest.fail.Exception, match="checked again"):
                choose_device("auto", MODEL, tmp_path)


@pytest.mark.usefixtures("mps_that_is_the_cpu")
def test_auto_is_the_cpu_with_a_note_where_mps_computes_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = CheckResult("gradients in float32", 0.5, 1e-3, "wte.weight")
    monkeypatch.setattr(device_check, "check_device", lambda *arguments: iter([wrong]))
    for _ in range(2):  # not remembered
        device, (note,) = choose_device("auto", MODEL, tmp_path)
        assert device == "cpu"
        assert note.startswith(
            "--device auto is cpu, because mps computes wrongly here (gradients in float32: error 5.0e"
        )
    assert find_wrong_result(torch.device("mps"), MODEL, tmp_path) == wrong
    assert choose_device("mps", MODEL, tmp_path) == ("mps", ())  # the user's own choice
