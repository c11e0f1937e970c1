import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gpt.training.metrics import Meter
from gpt.training.train_step import StepStats
from gpt.utils.distributed import DistContext


def test_report_has_the_loss_of_every_step_and_the_speed_of_its_window() -> None:
    now = [100.0]
    meter = Meter(
        10,
        torch.tensor(0),
        dist=DistContext("cpu"),
        flops_per_token=30,
        peak_flops=600,
        peak_memory=lambda: 7,
        clock=lambda: now[0],
    )
    now[0] = 500.0  # set-up is not training
    meter.start_window()
    for loss, norm, n_targets in (
        (20.0, 1.0, 10),
        (27.0, 2.0, 9),
    ):  # of ten positions, one is padding in step 2
        meter.add(StepStats(torch.tensor(loss), torch.tensor(norm), n_targets, lr=norm / 10))
    now[0] = 504.0
    metrics, losses, skips = meter.report()
    assert losses == (2.0, 3.0)
    assert skips == (False, False)
    assert metrics == {
        "train/loss": 3.0,
        "grad_norm": 2.0,
        "tokens_per_second": 5.0,
        "mfu": 0.25,
        "peak_memory_bytes": 7,
        "lr": 0.2,
    }
    meter.start_window()
    meter.add(StepStats(torch.tensor(10.0), torch.tensor(1.0), 10, lr=0.1))
    now[0] = 505.0
    assert meter.report() == (
        {"train/loss": 1.0, "grad_norm": 1.0, "tokens_per_second": 10.0, "mfu": 0.5, "peak_memory_bytes": 7, "lr": 0.1},
        (1.0,),
        (False,),
    )


def test_mfu_is_also_of_the_data_sheets_peak_if_that_is_known() -> None:
    meter = Meter(
        10, torch.tensor(0), DistContext("cpu"), flops_per_token=30, peak_flops=600, data_sheet_flops=1200,
        clock=lambda: 0.0,
    )  # fmt: skip
    meter._window_start = -2.0
    meter.add(StepStats(torch.tensor(10.0), torch.tensor(1.0), 10, lr=0.1))
    metrics, _, _ = meter.report()
    assert (metrics["mfu"], metrics["mfu_data_sheet"]) == (0.25, 0.125)


def test_step_without_targets_has_loss_zero() -> None:
    meter = Meter(10, torch.tensor(0), dist=DistContext("cpu"), flops_per_token=1, peak_flops=1)
    meter.add(StepStats(torch.tensor(0.0), torch.tensor(0.0), 0, lr=0.1))
    assert meter.report()[1] == (0.0,)


def test_skipped_step_does_not_change_the_losses_of_others() -> None:
    meter = Meter(10, torch.tensor(1), dist=DistContext("cpu"), flops_per_token=1, peak_flops=1)
    for loss, norm in ((20.0, 1.0), (math.nan, math.nan), (20.0, math.inf), (30.0, 2.0)):
        meter.add(StepStats(torch.tensor(loss), torch.tensor(norm), 10, lr=0.1))
    metrics, losses, skips = meter.report()
    assert (losses[0], losses[2], losses[3]) == (2.0, 2.0, 3.0)
    assert math.isnan(losses[1])
    assert skips == (False, True, True, False)
    assert (metrics["train/loss"], metrics["grad_norm"], metrics["skipped_updates"]) == (3.0, 2.0, 1)


def test_report_reads_losses_norms_and_probes_in_one_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(10, torch.tensor(0), dist=DistContext("cpu"), flops_per_token=1, peak_flops=1)
    for step in range(3):
        probes = {"wte": torch.tensor(step + 0.5), "count": torch.tensor(step)} if step == 2 else {}
        meter.add(StepStats(torch.tensor(10.0), torch.tensor(1.0), 10, 0.1, probes))
    with counted_syncs(monkeypatch) as syncs:
        metrics, losses, _ = meter.report()
    assert syncs == ["tolist"]
    assert losses == (1.0, 1.0, 1.0)
    assert (metrics["wte"], metrics["count"]) == (2.5, 2.0)
    meter.add(StepStats(torch.tensor(10.0), torch.tensor(1.0), 10, 0.1))
    assert "wte" not in meter.report()[0]


@contextmanager
def counted_syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """List the calls by which the host reads a tensor."""
    syncs: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            plain = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda tensor, *args, n=name, p=plain: (syncs.append(n), p(tensor, *args))[1]
            )
        yield syncs
