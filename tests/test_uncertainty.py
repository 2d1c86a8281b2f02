"""How far a figure would move: closed forms, scipy, and intervals that cover what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench import statistics
from robbench.attacks.gradient import Trace
from robbench.cell import Cell, Setting
from robbench.errors import InputError
from robbench.metrics import detected, metrics, outcomes
from robbench.metrics.uncertainty import looks, precise_enough, variability
from robbench.records import COSTS, Record
from robbench.threat import Threat


def record(ok, draws=20, wrong=None, trace=None, subset="s", **changes):
    """A record that is right in `ok` of the draws on x', and always right on x."""
    right = np.array(ok, dtype=np.uint8)
    wrong = draws - right if wrong is None else np.array(wrong)
    fields = {
        "dataset": "digits",
        "data": "0" * 16,
        "n": len(right),
        "defense": "ito",
        "defense_version": "1",
        "attack": "pgd",
        "attack_version": 1,
        "threat": Threat(eps="1/10"),
        "setting": Setting(kind="whitebox"),
    }
    cell = Cell(**(fields | changes))
    return Record(
        id=cell.id,
        cell=cell,
        draws=draws,
        ok=right,
        err=wrong.astype(np.uint8),
        clean_ok=np.full_like(right, draws),
        clean_err=np.zeros_like(right),
        distance=np.zeros(len(right), dtype=np.float32),
        trace=trace or {},
        cost=dict.fromkeys(COSTS, 1.0),
        provenance={"subset_hash": subset},
    )


def test_single_looks_spread_as_simulated_ones_do():
    rng = np.random.default_rng(0)
    chance = rng.beta(1, 1, 200)
    single = (rng.random((10_000, 200)) < chance).mean(axis=1)
    found = [looks(record(rng.binomial(20, chance))) for _ in range(40)]
    variance = np.mean([each.single_sd**2 for each in found])
    assert math.sqrt(variance) == pytest.approx(single.std(), rel=0.03)
    assert np.mean([each.expected.value for each in found]) == pytest.approx(
        single.mean(), abs=0.005
    )


def test_both_errors_are_those_of_images_drawn_anew():
    """Fresh images with fresh draws scatter by the one, fresh draws of the same by the other."""
    rng = np.random.default_rng(1)
    anew = [looks(record(rng.binomial(5, rng.beta(1, 2, 200)), draws=5)) for _ in range(300)]
    chance = rng.beta(1, 2, 200)
    same = [looks(record(rng.binomial(5, chance), draws=5)) for _ in range(300)]
    for found, name in ((anew, "image_error"), (same, "draw_error")):
        scatter = np.std([each.expected.value for each in found])
        assert np.mean([getattr(each, name) for each in found]) == pytest.approx(scatter, rel=0.1)


def test_one_draw_does_not_show_its_own_spread():
    assert math.isnan(looks(record([1, 0, 1], draws=1)).single_sd)


@pytest.mark.parametrize(("total", "broken"), [(5, 0.41), (10, 0.65), (40, 0.99)])
def test_an_attack_that_stops_at_a_lucky_flip_reports_what_chance_says(total, broken):
    """Nobody attacks: every look, the last one at what is returned, is lost with chance 10 %."""
    torch.manual_seed(0)
    n, chance, steps = 4000, 0.1, total - 1
    trace = Trace(n, steps)
    for step in range(steps):
        lost = (torch.rand(n) < chance).float()
        trace.note(step, torch.arange(n), torch.zeros(n), torch.ones(n, 1, 1, 1), lost)
    rng = np.random.default_rng(0)
    found = looks(record(rng.binomial(20, 1 - chance, n), trace=trace.arrays))
    assert found.expected.value == pytest.approx(0.9, abs=0.005)
    assert found.any_iteration.value == pytest.approx(1 - broken, abs=0.02)
    assert found.any_iteration.interval.low < (1 - chance) ** total
    assert (1 - chance) ** total < found.any_iteration.interval.high


def test_an_attack_looks_at_what_it_returns_too():
    """FGSM evaluates nothing but x; its image is broken all the same."""
    seen = np.zeros((2, 4), dtype=np.float16)
    found = looks(record([1, 0, 1, 0], draws=1, trace={"lost_seen": seen}))
    assert found.any_iteration == found.expected == metrics(record([1, 0, 1, 0], 1)).accuracy


def test_an_image_that_was_given_up_before_the_first_step_counts_as_lost():
    seen = np.array([[np.nan, 0, 0.5, 1], [np.nan, 0, 0, 0]], dtype=np.float16)
    assert looks(record([20, 20, 20, 20], trace={"lost_seen": seen})).any_iteration.value == 0.25


@pytest.mark.parametrize(
    "changes",
    [
        {"setting": Setting(kind="transfer", oracle="standard")},
        {"threat": Threat(eps="1/10", target="random")},
        {"trace": {}},
    ],
    ids=["transfer", "target", "no trace"],
)
def test_what_no_look_at_the_label_was_kept_for_is_not_a_number(changes):
    trace = {"lost_seen": np.zeros((2, 3), dtype=np.float16)}
    found = looks(record([20, 20, 3], **({"trace": trace} | changes)))
    assert math.isnan(found.any_iteration.value)
    assert found.expected.value == pytest.approx(43 / 60)


@given(st.integers(2, 60), st.data())
@settings(max_examples=40, deadline=None)
def test_the_images_asked_for_are_the_fewest_that_are_precise_enough(n, data):
    right = data.draw(st.integers(0, n))
    given_record = record([1] * right + [0] * (n - right), draws=1)
    precision = data.draw(st.floats(0.01, 0.3))
    low, high = metrics(given_record).robust_with_detection.interval
    more = precise_enough(given_record, precision)
    if more is None:
        assert (high - low) / 2 <= precision
        return
    share = right / n
    exact = statistics.proportion(0, more).high if share in (0, 1) else None
    z2 = stats.norm.ppf(0.975) ** 2
    halves = [
        math.sqrt(z2) / (1 + z2 / m) * math.sqrt(share * (1 - share) / m + z2 / (4 * m * m))
        for m in (more - 1, more)
    ]
    if exact is not None:
        halves = [statistics.proportion(0, m).high / 2 for m in (more - 1, more)]
    assert halves[1] <= precision * (1 + 1e-6) and precision < halves[0] * (1 + 1e-6)


def test_half_the_width_takes_four_times_the_images_of_a_stochastic_defense():
    rng = np.random.default_rng(1)
    given_record = record(rng.binomial(20, rng.beta(1, 1, 500)))
    low, high = metrics(given_record).robust_with_detection.interval
    assert precise_enough(given_record, (high - low) / 2) is None
    assert precise_enough(given_record, (high - low) / 4) == pytest.approx(2000, rel=0.02)


def test_a_precision_is_a_share():
    with pytest.raises(InputError, match="one point is written 0.01"):
        precise_enough(record([20, 0]), 1)


def runs(k, n=4, trainings=None):
    """k records that differ in their attack seeds, or in trainings and seeds."""
    pairs = [(0, seed) for seed in range(k)] if trainings is None else trainings
    return [record(np.zeros(n), train_seed=train, seed=seed) for train, seed in pairs]


def vary(table, pairs=None):
    """The variability of a table (K, N) of shares."""
    made = runs(*table.shape, pairs)
    rows = {(r.cell.train_seed, r.cell.seed): row for r, row in zip(made, table, strict=True)}
    return variability(made, lambda r: rows[r.cell.train_seed, r.cell.seed])


def test_models_that_differ_alike_on_all_images_have_students_interval():
    means = np.array([0.42, 0.5, 0.55, 0.49])
    images = np.tile([1e-4, -1e-4], 400)
    found = vary(means[:, None] + images, [(train, 0) for train in range(4)])
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    # of the images' own spread of 1e-4, Wilson of 800 images leaves nearly nothing
    assert found.interval == pytest.approx(tuple(expected), abs=0.001)
    assert found.training_sd == pytest.approx(means.std(ddof=1))
    assert found.seed_error == pytest.approx(stats.sem(means))
    assert math.isnan(found.seed_sd) and found.trainings == 4


def test_seeds_that_change_nothing_have_the_interval_of_the_images():
    rng = np.random.default_rng(2)
    shares = rng.binomial(20, rng.beta(1, 1, 300)) / 20
    found = vary(np.tile(shares, (3, 1)))
    assert found.interval == pytest.approx(statistics.mean(shares))
    assert found.image_error == found.error == pytest.approx(stats.sem(shares))
    assert found.seed_sd == found.seed_error == pytest.approx(0, abs=1e-12)
    assert math.isnan(found.training_sd)


def test_seeds_are_averaged_within_models_and_their_spread_is_pooled():
    rng = np.random.default_rng(3)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    table = rng.binomial(20, 0.5, (6, 250)) / 20
    found = vary(table, pairs)
    means = table.mean(axis=1)
    models = [means[:3].mean(), means[3:5].mean(), means[5]]
    within = (2 * means[:3].var(ddof=1) + means[3:5].var(ddof=1)) / 3
    assert found.mean == pytest.approx(np.mean(models))
    assert found.training_sd == pytest.approx(np.std(models, ddof=1))
    assert found.seed_sd == pytest.approx(math.sqrt(within))
    assert (found.records, found.trainings) == (6, 3)


def crossed(rng, k, n, image, model, noise):
    """Shares (K, N) of mean 0.5: of images, of models, and of each image in each model."""
    models = rng.normal(0, model, (k, 1))
    return 0.5 + rng.uniform(-image, image, n) + models + rng.choice([-noise, noise], (k, n))


def test_both_parts_add_up_to_the_variance_of_the_mean(monkeypatch):
    """The noise of an image in a model is in both parts, and must be counted once."""
    monkeypatch.setattr(statistics, "SMALL", 0)  # the interval is not looked at: no bootstrap
    rng = np.random.default_rng(4)
    found = [vary(crossed(rng, 4, 100, 0.1, 0.05, 0.3)) for _ in range(400)]
    true = 0.1**2 / 300 + 0.05**2 / 4 + 0.3**2 / 400
    assert np.mean([each.error**2 for each in found]) == pytest.approx(true, rel=0.1)
    assert np.var([each.mean for each in found]) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize(
    ("k", "image", "model", "noise", "most"),
    [
        (3, 0.45, 0.0, 0.01, 0.96),  # the images decide
        (2, 0.05, 0.1, 0.05, 0.96),  # the models decide
        (3, 0.05, 0.1, 0.05, 0.96),
        (3, 0.45, 0.012, 0.1, 0.985),  # both do: more than promised, never less
        (2, 0.45, 0.012, 0.1, 0.995),
    ],
)
def test_the_interval_over_models_covers_as_promised(k, image, model, noise, most):
    rng, hits = np.random.default_rng(5), []
    for _ in range(1000):
        low, high = vary(np.clip(crossed(rng, k, 400, image, model, noise), 0, 1)).interval
        hits.append(low <= 0.5 <= high)
    assert 0.94 < np.mean(hits) < most


def test_any_shares_of_records_can_be_averaged():
    made = [
        record([20, 10, 0], wrong=[0, 4, 20], seed=0),
        record([18, 10, 0], wrong=[0, 4, 16], seed=1),
    ]
    assert variability(made).mean == pytest.approx(np.mean([outcomes(r).mean() for r in made]))
    shielded = variability(made, detected)
    assert shielded.mean == pytest.approx((1 + 0.8 + 0 + 1 + 0.8 + 0.2) / 6)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: runs(1), "1 records of 1 seeds show no spread"),
        (lambda: [*runs(1), *runs(1)], "2 records of 1 seeds"),
        (lambda: [record([1]), record([1], seed=1, attack="mim")], "differ in more than seed"),
        (lambda: [record([1]), record([1], seed=1, subset="t")], "on the same images"),
        (lambda: runs(2, n=1), "one image shows no spread"),
    ],
)
def test_records_that_show_no_spread_are_refused(made, message):
    with pytest.raises(InputError, match=message):
        variability(made())
