import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest

from gpt.machine import spinning
from gpt.machine.spinning import (
    MAX_CORES_OF_OTHERS,
    MAX_SLEEP_SECONDS,
    MAX_WAITING_SHARE,
    MIN_SLEEP_SECONDS,
    USER_VARIABLES,
    SpinPolicy,
    ThreadTimes,
    find_spin_control,
    find_waiting_share,
    read_thread_times,
    sleep_when_busy,
)

BUSY, QUIET = MAX_WAITING_SHARE + 0.1, MAX_WAITING_SHARE - 0.1
FREE = 0.0
needs_statistics = pytest.mark.skipif(not read_thread_times(), reason="needs Linux with schedstat")


def test_threads_spin_while_cores_are_free() -> None:
    policy = SpinPolicy()
    assert all(policy.update(QUIET, FREE, now) for now in range(100))


def test_threads_sleep_on_a_busy_machine_and_spin_again_when_it_is_quiet() -> None:
    policy = SpinPolicy()
    assert not policy.update(BUSY, FREE, 10.0)
    assert not policy.update(0.0, FREE, 10.0 + MIN_SLEEP_SECONDS / 2)
    assert policy.update(BUSY, FREE, 10.0 + MIN_SLEEP_SECONDS)
    assert policy.update(QUIET, FREE, 10.25 + MIN_SLEEP_SECONDS)


def test_threads_do_not_try_spinning_while_others_use_the_cores() -> None:
    policy = SpinPolicy()
    assert not policy.update(BUSY, FREE, 0.0)
    assert not any(policy.update(BUSY, MAX_CORES_OF_OTHERS + 0.1, now) for now in range(1, 100))
    assert policy.update(BUSY, MAX_CORES_OF_OTHERS, 100.0)


def test_intervals_without_computation_change_nothing() -> None:
    policy = SpinPolicy()
    assert policy.update(None, FREE, 1.0) and not policy.update(BUSY, FREE, 2.0)
    assert not policy.update(None, FREE, 100.0)
    assert policy.update(QUIET, FREE, 101.0)


def test_threads_of_a_busy_machine_try_spinning_ever_more_rarely() -> None:
    policy, tries = SpinPolicy(), []
    for quarter in range(4 * 120):
        if policy.update(BUSY, FREE, quarter / 4):
            tries.append(quarter / 4)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(MAX_SLEEP_SECONDS, abs=0.5)
    assert (
        policy.update(BUSY, FREE, 1000.0)
        and policy.update(QUIET, FREE, 1000.25)
        and not policy.update(BUSY, FREE, 1000.5)
    )
    assert policy.update(BUSY, FREE, 1000.5 + MIN_SLEEP_SECONDS)


def test_waiting_share_is_that_of_the_compute_thread_that_waits_longest() -> None:
    before = {1: ThreadTimes(10**9, 10**9), 2: ThreadTimes(0, 0), 3: ThreadTimes(0, 0), 4: ThreadTimes(5, 5)}
    after = {
        1: ThreadTimes(10**9 + 200_000_000, 10**9 + 50_000_000),
        2: ThreadTimes(100_000_000, 150_000_000),
        3: ThreadTimes(0, 10_000_000),  # nearly idle
        4: ThreadTimes(1_000_005, 250_000_005),  # waits for its turn, but computes nothing
        5: ThreadTimes(0, 10**9),  # new
    }
    assert find_waiting_share(before, after, 0.25) == 0.6
    assert find_waiting_share(before, before, 0.25) is None


SPIN = """
import ctypes, sys, time
import torch
from gpt.machine.spinning import find_spin_control
torch.set_num_threads(2)
x = torch.ones(2**20)

def count_milliseconds():
    x.add(1)
    start = time.process_time()
    for _ in range(20):
        x.add(1)
        time.sleep(0.03)  # one thread waits for work
    return (time.process_time() - start) * 1000

control = find_spin_control(2)
milliseconds = [count_milliseconds()]
control.sleep()
milliseconds.append(count_milliseconds())
control.spin()
milliseconds.append(count_milliseconds())
print(*milliseconds)
"""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*USER_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    sleep_when_busy(1)


@needs_statistics
@pytest.mark.usefixtures("clean_environment")
def test_control_ends_and_restores_the_cpu_time_of_waiting() -> None:
    out = subprocess.run([sys.executable, "-c", SPIN], capture_output=True, text=True, check=True).stdout
    spinning_at_first, sleeping, spinning_again = map(float, out.split())
    assert sleeping < spinning_at_first / 2
    assert sleeping < spinning_again / 2


BITS = """
import torch
from gpt.configs.gpt_config import GPTConfig
from gpt.machine.spinning import find_spin_control
from gpt.models.gpt import GPT
torch.set_num_threads(2)
control = find_spin_control(2)
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=512).resolve(), seed=0)
tokens = torch.arange(8 * 64).reshape(8, 64) % 512

def train():
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]

results = [train()]
for change in (control.sleep, control.spin, control.sleep):
    change()
    results.append(train())
assert torch.get_num_threads() == 2
print(all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)))
"""


@needs_statistics
@pytest.mark.usefixtures("clean_environment")
def test_waiting_changes_no_bit() -> None:
    out = subprocess.run([sys.executable, "-c", BITS], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True"]


@needs_statistics
@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize("name", USER_VARIABLES)
def test_wait_policy_of_the_user_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spin_control(2) is not None
    monkeypatch.setenv(name, "1")
    assert find_spin_control(2) is None
    assert not sleep_when_busy(2)


@pytest.mark.usefixtures("clean_environment")
def test_one_thread_and_unknown_systems_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sleep_when_busy(1)
    assert not sleep_when_busy(2, enabled=False)
    monkeypatch.setattr(spinning, "THREADS", spinning.THREADS / "missing")
    assert not sleep_when_busy(2)


class RecordingControl:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def spin(self) -> None:
        self.calls.append("spin")


@needs_statistics
@pytest.mark.usefixtures("clean_environment")
def test_watcher_lets_threads_sleep_and_restores_spinning_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    control = RecordingControl()
    monkeypatch.setattr(spinning, "find_spin_control", lambda threads: control)
    monkeypatch.setattr(spinning, "find_waiting_share", lambda *_: 1.0)
    monkeypatch.setattr(spinning, "POLL_SECONDS", 0.001)
    assert sleep_when_busy(2)
    watcher = spinning._watchers[0]
    while not control.calls:
        os.sched_yield()
    assert not sleep_when_busy(2, enabled=False)
    assert not watcher.is_alive()
    assert control.calls == ["sleep", "spin"]
