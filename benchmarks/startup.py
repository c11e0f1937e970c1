"""How soon `gpt train quickstart` takes its first step, with everything prepared, beside `import torch` alone.

    python -m benchmarks.startup --repeats 5

Both are processes of their own and take turns. The first step is over when the console shows it; the time that such a
step takes afterwards is subtracted.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise

from benchmarks.common import cost_of, interleaved, spread, verdict

OURS, TORCH = "gpt train quickstart, to its first step", "import torch"
STEPS = 4
MOST_BEYOND = 2.0
"""Seconds."""


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        to_first_step(cache)  # prepares the text, and measures the machine's peak
        contenders = {OURS: partial(to_first_step, cache), TORCH: import_torch}
        seconds = interleaved(contenders, dict.fromkeys(contenders, given.repeats))
    for name, taken in seconds.items():
        print(f"{name:42} {spread(taken, ' s')}")
    beyond = statistics.median(seconds[OURS]) - statistics.median(seconds[TORCH])
    print(f"beyond the import: {beyond:.2f} s ({verdict(beyond, MOST_BEYOND, at_least=False)})")


def to_first_step(cache: str) -> float:
    """Seconds from the start of the process to the start of its first step."""
    with tempfile.TemporaryDirectory() as run:
        flags = ["--data.cache-dir", cache, "--run-dir", run, "--max-steps", str(STEPS), "--log.interval", "1"]
        command = [sys.executable, "-m", "gpt.main", "train", "quickstart", *flags]
        start, ends = time.perf_counter(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step ") and "tokens/s" in line:
                    ends.append(time.perf_counter())
        if process.returncode or len(ends) != STEPS:
            raise SystemExit(f"{command} ended with status {process.returncode} after {len(ends)} steps")
    return ends[0] - start - statistics.median(end - begin for begin, end in pairwise(ends))


def import_torch() -> float:
    """Seconds of a process that does nothing else."""
    return cost_of([sys.executable, "-c", "import torch"]).seconds


if __name__ == "__main__":
    main()
