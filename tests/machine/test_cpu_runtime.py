import ast
import os
import subprocess
import sys

import pytest

from gpt.machine.spinning import read_thread_times

FAULTS = """
import ctypes, resource, sys
from gpt.machine.cpu_runtime import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "reused":
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_blocks_are_reused_without_page_faults() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("reused", "returned")
    }
    assert faults["reused"] < 100
    assert faults["returned"] > 100_000


SET_UP = """
import sys, torch
from gpt.configs.runtime_config import RuntimeConfig
from gpt.machine import cpu_runtime
cpu_runtime.usable_cores = lambda: 1
print(cpu_runtime.set_up_cpu(RuntimeConfig.model_validate_json(sys.argv[1])))
tiny = torch.full((2**20,), 1e-39).mul(1.0)  # large enough for every thread to have a share
print(int((tiny == 0).sum()), torch.get_num_threads())
"""


def set_up(config: str = "{}", **environment: str) -> tuple[dict[str, object], int, int]:
    command = [sys.executable, "-c", SET_UP, config]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    settings, counts = subprocess.run(
        command, env=clean, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    zeros, threads = counts.split()
    return ast.literal_eval(settings), int(zeros), int(threads)


def test_by_default_threads_do_not_exceed_cores_and_denormals_are_not_flushed() -> None:
    settings, zeros, threads = set_up()
    assert settings["threads"] == threads == 1
    assert zeros == 0
    assert settings["flush_denormals"] is False


def test_threads_of_the_config_override_those_of_the_environment() -> None:
    assert set_up(OMP_NUM_THREADS="2")[2] == min(2, os.cpu_count() or 1)
    settings, zeros, threads = set_up(
        '{"threads": 4, "flush_denormals": true, "keep_freed_memory": false, "fused_attention": false, '
        '"sleep_when_busy": false}',
        OMP_NUM_THREADS="2",
    )
    assert threads == 4
    assert settings == {
        "threads": 4,
        "keep_freed_memory": False,
        "flush_denormals": zeros > 0,
        "fused_attention": False,
        "sleep_when_busy": False,
    }
    assert zeros in (0, 2**20)  # all threads flush, or none can


def test_several_threads_sleep_when_busy_unless_the_user_decides_how_they_wait() -> None:
    assert set_up('{"threads": 2}', OMP_NUM_THREADS="1")[0]["sleep_when_busy"] is bool(read_thread_times())
    assert set_up('{"threads": 2}', GOMP_SPINCOUNT="1000")[0]["sleep_when_busy"] is False
    assert set_up('{"threads": 1}')[0]["sleep_when_busy"] is False


COMPARE_FIRST_CALLS = """
import torch
from gpt.configs.runtime_config import RuntimeConfig
from gpt.machine import cpu_runtime
from gpt.models.gpt import GPT
cpu_runtime.set_up_cpu(RuntimeConfig(threads=2))
tensor = torch.ones(2**20)
for _ in range(20):
    tensor.add_(1.0)  # both threads are awake
x = torch.linspace(0.01, 0.99, 2**16)
for name in ("tanh", "sin", "cos", "erf", "log", "sqrt"):
    function = getattr(torch, name)
    print(name, int((function(x) != function(x)).sum()))
"""


def test_first_threaded_call_of_a_vector_function_computes_the_bits_of_later_calls() -> None:
    command = [sys.executable, "-c", COMPARE_FIRST_CALLS]
    for _ in range(8):  # without the initialization about one process in six differs
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.split()[1::2] == ["0"] * 6, output
