import os
import subprocess
import sys

import pytest

CODE = """
import atexit, sys, threading, time
from gpt.utils.launch import end_process

atexit.register(print, "cleaned up")
threading.Thread(target=time.sleep, args=(600,)).start()
print("said", end=" ")
end_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("status", "processes", "said"),
    [(0, 1, "said cleaned up\n"), (2, 1, "said cleaned up\n"), (0, 2, "said cleaned up\n"), (2, 2, "said ")],
)
def test_end_process_does_not_wait_for_threads(status: int, processes: int, said: str) -> None:
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", CODE, str(status)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, said)


def test_end_process_lets_a_profiler_report() -> None:
    code = "import cProfile; cProfile.run('from gpt.utils.launch import end_process; end_process(3)')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert "function calls" in done.stdout
