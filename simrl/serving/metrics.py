"""Metrics of a server's models, in the text form that Prometheus reads."""

import threading
from collections.abc import Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from simrl.serving.generation import Load, Serving

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

GAUGES: Mapping[str, str] = {  # fields of `Load`
    'waiting': 'requests in the queue',
    'active': 'rows that answer a request',
    'rows': 'rows: answers at once, at most',
    'tokens_per_second': 'sampled tokens per second, over the last ten seconds',
    'compiled': 'programs compiled since the server listens; 0 is right',
}
COUNTERS: Mapping[str, str] = {
    'prompt_tokens_total': 'tokens of prompts that were begun',
    'cached_tokens_total': 'tokens of prompts that were in a cache',
    'sampled_tokens_total': 'tokens that were sampled',
    'refused_total': 'requests that the full queue refused',
}


class Metrics:
    """The metrics of a server's models, in a registry of its own."""

    def __init__(self, models: Mapping[str, Serving]) -> None:
        self._models = models
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._first_token = Histogram(
            'simrl_first_token_seconds',
            'seconds from a request to its first token',
            ['model'],
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        for name in models:
            self._first_token.labels(name)
        self._loads: dict[str, Load] = {}
        self._registry.register(self)

    def text(self) -> bytes:
        """The metrics now."""
        with self._lock:
            self._loads = {name: serving.load() for name, serving in self._models.items()}
            for name, load in self._loads.items():
                for seconds in load.first_token_seconds:
                    self._first_token.labels(name).observe(seconds)
            return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the last loads."""
        for field, text in GAUGES.items():
            gauge = GaugeMetricFamily(f'simrl_{field}', text, labels=['model'])
            for name, load in self._loads.items():
                gauge.add_metric([name], getattr(load, field))
            yield gauge
        for field, text in COUNTERS.items():
            counter = CounterMetricFamily(f'simrl_{field}', text, labels=['model'])
            for name, load in self._loads.items():
                counter.add_metric([name], getattr(load, field))
            yield counter
        finished = CounterMetricFamily('simrl_finished_total', 'requests by how they ended', labels=['model', 'how'])
        for name, load in self._loads.items():
            for how, count in load.finished_total.items():
                finished.add_metric([name, how], count)
        yield finished
