"""Refusing to answer: what it costs, what it saves, and how well a score says when to refuse.

Pure functions of records, all shares over images: draws are never pooled. A score is larger where a
defense is surer. Every share is of the x' that the record has. An attacker who knows a threshold
ends just above it, so that at any threshold but the attacked one the same x' are refused far too
often: risk_coverage, operating and tpr_at_* flatter the defense until they are attacked themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robbench.errors import InputError
from robbench.metrics import Measure, counts, quotient, share
from robbench.metrics.detection import auc, threshold

if TYPE_CHECKING:
    from robbench.records import Record

PRICES = (0.0, 0.1, 0.5, 1.0)  # of a refusal, where an accepted error costs 1


class Abstention(NamedTuple):
    """A defense that may refuse, at its deployed threshold; nan where nothing is accepted."""

    coverage: Measure  # answers on x'
    clean_coverage: Measure
    selective: Measure  # right among the answers on x'
    clean_selective: Measure
    evasion: Measure  # wrong and accepted on x', among the images accepted and right on x


def abstention(record: Record) -> Abstention:
    """Coverage, accuracy among the answers, and evasion of a finished record.

    sum(right) / sum(right + wrong) is undefined at zero coverage, and certainly not 100 %.
    """
    r = record.draws
    right, wrong, clean_right, clean_wrong = counts(record)
    covered, clean_covered = (right + wrong) / r, (clean_right + clean_wrong) / r
    clean = clean_right / r
    return Abstention(
        coverage=share(covered, r),
        clean_coverage=share(clean_covered, r),
        selective=quotient(right / r, covered, r),
        clean_selective=quotient(clean, clean_covered, r),
        evasion=quotient(clean * (wrong / r), clean, r),
    )


def costs(record: Record) -> dict[float, float]:
    """Price of a refusal -> mean cost on x', incorrect + price * abstained, in [0, 1].

    At price 0 refusing everything is free, at price 1 a refusal is as bad as an error.
    """
    right, wrong, _, _ = counts(record)
    refused = record.draws - right - wrong
    return {price: float((wrong + price * refused).mean()) / record.draws for price in PRICES}


class _Scored(NamedTuple):
    """Of every image (N,): how sure the defense was, and the share of draws whose first label,
    refused or not, was right."""

    score: np.ndarray
    clean_score: np.ndarray
    best: np.ndarray
    clean_best: np.ndarray


def _scored(record: Record) -> _Scored | None:
    """None for records of the time before scores. No threshold refuses a score that is nan."""
    arrays = (record.score, record.clean_score, record.best, record.clean_best)
    if any(array is None for array in arrays):
        return None
    score, clean_score, best, clean_best = (np.asarray(array, dtype=np.float64) for array in arrays)
    sure, clean_sure = (np.where(np.isnan(each), np.inf, each) for each in (score, clean_score))
    return _Scored(sure, clean_sure, best / record.draws, clean_best / record.draws)


class RiskCoverage(NamedTuple):
    """What each threshold on the score does, (T,) each, from the highest threshold down."""

    threshold: np.ndarray
    clean_coverage: np.ndarray
    coverage: np.ndarray  # accepted on x'
    risk: np.ndarray  # wrong among the accepted on x', nan where none is
    area: float


def risk_coverage(record: Record) -> RiskCoverage | None:
    """The risk on x' at every threshold that clean images can set, whatever the defense itself
    refuses; None for a record without scores.

    The curve is that of El-Yaniv & Wiener, JMLR 11, 2010, the area in [0, 1] that of Geifman et al.
    2019, arXiv:1805.08206, the mean risk over coverages; there x' is x, here the coverages are the
    clean ones. Where no x' is accepted none is wrong. Draws of a stochastic defense are refused
    together, by their mean score.
    """
    found = _scored(record)
    if found is None:
        return None
    n, order = len(found.score), np.argsort(found.score)
    levels = np.unique(found.clean_score)[::-1]
    accepted = n - np.searchsorted(found.score[order], levels)
    clean_coverage = (n - np.searchsorted(np.sort(found.clean_score), levels)) / n
    wrong = np.append(0.0, np.cumsum(1 - found.best[order][::-1]))[accepted]
    risk = np.where(accepted > 0, wrong / np.maximum(accepted, 1), np.nan)
    steps = np.diff(clean_coverage, prepend=0.0)
    area = float((np.nan_to_num(risk) * steps).sum())
    return RiskCoverage(levels, clean_coverage, accepted / n, risk, area)


class Operating(NamedTuple):
    """A defense that refuses where its score is below the threshold."""

    threshold: float
    clean_coverage: float  # at least what was asked for; more where scores are equal
    clean: Measure  # right and accepted on x
    coverage: Measure  # accepted on x'
    risk: Measure  # wrong among the accepted on x', nan where none is
    evasion: Measure
    robust_with_detection: Measure


def operating(record: Record, clean_coverage: float) -> Operating | None:
    """The highest threshold on the score that accepts at least this share of the clean images, and
    what comes of it; None for a record without scores.

    clean_coverage in (0, 1]. Defenses are compared at equal clean coverage, so that one which never
    refuses has the same option as one which does; its own refusals do not count here. The attacker
    did not know of this threshold.
    """
    if not 0 < clean_coverage <= 1:
        raise InputError(
            f"clean_coverage = {clean_coverage} is no share above 0; write one such as 0.95"
        )
    found = _scored(record)
    if found is None:
        return None
    level, r = threshold(found.clean_score, 1 - clean_coverage), record.draws
    accepted, clean_accepted = found.score >= level, found.clean_score >= level
    wrong, clean = (1 - found.best) * accepted, found.clean_best * clean_accepted
    return Operating(
        threshold=level,
        clean_coverage=float(clean_accepted.mean()),
        clean=share(clean, r),
        coverage=share(accepted.astype(np.float64), 1),
        risk=quotient(wrong, accepted.astype(np.float64), r),
        evasion=quotient(clean * wrong, clean, r),
        robust_with_detection=share(clean * (1 - wrong), r),
    )


class Detection(NamedTuple):
    """A detector against the successful adversarial examples alone; nan where there is none."""

    successes: int  # images with a right first label on x and a wrong one on x', in most draws
    fpr: Measure  # clean images refused, at the deployed threshold
    tpr: Measure  # successes refused, at the deployed threshold
    tpr_at_5: Measure  # the same at 5 % false positives among the clean images of the record
    tpr_at_1: Measure
    auc: float  # over all thresholds, useless ones included, of scores that the attack chose


def detection(record: Record) -> Detection | None:
    """Detection rates and, last, the AUC of a record; None for one without scores.

    The threshold of `tpr` is the deployed one, which the defense has set on clean validation images
    (`fpr=`); those of `tpr_at_*` flag at most that share of the clean test images, none of which
    may be enough for 1 % of fewer than 100. Oblivious, transfer and adaptive attackers are records
    of different settings.
    """
    found = _scored(record)
    if found is None:
        return None
    r = record.draws
    _, wrong, clean_right, clean_wrong = counts(record)
    success = (found.best < 0.5) & (found.clean_best > 0.5)
    first_wrong = 1 - found.best[success]
    scores = found.score[success]

    def rate(fpr: float) -> Measure:
        flagged = (scores < threshold(found.clean_score, fpr)).astype(np.float64)
        return quotient(flagged, np.ones(len(flagged)), 1)

    return Detection(
        successes=int(success.sum()),
        fpr=share((r - clean_right - clean_wrong) / r, r),
        tpr=quotient(np.clip(first_wrong - wrong[success] / r, 0, None), first_wrong, r),
        tpr_at_5=rate(0.05),
        tpr_at_1=rate(0.01),
        auc=auc(found.clean_score, scores) if success.any() else float("nan"),
    )
