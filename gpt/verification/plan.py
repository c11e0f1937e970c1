"""Plan of the kills: at which step, in which phase, after which delay and by which signal, all decided by a seed."""

import random
from dataclasses import dataclass
from enum import Enum
from signal import SIGINT, SIGKILL, SIGTERM, Signals

SIGNALS = (SIGKILL, SIGTERM, SIGKILL, SIGKILL, SIGINT, SIGKILL)
"""Signals of the kills, in turn; SIGTERM and SIGINT let the run save its state."""


class KillPhase(Enum):
    """Phase of a run that a kill hits; the value is shown to the user."""

    START_UP = "during start-up"
    STEP = "during a step"
    SAVE = "during a save"
    EVALUATION = "during an evaluation"
    EPOCH_BOUNDARY = "at an epoch boundary"


@dataclass(frozen=True)
class RunOutline:
    """Steps of the run at which something happens, as the reference run shows them."""

    first_step: int
    """Step that the run starts from: 0, or the step of the other run's checkpoint that it forks."""
    last_step: int
    checkpoint_interval: int
    """Steps between two checkpoints; 0: only the last step is saved."""
    evaluated_steps: frozenset[int]
    """Steps after which the model is evaluated."""
    epoch_ends: frozenset[int]
    """Steps that consume the last sequence of an epoch."""

    @property
    def last_interval_start(self) -> int:
        """Step from which on kills no longer wait for their phase, which may not occur again before the end."""
        return max(self.first_step, self.last_step - (self.checkpoint_interval or self.last_step))


@dataclass(frozen=True)
class PlannedKill:
    """Condition under which to kill the run."""

    phase: KillPhase
    """Phase to wait for; STEP waits for none and hits whatever is under way."""
    step: float
    """Earliest step."""
    delay_fraction: float
    """Delay after the phase has begun, as a fraction of the time that it took in the reference run."""
    signal: Signals = SIGKILL


def plan_kills(seed: int, n_kills: int, outline: RunOutline) -> list[PlannedKill]:
    """Plan half of the kills at random times, and half in the phases that read or write files.

    Every third kill is a graceful stop by SIGTERM or SIGINT.

    Args:
        seed: seed of phases, steps, delays and signals.
        n_kills: number of kills.
        outline: outline of the run; kills are planned before its last checkpoint interval.
    """
    phases = [KillPhase.START_UP, KillPhase.SAVE]
    phases += [KillPhase.EVALUATION] if outline.evaluated_steps else []
    phases += [KillPhase.EPOCH_BOUNDARY] if outline.epoch_ends else []
    generator = random.Random(seed)
    chosen = [KillPhase.STEP if i % 2 else phases[i // 2 % len(phases)] for i in range(n_kills)]
    generator.shuffle(chosen)
    has_interval = outline.last_interval_start > outline.first_step
    end = outline.last_interval_start if has_interval else outline.last_step
    steps = sorted(generator.uniform(outline.first_step, end) for _ in range(n_kills))
    delays = [generator.random() for _ in range(n_kills)]
    first_signal = generator.randrange(len(SIGNALS))
    return [
        PlannedKill(*place, SIGNALS[(first_signal + number) % len(SIGNALS)])
        for number, place in enumerate(zip(chosen, steps, delays, strict=True))
    ]
