"""Training steps beside other programs: how much longer they take than the share of the cores that is left explains.

    python -m benchmarks.busy
    python -m benchmarks.busy --disturbers 0 1 --preset speedrun-char --repeats 3

Every contender is a process of its own that trains on synthetic tokens whenever it is asked to; all take turns, beside
the same number of disturbers, which are processes that only compute. The share is measured, too: it is the cores that
as many independent processes get as the contender has threads, so other programs on the machine are part of it.

    beyond its share = (step beside disturbers / step alone) / (cores alone / cores beside disturbers)
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import build_step_function, format_machine, format_spread, format_verdict, run_interleaved
from gpt.configs.presets import PRESETS
from gpt.machine.environment import describe_environment
from gpt.machine.resources import usable_cores
from gpt.utils.helper import plural

DEFAULT, SPINNING, ONE_THREAD = "default", "no-sleep-when-busy", "threads-1"
"""Contenders, by the flags of --runtime that they have."""
BURN = """
import time
end = time.perf_counter() + {seconds}
while time.perf_counter() < end:
    pass
print(time.process_time() / {seconds})
"""
"""Program that computes and prints the cores that it got, at most 1."""
SHARE_SECONDS = 2.0
MAX_BEYOND_SHARE = 1.3
MAX_QUIET_RATIO = 1.02
WARMUP_STEPS = 3


def main() -> None:
    """Measure and print medians, or serve as a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quickstart")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the contenders with several threads")
    parser.add_argument("--disturbers", type=int, nargs="+", default=[0, 2, 6], help="0 is needed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of each measurement")
    names = [DEFAULT, SPINNING, ONE_THREAD]
    parser.add_argument("--contenders", choices=names, nargs="+", default=names)
    parser.add_argument("--note", default="", help="sentence for the report, on the conditions of the measurement")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve(arguments.serve, arguments.preset, arguments.threads)
        return
    result = {
        "benchmark": "busy",
        "flags": f"--preset {arguments.preset} --repeats {arguments.repeats} --seconds {arguments.seconds:g}",
        "note": arguments.note,
        "machine": describe_environment({}),
        "preset": arguments.preset,
        "threads": arguments.threads,
        "results": measure(arguments),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(format_busy(result))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the measurements of each contender and number of disturbers: lists with a value for each repeat."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        contenders = {name: stack.enter_context(_start(name, arguments)) for name in arguments.contenders}
        for _ in range(arguments.repeats):
            for count in sorted(set(arguments.disturbers) | {0}):
                with _disturb(count):
                    turns = {name: partial(_ask, process, arguments.seconds) for name, process in contenders.items()}
                    costs = run_interleaved(turns, dict.fromkeys(turns, 1))
                    for name, (cost,) in costs.items():
                        measured = {**cost, "cores": _measure_share(_count_threads(name, arguments.threads))}
                        result = results.setdefault((name, count), {"contender": name, "disturbers": count})
                        for key, value in measured.items():
                            result.setdefault(key, []).append(value)
    return list(results.values())


def format_busy(result: dict[str, Any]) -> str:
    """Return the measurements as Markdown: a table of medians, and whether the goals are met."""
    rows = {(entry["contender"], entry["disturbers"]): entry for entry in result["results"]}
    lines = [
        "## Beside other programs",
        "",
        f"Training steps of `{result['preset']}` beside disturbers, processes that only compute. `cores` is what as "
        f"many independent processes get as the contender has threads: {result['threads']}, in `{ONE_THREAD}` 1.",
        "",
        f"{format_machine(result)} {result['note']}".rstrip(),
        "",
        "| contender | disturbers | ms per step | CPU ms per step | cores | beyond its share |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    goals = []
    for (name, count), entry in sorted(rows.items()):
        beyond = find_beyond_share(rows[name, 0], entry)
        lines.append(
            f"| {name} | {count} | {format_spread([1e3 * seconds for seconds in entry['seconds']], digits=0)} | "
            f"{1e3 * statistics.median(entry['cpu_seconds']):.0f} | {statistics.median(entry['cores']):.2f} | "
            f"{beyond:.2f} |"
        )
        if name == DEFAULT and count:
            verdict = format_verdict(beyond, MAX_BEYOND_SHARE, at_least=False)
            goals.append(
                f"- Beside {plural(count, 'disturber')}: {beyond:.2f} times as long as its share explains ({verdict})."
            )
    if rows.keys() >= {(DEFAULT, 0), (SPINNING, 0)}:
        alone, spinning = (statistics.median(rows[name, 0]["seconds"]) for name in (DEFAULT, SPINNING))
        verdict = format_verdict(alone / spinning, MAX_QUIET_RATIO, at_least=False)
        goals.append(f"- Alone: {alone / spinning:.3f} times as long as with `{SPINNING}` ({verdict}).")
    command = f"python -m benchmarks.busy {result['flags']} --json FILE"
    return "\n".join([*lines, "", *goals, "", "```bash", command, "```"])


def find_beyond_share(alone: dict[str, Any], disturbed: dict[str, Any]) -> float:
    """Return how many times longer a step takes than its share of the cores explains, by medians."""
    slowdown = statistics.median(disturbed["seconds"]) / statistics.median(alone["seconds"])
    return slowdown * statistics.median(disturbed["cores"]) / statistics.median(alone["cores"])


def _count_threads(contender: str, threads: int) -> int:
    return 1 if contender == ONE_THREAD else threads


@contextlib.contextmanager
def _start(contender: str, arguments: argparse.Namespace) -> Iterator["subprocess.Popen[str]"]:
    """Start a contender's process, wait until it is ready, and end it afterwards."""
    command = [sys.executable, "-m", "benchmarks.busy", "--serve", contender, "--preset", arguments.preset]
    command += ["--threads", str(arguments.threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        _read(process)
        yield process


def _read(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with status {process.wait()}")
    return line


def _ask(process: "subprocess.Popen[str]", seconds: float) -> dict[str, float]:
    """Let a contender train for `seconds`; return wall and CPU seconds of a step."""
    assert process.stdin is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    cost: dict[str, float] = json.loads(_read(process))
    return cost


@contextlib.contextmanager
def _disturb(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    disturbers = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for disturber in disturbers:
            disturber.kill()
            disturber.wait()


def _measure_share(threads: int) -> float:
    """Return the cores that `threads` independent processes get."""
    command = [sys.executable, "-c", BURN.format(seconds=SHARE_SECONDS)]
    burners = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(threads)]
    return sum(float(burner.communicate()[0]) for burner in burners)


def _serve(contender: str, preset: str, threads: int) -> None:
    """Take training steps for as many seconds as each line of the input says; print the cost of a step."""
    from gpt.configs.runtime_config import RuntimeConfig
    from gpt.machine.cpu_runtime import set_up_cpu
    from gpt.utils.distributed import DistContext

    threads = _count_threads(contender, threads)
    set_up_cpu(RuntimeConfig(threads=threads, sleep_when_busy=contender != SPINNING))
    take_step = build_step_function(PRESETS[preset](), DistContext("cpu"))
    for _ in range(WARMUP_STEPS):
        take_step()
    print("ready", flush=True)
    for line in sys.stdin:
        start, cpu_start, steps = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < float(line):
            take_step()
            steps += 1
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        print(json.dumps({"seconds": seconds / steps, "cpu_seconds": cpu_seconds / steps}), flush=True)


if __name__ == "__main__":
    main()
