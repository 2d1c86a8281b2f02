"""Accuracies of records: worked by hand, identities that always hold, intervals over images."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench import statistics
from robbench.cell import Cell, Setting
from robbench.metrics import metrics, outcomes, persistent
from robbench.records import COSTS, Record
from robbench.threat import Threat

SHARES = (
    "accuracy",
    "incorrect",
    "abstained",
    "correct_or_abstained",
    "robust",
    "robust_with_detection",
    "clean",
    "clean_abstained",
)


def record(draws, ok, err, clean_ok, clean_err):
    counts = {"ok": ok, "err": err, "clean_ok": clean_ok, "clean_err": clean_err}
    cell = Cell(
        dataset="digits",
        data="0" * 16,
        n=len(ok),
        defense="ito",
        defense_version="1",
        attack="pgd",
        attack_version=1,
        threat=Threat(eps="1/10"),
        setting=Setting(kind="whitebox"),
    )
    arrays = {name: np.array(values, dtype=np.uint8) for name, values in counts.items()}
    distance, cost = np.zeros(len(ok), dtype=np.float32), dict.fromkeys(COSTS, 1.0)
    return Record(id=cell.id, cell=cell, draws=draws, distance=distance, cost=cost, **arrays)


@st.composite
def records(draw, most=20):
    """Any record: right and wrong counts that leave room for abstention."""
    draws, n = draw(st.integers(1, most)), draw(st.integers(1, 12))
    split = st.tuples(st.integers(0, draws), st.integers(0, draws)).filter(
        lambda pair: sum(pair) <= draws
    )
    pairs = [draw(st.lists(split, min_size=n, max_size=n)) for _ in range(2)]
    (ok, err), (clean_ok, clean_err) = (zip(*pair, strict=True) for pair in pairs)
    return record(draws, ok, err, clean_ok, clean_err)


def values(found):
    return {name: getattr(found, name).value for name in (*SHARES, "conditional")}


def test_a_deterministic_defense_by_hand():
    # right on x: images 0-3; right on x': 0, 1 and, by luck of the attack, 4
    found = metrics(record(1, [1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]))
    assert values(found) == {
        "accuracy": 3 / 5,
        "incorrect": 2 / 5,
        "abstained": 0,
        "correct_or_abstained": 3 / 5,
        "robust": 2 / 5,
        "robust_with_detection": 2 / 5,
        "clean": 4 / 5,
        "clean_abstained": 0,
        "conditional": 2 / 4,
    }
    assert math.isnan(found.draw_error)


def test_a_stochastic_defense_by_hand():
    found = metrics(record(10, [10, 5, 0], [0, 5, 10], [10, 8, 2], [0, 2, 8]))
    assert values(found) == pytest.approx(
        {
            "accuracy": 0.5,
            "incorrect": 0.5,
            "abstained": 0,
            "correct_or_abstained": 0.5,
            "robust": (1 * 1 + 0.5 * 0.8 + 0 * 0.2) / 3,
            "robust_with_detection": (1 * 1 + 0.5 * 0.8 + 0 * 0.2) / 3,
            "clean": 2 / 3,
            "clean_abstained": 0,
            "conditional": 1.4 / 2,
        }
    )
    assert found.draw_error == pytest.approx(math.sqrt(0.25 / 9) / 3)


def test_an_abstaining_defense_by_hand():
    found = metrics(record(4, [4, 1, 0, 0], [0, 1, 4, 0], [4, 4, 2, 0], [0, 0, 0, 0]))
    assert values(found) == pytest.approx(
        {
            "accuracy": 5 / 16,
            "incorrect": 5 / 16,
            "abstained": 6 / 16,
            "correct_or_abstained": 11 / 16,
            "robust": 5 / 16,
            "robust_with_detection": (1 + 3 / 4 + 0 + 0) / 4,
            "clean": 10 / 16,
            "clean_abstained": 6 / 16,
            "conditional": 5 / 10,
        }
    )


def test_refusing_everything_is_not_robust():
    found = metrics(record(1, [0, 0], [0, 0], [0, 0], [0, 0]))
    assert found.correct_or_abstained.value == found.clean_abstained.value == 1
    assert found.robust.value == found.robust_with_detection.value == found.accuracy.value == 0


@given(records())
@settings(max_examples=60, deadline=None)
def test_shares_are_consistent(given_record):
    found = metrics(given_record)
    assert found.accuracy.value + found.incorrect.value + found.abstained.value == pytest.approx(1)
    assert found.correct_or_abstained.value == pytest.approx(1 - found.incorrect.value)
    assert found.robust.value <= min(found.clean.value, found.accuracy.value) + 1e-12
    if found.clean.value:
        assert found.conditional.value == pytest.approx(found.robust.value / found.clean.value)
    assert found.accuracy.value == pytest.approx(outcomes(given_record).mean())
    for name in SHARES:
        share = getattr(found, name)
        assert 0 <= share.interval.low <= share.value + 1e-12
        assert share.value - 1e-12 <= share.interval.high <= 1


@given(records(most=1))
@settings(max_examples=40, deadline=None)
def test_robust_accuracy_of_one_draw_counts_images(given_record):
    both = (given_record.ok == 1) & (given_record.clean_ok == 1)
    assert metrics(given_record).robust.value == both.mean()


@pytest.mark.parametrize("draws", [1, 20])
def test_there_is_no_conditional_accuracy_without_a_right_clean_image(draws):
    found = metrics(record(draws, [0, draws], [draws, 0], [0, 0], [draws, draws])).conditional
    assert math.isnan(found.value)
    assert all(map(math.isnan, found.interval))


def test_intervals_of_a_deterministic_defense_are_wilsons():
    ok = [1] * 37 + [0] * 91
    found = metrics(record(1, ok, np.subtract(1, ok), [1] * 128, [0] * 128))
    wilson = stats.binomtest(37, 128).proportion_ci(method="wilson")
    exact = stats.binomtest(128, 128).proportion_ci(method="exact")
    assert found.accuracy.interval == pytest.approx((wilson.low, wilson.high))
    assert found.conditional.interval == found.robust.interval == found.accuracy.interval
    assert found.clean.interval == pytest.approx((exact.low, exact.high))


def test_intervals_of_a_stochastic_defense_are_over_images_never_pooled():
    draws, n = 20, 300
    ok = np.repeat([draws, 0], [n // 2, n // 2])  # every image is lost always or never
    found = metrics(record(draws, ok, draws - ok, ok, draws - ok)).accuracy.interval
    images = statistics.proportion(n // 2, n)
    pooled = statistics.proportion(n // 2 * draws, n * draws)
    assert found == pytest.approx(images, abs=1e-3)
    width = found.high - found.low
    assert width == pytest.approx((pooled.high - pooled.low) * math.sqrt(draws), rel=0.02)


def test_draws_that_differ_within_images_make_the_interval_narrower():
    """The mean over draws of an image is known better than one draw of it."""
    draws, n = 20, 300
    half = np.full(n, draws // 2) + np.tile([1, -1], n // 2)
    found = metrics(record(draws, half, draws - half, half, draws - half)).accuracy.interval
    images = statistics.proportion(n // 2, n)
    assert found.high - found.low < (images.high - images.low) / 2


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_tries_of_a_persistent_attacker_are_all_subsets_of_the_draws(k):
    draws, ok = 6, [6, 5, 3, 1, 0]
    expected = [
        np.mean([all(tries) for tries in itertools.combinations([1] * s + [0] * (draws - s), k)])
        for s in ok
    ]
    given_record = record(draws, ok, np.subtract(draws, ok), ok, np.subtract(draws, ok))
    assert persistent(given_record, k).value == pytest.approx(np.mean(expected))


@given(records())
@settings(max_examples=30, deadline=None)
def test_one_try_is_the_accuracy_and_more_tries_never_help_the_defense(given_record):
    curve = [persistent(given_record, k) for k in range(1, given_record.draws + 1)]
    assert curve[0].value == pytest.approx(metrics(given_record).accuracy.value)
    assert all(a.value >= b.value - 1e-12 for a, b in itertools.pairwise(curve))


def test_one_answer_of_a_deterministic_defense_has_one_interval():
    given_record = record(1, [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0])
    assert persistent(given_record, 1) == metrics(given_record).accuracy


def test_a_failed_record_has_no_metrics():
    cell = record(1, [1], [0], [1], [0]).cell
    failed = Record(id=cell.id, cell=cell, status="failed", reason="no gradient")
    with pytest.raises(ValueError, match="no gradient"):
        metrics(failed)


def test_metrics_survive_the_file():
    before = record(20, [20, 3, 0], [0, 3, 20], [20, 20, 5], [0, 0, 0])
    after = Record.model_validate(json.loads(before.text()))
    assert metrics(after) == metrics(before)
