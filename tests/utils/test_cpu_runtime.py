import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from gpt.utils.cpu_runtime import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

use(2**26)  # 64 MiB: 16,384 pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")
def test_large_blocks_are_not_mapped_anew_each_time() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("kept", "returned")
    }
    assert faults["kept"] < 100
    assert faults["returned"] > 100_000
