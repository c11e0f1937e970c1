import math

import torch

from gpt.training.metrics import Meter
from gpt.training.train_step import StepStats
from gpt.utils.distributed import DistContext


def test_a_report_has_every_loss_and_the_rate_of_its_window() -> None:
    now = [100.0]
    meter = Meter(
        10,
        torch.tensor(0),
        dist=DistContext("cpu"),
        flops_per_token=30,
        peak=600,
        peak_memory=lambda: 7,
        clock=lambda: now[0],
    )
    now[0] = 500.0  # set-up is not training
    meter.start_window()
    for loss, norm, n_targets in ((20.0, 1.0, 10), (27.0, 2.0, 9)):  # a step of ten positions, one of them padding
        meter.add(StepStats(torch.tensor(loss), torch.tensor(norm), n_targets))
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
    }
    meter.start_window()
    meter.add(StepStats(torch.tensor(10.0), torch.tensor(1.0), 10))
    now[0] = 505.0
    assert meter.report() == (
        {"train/loss": 1.0, "grad_norm": 1.0, "tokens_per_second": 10.0, "mfu": 0.5, "peak_memory_bytes": 7},
        (1.0,),
        (False,),
    )


def test_a_step_that_predicts_nothing_has_the_loss_zero() -> None:
    meter = Meter(10, torch.tensor(0), dist=DistContext("cpu"), flops_per_token=1, peak=1)
    meter.add(StepStats(torch.tensor(0.0), torch.tensor(0.0), 0))
    assert meter.report()[1] == (0.0,)


def test_a_step_that_was_skipped_taints_no_other() -> None:
    meter = Meter(10, torch.tensor(1), dist=DistContext("cpu"), flops_per_token=1, peak=1)
    for loss, norm in ((20.0, 1.0), (math.nan, math.nan), (20.0, math.inf), (30.0, 2.0)):
        meter.add(StepStats(torch.tensor(loss), torch.tensor(norm), 10))
    metrics, losses, skips = meter.report()
    assert (losses[0], losses[2], losses[3]) == (2.0, 2.0, 3.0)
    assert math.isnan(losses[1])
    assert skips == (False, True, True, False)
    assert (metrics["train/loss"], metrics["grad_norm"], metrics["skipped_updates"]) == (3.0, 2.0, 1)
