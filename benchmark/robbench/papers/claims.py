"""The claims that a paper makes in words, and whether they hold at this scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from robbench import statistics
from robbench.defense import with_preset
from robbench.errors import InputError, unknown
from robbench.metrics import Measure
from robbench.papers.costs import timed
from robbench.papers.derived import outcome
from robbench.papers.paper import Claim, Counterpart, Curve, Number, Paper, Printed
from robbench.papers.reproduction import SHARES, Ground, Line, made_of, shown_value
from robbench.statistics import Interval

MARGIN = 2  # what is as good as 0, in the unit of the print
NETWORK, MACHINE = "another network at this scale", "another machine"
TREND = 0.5  # rank correlation from which on a curve is said to rise or to fall
TRENDS = ("rises", "falls", "widens", "rises-then-falls")


class Point(NamedTuple):
    """Of a figure's curve; low and high are nan where the figure has no interval."""

    x: float
    y: float
    low: float
    high: float


Series = Mapping[str, Sequence[Point]]


class Judged(NamedTuple):
    """A claim beside its counterpart. measured: in words; holds: yes, no, undecided, or why not;
    lines: of the counterparts, none for text and curves; behind: all that the figure of a curve was
    measured on."""

    claim: Claim
    measured: str
    holds: str
    lines: tuple[Line, ...] = ()
    behind: tuple[Ground, ...] = ()

    @property
    def grounds(self) -> list[Ground]:
        """All that the counterpart was measured on."""
        return [*self.behind, *(each for line in self.lines for each in line.behind)]


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
            return Judged(claim, *_of_curve(claim, claim.curve, series_of(claim.curve.figure)))
        lines = {path: line_of(path) for path in map(_path, _asked(claim))}
        asked = tuple(lines.values())
        missing = [line for line in asked if line.measure is None]
        if missing:
            return Judged(claim, "", missing[0].why, asked)
        if (claim.most or claim.least or claim.count) and any(map(_undefined, asked)):
            return Judged(claim, "n.a.", "not defined here", asked)
        return Judged(claim, *_of_numbers(claim, lambda each: lines[_path(each)]), asked)
    except InputError as error:
        return Judged(claim, "", str(error))


def _of_numbers(claim: Claim, line: Callable[[Counterpart], Line]) -> tuple[str, str]:
    """What was measured, in words, and whether the claim holds."""
    if claim.order:
        sides = [
            [_largest([line(e) for e in _sides(side)]) for side in pair] for pair in claim.order
        ]
        return _ordered([(first, second) for first, second in sides])
    if claim.count:
        return _counted(claim, [line(each) for each in claim.count.of], claim.count.below)
    pairs = [claim.differ] if claim.differ else list(claim.most or claim.least)
    if pairs:
        found = [(difference(line(a), line(b)), line(a)) for a, b in pairs]
        extreme = min if claim.least else max
        measure, first = extreme(found, key=lambda pair: pair[0].value)
        bounds = zip(*(_sure(each) for each, _ in found), strict=True)
        measure = Measure(measure.value, Interval(*map(extreme, bounds)))
        return _points(measure, first.unit), _holds(claim, measure, _factor(first))
    only = line(claim.number or claim.bind)
    assert only.measure is not None
    holds = _elsewhere(claim, only) or _holds(claim, only.measure, _factor(only))
    return shown_value(only.measure, only.unit), holds


def _of_curve(claim: Claim, curve: Curve, named: Series) -> tuple[str, str]:
    """The same of a figure's series, or of one minus another."""
    found = [_series(named, name) for name in curve.series]
    if curve.left is not None:
        measure = _ratio(*(_limit(points, curve.left) for points in found))
        low, high = measure.interval
        return f"{measure.value:.3g} ({low:.3g} to {high:.3g})", _holds(claim, measure, 1.0)
    if len(found) < 2 and claim.holds == "widens":
        raise InputError("two series are needed for a gap that widens")
    points = _gaps(found) if len(found) > 1 else [_at(point) for point in found[0]]
    if claim.holds in TRENDS:
        return _shown_curve(points), _trend(claim.holds, points)
    measure = _mean(points)
    shown = _points(measure, None) if len(found) > 1 else shown_value(measure, None)
    return shown, _holds(claim, measure, 1.0)


def _elsewhere(claim: Claim, line: Line) -> str | None:
    """Why a printed level cannot be one here: seconds and bytes of their machine, parameters of a
    network that the scale has made smaller."""
    binding = line.number.binding
    if binding.kind != "cost" or "over" in binding.arguments or not claim.holds.startswith("near"):
        return None
    if timed(binding):
        return MACHINE
    assert binding.defense and binding.dataset
    whole = made_of(str(with_preset(binding.defense, "paper", binding.dataset)))[0]
    return NETWORK if any(made_of(each.defense)[0] != whole for each in line.deployed) else None


def difference(first: Line, second: Line) -> Measure:
    """First - second: paired where both are shares of the same images, else `apart`."""
    assert first.measure is not None and second.measure is not None
    a, b = _outcomes(first), _outcomes(second)
    if a is not None and b is not None and _alike(first, second):
        n = min(len(a), len(b))
        found = statistics.paired(a[:n], b[:n])
        return Measure(found.difference, found.interval)
    return apart(first.measure, second.measure)


def apart(first: Measure, second: Measure) -> Measure:
    """First - second of two independent numbers, from their own intervals (Zou and Donner 2008);
    without an interval where one of them has none."""
    (x, (x_low, x_high)), (y, (y_low, y_high)) = first, second
    low, high = math.hypot(x - x_low, y_high - y), math.hypot(x_high - x, y - y_low)
    return Measure(x - y, Interval(x - y - low, x - y + high))


def _factor(line: Line) -> float:
    return 100.0 if line.unit in SHARES else 1.0


def _outcomes(line: Line) -> np.ndarray | None:
    if line.number.binding.kind != "cell" or not line.records:
        return None
    try:
        return outcome(line.records[0], line.number.binding.measure)
    except InputError:  # a quotient is no mean over all images
        return None


def _alike(first: Line, second: Line) -> bool:
    """Whether both are of the same images, of which the first are the first of the other too."""
    one, other = first.records[0].cell, second.records[0].cell
    return (one.dataset, one.data) == (other.dataset, other.data)


def _asked(claim: Claim) -> list[Counterpart]:
    """The counterparts of a claim, flat."""
    if claim.number:
        return [claim.number]
    if claim.bind:
        return [claim.bind]
    if claim.count:
        return list(claim.count.of)
    pairs = [claim.differ] if claim.differ else claim.order or claim.most or claim.least
    return [each for pair in pairs for side in pair for each in _sides(side)]


def _sides(side: Counterpart | tuple[Counterpart, ...]) -> tuple[Counterpart, ...]:
    return side if isinstance(side, tuple) else (side,)


def _path(each: Counterpart) -> str:
    return each if isinstance(each, str) else Number.alone(each).path


def _holds(claim: Claim, measure: Measure, factor: float) -> str:
    """yes, no or undecided, by the interval of a measure; factor: to the unit of the print."""
    if measure.value != measure.value:
        return "not defined here"
    low, high = (factor * bound for bound in _sure(measure))
    rule, _, limit = claim.holds.partition(":")
    if rule == "near":
        return _near(claim.value, low, high)
    if rule == "zero":
        margin = float(limit or MARGIN)
        inside = -margin <= low and high <= margin
        return "yes" if inside else "no" if low > margin or high < -margin else "undecided"
    if rule in ("positive", "above"):
        return _beyond(low, high, float(limit or 0))
    if rule in ("negative", "below"):
        return _beyond(-high, -low, -float(limit or 0))
    known = ["near", "zero:X", "positive", "negative", "above:X", "below:X"]
    known += TRENDS if claim.curve else ()
    raise unknown("rule of a claim", claim.holds, known)


def _beyond(low: float, high: float, limit: float) -> str:
    return "yes" if low > limit else "no" if high < limit else "undecided"


def _near(printed: Printed, low: float, high: float) -> str:
    """Whether what is printed - `~0.27M x 2`, 85.62 - can be the number behind an interval; a unit
    of its last digit is what it was rounded to. An interval that is wider than the number is long
    says little of it."""
    match = re.fullmatch(r"(~?)\s*([-+]?\d+(?:\.(\d+))?)([kmM]?)(?: x (\d+))?", str(printed))
    if match is None:
        return "undecided"
    size = {"k": 1e3, "m": 1e6, "M": 1e6}.get(match[4], 1.0) * int(match[5] or 1)
    value, unit = size * float(match[2]), size * 10.0 ** -len(match[3] or "")
    slack = unit if match[1] else unit / 2
    if not low - slack <= value <= high + slack:
        return "no"
    return "yes" if high - low <= max(abs(value), 2 * MARGIN) else "undecided"


def _ordered(pairs: Sequence[tuple[Line, Line]]) -> tuple[str, str]:
    """What was found of the pairs, and whether all of them are in this order."""
    found = [difference(first, second) for first, second in pairs]
    clear = sum(measure.interval.low > 0 for measure in found)
    against = sum(measure.interval.high < 0 for measure in found)
    larger = sum(measure.value > 0 for measure in found)
    text = f"{larger} of {len(found)} in this order, {clear} clearly, {against} clearly reversed"
    if len(found) == 1:
        text = _points(found[0], pairs[0][0].unit)
    return text, "yes" if clear == len(found) else "no" if against else "undecided"


def _undefined(line: Line) -> bool:
    return line.measure is None or math.isnan(line.measure.value)


def _largest(lines: Sequence[Line]) -> Line:
    """The one with the largest number that is defined."""
    known = [line for line in lines if not _undefined(line)] or lines
    return max(known, key=lambda line: line.measure.value if line.measure else -math.inf)


def _counted(claim: Claim, lines: Sequence[Line], below: float) -> tuple[str, str]:
    """How many numbers lie below a limit; those whose intervals contain it may or may not."""
    limit = below / _factor(lines[0])
    found = [
        (m.value, m.interval.high, m.interval.low) for m in (line.measure for line in lines) if m
    ]
    value, sure, possible = (np.array(found) < limit).sum(axis=0).tolist()
    measure = Measure(float(value), Interval(float(sure), float(possible)))
    low, high = measure.interval
    shown = f"{measure.value:.0f} ({low:.0f} to {high:.0f}) of {len(lines)}"
    return shown, _holds(claim, measure, 1.0)


def _points(measure: Measure, unit: str | None) -> str:
    factor, name = (100.0, " points") if unit in SHARES else (1.0, "")
    low, high = (factor * bound for bound in measure.interval)
    return f"{factor * measure.value:+.3g} ({low:+.3g} to {high:+.3g}){name}"


def _series(named: Series, name: str) -> list[Point]:
    if name not in named:
        raise unknown("series", name, named)
    return sorted(named[name], key=lambda point: point.x)


def _shown_curve(points: Sequence[Measure]) -> str:
    first, middle, last = (points[at].value for at in (0, len(points) // 2, -1))
    return f"from {first:.4g} over {middle:.4g} to {last:.4g}"


def _at(point: Point) -> Measure:
    return Measure(point.y, Interval(point.low, point.high))


def _gaps(found: Sequence[Sequence[Point]]) -> list[Measure]:
    """First - second at each x, from their own intervals."""
    if [point.x for point in found[0]] != [point.x for point in found[1]]:
        raise InputError("two series at the same x are needed to compare them")
    return [apart(_at(one), _at(other)) for one, other in zip(*found, strict=True)]


def _mean(curve: Sequence[Measure]) -> Measure:
    """The mean over points. Its interval: the mean of theirs, as points on the same images err
    together; of points without one the t interval over points."""
    if len(curve) < 2:
        raise InputError("a mean over points needs two of them")
    values = np.array([measure.value for measure in curve])
    bounds = np.array([measure.interval for measure in curve])
    if np.isnan(bounds).any():
        return Measure(float(values.mean()), statistics.runs(values))
    low, high = bounds.mean(axis=0)
    return Measure(float(values.mean()), Interval(float(low), float(high)))


def _limit(points: Sequence[Point], left: float) -> Measure:
    """The least x at which no more than `left` is left, and where it may be; infinite where more is
    left everywhere."""

    def first(field: str) -> float:
        reached = (point.x for point in points if getattr(point, field) <= left)
        return next(reached, math.inf)

    return Measure(first("y"), Interval(first("low"), first("high")))


def _ratio(first: Measure, second: Measure) -> Measure:
    """First / second of two limits; nan where both lie beyond the points, and a bound that is none
    where both bounds do."""
    (x, (x_low, x_high)), (y, (y_low, y_high)) = first, second
    with np.errstate(divide="ignore", invalid="ignore"):
        value, low, high = np.divide((x, x_low, x_high), (y, y_high, y_low)).tolist()
    none = Interval(0.0 if math.isnan(low) else low, math.inf if math.isnan(high) else high)
    return Measure(value, none)


def _trend(rule: str, curve: Sequence[Measure]) -> str:
    y = np.array([measure.value for measure in curve])
    if np.isnan(y).any():
        return "not defined here"
    if rule == "rises-then-falls":
        return _peaks(curve)
    if np.all(y == y[0]):  # flat, as far as the intervals tell
        return "undecided" if curve[0].interval.low < curve[0].interval.high else "no"
    sign = -1 if rule == "falls" else 1
    slope = sign * float(spearmanr(np.arange(len(y)), y).statistic)
    if abs(slope) < TREND:
        return "undecided"
    low, high = sorted(sign * bound for bound in apart(curve[-1], curve[0]).interval)
    if slope > 0:
        return "undecided" if low <= 0 else "yes"  # nan, of a curve without intervals: its trend
    return "undecided" if high >= 0 else "no"


def _peaks(curve: Sequence[Measure]) -> str:
    """Whether the highest point lies within, above both ends by more than the intervals allow."""
    if len(curve) < 3:
        return "undecided"
    peak = max(curve[1:-1], key=lambda measure: measure.value)
    rises = [apart(peak, end) for end in (curve[0], curve[-1])]
    lows, highs = zip(*(_sure(rise) for rise in rises), strict=True)
    return "yes" if min(lows) > 0 else "no" if min(highs) < 0 else "undecided"


def _sure(measure: Measure) -> Interval:
    """The interval, or the number itself of what cannot vary, as a number of parameters."""
    low, _ = measure.interval
    return measure.interval if low == low else Interval(measure.value, measure.value)
