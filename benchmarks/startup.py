"""Time to the first step of `gpt train quickstart` with a prepared corpus, compared with `import torch` alone.

    python -m benchmarks.startup --repeats 5

Both are separate processes and alternate. The first step ends when the console shows it; the median time of a later
step is subtracted.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise

from benchmarks.common import format_spread, format_verdict, measure_program, run_interleaved

OURS, TORCH = "gpt train quickstart, to its first step", "import torch"
STEPS = 4
MAX_SECONDS_BEYOND_IMPORT = 2.0


def main() -> None:
    """Measure and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        measure_first_step(cache)  # prepares the text and measures the machine's peak FLOP/s
        contenders = {OURS: partial(measure_first_step, cache), TORCH: measure_import}
        seconds = run_interleaved(contenders, dict.fromkeys(contenders, arguments.repeats))
    for name, values in seconds.items():
        print(f"{name:42} {format_spread(values, ' s')}")
    beyond = statistics.median(seconds[OURS]) - statistics.median(seconds[TORCH])
    print(f"beyond the import: {beyond:.2f} s ({format_verdict(beyond, MAX_SECONDS_BEYOND_IMPORT, at_least=False)})")


def measure_first_step(cache: str) -> float:
    """Return the seconds from the start of the process to the start of its first step."""
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


def measure_import() -> float:
    """Return the seconds of a process that only imports torch."""
    return measure_program([sys.executable, "-c", "import torch"]).seconds


if __name__ == "__main__":
    main()
