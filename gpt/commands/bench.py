"""`gpt bench [PRESET] [--flags]`: measure a training step; `gpt bench speedrun`: measure a whole run."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gpt.commands.output import build_console, print_json
from gpt.configs.base import Config
from gpt.configs.cli import JsonOutput, PresetOverrides, parse, parse_over_preset
from gpt.configs.data_config import Sources
from gpt.configs.presets import PRESETS
from gpt.configs.run_plan import MachineFacts, RunPlan
from gpt.configs.train_config import TrainConfig

if TYPE_CHECKING:
    from gpt.training.step_timer import Phase, StepTimer
    from gpt.training.train_step import TrainStep
    from gpt.utils.distributed import DistContext

WARMUP_STEPS = 3
"""Steps that are not counted: memory is allocated, threads start, kernels are selected or compiled."""
CHAR_VOCAB_SIZE = 65
"""Vocabulary of a `char` tokenizer trained on tinyshakespeare."""
SPEEDRUN = "speedrun"
SPEEDRUN_LOSS = 1.88
"""Validation loss that nanoGPT's README documents for its CPU setting on tinyshakespeare."""
MAIN = Path(__file__).resolve().parents[1] / "main.py"


class BenchCommand(JsonOutput, PresetOverrides):
    """Measure a training step of a preset on synthetic tokens; every value below is the preset's.

    gpt bench speedrun measures a whole run on a text file.
    """

    steps: int = Field(10, ge=1, le=1_000_000)
    """Steps to measure, twice: without a break, and with a clock between their phases."""


class SpeedrunText(Config):
    """The data of the speedrun."""

    source: Sources = PRESETS["speedrun-char"]().data.source
    """Text file of tinyshakespeare; shakespeare: download it once."""


class SpeedrunCommand(JsonOutput):
    """Measure a run of the preset speedrun-char, from the start of its process to its end."""

    data: SpeedrunText = SpeedrunText()


def run(argv: Sequence[str]) -> int:
    """Parse the flags, measure and print."""
    if list(argv[:1]) == [SPEEDRUN]:
        return _bench_speedrun(parse(SpeedrunCommand, argv[1:], prog=f"gpt bench {SPEEDRUN}"))
    return _bench_step(parse_over_preset(BenchCommand, argv, verb="bench"))


def _bench_step(command: BenchCommand) -> int:
    from gpt.run import open_machine

    config = command.as_train_config()
    dist, machine = open_machine(config)
    figures = measure_step(config.on_device(machine.device), machine, dist, command.steps)
    if dist.is_main:
        _print_figures(format_rows(figures), figures, as_json=command.as_json)
    dist.close()
    return 0


def measure_step(config: TrainConfig, machine: MachineFacts, dist: "DistContext", steps: int) -> dict[str, Any]:
    """Measure a training step on synthetic tokens, and return its figures by name.

    Args:
        config: the configuration on this device.
        machine: its hardware.
        dist: the ranks.
        steps: steps to measure, twice.
    """
    from gpt.machine.flops import flops_per_token
    from gpt.machine.peak_flops import find_peak_flops

    plan = plan_synthetic_run(config, machine, dist)
    measured = _measure(config, plan, dist, steps)
    peak = find_peak_flops(plan, dist, config.data.cache_dir)
    flops = flops_per_token(plan.model) * plan.batch.tokens_per_step
    seconds = statistics.median(measured.step_seconds)
    return {
        "device": machine.device_name,
        "dtype": plan.dtype,
        "processes": dist.world_size,
        "parameters": plan.model.n_parameters,
        "tokens_per_step": plan.batch.tokens_per_step,
        "micro_batch_size": plan.batch.micro_batch_size,
        "steps": steps,
        "tokens_per_second": plan.batch.tokens_per_step / seconds,
        "milliseconds": {phase: 1e3 * median for phase, median in measured.phase_seconds.items()},
        "peak_memory_bytes": measured.peak_memory_bytes,
        "flops_per_token": flops_per_token(plan.model),
        "peak_flops_per_second": peak.measured,
        "mfu": flops / seconds / peak.measured,
        "own_shapes_flops_per_second": statistics.median(measured.matmul_rates),
        "mfu_of_own_shapes": statistics.median(
            flops / step / rate for step, rate in zip(measured.step_seconds, measured.matmul_rates, strict=True)
        ),
        "data_sheet_flops_per_second": peak.data_sheet,
        "mfu_data_sheet": None if peak.data_sheet is None else flops / seconds / peak.data_sheet,
    }


def plan_synthetic_run(config: TrainConfig, machine: MachineFacts, dist: "DistContext") -> RunPlan:
    """Return the plan of a run on synthetic tokens."""
    from gpt.auto_batch import resolve_auto_micro_batch
    from gpt.configs.run_plan import CorpusFacts, StreamFacts, resolve

    config = _drop_source_weights(config)
    corpus = CorpusFacts(_choose_vocab_size(config), (StreamFacts("synthetic tokens", 10**12),))
    return resolve_auto_micro_batch(config, resolve(config, machine, corpus), dist)


def build_synthetic_step(config: TrainConfig, plan: RunPlan, dist: "DistContext", timer: "StepTimer") -> "TrainStep":
    """Build a training step, as a run has it, on synthetic tokens."""
    from gpt.data.data_loader import DataLoader
    from gpt.data.synthetic import SyntheticTokens
    from gpt.pipeline import build_state, build_train_step

    tokens = SyntheticTokens(plan.model.vocab_size, plan.batch.block_size, document_mask=config.data.document_mask)
    loader = DataLoader(tokens, plan.batch, rank=dist.rank, device=dist.device)
    return build_train_step(config, plan, dist, build_state(config, plan, dist), loader, timer)[0]


def _drop_source_weights(config: TrainConfig) -> TrainConfig:
    """Return `config` without weights of sources: there is one source, the synthetic tokens."""
    return config.model_copy(update={"data": config.data.model_copy(update={"weights": ()})})


def _choose_vocab_size(config: TrainConfig) -> int:
    """Return the vocabulary size of the configured tokenizer; a typical one if it depends on a text."""
    from gpt.data.tokenizer_builders import build_tokenizer

    trained = {"bpe": config.data.vocab_size, "char": CHAR_VOCAB_SIZE}
    kind = config.data.tokenizer
    return config.model.vocab_size or trained.get(kind) or build_tokenizer(kind).vocab_size


@dataclass(frozen=True)
class _Measurements:
    step_seconds: list[float]
    matmul_rates: list[float]
    """FLOP/s of matmuls in the model's own shapes, measured after each step, under the same load of the machine."""
    phase_seconds: "dict[Phase, float]"
    """Median of each phase, over steps that were timed by phase."""
    peak_memory_bytes: int | None


def _measure(config: TrainConfig, plan: RunPlan, dist: "DistContext", steps: int) -> _Measurements:
    import torch

    from gpt.machine.hardware import peak_memory
    from gpt.machine.peak_flops import measure_model_flops, synchronize
    from gpt.training.step_timer import StepTimer

    timer = StepTimer(dist.device)
    train_step = build_synthetic_step(config, plan, dist, timer)
    rows = plan.batch.micro_batch_size * plan.batch.block_size

    def time_step(step: int) -> float:
        synchronize(dist.device)
        start = time.perf_counter()
        train_step(step)
        synchronize(dist.device)
        return time.perf_counter() - start

    def time_phases(step: int) -> "dict[Phase, float]":
        timer.take()
        train_step(step)
        return timer.take()

    with closing(train_step):
        for step in range(WARMUP_STEPS):
            train_step(step)
        memory = peak_memory(dist.device.type)  # before the matmuls below allocate theirs
        step_seconds, matmul_rates = [], []
        for step in range(WARMUP_STEPS, WARMUP_STEPS + steps):
            step_seconds.append(time_step(step))
            rate = dist.on_main(lambda: measure_model_flops(dist.device, getattr(torch, plan.dtype), plan.model, rows))
            matmul_rates.append(rate * dist.world_size)
        timer.synchronizes = True
        laps = [time_phases(step) for step in range(WARMUP_STEPS + steps, WARMUP_STEPS + 2 * steps)]
    phases = {phase: statistics.median(lap[phase] for lap in laps) for phase in laps[0]}
    return _Measurements(step_seconds, matmul_rates, phases, memory)


def format_rows(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of the table of a step's figures."""
    from gpt.utils.helper import format_count, format_percent, format_si, plural

    phases, memory = figures["milliseconds"], figures["peak_memory_bytes"]
    sheet = figures["data_sheet_flops_per_second"]
    rows = {
        "machine": f"{figures['device']}, {plural(figures['processes'], 'process', 'es')}, {figures['dtype']}",
        "model": f"{format_count(figures['parameters'])} parameters, "
        f"{format_si(figures['flops_per_token'], 'FLOP')} per token",
        "tokens/s": format_count(figures["tokens_per_second"]),
        "ms per step": f"{1e3 * figures['tokens_per_step'] / figures['tokens_per_second']:.1f}; timed by phase: "
        + ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in phases.items())
        + f" (medians of {plural(figures['steps'], 'step')} of {figures['tokens_per_step']:,} tokens)",
        "peak memory": "unknown on this device" if memory is None else f"{format_si(memory, 'B')} per process",
        "MFU": f"{format_percent(figures['mfu'])} of the "
        f"{format_si(figures['peak_flops_per_second'], 'FLOP/s')} of large matmuls; "
        f"{format_percent(figures['mfu_of_own_shapes'])} of the "
        f"{format_si(figures['own_shapes_flops_per_second'], 'FLOP/s')} "
        "of matmuls in the model's own shapes",
    }
    if sheet is not None:
        rows["MFU"] += (
            f"; {format_percent(figures['mfu_data_sheet'])} of the {format_si(sheet, 'FLOP/s')} of the data sheet"
        )
    return rows


def _bench_speedrun(command: SpeedrunCommand, *flags: str) -> int:
    """Train in a new process with an empty cache; `flags` are added to its command line."""
    from gpt.checkpoint.manifest import VAL_LOSS
    from gpt.checkpoint.run_folder import RunFolder
    from gpt.utils.atomic_io import read_jsonl

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        program = [sys.executable, str(MAIN), "train", "speedrun-char", "--run-dir", str(run_dir)]
        program += ["--data.cache-dir", str(Path(folder) / "cache"), "--data.source", *_fetch_sources(command), *flags]
        start = time.perf_counter()
        process = subprocess.run(program, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        if process.returncode:
            return process.returncode  # its error is on stderr
        losses = [record[VAL_LOSS] for record in read_jsonl(RunFolder(run_dir).metrics) if VAL_LOSS in record]
    loss = losses[-1]
    reached = loss is not None and loss <= SPEEDRUN_LOSS
    rows = {
        "seconds": f"{seconds:.1f}, from the start of the process to its end, including data preparation",
        "val/loss": f"{loss}, on the whole validation set",
        "reached": f"{'yes' if reached else 'no'}: the target is at most {SPEEDRUN_LOSS}",
    }
    figures = {"seconds": seconds, "val/loss": loss, "reached": reached}
    _print_figures(rows, figures, as_json=command.as_json)
    return 0 if reached else 1


def _fetch_sources(command: SpeedrunCommand) -> list[str]:
    """Return the sources by their paths; a download is no part of the run."""
    from gpt.configs.data_config import SHAKESPEARE, PreparationConfig
    from gpt.data.prepare.shakespeare import fetch_shakespeare

    cache_dir = PreparationConfig().cache_dir
    return [
        str(fetch_shakespeare("--data.source", cache_dir)) if source == SHAKESPEARE else source
        for source in command.data.source
    ]


def _print_figures(rows: Mapping[str, str], figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a table for people, or one JSON object for programs."""
    if as_json:
        print_json(dict(figures))
        return
    build_console().write_rows(rows)
