import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.machine import peak_flops as module
from gpt.machine.flops import flops_per_token
from gpt.machine.peak_flops import (
    PeakFlops,
    find_peak_flops,
    load_or_measure_peak_flops,
    measure_model_flops,
    measure_peak_flops,
)
from tests.training.example_events import PLAN

CPU = torch.device("cpu")


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that a test fills with the results of the next measurements, which take no time."""
    results: list[float] = []
    monkeypatch.setattr(module, "measure_peak_flops", lambda *_: results.pop(0))
    return results


def test_a_peak_is_measured_once(measurements: list[float], tmp_path: Path) -> None:
    measurements += [2e9]
    peaks = [load_or_measure_peak_flops(CPU, "a CPU", "float32", tmp_path / "cache") for _ in range(3)]
    assert peaks == [2e9] * 3
    (file,) = (tmp_path / "cache").iterdir()
    key = ["a CPU", "float32", torch.get_num_threads(), torch.__version__]
    assert json.loads(file.read_text()) == {"device, dtype, threads, torch": key, "flops_per_second": 2e9}


def test_each_device_dtype_and_thread_count_has_its_own_peak(measurements: list[float], tmp_path: Path) -> None:
    measurements += [4.0, 3.0, 2.0, 1.0]
    peaks = [
        load_or_measure_peak_flops(CPU, name, dtype, tmp_path)
        for name in ("a", "b")
        for dtype in ("float32", "bfloat16")
    ]
    assert peaks == [4.0, 3.0, 2.0, 1.0]
    torch.set_num_threads(2)
    try:
        measurements.append(0.5)
        assert load_or_measure_peak_flops(CPU, "a", "float32", tmp_path) == 0.5
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"flops_per_second": null}', '{"flops_per_second": NaN}'])
def test_a_damaged_cache_file_is_measured_again(measurements: list[float], tmp_path: Path, content: str) -> None:
    measurements += [1.0, 2.0]
    load_or_measure_peak_flops(CPU, "a", "float32", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert [load_or_measure_peak_flops(CPU, "a", "float32", tmp_path) for _ in range(2)] == [2.0, 2.0]


def test_an_unwritable_cache_is_no_error(measurements: list[float], tmp_path: Path) -> None:
    measurements += [1.0]
    (tmp_path / "file").touch()
    assert load_or_measure_peak_flops(CPU, "a", "float32", tmp_path / "file" / "cache") == 1.0


@pytest.mark.parametrize(("name", "data_sheet"), [("NVIDIA H100 80GB HBM3", 2 * 989.4e12), ("a CPU", None)])
def test_peaks_are_those_of_all_ranks_together(
    name: str, data_sheet: float | None, measurements: list[float], tmp_path: Path
) -> None:
    measurements += [7e14]
    plan = replace(PLAN, dtype="bfloat16", machine=replace(PLAN.machine, device_name=name))
    ranks: Any = SimpleNamespace(device=CPU, world_size=2, is_main=True, on_main=lambda work: work())
    assert find_peak_flops(plan, ranks, tmp_path) == PeakFlops(1.4e15, data_sheet)


@pytest.mark.parametrize(("together", "expected"), [(7.0, 7.0), (3.9, 8.0)])
def test_on_a_busy_cpu_the_peak_is_that_of_one_thread_times_threads(
    monkeypatch: pytest.MonkeyPatch, together: float, expected: float
) -> None:
    monkeypatch.setattr(module, "_measure_square_matmuls", lambda *_: together if torch.get_num_threads() == 2 else 4.0)
    torch.set_num_threads(2)
    try:
        assert measure_peak_flops(CPU, torch.float32) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("block_size", [16, 2048])
def test_model_matmuls_add_up_to_flops_per_token(block_size: int) -> None:
    config = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=block_size, vocab_size=24, mlp="swiglu")
    model = config.resolve()
    products = [*module._model_matmuls(CPU, torch.float32, model, rows=32)]
    assert sum(needed for _, _, needed in products) == 32 * flops_per_token(model)
    assert all((a @ b).shape[-2:] == (a.shape[-2], b.shape[-1]) for a, b, _ in products)


def test_measuring_does_not_advance_the_default_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_PER_SHAPE", 0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert measure_peak_flops(CPU, torch.float32) > 0
    model = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=16, mlp="swiglu").resolve()
    assert measure_model_flops(CPU, torch.bfloat16, model, rows=4) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_cached_peak_can_be_read_by_other_users(measurements: list[float], tmp_path: Path) -> None:
    measurements += [2e9]
    mask = os.umask(0o022)
    try:
        load_or_measure_peak_flops(CPU, "a CPU", "float32", tmp_path)
    finally:
        os.umask(mask)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
