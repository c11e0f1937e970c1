"""Counts of the server, in the text format of Prometheus."""

import threading
import time

LATENCY_BOUNDS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Counters, gauges and histograms; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._counts: dict[tuple[str, str], float] = {}
        self._seconds: dict[str, list[float]] = {}  # name -> count of each bucket, then sum and count
        self.running, self.waiting = 0, 0

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = name, ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + amount

    def observe_seconds(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            record = self._seconds.setdefault(name, [0.0] * (len(LATENCY_BOUNDS_SECONDS) + 2))
            for index, bound in enumerate(LATENCY_BOUNDS_SECONDS):
                record[index] += seconds <= bound
            record[-2] += seconds
            record[-1] += 1

    def format(self) -> str:
        """Return all values as Prometheus reads them."""
        gauges = {
            "gpt_requests_running": self.running,
            "gpt_requests_waiting": self.waiting,
            "gpt_uptime_seconds": time.monotonic() - self._start,
        }
        lines = [line for name, value in gauges.items() for line in (f"# TYPE {name} gauge", f"{name} {value:g}")]
        with self._lock:
            for name in sorted({name for name, _ in self._counts}):
                lines.append(f"# TYPE {name} counter")
                for (other, labels), value in sorted(self._counts.items()):
                    if other == name:
                        lines.append(f"{name}{{{labels}}} {value:g}" if labels else f"{name} {value:g}")
            for name, record in sorted(self._seconds.items()):
                lines.append(f"# TYPE {name} histogram")
                for bound, value in zip(LATENCY_BOUNDS_SECONDS, record, strict=False):
                    lines.append(f'{name}_bucket{{le="{bound:g}"}} {value:g}')
                lines.append(f'{name}_bucket{{le="+Inf"}} {record[-1]:g}')
                lines += [f"{name}_sum {record[-2]:g}", f"{name}_count {record[-1]:g}"]
        return "\n".join(lines) + "\n"
