import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from gpt.utils.cpu_runtime import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(2**24)  # 64 MiB: 16,384 pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24 - 1024)  # aligned allocation needs a little more room than it takes
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")
def test_large_blocks_are_not_mapped_anew_each_time() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("kept", "returned")
    }
    assert faults["kept"] < faults["returned"] / 5
