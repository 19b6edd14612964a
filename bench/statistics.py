"""From raw samples to medians, ratios, ranks and warnings.  Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """The median of some samples, with the smallest and the largest."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Largest minus smallest."""
        return self.high - self.low

    def scaled(self, factor: float) -> Summary:
        """The same in another unit."""
        return Summary(self.median * factor, self.low * factor, self.high * factor, self.count)


def summarise(samples: Iterable[float]) -> Summary | None:
    """None where there is no sample."""
    values = sorted(samples)
    if not values:
        return None
    return Summary(statistics.median(values), values[0], values[-1], len(values))


def ratio(value: Summary | None, reference: Summary | None) -> float | None:
    """Median over median; none where either is missing or the reference is not above zero."""
    if value is None or reference is None or reference.median <= 0:
        return None
    return value.median / reference.median


def middle(samples: Sequence[float]) -> tuple[float, float]:
    """The range in which the middle half of the samples lies (all of them where there are fewer than four)."""
    values = sorted(samples)
    if len(values) < 4:
        return values[0], values[-1]
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[0], quartiles[2]


def ranking(samples: Mapping[str, Sequence[float]], resolution: float = 0.0) -> list[list[str]]:
    """Names from the smallest median to the largest, in groups whose members cannot be told apart.

    A name joins the group before it when its middle half overlaps that of the group's first member, or its median is
    within `resolution` of that member's median: a difference below the noise is no difference.
    """
    present = {name: values for name, values in samples.items() if values}
    order = sorted(present, key=lambda name: statistics.median(present[name]))
    groups: list[list[str]] = []
    for name in order:
        if groups:
            first = present[groups[-1][0]]
            close = statistics.median(present[name]) - statistics.median(first) <= resolution
            if close or middle(present[name])[0] <= middle(first)[1]:
                groups[-1].append(name)
                continue
        groups.append([name])
    return groups


def noise_warnings(
    what: str, samples: Mapping[str, Sequence[float]], noise: float, resolution: float = 0.0
) -> list[str]:
    """What cannot be concluded: differences between neighbours in the ranking that are smaller than the noise."""
    warnings = []
    for group in ranking(samples, resolution):
        if len(group) > 1:
            warnings.append(f"{what}: not told apart: {', '.join(group)}")
    small = [
        name for name, values in samples.items() if values and 0 < abs(statistics.median(values)) < noise and noise > 0
    ]
    if small:
        warnings.append(f"{what}: below the noise of the baseline ({noise * 1e3:.1f} ms): {', '.join(small)}")
    return warnings
