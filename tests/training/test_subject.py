from collections.abc import Iterable

import pytest

from gpt.training.events import Command, EvalEnd, Event, Save, StepEnd, Stop, TextSampled
from gpt.training.subject import Subject


class Reacting:
    """Notes what it is told, and reacts to one type of event."""

    def __init__(self, log: list[tuple[str, str]], name: str, to: type[Event], *reactions: Command | Event):
        self.log, self.name, self.to, self.reactions = log, name, to, reactions

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        self.log.append((self.name, type(event).__name__))
        return self.reactions if isinstance(event, self.to) else ()

    def close(self, error: BaseException | None) -> None:
        self.log.append((self.name, f"close {error}"))
        if self.to is Event:
            raise OSError(f"{self.name} cannot close")


STEP = StepEnd(1, 10)


def test_observers_are_told_in_the_order_of_attachment() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject()
    for name in "abc":
        subject.attach(Reacting(log, name, TextSampled))
    assert subject.notify(STEP) == []
    assert log == [("a", "StepEnd"), ("b", "StepEnd"), ("c", "StepEnd")]


def test_published_events_follow_first_in_first_out_to_everyone() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject()
    subject.attach(Reacting(log, "a", StepEnd, EvalEnd(1, "val", {}), TextSampled(1, "", "")))
    subject.attach(Reacting(log, "b", EvalEnd, Stop("enough")))
    assert subject.notify(STEP) == [Stop("enough")]
    assert log == [(name, event) for event in ("StepEnd", "EvalEnd", "TextSampled") for name in "ab"]


def test_commands_are_returned_in_order() -> None:
    subject = Subject()
    subject.attach(Reacting([], "a", StepEnd, Save(), Stop("one")))
    subject.attach(Reacting([], "b", StepEnd, Stop("two")))
    assert subject.notify(STEP) == [Save(), Stop("one"), Stop("two")]


def test_a_detached_observer_hears_no_more() -> None:
    log: list[tuple[str, str]] = []
    subject, observer = Subject(), Reacting(log, "a", StepEnd)
    subject.attach(observer)
    subject.detach(observer)
    subject.notify(STEP)
    assert log == []
    with pytest.raises(ValueError, match="not in list"):
        subject.detach(observer)


def test_an_observers_error_is_the_runs() -> None:
    class Failing(Reacting):
        def on_event(self, event: Event) -> Iterable[Command | Event]:
            raise RuntimeError("broken")

    subject = Subject()
    subject.attach(Failing([], "a", StepEnd))
    with pytest.raises(RuntimeError, match="broken"):
        subject.notify(STEP)


def test_all_are_closed_though_one_cannot() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject()
    subject.attach(Reacting(log, "a", Event))
    subject.attach(Reacting(log, "b", StepEnd))
    with pytest.raises(OSError, match="a cannot close"):
        subject.close(None)
    assert log == [("a", "close None"), ("b", "close None")]
