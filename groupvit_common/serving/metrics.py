"""Metrics of a server in Prometheus's text format (version 0.0.4), without its client library."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

Labels = tuple[tuple[str, str], ...]


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Counters and histograms that threads may add to, and gauges that are read when they are written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[Labels, _Histogram]] = defaultdict(dict)
        self._gauges: dict[str, Callable[[], float]] = {}

    def describe(self, name: str, kind: str, text: str) -> None:
        """Says what a metric means; `kind`: counter, gauge or histogram."""
        self._help[name] = (kind, text)

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counters[name][tuple(sorted(labels.items()))] += value

    def observe(self, name: str, value: float, *, of_counts: bool = False, **labels: str) -> None:
        """Adds a value, seconds unless `of_counts`, to a histogram."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            every = self._histograms[name]
            if key not in every:
                every[key] = _Histogram(_COUNTS if of_counts else _SECONDS)
            every[key].add(value)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a gauge, whose value `read` gives."""
        self.describe(name, "gauge", text)
        self._gauges[name] = read

    def text(self) -> str:
        """Returns all metrics."""
        lines: list[str] = []
        with self._lock:
            for name, values in self._counters.items():
                self._head(lines, name, "counter")
                lines += [f"{name}{_written(labels)} {value:.10g}" for labels, value in values.items()]
            for name, histograms in self._histograms.items():
                self._head(lines, name, "histogram")
                for labels, histogram in histograms.items():
                    total = 0
                    for bound, number in zip((*histogram.bounds, None), histogram.counts, strict=True):
                        total += number
                        written = "+Inf" if bound is None else f"{bound:g}"
                        lines.append(f"{name}_bucket{_written((*labels, ('le', written)))} {total}")
                    lines.append(f"{name}_sum{_written(labels)} {histogram.total:.10g}")
                    lines.append(f"{name}_count{_written(labels)} {total}")
        for name, read in self._gauges.items():
            self._head(lines, name, "gauge")
            lines.append(f"{name} {read():.10g}")
        return "\n".join(lines) + "\n"

    def _head(self, lines: list[str], name: str, kind: str) -> None:
        kind, text = self._help.get(name, (kind, name))
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def resident_bytes() -> float:
    """Returns the memory that this process holds; 0 where the system does not say."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0.0
