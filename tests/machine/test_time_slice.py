import ctypes
import os
import platform
import subprocess
import sys
import threading

import pytest

from gpt.machine.time_slice import SHORT_SLICE_NANOSECONDS, SYSTEM_CALLS, SchedAttr, shorten_time_slices

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS, reason="needs Linux on x86 or ARM"
)


def read_attributes(thread: int) -> SchedAttr:
    attributes = SchedAttr()
    number = SYSTEM_CALLS[platform.machine()] + 1  # sched_getattr
    assert ctypes.CDLL(None).syscall(number, thread, ctypes.byref(attributes), ctypes.sizeof(attributes), 0) == 0
    return attributes


def test_slices_are_short_and_priorities_stay() -> None:
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    first, second = (thread.native_id or 0 for thread in threads)
    os.setpriority(os.PRIO_PROCESS, first, 7)
    before = read_attributes(second)
    try:
        shorten_time_slices([2**22 + 1, first, second])  # no thread has the first id
        assert [read_attributes(thread).nice for thread in (first, second)] == [7, before.nice]
        slices = {read_attributes(thread).runtime for thread in (first, second)}
        assert slices == {SHORT_SLICE_NANOSECONDS if before.runtime else 0}  # Linux before 6.12 reports none
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_scheduling_that_the_user_has_set_stays() -> None:
    code = (
        "import os; from gpt.machine.time_slice import shorten_time_slices; os.sched_setscheduler(0, os.SCHED_BATCH, "
    )
    code += "os.sched_param(0)); shorten_time_slices([os.getpid()]); print(os.sched_getscheduler(0) == os.SCHED_BATCH)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
