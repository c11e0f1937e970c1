"""Measure one GPU, and write the tables of docs/gpu.md.

    python -m benchmarks.gpu --minutes 8
    python -m benchmarks.gpu --minutes 8 --nanogpt path/to/nanoGPT

Everything is measured in this process, in the order of the tables; what the time does not suffice for is named in them.
nanoGPT is measured by its own bench.py. Without a GPU the same program runs at a small size, prints what it measured,
and leaves docs/gpu.md as it is.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt.commands import selftest
from gpt.commands.bench import measure_step
from gpt.configs.observer_config import SampleConfig
from gpt.configs.presets import PRESETS
from gpt.configs.run_plan import MachineFacts
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.inference.generate import Completion, generate
from gpt.machine.data_sheet import find_data_sheet_peak
from gpt.machine.environment import read_gpu_driver
from gpt.models.gpt import GPT
from gpt.run import open_machine
from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line, format_count, format_percent, format_si

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- Written by python -m benchmarks.gpu -->", "<!-- End -->"
"""Lines of the document between which the tables stand."""
NOT_MEASURED = "Not measured: nobody has run `python -m benchmarks.gpu` on a GPU and committed its tables yet."
EAGER, COMPILED, REPRODUCIBLE, DEFAULTS = "eager", "compiled", "reproducible", "defaults"
MAIN = Path(__file__).resolve().parents[1] / "gpt" / "main.py"
ITERATION = re.compile(r"time per iteration: ([\d.]+)ms")
"""Part of the last line of nanoGPT's bench.py."""


@dataclass(frozen=True)
class Size:
    """Sizes of everything that is measured."""

    preset: str
    changes: Mapping[str, Any]
    """Changed fields of the preset."""
    micro_batch_size: int
    steps: int
    kills: int
    new_tokens: int


GPU_SIZE = Size("gpt2-124m", {}, micro_batch_size=32, steps=10, kills=3, new_tokens=256)
CPU_SIZE = Size(
    "debug", {"model": {"n_embd": 32, "block_size": 32}}, micro_batch_size=2, steps=1, kills=0, new_tokens=8
)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, and write them into the document if there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no measurement begins after this time")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="page whose tables are replaced")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(device, 60 * arguments.minutes, arguments.nanogpt)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(format_tables(result))
    if device == "cuda":
        write_tables(arguments.document, format_tables(result))


class Session:
    """Measurements one after the other, as long as there is time.

    Args:
        device: cuda or cpu.
        seconds: time after which no measurement begins.
    """

    def __init__(self, device: str, seconds: float):
        self._device, self._deadline = device, time.monotonic() + seconds

    def attempt(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
        """Return the figures that `work` measures, with the warnings meanwhile, or the reason why there are none."""
        print(f"measuring {name}", file=sys.stderr)
        if time.monotonic() > self._deadline:
            return "out of time"
        warnings = Warnings()
        logging.getLogger().addHandler(warnings)
        try:
            return work() | {"warnings": warnings.messages}
        except torch.OutOfMemoryError:
            return "out of memory"
        except (UserError, RuntimeError, OSError) as error:
            return first_line(error)
        finally:
            logging.getLogger().removeHandler(warnings)
            release_memory(self._device)


class Warnings(logging.Handler):
    """The warnings of a measurement, such as that something was not compiled."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def measure(device: str, seconds: float, nanogpt: Path | None) -> dict[str, Any]:
    """Measure everything, and return the figures; each is a dict, or the reason why there is none.

    Args:
        device: cuda or cpu.
        seconds: time after which no measurement begins.
        nanogpt: checkout of nanoGPT.
    """
    size = GPU_SIZE if device == "cuda" else CPU_SIZE
    session, settings = Session(device, seconds), list_settings(size, device)
    dist, machine = open_machine(settings[EAGER])
    result = {
        "device": machine.device_name,
        "kind": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": read_gpu_driver(),
        "size": f"{size.preset}, {size.micro_batch_size} sequences of {settings[EAGER].model.block_size} tokens",
        "selftest": session.attempt("self-test", lambda: run_selftest(size, device)),
        "training": measure_training(session, settings, machine, dist, size, nanogpt),
        "generation": {
            name: session.attempt(
                name, lambda rows=rows: measure_generation(settings[EAGER], dist, rows, size.new_tokens)
            )
            for name, rows in (("1 text", 1), ("8 texts together", 8))
        },
    }
    dist.close()
    return result


def measure_training(
    session: Session,
    settings: Mapping[str, TrainConfig],
    machine: MachineFacts,
    dist: DistContext,
    size: Size,
    nanogpt: Path | None,
) -> dict[str, Any]:
    """Measure a training step of every setting, with nanoGPT's beside the first two."""
    training: dict[str, Any] = {}
    for name, config in settings.items():
        if config.compile == "on" and machine.device == "cpu":
            training[name] = "compiling takes longer than all else here"
        else:
            training[name] = session.attempt(
                name, lambda config=config: measure_step(config, machine, dist, size.steps)
            )
        if name == COMPILED:
            for kind in (EAGER, COMPILED):
                work = partial(run_nanogpt, nanogpt, machine.device, kind, size)
                training[f"nanoGPT, {kind}"] = session.attempt(f"nanoGPT, {kind}", work)
    training[REPRODUCIBLE] = session.attempt(REPRODUCIBLE, lambda: run_reproducible(settings[EAGER], size))
    return training


def list_settings(size: Size, device: str) -> dict[str, TrainConfig]:
    """Return the name of each measured setting -> its configuration; a step is one micro-batch, or 16 with defaults.

    The dtype is bfloat16, or what `--dtype auto` takes on a card without it.
    """
    base = PRESETS[size.preset]().model_dump()
    base |= {name: base[name] | change for name, change in size.changes.items()}
    tokens = size.micro_batch_size * base["model"]["block_size"]
    base |= {"device": device, "micro_batch_size": size.micro_batch_size, "tokens_per_step": tokens, "compile": "off"}
    changes: dict[str, dict[str, Any]] = {
        EAGER: {},
        COMPILED: {"compile": "on"},
        "float16": {"dtype": "float16"},
        "Muon": {"optimizer": base["optimizer"] | {"name": "muon"}},
        "document mask": {"data": base["data"] | {"document_mask": True}},
        "block checkpointing": {"parallel": base["parallel"] | {"activation_checkpointing": "block"}},
        DEFAULTS: {"micro_batch_size": "auto", "tokens_per_step": 16 * tokens, "compile": "auto"},
        f"{COMPILED}, Muon": {"compile": "on", "optimizer": base["optimizer"] | {"name": "muon"}},
    }
    return {name: TrainConfig.model_validate(base | change) for name, change in changes.items()}


def release_memory(device: str) -> None:
    """Return what the last measurement held, and start the count of the next one's peak."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_selftest(size: Size, device: str) -> dict[str, Any]:
    """Run `gpt selftest`, and return its report."""
    flags = [size.preset, "--device", device, "--kills", str(size.kills), "--steps", "1", "--json"]
    flags += ["--micro-batch-size", "1"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        selftest.run(flags)
    report: dict[str, Any] = json.loads(output.getvalue())
    return report


def run_reproducible(config: TrainConfig, size: Size) -> dict[str, Any]:
    """Run `gpt bench` with deterministic kernels, which are a setting of its process, and return its figures.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"reproducible": True})})
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "config.json"
        saved.write_text(config.saved_json(), encoding="utf-8")
        command = [sys.executable, str(MAIN), "bench", "--config", str(saved), "--steps", str(size.steps), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1])
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def run_nanogpt(checkout: Path | None, device: str, kind: str, size: Size) -> dict[str, Any]:
    """Run nanoGPT's own bench.py of GPT-2 124M at this size, and return its speed.

    Raises:
        UserError: there is no checkout, or no GPU.
        RuntimeError: it failed; the message is its last line.
    """
    if checkout is None:
        raise UserError("add --nanogpt with a checkout")
    if device != "cuda":
        raise UserError("its bench.py needs a GPU; python -m benchmarks.peers compares on a CPU")
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    command = [sys.executable, "bench.py", f"--batch_size={size.micro_batch_size}", "--block_size=1024"]
    command += [f"--dtype={dtype}", f"--compile={kind == COMPILED}", "--real_data=False"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    found = ITERATION.search(done.stdout)
    if found is None:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1])
    return {"tokens_per_second": size.micro_batch_size * 1024 / (float(found[1]) / 1e3)}


def measure_generation(config: TrainConfig, dist: DistContext, rows: int, new_tokens: int) -> dict[str, Any]:
    """Measure how fast a model of random weights generates, after a first text that does not count.

    Args:
        config: gives the model.
        dist: gives the device.
        rows: texts that are generated together.
        new_tokens: tokens of each text.
    """
    model_config = config.model.model_copy(update={"vocab_size": config.model.vocab_size or 256}).resolve()
    model = GPT(model_config, seed=0).to(dist.device)
    settings = SampleConfig(max_new_tokens=new_tokens)
    seconds = 0.0
    for _ in range(2):
        texts = [Completion([1, 2, 3], settings, seed) for seed in range(rows)]
        start = time.perf_counter()
        for _ in generate(model, model_config, texts, vocab_size=model_config.vocab_size, end_of_text=None):
            pass
        seconds = time.perf_counter() - start
    return {"tokens_per_second": sum(len(text.tokens) for text in texts) / seconds}


def format_tables(result: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    sheet = find_data_sheet_peak(result["device"], "bfloat16") or find_data_sheet_peak(result["device"], "float16")
    rated = f", {format_si(sheet, 'FLOP/s')} by its data sheet" if sheet else ""
    versions = f"torch {result['torch']}" + (f", CUDA {result['cuda']}, {result['driver']}" if result["cuda"] else "")
    lines = [f"{result['device']}{rated}. {versions}.", ""]
    lines += [_format_selftest(result["selftest"]), "", f"Training, {result['size']}:", ""]
    columns = (
        "setting",
        "dtype",
        "tokens/s",
        "MFU of data sheet",
        "MFU of measured peak",
        "peak memory",
        "optimizer's share",
    )
    lines += [f"| {' | '.join(columns)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [_format_training(name, figures) for name, figures in result["training"].items()]
    lines += ["", "Generation, random weights, float32:", "", "| | tokens/s |", "| --- | ---: |"]
    lines += [f"| {name} | {_format_speed(figures)} |" for name, figures in result["generation"].items()]
    return "\n".join(lines)


def _format_selftest(report: dict[str, Any] | str) -> str:
    if isinstance(report, str):
        return f"Self-test: {report}."
    failed = [f"{check['name']} ({check['detail']})" for check in report["checks"] if check["state"] == selftest.FAILED]
    n_run = sum(check["state"] != selftest.NOT_RUN for check in report["checks"])
    return f"Self-test: FAILED: {'; '.join(failed)}." if failed else f"Self-test: all {n_run} checks passed."


def _format_training(name: str, figures: dict[str, Any] | str) -> str:
    if isinstance(figures, str) or "mfu" not in figures:
        return f"| {name} | | {_format_speed(figures)} | | | | |"
    milliseconds, memory = figures["milliseconds"], figures["peak_memory_bytes"]
    size = figures["micro_batch_size"]
    share = milliseconds["optimizer"] / sum(milliseconds.values())
    sheet = "" if figures["mfu_data_sheet"] is None else format_percent(figures["mfu_data_sheet"])
    cells = (
        "; ".join([name if name != DEFAULTS else f"{name}: {size} sequences", *figures["warnings"]]),
        *(figures["dtype"], _format_speed(figures), sheet, format_percent(figures["mfu"])),
        *("" if memory is None else format_si(memory, "B"), format_percent(share)),
    )
    return f"| {' | '.join(cells)} |"


def _format_speed(figures: dict[str, Any] | str) -> str:
    return f"not measured: {figures}" if isinstance(figures, str) else format_count(figures["tokens_per_second"])


def write_tables(document: Path, tables: str) -> None:
    """Replace the part of a page between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} lacks the lines {BEGIN!r} and {END!r}")
    document.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
