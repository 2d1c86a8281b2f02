"""The claims that a paper makes in words, and whether they hold at this scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr, ttest_1samp

from robbench import statistics
from robbench.errors import InputError, unknown
from robbench.metrics import Measure
from robbench.papers.derived import outcome
from robbench.papers.paper import Claim, Counterpart, Number, Paper, Printed
from robbench.papers.reproduction import SHARES, Line, shown_value
from robbench.statistics import Interval

TREND = 0.5  # rank correlation from which on a curve is said to rise or to fall
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y


class Judged(NamedTuple):
    """A claim with its measured counterpart; holds: yes, no, undecided, or why there is none."""

    claim: Claim
    measured: str
    holds: str


def counterparts(paper: Paper) -> list[Number]:
    """The bindings that only claims have, as numbers, so that they are planned and measured."""
    known: dict[str, Number] = {}
    for claim in paper.claims:
        for each in _asked(claim):
            if not isinstance(each, str):
                number = Number.alone(each)
                known.setdefault(number.path, number)
    return list(known.values())


def paths(paper: Paper) -> list[str]:
    """The numbers of tables that claims refer to."""
    return [each for claim in paper.claims for each in _asked(claim) if isinstance(each, str)]


def judge(
    claim: Claim,
    line_of: Callable[[str], Line],
    series_of: Callable[[str], Series],
) -> Judged:
    """Whether a claim holds. line_of: a measured number by its path; series_of: a figure's data."""
    if claim.text:
        return Judged(claim, "", claim.text)
    try:
        if claim.curve:
            named = series_of(claim.curve.figure)
            found = [_series(named, name) for name in claim.curve.series]
            if claim.holds.partition(":")[0] in ("positive", "negative", "zero"):
                measure = _mean_gap(found)
                return Judged(claim, _points(measure, None), _holds(claim, measure, 1.0))
            return Judged(claim, _shown_curve(found[0]), _trend(claim.holds, found))
        asked = [line_of(_path(each)) for each in _asked(claim)]
        missing = [line for line in asked if line.measure is None]
        if missing:
            return Judged(claim, "", missing[0].why)
        if claim.order:
            return _ordered(claim, list(zip(asked[::2], asked[1::2], strict=True)))
        if claim.differ:
            measure = difference(asked[0], asked[1])
            return Judged(
                claim, _points(measure, asked[0].unit), _holds(claim, measure, _factor(asked[0]))
            )
        (line,) = asked
        assert line.measure is not None
        shown = shown_value(line.measure, line.unit)
        return Judged(claim, shown, _holds(claim, line.measure, _factor(line)))
    except InputError as error:
        return Judged(claim, "", str(error))


def difference(first: Line, second: Line) -> Measure:
    """First - second: paired where both are shares of the same images, else of two independent
    numbers, from their own intervals (Zou and Donner 2008)."""
    assert first.measure is not None and second.measure is not None
    a, b = _outcomes(first), _outcomes(second)
    if a is not None and b is not None:
        n = min(len(a), len(b))
        found = statistics.paired(a[:n], b[:n])
        return Measure(found.difference, found.interval)
    (x, (x_low, x_high)), (y, (y_low, y_high)) = map(_bounded, (first.measure, second.measure))
    low, high = math.hypot(x - x_low, y_high - y), math.hypot(x_high - x, y - y_low)
    return Measure(x - y, Interval(x - y - low, x - y + high))


def _factor(line: Line) -> float:
    return 100.0 if line.unit in SHARES else 1.0


def _bounded(measure: Measure) -> Measure:
    """A measure without an interval has the number itself for one."""
    value, (low, _) = measure
    return measure if low == low else Measure(value, Interval(value, value))


def _outcomes(line: Line) -> np.ndarray | None:
    if line.number.binding.kind != "cell" or not line.records:
        return None
    try:
        return outcome(line.records[0], line.number.binding.measure)
    except InputError:  # a quotient is no mean over all images
        return None


def _asked(claim: Claim) -> list[Counterpart]:
    """The counterparts of a claim, flat."""
    if claim.number:
        return [claim.number]
    if claim.bind:
        return [claim.bind]
    pairs = [claim.differ] if claim.differ else list(claim.order)
    return [each for pair in pairs for each in pair]


def _path(each: Counterpart) -> str:
    return each if isinstance(each, str) else Number.alone(each).path


def _holds(claim: Claim, measure: Measure, factor: float) -> str:
    """yes, no or undecided, by the interval of a measure; factor: to the unit of the print."""
    value = factor * measure.value
    low, high = (factor * bound for bound in measure.interval)
    if value != value:
        return "not defined here"
    if low != low:  # no interval: the number itself
        low = high = value
    rule, _, limit = claim.holds.partition(":")
    if rule == "near":
        return _near(claim.value, low, high)
    if rule == "zero":
        margin = float(limit or 2)
        inside = -margin <= low and high <= margin
        return "yes" if inside else "no" if low > 0 or high < 0 else "undecided"
    if rule in ("positive", "above"):
        return _beyond(low, high, float(limit or 0))
    if rule in ("negative", "below"):
        return _beyond(-high, -low, -float(limit or 0))
    known = ("near", "zero:X", "positive", "negative", "above:X", "below:X")
    raise unknown("rule of a claim", claim.holds, known)


def _beyond(low: float, high: float, limit: float) -> str:
    return "yes" if low > limit else "no" if high < limit else "undecided"


def _near(printed: Printed, low: float, high: float) -> str:
    """Whether what is printed - `<=1`, `~0.27M x 2`, 85.62 - can be the number behind an interval; a
    unit of its last digit is what it was rounded to."""
    match = re.fullmatch(r"([<>]=?|~)?\s*([-+]?\d+(?:\.(\d+))?)([kmM]?)(?: x (\d+))?", str(printed))
    if match is None:
        return "undecided"
    size = {"k": 1e3, "m": 1e6, "M": 1e6}.get(match[4], 1.0) * int(match[5] or 1)
    value, unit = size * float(match[2]), size * 10.0 ** -len(match[3] or "")
    slack = unit if match[1] == "~" else unit / 2
    if match[1] in (">", ">="):
        return "yes" if high >= value else "no"
    if match[1] in ("<", "<="):
        return "yes" if low <= value else "no"
    return "yes" if low - slack <= value <= high + slack else "no"


def _ordered(claim: Claim, pairs: Sequence[tuple[Line, Line]]) -> Judged:
    found = [difference(first, second) for first, second in pairs]
    clear = sum(measure.interval.low > 0 for measure in found)
    against = sum(measure.interval.high < 0 for measure in found)
    larger = sum(measure.value > 0 for measure in found)
    text = f"{larger} of {len(found)} in this order, {clear} clearly, {against} clearly reversed"
    if len(found) == 1:
        text = _points(found[0], pairs[0][0].unit)
    holds = "yes" if clear == len(found) else "no" if against else "undecided"
    return Judged(claim, text, holds)


def _points(measure: Measure, unit: str | None) -> str:
    factor, name = (100.0, " points") if unit in SHARES else (1.0, "")
    low, high = (factor * bound for bound in measure.interval)
    return f"{factor * measure.value:+.3g} ({low:+.3g} to {high:+.3g}){name}"


def _series(named: Series, name: str) -> np.ndarray:
    if name not in named:
        raise unknown("series", name, named)
    x, y = named[name]
    return np.asarray(y, dtype=np.float64)[np.argsort(x, kind="stable")]


def _shown_curve(y: np.ndarray) -> str:
    return f"from {y[0]:.4g} over {y[len(y) // 2]:.4g} to {y[-1]:.4g}"


def _mean_gap(found: Sequence[np.ndarray]) -> Measure:
    """The mean of first - second over the points they share, with its t interval."""
    if len(found) != 2 or len(found[0]) != len(found[1]):
        raise InputError("two series at the same x are needed to compare them")
    gap = found[0] - found[1]
    low, high = ttest_1samp(gap, 0.0).confidence_interval(0.95)
    return Measure(float(gap.mean()), Interval(float(low), float(high)))


def _trend(rule: str, found: Sequence[np.ndarray]) -> str:
    y = found[0] - found[1] if rule == "widens" else found[0]
    if rule == "rises-then-falls":
        peak = int(y.argmax())
        return "yes" if 0 < peak < len(y) - 1 and y[peak] > max(y[0], y[-1]) else "no"
    signs = {"rises": 1, "widens": 1, "falls": -1}
    if rule not in signs:
        raise unknown("rule of a curve", rule, [*signs, "rises-then-falls"])
    if np.all(y == y[0]):
        return "no"
    slope = signs[rule] * float(spearmanr(np.arange(len(y)), y).statistic)
    return "yes" if slope >= TREND else "no" if slope <= -TREND else "undecided"
