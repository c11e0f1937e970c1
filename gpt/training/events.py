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
class TrainEnd(Event):
    """On a clean end only."""

    reason: str
    """`finished`, or the reason that a Stop gave."""


@dataclass(frozen=True)
class Stop:
    """Command: end the run after this step; the state is saved."""

    reason: str


@dataclass(frozen=True)
class Save:
    """Command: write a checkpoint of this step."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the model at this step; recorded in the checkpoint."""


Command = Stop | Save
