"""How much memory `gpt prepare` takes, of inputs of several sizes: it should be little, and the same for all.

    python -m benchmarks.preparation_memory --megabytes 1000 4000
    python -m benchmarks.preparation_memory --megabytes 1000 4000 --formats text --tokenizer gpt2

Linux only: every 50 ms the memory of the program and of all processes that it started is read from /proc. PSS shares a
page that several processes map among them, so that its sum is what they take together.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import verdict, write_input

MOST_MEGABYTES = 600
INTERVAL = 0.05


def main() -> None:
    """Prepare each input and print what it took."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=float, nargs="+", default=[1000, 4000], help="of each input")
    arguments.add_argument("--formats", nargs="+", choices=("jsonl", "text"), default=["jsonl", "text"])
    arguments.add_argument("--tokenizer", default="gpt2")
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()

    print(f"{'input':>16} {'seconds':>8} {'all, PSS':>10} {'largest, RSS':>13}")
    for kind in given.formats:
        for megabytes in given.megabytes:
            with tempfile.TemporaryDirectory() as name:
                source = Path(name) / ("input.jsonl" if kind == "jsonl" else "input.txt")
                write_input(source, int(megabytes * 1e6), kind)
                flags = ["--tokenizer", given.tokenizer, "--workers", str(given.workers), "--out", f"{name}/out"]
                command = [sys.executable, "-m", "gpt.main", "prepare", str(source), *flags]
                seconds, together, largest = _watched(command)
                shutil.rmtree(f"{name}/out")
            row = f"{megabytes:10.0f} {kind:>5} {seconds:7.1f}s {together:7.0f} MB {largest:10.0f} MB"
            print(row, f" {verdict(together, MOST_MEGABYTES, at_least=False)}", flush=True)


def _watched(command: list[str]) -> tuple[float, float, float]:
    """Seconds, the largest sum of PSS at one time, and the largest RSS of one process, in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    together = largest = 0
    while process.poll() is None:
        found = list(_family(process.pid))
        together = max(together, sum(_field(pid, "smaps_rollup", "Pss:") for pid in found))
        largest = max(largest, *(_field(pid, "status", "VmHWM:") for pid in found))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return time.perf_counter() - start, together / 1000, largest / 1000


def _family(pid: int) -> Iterator[int]:
    """A process and everything that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                yield from _family(int(child))
        except OSError:  # ended meanwhile
            continue


def _field(pid: int, file: str, name: str) -> int:
    """A number of kB from one of a process's files in /proc; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 // 1000 for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
