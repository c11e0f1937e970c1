"""Kills at points that a seed draws, and what each of them hit."""

import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from gpt.checkpoint.run_folder import RunFolder
from gpt.errors import UserError
from gpt.verification.lives import TrainingProcess
from gpt.verification.watch import RunStatus, Watch

LOOK_EVERY = 0.001
"""Seconds between two looks at a run's folder: a small model's checkpoint is written in a few milliseconds."""
PATIENCE = 60.0
"""Seconds that a life may take beyond ten times the whole reference; then it hangs."""
FRUITLESS = 2
"""Lives in a row without a new checkpoint, after which the next one is left alone until there is one."""


class Place(Enum):
    """What a kill hits; the value says so to the user."""

    START_UP = "in start-up"
    STEP = "in a step"
    SAVE = "in a save"
    EVALUATION = "in an evaluation"
    EPOCH = "at an epoch's edge"


@dataclass(frozen=True)
class RunOutline:
    """What is known of the whole run, from the reference."""

    first_step: int
    """After which it begins: not 0 where it continues another run."""
    last_step: int
    checkpoint_interval: int
    """In steps; 0: the last one alone is saved."""
    evaluated: frozenset[int]
    """Steps after which the model is evaluated."""
    epoch_ends: frozenset[int]
    """Steps that consume the last sequence of an epoch."""

    @property
    def closing(self) -> int:
        """From here on a kill does not wait for anything that may not come before the end."""
        return max(self.first_step, self.last_step - (self.checkpoint_interval or self.last_step))


@dataclass
class Timings:
    """Seconds that things took in the reference."""

    start_up: float = 0.0
    """From the start of the process to the first report."""
    whole: float = 0.0
    steps: list[float] = field(default_factory=list)
    """Between two reports."""
    saves: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Of a step with nothing else in it."""
        return statistics.median(self.steps or [0.0])

    def of(self, place: Place, course: RunOutline) -> float:
        """How long a kill may wait, after what it waited for has come."""
        match place:
            case Place.START_UP:
                return self.start_up
            case Place.SAVE:
                return statistics.median(self.saves or [self.step])
            case Place.EVALUATION:
                return statistics.median(self.evaluations or [self.step])
            case Place.EPOCH:
                return 2 * self.step
            case Place.STEP:
                return self.step * max(1.0, course.checkpoint_interval / 2)


@dataclass(frozen=True)
class PlannedKill:
    """A kill that is yet to come."""

    place: Place
    """What it waits for; one in a step waits for nothing, and hits what is there."""
    step: float
    """Not before this one is reported."""
    fraction: float
    """Of the seconds that such a thing takes, to wait once it has come."""


@dataclass(frozen=True)
class KillRecord:
    """A kill that was."""

    place: Place
    step: int
    """Last step that was reported; of a life that reported none, the step that it continued from."""
    kept: int
    """Step of the newest checkpoint, from which the next life goes on."""

    @property
    def lost(self) -> int:
        """Steps to train once more."""
        return max(0, self.step - self.kept)


def plan_kills(seed: int, kills: int, course: RunOutline) -> list[PlannedKill]:
    """Half of the kills at any time, the others where things are written and read, up to the last interval."""
    places = [Place.START_UP, Place.SAVE]
    places += [Place.EVALUATION] if course.evaluated else []
    places += [Place.EPOCH] if course.epoch_ends else []
    drawn = random.Random(seed)
    chosen = [Place.STEP if i % 2 else places[i // 2 % len(places)] for i in range(kills)]
    drawn.shuffle(chosen)
    end = course.closing if course.closing > course.first_step else course.last_step
    steps = sorted(drawn.uniform(course.first_step, end) for _ in range(kills))
    return [PlannedKill(place, step, drawn.random()) for place, step in zip(chosen, steps, strict=True)]


def measure(life: TrainingProcess, folder: RunFolder) -> Timings:
    """Watch the reference until its end."""
    watch, pace, started = Watch(folder), Timings(), time.monotonic()
    before, since = watch.look(), started
    saving_since = evaluating_since = started
    while life.poll() is None:
        time.sleep(LOOK_EVERY)
        sight, now = watch.look(), time.monotonic()
        if sight.step != before.step:
            if not before.step:
                pace.start_up = now - started
            elif sight.step == before.step + 1:
                pace.steps.append(now - since)
            since = evaluating_since = now
        if sight.evaluated != before.evaluated:
            pace.evaluations.append(now - evaluating_since)
        if sight.saving and not before.saving:
            saving_since = now
        if before.saving and not sight.saving:
            pace.saves.append(now - saving_since)
        before = sight
    pace.whole = time.monotonic() - started
    return pace


def kill_and_resume(
    start: Callable[[], TrainingProcess],
    folder: RunFolder,
    aims: Sequence[PlannedKill],
    course: RunOutline,
    pace: Timings,
    tell: Callable[[int, KillRecord], None],
) -> list[KillRecord]:
    """Kill one life after the other, then let the last one finish.

    Args:
        start: begins or continues the run.
        folder: of the run.
        aims: one for each kill.
        course: of the whole run.
        pace: of the reference.
        tell: of each kill as it happens, and how many there were.

    Returns:
        The kills; fewer than there were aims if the run came to its end before.

    Raises:
        UserError: a life that nobody killed failed, or hangs.
    """
    kills: list[KillRecord] = []
    fruitless = 0
    for aim in [*aims, None]:
        watch = Watch(folder)
        before = max(watch.look().committed, course.first_step)
        life = start()
        try:
            _watch_until_due(life, watch, aim, course, pace, saved_at=before if fruitless >= FRUITLESS else None)
        finally:
            life.kill()
        if (status := life.poll()) == 0:
            return kills
        if status != -signal.SIGKILL or aim is None:
            raise UserError(f"it ended by itself with status {status}")
        sight = watch.look()
        place = _place(sight, course, resumed_at=before)
        kept = max(sight.committed, course.first_step)
        kills.append(KillRecord(place, before if place is Place.START_UP else sight.step, kept))
        tell(len(kills), kills[-1])
        fruitless = 0 if kept > before else fruitless + 1
    raise AssertionError("the last life is nobody's to kill")


def _watch_until_due(
    life: TrainingProcess,
    watch: Watch,
    aim: PlannedKill | None,
    course: RunOutline,
    pace: Timings,
    saved_at: int | None,
) -> None:
    """Watch a life until it has ended, or is to be ended now.

    Args:
        life: to watch.
        watch: how.
        aim: when to end it; None lets it finish.
        course: of the whole run.
        pace: of the reference.
        saved_at: there has to be a newer checkpoint than this before; None: no such wish.

    Raises:
        UserError: it hangs.
    """
    patience = PATIENCE + 10 * pace.whole
    deadline = time.monotonic() + patience
    while life.poll() is None:
        sight = watch.look()
        if aim is not None and _is_due(aim, sight, course, saved_at):
            closing = aim.place is not Place.START_UP and sight.step >= course.closing
            time.sleep(aim.fraction * (pace.step if closing else pace.of(aim.place, course)))
            return
        if time.monotonic() > deadline:
            raise UserError(f"it hangs at step {sight.step}: {patience:.0f} s without an end")
        time.sleep(LOOK_EVERY)


def _is_due(aim: PlannedKill, sight: RunStatus, course: RunOutline, saved_at: int | None) -> bool:
    """Whether what an aim waits for has come."""
    if aim.place is Place.START_UP:
        return True
    if not sight.begun:
        return False
    if sight.step >= course.closing:
        return sight.step >= min(aim.step, course.last_step - 1)
    if sight.step < aim.step or (saved_at is not None and sight.committed <= saved_at):
        return False
    match aim.place:
        case Place.SAVE:
            return sight.saving
        case Place.EVALUATION:
            return sight.step in course.evaluated and sight.evaluated < sight.step
        case Place.EPOCH:
            return sight.step + 1 in course.epoch_ends
    return True


def _place(sight: RunStatus, course: RunOutline, resumed_at: int) -> Place:
    """What a kill hit, from what it left."""
    if sight.saving:
        return Place.SAVE
    if sight.step <= resumed_at:  # no step of this life was reported
        return Place.START_UP
    if sight.step in course.evaluated and sight.evaluated < sight.step:
        return Place.EVALUATION
    if {sight.step, sight.step + 1} & course.epoch_ends:
        return Place.EPOCH
    return Place.STEP
