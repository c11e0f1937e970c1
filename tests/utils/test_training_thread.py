"""The training thread as another thread sees it."""

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpt.utils.hang import NO_PROGRESS, Progress
from gpt.utils.training_thread import COMPILER_FILES, TrainingThread, is_compiling

IN_STEP = Progress(3, 2, in_step=True)


@pytest.fixture
def run_in_thread() -> Iterator[Callable[[Callable[[threading.Event], None]], None]]:
    """Return a function that runs work in another thread until the test ends; the work gets the event of its end."""
    ended, threads = threading.Event(), list[threading.Thread]()

    def run(work: Callable[[threading.Event], None]) -> None:
        threads.append(threading.Thread(target=work, args=(ended,)))
        threads[-1].start()

    yield run
    ended.set()
    for thread in threads:
        thread.join()


def watch_thread(
    run_in_thread: Callable[..., None],
    work: Callable[[threading.Event], object],
    progress: Progress = IN_STEP,
    *,
    waits_idle: bool = True,
) -> bool:
    """Watch `work` for a second with a timeout of half a second, and return whether it ends up blocked."""
    watcher, follows = TrainingThread(0.5, waits_idle=waits_idle), threading.Event()

    def follow_and_work(ended: threading.Event) -> None:
        watcher.follow(lambda: progress)
        follows.set()
        work(ended)

    run_in_thread(follow_and_work)
    assert follows.wait(10)
    for _ in range(20):
        examined = watcher.examine()
        assert examined[0] == progress
        time.sleep(0.05)
    return examined[1]


def spin(ended: threading.Event) -> None:
    while not ended.is_set():
        sum(range(1000))


def test_nothing_is_blocked_before_training() -> None:
    assert TrainingThread(1, waits_idle=True).examine() == (NO_PROGRESS, False)


def test_waiting_thread_is_blocked_within_a_step_only(run_in_thread: Callable[..., None]) -> None:
    assert watch_thread(run_in_thread, threading.Event.wait)
    assert not watch_thread(run_in_thread, threading.Event.wait, Progress(3, 2, in_step=False))


def test_computing_thread_is_blocked_on_a_gpu_only(run_in_thread: Callable[..., None]) -> None:
    """Cover the host of a GPU, which may spin while it waits."""
    if not hasattr(time, "pthread_getcpuclockid"):
        pytest.skip("needs the clock of another thread")
    assert not watch_thread(run_in_thread, spin)
    assert watch_thread(run_in_thread, spin, waits_idle=False)


def test_progress_ends_the_wait() -> None:
    now, progress = [0.0], [IN_STEP]
    watcher = TrainingThread(10, waits_idle=False, clock=lambda: now[0])
    watcher.follow(lambda: progress[0])
    for now[0], progress[0], expected in (
        (0.0, IN_STEP, False),
        (9.0, IN_STEP, False),
        (10.0, IN_STEP, True),
        (11.0, IN_STEP._replace(parts=3), False),
        (21.0, IN_STEP._replace(parts=3), True),
    ):
        assert watcher.examine()[1] is expected
    watcher.follow(None)
    assert watcher.examine() == (NO_PROGRESS, False)


@pytest.mark.parametrize("file", COMPILER_FILES)
def test_compiling_thread_is_not_blocked(file: str, run_in_thread: Callable[..., None]) -> None:
    namespace: dict[str, Callable[[threading.Event], object]] = {}
    exec(compile("def wait(ended):\n    ended.wait()", f"/somewhere/{file}", "exec"), namespace)
    assert not is_compiling()
    assert not watch_thread(run_in_thread, namespace["wait"])
    assert is_compiling()


def test_real_compilation_is_recognised() -> None:
    """Let a backend of torch.compile look: it is called where kernels are compiled."""
    import torch

    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(is_compiling())
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert seen == [True]
    assert not is_compiling()


def test_place_is_the_innermost_line_of_the_package() -> None:
    now = [0.0]
    watcher = TrainingThread(10, waits_idle=False, clock=lambda: now[0])
    watcher.follow(lambda: IN_STEP)
    watcher.examine()
    assert watcher.find_place() == ""  # it has come further lately
    now[0] = 5.0
    # This thread is in find_place itself, below which there are frames of pytest.
    assert re.fullmatch(r"gpt/utils/training_thread\.py:\d+", watcher.find_place())
