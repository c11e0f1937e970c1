"""Events of a run, and the commands that observers return.

Events are frozen and hold no tensor, model or trainer; every field is equal on every rank. To add one, write a
dataclass here and publish it from `Trainer` or from an observer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpt.configs.run_plan import RunPlan


@dataclass(frozen=True)
class Event:
    """Something that happened after `step` global batches were consumed."""

    step: int


@dataclass(frozen=True)
class TrainStart(Event):
    """Published once, before the first step."""

    plan: RunPlan
    resumed_from: str | None
    """Checkpoint that the run resumes from."""


@dataclass(frozen=True)
class StepEnd(Event):
    """Published after every step; on steps that report metrics, after MetricsReady."""

    tokens_seen: int


@dataclass(frozen=True)
class MetricsReady(Event):
    """Published at each log interval."""

    metrics: Mapping[str, float]
    """Metric -> value, reduced over all ranks."""
    losses: tuple[float, ...]
    """train/loss of every step since the last report, in order, up to `step`."""
    skipped: tuple[int, ...] = ()
    """Numbers of these steps whose update was skipped for a NaN or inf in the loss or gradient."""


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
    """Sample, without the prompt."""


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Published once a checkpoint is committed to the disk."""

    path: str


@dataclass(frozen=True)
class SpikeSeen(Event):
    """Published by the SpikeGuard; `step` is the step of the spike."""

    loss: float
    median: float
    """Median of the losses before it."""
    deviations: float
    """Distance from the median in robust standard deviations."""


@dataclass(frozen=True)
class RolledBack(Event):
    """Published after a rollback from `step` to the checkpoint of `to_step`."""

    to_step: int
    reason: str


@dataclass(frozen=True)
class TrainEnd(Event):
    """Published at a clean end only."""

    reason: str
    """`finished`, or the reason of the Stop that ended the run."""


@dataclass(frozen=True)
class Stop:
    """Command: save the state and end the run after this step."""

    reason: str


@dataclass(frozen=True)
class Save:
    """Command: write a checkpoint of this step."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the model at this step; recorded in the checkpoint."""


@dataclass(frozen=True)
class RollBack:
    """Command: load the newest scheduled checkpoint before all bad steps, and train on without their batches.

    For a bit-exact resume, the command must depend on losses up to the last bad step alone, not on when it is given: a
    stop or a save reports steps early.
    """

    reason: str
    bad_steps: Mapping[int, str]
    """Number of a bad step -> what was wrong with it."""


Command = Stop | Save | RollBack


def is_evaluated(event: Event, plan: RunPlan) -> bool:
    """Return whether the model is evaluated on `event`: a due step, or a start whose step was not evaluated yet."""
    match event:
        case StepEnd(step=step):
            return plan.evaluates_at(step)
        case TrainStart():
            return plan.evaluates_first
    return False
