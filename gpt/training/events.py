"""What happens in a run, and what an observer may ask for.

Events are frozen and hold no tensor, no model and no trainer; every field is equal on every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpt.configs.run_plan import RunPlan


@dataclass(frozen=True)
class Event:
    """Something happened after `step` global batches were consumed."""

    step: int


@dataclass(frozen=True)
class TrainStart(Event):
    """Once, before the first step."""

    plan: RunPlan
    resumed_from: str | None
    """Checkpoint that the run continues from."""


@dataclass(frozen=True)
class StepEnd(Event):
    """After every step; on steps that report metrics, after MetricsReady."""

    tokens_seen: int


@dataclass(frozen=True)
class MetricsReady(Event):
    """At each log interval."""

    metrics: Mapping[str, float]
    """Host numbers, reduced over the processes."""
    losses: tuple[float, ...]
    """train/loss of every step since the last report, this one's last."""
    skipped: tuple[int, ...] = ()
    """Those of these steps whose update was skipped: a NaN or inf in a loss or gradient."""


@dataclass(frozen=True)
class EvalEnd(Event):
    """Published by the Evaluator."""

    task: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TextSampled(Event):
    """Published by the TextSampler."""

    prompt: str
    text: str
    """What the model wrote after the prompt."""


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """After the commit."""

    path: str


@dataclass(frozen=True)
class SpikeSeen(Event):
    """Published by the SpikeGuard; `step` is the spike's own."""

    loss: float
    median: float
    """Of the losses before it."""
    deviations: float
    """How many robust deviations lie between the two."""


@dataclass(frozen=True)
class RolledBack(Event):
    """After the state of `to_step` was loaded; `step` is the one that was left."""

    to_step: int
    reason: str


@dataclass(frozen=True)
class TrainEnd(Event):
    """On a clean end only."""

    reason: str
    """`finished`, or the reason that a Stop gave."""


def is_evaluated(event: Event, plan: RunPlan) -> bool:
    """Whether the model is evaluated on `event`: after steps that are due, at the start where the last one still is."""
    match event:
        case StepEnd(step=step):
            return plan.evaluates_at(step)
        case TrainStart():
            return plan.evaluates_first
    return False


@dataclass(frozen=True)
class Stop:
    """Command: end the run after this step; the state is saved."""

    reason: str


@dataclass(frozen=True)
class Save:
    """Command: write a checkpoint of this step."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the model at this step; recorded in the checkpoint."""


@dataclass(frozen=True)
class RollBack:
    """Command: go back to the newest checkpoint before all bad steps, and on without their batches."""

    reason: str
    bad_steps: Mapping[int, str]
    """Number of a step -> what was wrong with it."""


Command = Stop | Save | RollBack
