import dataclasses
import typing

import pytest

from gpt.training import events
from gpt.training.events import Event

EVENTS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]


@pytest.mark.parametrize("event", EVENTS)
def test_events_are_frozen_and_hold_no_tensor_model_or_trainer(event: type[Event]) -> None:
    assert event.__dataclass_params__.frozen  # type: ignore[attr-defined]
    held = str(typing.get_type_hints(event).values())
    assert not [name for name in ("torch", "Tensor", "Module", "Trainer") if name in held]
    assert next(field.name for field in dataclasses.fields(event)) == "step"


def test_events_are_the_documented_ones() -> None:
    names = {event.__name__ for event in EVENTS} - {"Event"}
    documented = {"TrainStart", "StepEnd", "MetricsReady", "EvalEnd", "TextSampled", "CheckpointSaved", "TrainEnd"}
    documented |= {"SpikeSeen", "RolledBack"}
    assert names == documented
