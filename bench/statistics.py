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


Processes = Sequence[Sequence[float]]
"""The samples of one engine, a list for each process that took them."""

LEAST_RELATIVE_NOISE = 0.1
"""Medians that differ by less than this part are not told apart, however steady a run looks: the next run differs."""

FEW_SAMPLES = 4
"""An engine with fewer samples than this ..."""
LEAST_RELATIVE_NOISE_OF_FEW = 0.5
"""... is told apart only where medians differ by more than this part: two samples lie close to each other by luck."""


def flat(processes: Processes) -> list[float]:
    """All samples of an engine."""
    return [value for one in processes for value in one]


def process_noise(samples: Mapping[str, Processes]) -> float:
    """How much processes of the same engine differ from each other: the median over the engines of the range of the
    processes' medians, as a part of their mean; 0 where no engine ran in more than one process."""
    found = []
    for processes in samples.values():
        medians = [statistics.median(one) for one in processes if one]
        mean = abs(statistics.fmean(medians)) if medians else 0.0
        if len(medians) > 1 and mean > 0:
            found.append((max(medians) - min(medians)) / mean)
    return statistics.median(found) if found else 0.0


def compare(first: Processes, second: Processes, resolution: float, relative: float) -> int:
    """-1 where the first is surely smaller, 1 where it is surely larger, 0 where they cannot be told apart.

    Told apart are engines whose medians differ by more than `resolution`, by more than `relative` of the larger one
    (of an engine with few samples: by more than half of it), and by more than either's processes differ among
    themselves, whose middle halves do not overlap, and each of whose processes has its median on the same side of
    every process's of the other.
    """
    one, other = flat(first), flat(second)
    if not one or not other:
        return 0
    medians = statistics.median(one), statistics.median(other)
    if medians[0] > medians[1]:
        return -compare(second, first, resolution, relative)
    gap = medians[1] - medians[0]
    if min(len(one), len(other)) < FEW_SAMPLES:
        relative = max(relative, LEAST_RELATIVE_NOISE_OF_FEW)
    if gap <= resolution or gap <= relative * max(map(abs, medians)) or middle(one)[1] >= middle(other)[0]:
        return 0
    lows, highs = ([statistics.median(p) for p in processes if p] for processes in (first, second))
    wide = max(max(lows) - min(lows), max(highs) - min(highs))
    return -1 if gap > wide and max(lows) < min(highs) else 0


def ranking(samples: Mapping[str, Processes], resolution: float = 0.0) -> list[list[str]]:
    """Names from the smallest median to the largest, in groups whose members cannot be told apart.

    A name joins the group before it where it cannot be told apart from that group's first member (`compare`, the
    relative noise being that of this run's processes): a difference below the noise is no difference.
    """
    present = {name: processes for name, processes in samples.items() if flat(processes)}
    relative = max(LEAST_RELATIVE_NOISE, process_noise(present))
    groups: list[list[str]] = []
    for name in sorted(present, key=lambda name: statistics.median(flat(present[name]))):
        if groups and compare(present[groups[-1][0]], present[name], resolution, relative) == 0:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def noise_warnings(what: str, samples: Mapping[str, Processes], noise: float, resolution: float = 0.0) -> list[str]:
    """What cannot be concluded: differences between neighbours in the ranking that are smaller than the noise."""
    warnings = []
    for group in ranking(samples, resolution):
        if len(group) > 1:
            warnings.append(f"{what}: not told apart: {', '.join(group)}")
    medians = {name: abs(statistics.median(flat(processes))) for name, processes in samples.items() if flat(processes)}
    small = [name for name, median in medians.items() if 0 < median < noise]
    if small:
        warnings.append(f"{what}: below the noise of plain steps ({noise * 1e3:.1f} ms): {', '.join(small)}")
    return warnings
