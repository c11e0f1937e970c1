"""Memory of `gpt prepare` for inputs of several sizes: it should be small, and independent of the size.

    python -m benchmarks.preparation_memory --megabytes 1000 4000
    python -m benchmarks.preparation_memory --megabytes 1000 4000 --formats text --tokenizer gpt2

Linux only: the memory of the program and all its child processes is read from /proc every 50 ms. PSS divides a page
that several processes map among them, so the sum is what they use together.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import format_verdict, write_input

MAX_MEGABYTES = 600
POLL_SECONDS = 0.05


def main() -> None:
    """Prepare each input and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1000, 4000], help="size of each input")
    parser.add_argument("--formats", nargs="+", choices=("jsonl", "text"), default=["jsonl", "text"])
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    print(f"{'input':>16} {'seconds':>8} {'all, PSS':>10} {'largest, RSS':>13}")
    for kind in arguments.formats:
        for megabytes in arguments.megabytes:
            with tempfile.TemporaryDirectory() as name:
                source = Path(name) / ("input.jsonl" if kind == "jsonl" else "input.txt")
                write_input(source, int(megabytes * 1e6), kind)
                flags = [
                    "--tokenizer",
                    arguments.tokenizer,
                    "--workers",
                    str(arguments.workers),
                    "--out",
                    f"{name}/out",
                ]
                command = [sys.executable, "-m", "gpt.main", "prepare", str(source), *flags]
                seconds, total, largest = _measure_memory(command)
                shutil.rmtree(f"{name}/out")
            row = f"{megabytes:10.0f} {kind:>5} {seconds:7.1f}s {total:7.0f} MB {largest:10.0f} MB"
            print(row, f" {format_verdict(total, MAX_MEGABYTES, at_least=False)}", flush=True)


def _measure_memory(command: list[str]) -> tuple[float, float, float]:
    """Return seconds, the peak of the summed PSS, and the peak RSS of one process, both in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    total = largest = 0
    while process.poll() is None:
        pids = list(_iterate_pids(process.pid))
        total = max(total, sum(_read_field(pid, "smaps_rollup", "Pss:") for pid in pids))
        largest = max(largest, *(_read_field(pid, "status", "VmHWM:") for pid in pids))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return time.perf_counter() - start, total / 1000, largest / 1000


def _iterate_pids(pid: int) -> Iterator[int]:
    """Yield a process id and those of all its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                yield from _iterate_pids(int(child))
        except OSError:  # the process has ended
            continue


def _read_field(pid: int, file: str, name: str) -> int:
    """Return a field in kB of a process's file in /proc; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 // 1000 for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
