"""Refusals, scores and detectors: by enumeration, against scikit-learn, scipy and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from robbench.cell import Cell, Setting
from robbench.errors import InputError
from robbench.metrics import metrics
from robbench.metrics.abstention import abstention, costs, detection, operating, risk_coverage
from robbench.metrics.detection import threshold
from robbench.records import COSTS, Record
from robbench.threat import Threat


def record(ok, err, clean_ok, clean_err, draws=1, **scores):
    """best, clean_best, score, clean_score where a test needs them."""
    cell = Cell(
        dataset="digits",
        data="0" * 16,
        n=len(ok),
        defense="rce",
        defense_version="1",
        attack="pgd",
        attack_version=1,
        threat=Threat(eps="1/10"),
        setting=Setting(kind="whitebox"),
    )
    counts = {"ok": ok, "err": err, "clean_ok": clean_ok, "clean_err": clean_err}
    for name in ("best", "clean_best"):
        if name in scores:
            counts[name] = scores.pop(name)
    return Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        distance=np.zeros(len(ok), dtype=np.float32),
        cost=dict.fromkeys(COSTS, 1.0),
        **{name: np.array(values, dtype=np.uint8) for name, values in counts.items()},
        **{name: np.array(values, dtype=np.float32) for name, values in scores.items()},
    )


def thresholded(best, score, clean_best, clean_score, level=-np.inf):
    """A deterministic defense that refuses what scores below the level."""
    best, clean_best = np.array(best, dtype=int), np.array(clean_best, dtype=int)
    score, clean_score = np.float32(score), np.float32(clean_score)
    takes, clean_takes = score >= level, clean_score >= level
    return record(
        best * takes,
        (1 - best) * takes,
        clean_best * clean_takes,
        (1 - clean_best) * clean_takes,
        best=best,
        clean_best=clean_best,
        score=score,
        clean_score=clean_score,
    )


def simulated(n, seed, level=-np.inf):
    """An attack that fools half of the images, and a detector that sees something of it."""
    rng = np.random.default_rng(seed)
    clean_best, best = rng.random(n) < 0.9, rng.random(n) < 0.5
    score = rng.normal(best + 0.0, 1)
    return thresholded(best, score, clean_best, rng.normal(clean_best + 0.5, 1), level)


@st.composite
def records(draw, most=6):
    draws, n = draw(st.integers(1, most)), draw(st.integers(1, 8))
    split = st.tuples(st.integers(0, draws), st.integers(0, draws)).filter(
        lambda pair: sum(pair) <= draws
    )
    pairs = [draw(st.lists(split, min_size=n, max_size=n)) for _ in range(2)]
    (ok, err), (clean_ok, clean_err) = (zip(*pair, strict=True) for pair in pairs)
    return record(ok, err, clean_ok, clean_err, draws)


@given(records())
@settings(max_examples=40, deadline=None)
def test_robust_accuracy_with_detection_is_counted_over_all_pairs_of_draws(given_record):
    r, shares = given_record.draws, []
    for image in range(given_record.cell.n):
        clean = [True] * int(given_record.clean_ok[image])
        clean += [False] * (r - len(clean))
        harm = [True] * int(given_record.err[image])
        harm += [False] * (r - len(harm))
        shares.append(np.mean([x and not y for x, y in itertools.product(clean, harm)]))
    assert metrics(given_record).robust_with_detection.value == pytest.approx(np.mean(shares))


@given(records())
@settings(max_examples=40, deadline=None)
def test_who_never_refuses_gains_nothing_by_detection(given_record):
    r = given_record.draws
    answering = given_record.model_copy(
        update={
            "err": (r - given_record.ok).astype(np.uint8),
            "clean_err": (r - given_record.clean_ok).astype(np.uint8),
        }
    )
    found = metrics(answering)
    assert found.robust_with_detection == found.robust
    assert abstention(answering).selective.value == pytest.approx(found.accuracy.value)


@given(records())
@settings(max_examples=60, deadline=None)
def test_evasion_and_detection_share_out_the_images_right_when_clean(given_record):
    whole, found = metrics(given_record), abstention(given_record)
    if not whole.clean.value:
        assert math.isnan(found.evasion.value)
        return
    kept = whole.robust_with_detection.value
    assert found.evasion.value == pytest.approx(1 - kept / whole.clean.value)


def test_refusing_everything_has_no_accuracy():
    found = abstention(record([0, 0], [0, 0], [0, 0], [0, 0]))
    assert found.coverage.value == found.clean_coverage.value == 0
    for measure in (found.selective, found.clean_selective, found.evasion):
        assert math.isnan(measure.value) and all(map(math.isnan, measure.interval))


def test_a_defense_that_abstains_by_hand():
    found = abstention(record([4, 1, 0, 0], [0, 1, 4, 0], [4, 4, 2, 0], [0, 0, 2, 4], draws=4))
    assert found.coverage.value == 10 / 16 and found.clean_coverage.value == 1
    assert found.selective.value == 5 / 10 and found.clean_selective.value == 10 / 16
    assert found.evasion.value == pytest.approx((1 * 0.25 + 0.5 * 1) / 2.5)


def test_selective_accuracy_has_scipys_bootstrap_interval():
    rng = np.random.default_rng(0)
    ok, err, refused = rng.multinomial(20, [0.5, 0.3, 0.2], 120).T * rng.integers(0, 2, 120)
    ok, err = ok + refused, err  # images that are always refused, and others
    found = abstention(record(ok, err, ok, err, draws=20)).selective
    some = ok + err > 0
    expected = stats.bootstrap(
        (ok[some] / 20, (ok + err)[some] / 20),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == ok.sum() / (ok + err).sum()
    assert found.interval == pytest.approx(tuple(expected), abs=0.005)


def test_selective_accuracy_of_one_draw_is_wilsons_of_the_answers():
    found = abstention(record([1] * 30 + [0] * 70, [0] * 30 + [1] * 20 + [0] * 50, [1] * 100,
                              [0] * 100)).selective  # fmt: skip
    wilson = stats.binomtest(30, 50).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((wilson.low, wilson.high))


@given(records())
@settings(max_examples=40, deadline=None)
def test_a_refusal_costs_from_nothing_to_an_error(given_record):
    found, whole = costs(given_record), metrics(given_record)
    assert found[0.0] == pytest.approx(whole.incorrect.value)
    assert found[1.0] == pytest.approx(1 - whole.accuracy.value)
    middle = found[0.0] + 0.1 * whole.abstained.value
    assert found[0.1] == pytest.approx(middle)
    assert found[0.5] == pytest.approx((found[0.0] + found[1.0]) / 2)


def test_the_curve_is_that_of_every_threshold_tried():
    given_record = simulated(60, 0)
    ties = given_record.model_copy(
        update={
            "score": np.round(given_record.score),
            "clean_score": np.round(given_record.clean_score),
        }
    )
    for each in (given_record, ties):
        curve = risk_coverage(each)
        assert set(curve.threshold) == set(each.clean_score.tolist())
        for level, clean, coverage, risk in zip(*curve[:4], strict=True):
            taken = each.score >= level
            assert clean == np.mean(each.clean_score >= level)
            assert coverage == taken.mean()
            expected = 1 - each.best[taken].mean() if taken.any() else math.nan
            assert risk == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("error", [0.1, 0.4])
def test_the_area_of_a_perfect_score_is_known(error):
    """Errors come last: e + (1 - e) log(1 - e) (Geifman et al. 2019), and e for a useless score."""
    n = 2000
    best = np.arange(n) < (1 - error) * n
    score = -np.arange(n, dtype=float)
    perfect = risk_coverage(thresholded(best, score, best, score))
    assert perfect.area == pytest.approx(error + (1 - error) * math.log(1 - error), abs=1e-3)
    useless = np.random.default_rng(0).permutation(score)
    assert risk_coverage(thresholded(best, useless, best, useless)).area == pytest.approx(
        error, abs=0.03
    )
    assert risk_coverage(thresholded(best, score * 0, best, score * 0)).area == pytest.approx(error)


def test_who_refuses_all_adversarial_examples_has_no_risk_to_show():
    given_record = thresholded([0, 0], [-1, -2], [1, 1], [0, 1])
    curve = risk_coverage(given_record)
    assert curve.area == 0 and all(np.isnan(curve.risk)) and all(curve.coverage == 0)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_a_threshold_set_afterwards_is_the_deployed_one(coverage):
    """The same defense, deployed with a threshold and without: at equal clean coverage they are
    equal, whoever sets it."""
    free = simulated(200, 1)
    level = threshold(free.clean_score, 1 - coverage)
    deployed = simulated(200, 1, level)
    found, whole, own = operating(free, coverage), metrics(deployed), abstention(deployed)
    assert found.threshold == pytest.approx(level)
    assert found.clean_coverage == pytest.approx(coverage) == own.clean_coverage.value
    assert found.clean == whole.clean
    assert found.robust_with_detection == whole.robust_with_detection
    assert found.coverage == own.coverage and found.evasion == own.evasion
    assert 1 - found.risk.value == pytest.approx(own.selective.value)
    assert operating(deployed, coverage) == found, "what it refuses itself does not count"


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_operating_point_refuses_as_much_as_it_may(scores, coverage):
    n = len(scores)
    given_record = thresholded([1] * n, scores, [1] * n, scores)
    found = operating(given_record, coverage)
    assert found.clean_coverage >= coverage - 1e-9
    higher = [level for level in set(scores) if level > found.threshold]
    assert all(np.mean(np.array(scores) >= level) < coverage for level in higher)


def test_scores_of_stochastic_defenses_refuse_all_draws_of_an_image():
    given_record = record(
        [4, 0, 0], [0, 4, 2], [4, 4, 3], [0, 0, 1], draws=4,
        best=[4, 0, 1], clean_best=[4, 4, 3], score=[2, 1, 0], clean_score=[2, 3, 1],
    )  # fmt: skip
    found = operating(given_record, 2 / 3)
    assert found.threshold == 2 and found.clean_coverage == 2 / 3
    assert found.clean.value == 2 / 3
    assert found.coverage.value == 1 / 3 and found.risk.value == 0
    all_of_it = operating(given_record, 1)
    assert all_of_it.risk.value == 1 / 2
    assert all_of_it.robust_with_detection.value == pytest.approx((1 + 0 + 3 / 4) / 3)


def test_detection_rates_and_area_are_scikit_learns():
    given_record = simulated(400, 2)
    found = detection(given_record)
    success = (given_record.best == 0) & (given_record.clean_best == 1)
    positive = -given_record.score[success]
    labels = np.repeat([0, 1], [400, len(positive)])
    flagged = np.concatenate([-given_record.clean_score, positive])
    fpr, tpr, _ = roc_curve(labels, flagged, drop_intermediate=False)
    assert found.successes == success.sum()
    assert found.tpr_at_5.value == pytest.approx(tpr[fpr <= 0.05].max())
    assert found.tpr_at_1.value == pytest.approx(tpr[fpr <= 0.01].max())
    assert found.auc == pytest.approx(roc_auc_score(labels, flagged))


def test_deployed_detection_rates_are_of_the_deployed_threshold():
    given_record = simulated(400, 2, level=0.2)
    found = detection(given_record)
    success = (given_record.best == 0) & (given_record.clean_best == 1)
    assert found.tpr.value == np.mean(given_record.score[success] < 0.2)
    assert found.fpr.value == np.mean(given_record.clean_score < 0.2)
    wilson = stats.binomtest(int((given_record.score[success] < 0.2).sum()), int(success.sum()))
    assert found.tpr.interval == pytest.approx(tuple(wilson.proportion_ci(method="wilson")))


def test_detection_of_a_stochastic_defense_counts_refused_errors():
    given_record = record(
        [4, 0, 0], [0, 1, 0], [4, 4, 4], [0, 0, 0], draws=4,
        best=[4, 0, 1], clean_best=[4, 4, 4], score=[2, 1, 0], clean_score=[2, 3, 1],
    )  # fmt: skip
    found = detection(given_record)
    assert found.successes == 2
    assert found.tpr.value == pytest.approx((3 + 3) / (4 + 3))


def test_without_a_success_there_is_nothing_to_detect():
    found = detection(thresholded([1, 1], [0, 1], [1, 1], [0, 1]))
    assert found.successes == 0
    for value in (found.tpr.value, found.tpr_at_5.value, found.tpr_at_1.value, found.auc):
        assert math.isnan(value)
    assert found.fpr.value == 0


def test_a_score_that_is_no_number_is_never_refused():
    """No threshold flags it, so an attack must not gain a detection by it."""
    given_record = thresholded([0, 0, 1], [np.nan, -5, 1], [1, 1, 1], [1, 2, 3])
    assert operating(given_record, 1 / 3).coverage.value == pytest.approx(1 / 3)
    assert detection(given_record).tpr_at_5.value == pytest.approx(1 / 2)


def test_records_of_the_time_before_scores_say_so():
    old = record([1, 0], [0, 1], [1, 1], [0, 0])
    assert risk_coverage(old) is operating(old, 0.9) is detection(old) is None


@pytest.mark.parametrize("coverage", [0, 1.5, 95, math.nan])
def test_a_coverage_is_a_share_above_zero(coverage):
    with pytest.raises(InputError, match="write one such as 0.95"):
        operating(record([1], [0], [1], [0]), coverage)
