"""`gpt bench [PRESET] [--flags]`: measure a training step; `gpt bench speedrun`: measure a whole run."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gpt.configs.base import Config, FilePath
from gpt.configs.cli import PresetOverrides, parse, parse_over_preset
from gpt.configs.data_config import Sources
from gpt.configs.presets import PRESETS
from gpt.configs.run_plan import RunPlan
from gpt.configs.train_config import TrainConfig

if TYPE_CHECKING:
    from gpt.utils.distributed import DistContext

WARM_UP = 3
"""Steps that are not counted: memory is allocated, threads start, kernels are chosen or compiled."""
CHARACTERS = 65
"""Vocabulary of a `char` tokenizer: tinyshakespeare's."""
SPEEDRUN = "speedrun"
SPEEDRUN_LOSS = 1.88
"""What nanoGPT's README documents for its CPU setting on tinyshakespeare."""
MAIN = Path(__file__).resolve().parents[1] / "main.py"


class BenchCommand(PresetOverrides):
    """Measure a training step on made-up tokens: every value below is the preset's own.

    gpt bench speedrun measures a whole run instead, on a text of yours.
    """

    steps: int = Field(10, ge=1, le=1_000_000)
    """Steps to measure, twice: as they are, and with a clock between their parts."""
    json_file: FilePath | None = Field(None, alias="json")
    """File for the figures."""


class SpeedrunText(Config):
    """The text of the speedrun."""

    source: Sources = PRESETS["speedrun-char"]().data.source
    """The text of tinyshakespeare."""


class SpeedrunCommand(Config):
    """Measure the preset speedrun-char from the start of its process to its end."""

    data: SpeedrunText = SpeedrunText()
    json_file: FilePath | None = Field(None, alias="json")
    """File for the figures."""


def run(argv: Sequence[str]) -> int:
    """Parse, then measure."""
    if list(argv[:1]) == [SPEEDRUN]:
        return _bench_speedrun(parse(SpeedrunCommand, argv[1:], prog=f"gpt bench {SPEEDRUN}"))
    return _bench_step(parse_over_preset(BenchCommand, argv, verb="bench"))


def _bench_step(command: BenchCommand) -> int:
    from gpt.auto_batch import resolve_auto_micro_batch
    from gpt.configs.run_plan import CorpusFacts, MachineFacts, StreamFacts, resolve
    from gpt.machine.cpu_runtime import set_up_cpu
    from gpt.machine.flops import flops_per_token
    from gpt.machine.hardware import find_device, machine_facts
    from gpt.machine.peak_flops import measured_peak_flops
    from gpt.utils.distributed import DistContext

    device = find_device(command.device)
    dist = DistContext(device)
    config = _without_sources(command.as_train_config())
    runtime = set_up_cpu(config.runtime, reproducible=config.parallel.reproducible)
    corpus = CorpusFacts(_vocabulary(config), (StreamFacts("made-up tokens", 10**12),))
    facts = replace(machine_facts(device, dist.world_size), runtime=runtime)
    machine = MachineFacts(**dist.broadcast(asdict(facts)))
    plan = resolve_auto_micro_batch(config, resolve(config, machine, corpus), dist)
    measured = _measure(config, plan, dist, command.steps)
    peak = dist.on_main(
        lambda: (
            measured_peak_flops(dist.device, machine.device_name, plan.dtype, config.data.cache_dir) * dist.world_size
        )
    )
    flops = flops_per_token(plan.model) * plan.batch.tokens_per_step
    seconds = statistics.median(measured.step_seconds)
    if dist.is_main:
        figures = {
            "device": machine.device_name,
            "dtype": plan.dtype,
            "processes": dist.world_size,
            "parameters": plan.model.n_parameters,
            "tokens_per_step": plan.batch.tokens_per_step,
            "steps": command.steps,
            "tokens_per_second": plan.batch.tokens_per_step / seconds,
            "milliseconds": {phase: 1e3 * median for phase, median in measured.phase_seconds.items()},
            "peak_memory_bytes": measured.peak_memory,
            "flops_per_token": flops_per_token(plan.model),
            "peak_flops_per_second": peak,
            "mfu": flops / seconds / peak,
            "own_shapes_flops_per_second": statistics.median(measured.own_rates),
            "mfu_of_own_shapes": statistics.median(
                flops / step / own for step, own in zip(measured.step_seconds, measured.own_rates, strict=True)
            ),
        }
        _show(_rows(figures), figures, command.json_file)
    dist.close()
    return 0


def _without_sources(config: TrainConfig) -> TrainConfig:
    """There is one source, made up, and it has no weight."""
    return config.model_copy(update={"data": config.data.model_copy(update={"weights": ()})})


def _vocabulary(config: TrainConfig) -> int:
    """The size that the configured tokenizer has, or, where only a text would tell, a likely one."""
    from gpt.data.tokenizer_builders import build_tokenizer

    learnt = {"bpe": config.data.vocab_size, "char": CHARACTERS}
    kind = config.data.tokenizer
    return config.model.vocab_size or learnt.get(kind) or build_tokenizer(kind).vocab_size


@dataclass(frozen=True)
class _Measured:
    step_seconds: list[float]
    own_rates: list[float]
    """FLOP/s of products in the model's own shapes, after each step: what disturbs one disturbs the other."""
    phase_seconds: dict[str, float]
    """Medians of the parts of steps that are timed by part."""
    peak_memory: int | None
    """Bytes."""


def _measure(config: TrainConfig, plan: RunPlan, dist: "DistContext", steps: int) -> _Measured:
    import torch

    from gpt.auto_batch import build_autocast
    from gpt.data.data_loader import DataLoader
    from gpt.data.synthetic import SyntheticTokens
    from gpt.machine.hardware import peak_memory
    from gpt.machine.peak_flops import own_rate, synchronize
    from gpt.optim.build import set_learning_rate
    from gpt.pipeline import build_state, build_train_step
    from gpt.training.stopwatch import Stopwatch, TimedScaler
    from gpt.utils.custom_scheduler import build_schedule

    stopwatch = Stopwatch(dist.device)
    state = build_state(config, plan, dist)
    state.scaler = TimedScaler(dist.device.type, enabled=state.scaler.is_enabled(), stopwatch=stopwatch)
    train_step = build_train_step(config, plan, dist, state, stopwatch.around(build_autocast(plan)))
    schedule = build_schedule(plan.lr, plan.max_steps)
    tokens = SyntheticTokens(plan.model.vocab_size, plan.batch.block_size, document_mask=config.data.document_mask)
    rows = plan.batch.micro_batch_size * plan.batch.block_size

    with DataLoader(tokens, plan.batch, rank=dist.rank, device=dist.device) as loader:

        def advance(step: int) -> None:
            batch = loader.get_batch(step)
            stopwatch.lap("data")
            set_learning_rate(state.optimizer, schedule(step))
            train_step(step, batch)
            stopwatch.lap("optimizer")

        def seconds_of(step: int) -> float:
            synchronize(dist.device)
            start = time.perf_counter()
            advance(step)
            synchronize(dist.device)
            return time.perf_counter() - start

        def phases_of(step: int) -> dict[str, float]:
            stopwatch.start()
            advance(step)
            return stopwatch.stop()

        for step in range(WARM_UP):
            advance(step)
        memory = peak_memory(dist.device.type)  # what is multiplied below does not belong to it
        step_seconds, own_rates = [], []
        for step in range(WARM_UP, WARM_UP + steps):
            step_seconds.append(seconds_of(step))
            own = dist.on_main(lambda: own_rate(dist.device, getattr(torch, plan.dtype), plan.model, rows))
            own_rates.append(own * dist.world_size)
        laps = [phases_of(step) for step in range(WARM_UP + steps, WARM_UP + 2 * steps)]
    phases = {phase: statistics.median(lap[phase] for lap in laps) for phase in laps[0]}
    return _Measured(step_seconds, own_rates, phases, memory)


def _rows(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a step, for people."""
    from gpt.utils.helper import format_si, plural

    phases, memory = figures["milliseconds"], figures["peak_memory_bytes"]
    return {
        "machine": f"{figures['device']}, {plural(figures['processes'], 'process', 'es')}, {figures['dtype']}",
        "model": f"{format_si(figures['parameters'])} parameters, "
        f"{format_si(figures['flops_per_token'])}FLOP per token",
        "tokens/s": format_si(figures["tokens_per_second"]),
        "ms per step": f"{sum(phases.values()):.1f}: "
        + ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in phases.items())
        + f" (medians of {plural(figures['steps'], 'step')} of {figures['tokens_per_step']:,} tokens)",
        "peak memory": "not known here" if memory is None else f"{format_si(memory)}B per process",
        "MFU": f"{figures['mfu']:.1%} of the {format_si(figures['peak_flops_per_second'])}FLOP/s of large "
        f"matrix products; "
        f"{figures['mfu_of_own_shapes']:.1%} of the {format_si(figures['own_shapes_flops_per_second'])}FLOP/s "
        "of products in the model's own shapes",
    }


def _bench_speedrun(command: SpeedrunCommand, *flags: str) -> int:
    """Train in a process of its own that finds nothing prepared, as on the first day; `flags` are added to its own."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        program = [sys.executable, str(MAIN), "train", "speedrun-char", "--run-dir", str(run_dir)]
        program += ["--data.cache-dir", str(Path(folder) / "cache"), "--data.source", *command.data.source, *flags]
        start = time.perf_counter()
        done = subprocess.run(program, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        if done.returncode:
            return done.returncode  # it has said why
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = next(record["val/loss"] for record in reversed(records) if "val/loss" in record)
    reached = loss is not None and loss <= SPEEDRUN_LOSS
    rows = {
        "seconds": f"{seconds:.1f}, from the start of the process to its end, the text's preparation included",
        "val/loss": f"{loss}, of the whole validation set",
        "reached": f"{'yes' if reached else 'no'}: at most {SPEEDRUN_LOSS} is asked for",
    }
    _show(rows, {"seconds": seconds, "val/loss": loss, "reached": reached}, command.json_file)
    return 0 if reached else 1


def _show(rows: Mapping[str, str], figures: Mapping[str, Any], file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpt.utils.atomic_io import write_json

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, markup=False, highlight=False, soft_wrap=True)
    if file is not None:
        write_json(file, figures)
