"""The sink that writes metrics.jsonl and samples.jsonl, one JSON object a line."""

import math
from collections.abc import Mapping
from pathlib import Path

from gpt.training.events import EvalEnd, Event, MetricsReady, RolledBack, SpikeSeen, TextSampled
from gpt.training.observer import Sink
from gpt.utils.atomic_io import append_jsonl, truncate_jsonl


class JsonlSink(Sink):
    """Appends metrics and samples; a number that JSON lacks (NaN, inf) is written as null."""

    events: tuple[type[Event], ...] = (MetricsReady, EvalEnd, SpikeSeen, RolledBack, TextSampled)

    def __init__(self, metrics: Path, samples: Path):
        self._metrics, self._samples = metrics, samples

    def write(self, event: Event) -> None:
        """Append a line per report, evaluation, spike or sample; a rollback removes the lines after its step."""
        match event:
            case MetricsReady(step=step, metrics=metrics) | EvalEnd(step=step, metrics=metrics):
                self._append(step, metrics)
            case SpikeSeen(step=step, loss=loss, median=median, deviations=deviations):
                numbers = {"spike/loss": loss, "spike/median": median, "spike/deviations": deviations}
                self._append(step, numbers)
            case RolledBack(to_step=to_step):
                for records in (self._metrics, self._samples):
                    truncate_jsonl(records, to_step)
            case TextSampled(step=step, prompt=prompt, text=text):
                append_jsonl(self._samples, {"step": step, "prompt": prompt, "text": text})

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_jsonl(self._metrics, {"step": step, **numbers})
