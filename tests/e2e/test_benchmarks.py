"""Benchmarks import and write reports; their measurements are not run here."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.busy import DEFAULT, SPINNING, format_busy
from benchmarks.loss_curve import render_svg
from benchmarks.report import format_peers, format_speedrun
from benchmarks.training_peers import DEFAULTS, FP32, NANOGPT, OURS

REPOSITORY = Path(__file__).resolve().parents[2]
MACHINE = {"cpu": "CPU", "cpu_capability": "AVX512", "libraries": {"torch": "2.13.0"}, "python": "3.11.7"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("[!_]*.py")))
def test_benchmark_imports(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def peer(contender: str, setting: str, step_seconds: float, peak_bytes: int) -> dict[str, Any]:
    run = {
        "step_seconds": [2 * step_seconds, step_seconds],
        "step_cpu_seconds": [2 * step_seconds, step_seconds],
        "peak_bytes": peak_bytes,
        "parameters": 10_770_000,
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "load_average": 1.0,
    }
    return {"contender": contender, "setting": setting, "runs": [run]}


def test_peers_report_holds_the_ratios() -> None:
    report = format_peers(
        {
            "model": "10m",
            "sizes": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "batch": 8},
            "warmup": 1,
            "flags": "--repeats 1",
            "machine": MACHINE,
            "left_out": {"litgpt": "not installed"},
            "results": [peer(OURS, DEFAULTS, 0.25, 600_000_000), peer(NANOGPT, FP32, 1.0, 800_000_000)],
        }
    )
    assert "| nanoGPT | fp32 | 10.77M | 2,048 | 2,048 to 2,048, n=1 | 4.00x |" in report
    assert "fastest peer as documented, nanoGPT (fp32): 4.00x as fast (at least 1.8: met)" in report
    assert "leanest peer, nanoGPT (fp32): 0.75x the memory" in report
    assert "- Left out: litgpt, not installed." in report


def test_speedrun_report_holds_the_ratio() -> None:
    results = {
        name: [
            {"seconds": seconds, "cpu_seconds": 2 * seconds, "val_loss": 1.8, "validation": "all", "load_average": 1.0}
        ]
        for name, seconds in (("ours", 8.0), ("nanoGPT", 72.0))
    }
    report = format_speedrun({"flags": "--repeats 1", "machine": MACHINE, "results": results})
    assert "- 9.0x as fast (at least 10: MISSED); by CPU seconds 9.0x." in report


def test_loss_curve_spans_the_plot_and_names_its_axes() -> None:
    svg = render_svg(train=[(0, 4.0), (100, 2.0)], val=[(100, 2.5)])
    assert 'points="64.0,16.0 704.0,312.0"' in svg
    assert ">step<" in svg and ">loss (nats per token)<" in svg and ">2.500<" in svg


def test_busy_report_compares_a_slowdown_with_the_share_of_the_cores() -> None:
    alone = {"seconds": [0.2, 0.1, 0.3], "cpu_seconds": [0.4] * 3, "cores": [2.0] * 3, "disturbers": 0}
    beside_two = {"seconds": [0.5] * 3, "cpu_seconds": [0.5] * 3, "cores": [1.0] * 3, "disturbers": 2}
    results = [alone | {"contender": DEFAULT}, beside_two | {"contender": DEFAULT}, alone | {"contender": SPINNING}]
    facts = {"preset": "quickstart", "threads": 2, "flags": "", "note": "Others were busy.", "machine": MACHINE}
    report = format_busy(facts | {"results": results})
    assert "Python 3.11.7. Others were busy.\n" in report
    assert "| default | 2 | 500 (500 to 500, n=3) | 500 | 1.00 | 1.25 |" in report
    assert "- Beside 2 disturbers: 1.25 times as long as its share explains (at most 1.3: met)." in report
    assert "- Alone: 1.000 times as long as with `no-sleep-when-busy` (at most 1.02: met)." in report
