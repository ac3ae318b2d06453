"""Usage of an endpoint: calls, tries and failures by cause, tokens and cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

TOTALS = ('calls', 'cached', 'tries', 'input_tokens', 'output_tokens', 'cost')
BY_CAUSE = ('failures', 'failed_tries')


@dataclasses.dataclass(frozen=True)
class Usage:
    """Sums over calls of an endpoint.

    Attributes:
        calls: that are over.
        cached: calls that the cache answered.
        tries: requests that were sent.
        failures: calls without an answer, by cause.
        failed_tries: tries that failed but may be repeated, by cause; their calls may have been answered later.
        cost: in the currency of the prices.
    """

    calls: int = 0
    cached: int = 0
    tries: int = 0
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)
    failed_tries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: 'Usage') -> 'Usage':
        return self._plus(other, 1)

    def __sub__(self, other: 'Usage') -> 'Usage':
        return self._plus(other, -1)

    def _plus(self, other: 'Usage', times: int) -> 'Usage':
        values: dict[str, Any] = {name: getattr(self, name) + times * getattr(other, name) for name in TOTALS}
        for name in BY_CAUSE:
            own, others = getattr(self, name), getattr(other, name)
            counts = {cause: own.get(cause, 0) + times * others.get(cause, 0) for cause in {**own, **others}}
            values[name] = {cause: count for cause, count in counts.items() if count}
        return Usage(**values)

    def counts(self) -> dict[str, float]:
        """One number each: failures and failed tries of all causes together."""
        totals = {name: float(getattr(self, name)) for name in TOTALS}
        return totals | {name: float(sum(getattr(self, name).values())) for name in BY_CAUSE}

    def __str__(self) -> str:
        def causes(counts: Mapping[str, int]) -> str:
            each = ', '.join(f'{cause} {count}' for cause, count in sorted(counts.items()))
            return f'{sum(counts.values())}' + (f' ({each})' if counts else '')

        return (
            f'calls: {self.calls}, from the cache: {self.cached}, failed: {causes(self.failures)}; '
            f'tries: {self.tries}, failed: {causes(self.failed_tries)}; '
            f'tokens: {self.input_tokens} in, {self.output_tokens} out; cost: {self.cost:.4g}'
        )
