from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from gpt.training.events import Command, EvalEnd, Event, Save, StepEnd, Stop, TextSampled
from gpt.training.logger import Logger
from gpt.training.observer import Observer, Probe, Sink
from gpt.training.subject import Subject


class Reacting(Observer):
    """Notes every event, and reacts to one type."""

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


def test_observers_get_events_in_the_order_of_attachment() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject(Logger(60.0))
    for name in "abc":
        subject.attach(Reacting(log, name, TextSampled))
    assert subject.notify(STEP) == []
    assert log == [("a", "StepEnd"), ("b", "StepEnd"), ("c", "StepEnd")]


def test_published_events_reach_all_observers_first_in_first_out() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject(Logger(60.0))
    subject.attach(Reacting(log, "a", StepEnd, EvalEnd(1, "val", {}), TextSampled(1, "", "")))
    subject.attach(Reacting(log, "b", EvalEnd, Stop("enough")))
    assert subject.notify(STEP) == [Stop("enough")]
    assert log == [(name, event) for event in ("StepEnd", "EvalEnd", "TextSampled") for name in "ab"]


def test_commands_are_returned_in_order() -> None:
    subject = Subject(Logger(60.0))
    subject.attach(Reacting([], "a", StepEnd, Save(), Stop("one")))
    subject.attach(Reacting([], "b", StepEnd, Stop("two")))
    assert subject.notify(STEP) == [Save(), Stop("one"), Stop("two")]


def test_detached_observer_gets_no_event() -> None:
    log: list[tuple[str, str]] = []
    subject, observer = Subject(Logger(60.0)), Reacting(log, "a", StepEnd)
    subject.attach(observer)
    subject.detach(observer)
    subject.notify(STEP)
    assert log == []
    with pytest.raises(ValueError, match="not in list"):
        subject.detach(observer)


def test_error_of_an_observer_is_raised() -> None:
    class Failing(Reacting):
        def on_event(self, event: Event) -> Iterable[Command | Event]:
            raise RuntimeError("broken")

    subject = Subject(Logger(60.0))
    subject.attach(Failing([], "a", StepEnd))
    with pytest.raises(RuntimeError, match="broken"):
        subject.notify(STEP)


def test_all_observers_are_closed_when_one_fails_to_close() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject(Logger(60.0))
    subject.attach(Reacting(log, "a", Event))
    subject.attach(Reacting(log, "b", StepEnd))
    with pytest.raises(OSError, match="a cannot close"):
        subject.close(None)
    assert log == [("a", "close None"), ("b", "close None")]


def test_only_the_error_that_ended_the_run_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    subject = Subject(Logger(60.0))
    for name in "ab":
        subject.attach(Reacting([], name, Event))
    subject.close(RuntimeError("broken"))
    assert caplog.messages == [f"Reacting could not be closed: {name} cannot close" for name in "ab"]
    caplog.clear()
    with pytest.raises(OSError, match="a cannot close"):
        subject.close(None)
    assert caplog.messages == ["Reacting could not be closed: b cannot close"]


class Listing(Sink):
    """Notes the events that it writes, and that it was closed."""

    def __init__(self, log: list[tuple[str, str]], *events: type[Event]):
        self.log = log
        if events:
            self.events = events

    def write(self, event: Event) -> None:
        self.log.append(("sink", type(event).__name__))

    def close(self, error: BaseException | None) -> None:
        self.log.append(("sink", f"close {error}"))


def test_sinks_write_after_all_observers_wherever_they_were_attached() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject(Logger(60.0))
    subject.attach(Listing(log))
    subject.attach(Reacting(log, "a", StepEnd, TextSampled(1, "", "")))
    subject.notify(STEP)
    assert log == [(name, event) for event in ("StepEnd", "TextSampled") for name in ("a", "sink")]


def test_sink_gets_only_the_events_that_it_declares() -> None:
    log: list[tuple[str, str]] = []
    subject = Subject(Logger(60.0))
    subject.attach(Listing(log, TextSampled, EvalEnd))
    for event in (STEP, TextSampled(1, "", ""), EvalEnd(1, "val", {})):
        subject.notify(event)
    subject.close(None)
    assert log == [("sink", "TextSampled"), ("sink", "EvalEnd"), ("sink", "close None")]


def test_detached_sink_gets_no_event() -> None:
    log: list[tuple[str, str]] = []
    subject, sink = Subject(Logger(60.0)), Listing(log)
    subject.attach(sink)
    subject.detach(sink)
    subject.notify(STEP)
    subject.close(None)
    assert log == []
    with pytest.raises(ValueError, match="not in list"):
        subject.detach(sink)


def test_probes_are_attached_and_detached() -> None:
    class Nothing(Probe):
        def measure(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
            return {}

    subject, probe = Subject(Logger(60.0)), Nothing()
    subject.attach(probe)
    assert subject._probes == [probe]
    subject.detach(probe)
    assert subject._probes == []


def test_attaching_anything_else_is_refused() -> None:
    class Duck:
        def on_event(self, event: Event) -> tuple[()]:
            return ()

        def close(self, error: BaseException | None) -> None: ...

    with pytest.raises(TypeError, match="Duck cannot be attached: derive it from Sink, Observer or Probe"):
        Subject(Logger(60.0)).attach(Duck())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Duck is not attached"):
        Subject(Logger(60.0)).detach(Duck())  # type: ignore[arg-type]
