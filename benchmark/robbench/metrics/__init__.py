"""Accuracies with intervals, from records alone; the accounting for stochastic and abstaining
defenses. All shares are per image, means over images are what is reported.

The measures of the papers are one module per subject, pure functions of tensors: diversity,
detection, separation, distortion, gradcam, costs. Defenses and detectors use them too. Of records,
beside this module: uncertainty and abstention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robbench import statistics
from robbench.statistics import Interval

if TYPE_CHECKING:  # detectors and losses use the measures, and records come after both
    from robbench.records import Record


LOST = 0.95  # of the decisions on an image: a suite attacks it no further


class Measure(NamedTuple):
    """A share in [0, 1] with its 95 % interval; nan where it is not defined."""

    value: float
    interval: Interval


class Metrics(NamedTuple):
    """What a table can show of one record."""

    accuracy: Measure  # right on x', the usual published figure
    incorrect: Measure  # wrong on x' and not abstained
    abstained: Measure
    correct_or_abstained: Measure  # 1 - incorrect
    robust: Measure  # right on x and right on x'
    robust_with_detection: Measure  # right on x, and right or refused on x': what boards order by
    conditional: Measure  # right on x', among the images right when clean
    clean: Measure
    clean_abstained: Measure
    draw_error: float  # standard error that the draws alone cause, nan for one draw


def metrics(record: Record) -> Metrics:
    """The accuracies of a finished record.

    Robust accuracy with detection is that of Tramèr 2022, arXiv:2107.11630: to refuse x' is fine,
    to refuse x is not; it equals `robust` for a defense that always answers. An attack for denial
    (threat.goal) does not look for accepted errors, so it is no bound there.
    """
    r = record.draws
    right, wrong, clean_right, clean_wrong = counts(record)
    clean = clean_right / r
    # draws on x and on x' are independent, so the joint share of an image is the product
    both = right / r * clean
    return Metrics(
        accuracy=share(right / r, r),
        incorrect=share(wrong / r, r),
        abstained=share((r - right - wrong) / r, r),
        correct_or_abstained=share((r - wrong) / r, r),
        robust=share(both, r),
        robust_with_detection=share(detected(record), r),
        conditional=quotient(both, clean, r),
        clean=share(clean, r),
        clean_abstained=share((r - clean_right - clean_wrong) / r, r),
        draw_error=statistics.draw_error(right, r),
    )


class Counts(NamedTuple):
    """Draws out of record.draws, (N,) int64 each: right, and wrong but not abstained."""

    right: np.ndarray
    wrong: np.ndarray
    clean_right: np.ndarray
    clean_wrong: np.ndarray


def counts(record: Record) -> Counts:
    """The counts of a finished record; ValueError for any other.

    Whole numbers, to be divided last: shares that are alike must be so to the last bit.
    """
    if record.ok is None or record.err is None or record.status != "ok":
        raise ValueError(f"record {record.id} has no outcomes: {record.reason}")
    assert record.clean_ok is not None and record.clean_err is not None
    outcomes = (record.ok, record.err, record.clean_ok, record.clean_err)
    return Counts(*(array.astype(np.int64) for array in outcomes))


class Contribution(NamedTuple):
    """What one stage of a suite did: images it attacked, those it lost for good to the suite's
    selection draws, those whose worst point it found, and its passes per attacked image."""

    stage: str
    attacked: int
    broken: int
    worst: int
    passes: float


def contributions(record: Record) -> list[Contribution]:
    """The stages of a suite in their order; none for any other attack."""
    names = record.provenance.get("suite", [])
    if not names or "suite_lost" not in record.trace:
        return []
    enough = 1 if record.draws == 1 else LOST
    found = []
    for index, name in enumerate(names):
        lost = record.trace["suite_lost"][index].astype(np.float64)
        there = np.isfinite(lost)
        passes = record.trace["suite_passes"][index][there]
        found.append(
            Contribution(
                name,
                int(there.sum()),
                int((lost[there] >= enough).sum()),
                int((record.trace["suite_winner"] == index).sum()),
                float(passes.mean()) if there.any() else 0.0,
            )
        )
    return found


def share(values: np.ndarray, draws: int) -> Measure:
    """Mean of per-image shares: Wilson or Clopper-Pearson for one deterministic draw, else an
    interval over images. Draws are never pooled: images are the sampling unit."""
    values = np.clip(values, 0, 1)
    if draws == 1:
        return Measure(
            float(values.mean()), statistics.proportion(int(round(values.sum())), len(values))
        )
    return Measure(float(values.mean()), statistics.mean(values))


def quotient(part: np.ndarray, whole: np.ndarray, draws: int) -> Measure:
    """sum(part) / sum(whole) of per-image shares (N,), part <= whole; nan where whole is zero
    everywhere. The interval is that of `share`, over the images that are in it."""
    if not whole.any():
        return Measure(float("nan"), Interval(float("nan"), float("nan")))
    if draws == 1:
        return share(part[whole == 1], 1)
    return Measure(float(part.sum() / whole.sum()), statistics.ratio(part, whole))


def persistent(record: Record, k: int) -> Measure:
    """RA@k: the share of images on which k fresh draws are all right (Lucas et al. 2023)."""
    assert record.ok is not None
    failures = record.draws - record.ok.astype(int)
    values = statistics.survival(failures, record.draws, k)
    return share(values, record.draws)


def outcomes(record: Record) -> np.ndarray:
    """(N,) per-image shares right on x'."""
    assert record.ok is not None
    return record.ok.astype(np.float64) / record.draws


def detected(record: Record) -> np.ndarray:
    """(N,) per-image shares of robust accuracy with detection."""
    found, r = counts(record), record.draws
    return found.clean_right / r * ((r - found.wrong) / r)
