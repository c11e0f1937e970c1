"""metrics.jsonl and samples.jsonl: one JSON object a line."""

import math
from pathlib import Path

from gpt.training.events import EvalEnd, Event, MetricsReady, TextSampled
from gpt.utils.atomic_io import append_jsonl


class JsonlSink:
    """Appends metrics and texts; a number that JSON has no name for (NaN, inf) is written as null."""

    def __init__(self, metrics: Path, samples: Path):
        self._metrics, self._samples = metrics, samples

    def write(self, event: Event) -> None:
        """One line per report, evaluation or text."""
        match event:
            case MetricsReady(step=step, metrics=metrics) | EvalEnd(step=step, metrics=metrics):
                numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                append_jsonl(self._metrics, {"step": step, **numbers})
            case TextSampled(step=step, prompt=prompt, text=text):
                append_jsonl(self._samples, {"step": step, "prompt": prompt, "text": text})

    def close(self, error: BaseException | None) -> None:
        """Nothing is held open."""
