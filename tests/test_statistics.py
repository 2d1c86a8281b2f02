"""Intervals and tests against scipy, closed formulas and the coverage that they promise.

PYTHONPATH=benchmark python -m pytest tests/test_statistics.py
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from robbench import statistics
from robbench.errors import InputError
from robbench.statistics import Interval

SHARES = st.lists(st.integers(0, 20), min_size=1, max_size=40).map(
    lambda counts: np.array(counts) / 20
)


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def beta_binomial(
    center: float, concentration: float, draws: int, size: tuple[int, int], seed: int
) -> NDArray[np.float64]:
    """Shares of a stochastic defense: every image has its own chance, and `draws` looks at it."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(center * concentration, (1 - center) * concentration, size)
    return np.asarray(rng.binomial(draws, chance) / draws)


@pytest.mark.parametrize(("successes", "n"), [(1, 10), (5, 10), (499, 500), (37, 128)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_proportion_is_scipys_wilson(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert statistics.proportion(successes, n, confidence) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("n", [1, 128, 1000])
def test_proportion_at_the_ends_is_clopper_pearson(n: int) -> None:
    bound = 1 - 0.025 ** (1 / n)  # closed form; 0.37 % at n = 1,000, 2.8 % at n = 128
    assert statistics.proportion(0, n) == pytest.approx((0, bound))
    assert statistics.proportion(n, n) == pytest.approx((1 - bound, 1))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_proportion_contains_its_estimate_and_mirrors(case: tuple[int, int]) -> None:
    successes, n = case
    interval = statistics.proportion(successes, n)
    assert 0 <= interval.low <= successes / n <= interval.high <= 1
    mirrored = statistics.proportion(n - successes, n)
    assert mirrored == pytest.approx((1 - interval.high, 1 - interval.low), abs=1e-12)


@given(st.integers(1, 300), st.data())
def test_proportion_is_monotone(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n - 1))
    here, next_ = statistics.proportion(successes, n), statistics.proportion(successes + 1, n)
    assert here.low <= next_.low
    assert here.high <= next_.high
    wider = statistics.proportion(successes, n, 0.99)
    assert wider.low <= here.low
    assert here.high <= wider.high


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("n", [500, 1000])
def test_proportion_covers_as_promised(p: float, n: int) -> None:
    # no simulation needed: n + 1 outcomes, each with its exact probability
    hit = [covers(statistics.proportion(k, n), p) for k in range(n + 1)]
    coverage = float(stats.binom.pmf(np.arange(n + 1), n, p) @ np.array(hit))
    assert coverage == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [50, 128, 200, 500, 1000])
def test_proportion_covers_as_promised_on_average_over_all_shares(n: int) -> None:
    """Wilson inside, Clopper-Pearson at both ends, every share equally likely: exact, for a share
    of n images then has the probability 1 / (n + 1) of each count, by the beta integral."""
    intervals = [statistics.proportion(k, n) for k in range(n + 1)]
    posterior = [stats.beta(k + 1, n - k + 1) for k in range(n + 1)]
    covered = [
        beta.cdf(each.high) - beta.cdf(each.low)
        for beta, each in zip(posterior, intervals, strict=True)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@given(st.integers(2, 3000).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_needed_is_the_inverse_of_wilsons_interval(case: tuple[int, int]) -> None:
    successes, n = case
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    half = (expected.high - expected.low) / 2
    assert statistics.needed(successes / n, half) == n
    assert statistics.needed(successes / n, half * (1 + 1e-6)) <= n
    assert statistics.needed(successes / n, half * (1 - 1e-6)) == n + 1


@given(st.integers(1, 3000), st.booleans())
def test_needed_at_the_ends_is_the_inverse_of_clopper_pearsons(n: int, all_right: bool) -> None:
    expected = stats.binomtest(n * all_right, n).proportion_ci(method="exact")
    assert statistics.needed(float(all_right), (expected.high - expected.low) / 2) == n


@pytest.mark.parametrize(("n", "points"), [(128, 8.5), (512, 4.3), (1000, 3.1), (10_000, 1.0)])
def test_needed_for_one_point_is_ten_thousand_images(n: int, points: float) -> None:
    assert statistics.needed(0.5, points / 100) == pytest.approx(n, rel=0.05)


@given(SHARES)
@settings(max_examples=40, deadline=None)
def test_mean_contains_its_estimate(shares: NDArray[np.float64]) -> None:
    interval = statistics.mean(shares)
    assert 0 <= interval.low <= shares.mean() + 1e-12
    assert shares.mean() - 1e-12 <= interval.high <= 1
    assert interval.low < interval.high


def test_mean_of_small_samples_is_scipys_bca() -> None:
    shares = beta_binomial(0.6, 1.0, 20, (1, 60), seed=3)[0]
    expected = stats.bootstrap((shares,), np.mean, method="BCa", rng=np.random.default_rng(0))
    interval = statistics.mean(shares)
    assert interval == pytest.approx(tuple(expected.confidence_interval), abs=0.005)
    assert interval == statistics.mean(shares), "the seed is fixed"


def test_mean_of_large_samples_is_near_the_t_interval() -> None:
    shares = beta_binomial(0.6, 1.0, 20, (1, 1000), seed=3)[0]
    expected = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    assert statistics.mean(shares) == pytest.approx(tuple(expected), abs=5e-4)


def test_mean_of_right_and_wrong_images_is_the_proportion() -> None:
    shares = np.repeat([1.0, 0.0], [180, 320])
    assert statistics.mean(shares) == pytest.approx(statistics.proportion(180, 500), abs=1e-4)


def test_mean_without_spread() -> None:
    assert statistics.mean(np.zeros(128)) == statistics.proportion(0, 128)
    assert statistics.mean(np.ones(128)) == statistics.proportion(128, 128)
    assert statistics.mean(np.full(128, 0.5)) == statistics.proportion(64, 128)


@pytest.mark.parametrize(
    ("center", "concentration"),
    [(0.5, 0.5), (0.3, 2.0), (0.9, 0.5), (0.02, 0.5), (0.99, 2.0)],
    ids=lambda value: str(value),
)
def test_mean_covers_as_promised(center: float, concentration: float) -> None:
    tables = beta_binomial(center, concentration, 20, (3000, 1000), seed=0)
    coverage = np.mean([covers(statistics.mean(shares), center) for shares in tables])
    assert coverage == pytest.approx(0.95, abs=0.015)


def test_mean_covers_as_promised_on_average_over_all_shares() -> None:
    """Every mean chance equally likely, the spread between images from slight to all or nothing."""
    rng = np.random.default_rng(12)
    center, concentration = rng.uniform(0, 1, 5_000), rng.choice([0.2, 1, 5], 5_000)
    ends = center * concentration, (1 - center) * concentration
    chance = rng.beta(*ends, (300, 5_000)).T
    tables = rng.binomial(20, chance) / 20
    hit = [
        covers(statistics.mean(shares), truth) for shares, truth in zip(tables, center, strict=True)
    ]
    assert np.mean(hit) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", [100, 500])
def test_rare_images_are_not_promised_away(n: int) -> None:
    """What a strong attack leaves: nearly all images at 0, a few survivors at 1, some at 1 / 20."""
    rng = np.random.default_rng(7)
    kind = rng.random((2000, n))
    tables = np.where(kind < 0.003, 1.0, np.where(kind < 0.023, 0.05, 0.0))
    coverage = np.mean([covers(statistics.mean(shares), 0.004) for shares in tables])
    assert coverage > 0.94
    one = np.zeros(n)
    one[0] = 0.05
    assert statistics.mean(one).high > 0.8 * statistics.proportion(0, n).high


def test_mean_of_small_samples_covers_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 999)  # enough here, and ten times as fast
    hit = [
        covers(statistics.mean(shares), center)
        for center in (0.2, 0.4, 0.6, 0.8)
        for shares in beta_binomial(center, 1.0, 20, (500, 80), seed=1)
    ]
    assert np.mean(hit) == pytest.approx(0.95, abs=0.01)


def test_pooled_draws_would_cover_too_rarely() -> None:
    draws, images, center = 20, 500, 0.5
    tables = beta_binomial(center, 0.5, draws, (1000, images), seed=2)
    right = np.rint(tables.sum(axis=1) * draws).astype(int)
    pooled = [covers(statistics.proportion(k, draws * images), center) for k in right.tolist()]
    per_image = [covers(statistics.mean(shares), center) for shares in tables]
    assert np.mean(pooled) < 0.6
    assert np.mean(per_image) > 0.935


@given(SHARES, st.data())
@settings(max_examples=30, deadline=None)
def test_ratio_contains_its_estimate(ok: NDArray[np.float64], data: st.DataObject) -> None:
    share = data.draw(st.lists(st.integers(0, 10), min_size=len(ok), max_size=len(ok)))
    err = (1 - ok) * np.array(share) / 10
    interval = statistics.ratio(ok, ok + err)
    if np.all(ok + err == 0):
        assert math.isnan(interval.low) and math.isnan(interval.high)
    else:
        estimate = ok.sum() / (ok + err).sum()
        assert -1e-12 <= interval.low - 1e-12 <= estimate <= interval.high + 1e-12


def test_ratio_with_full_coverage_is_the_mean() -> None:
    ok = beta_binomial(0.6, 1.0, 20, (1, 150), seed=3)[0]
    assert statistics.ratio(ok, np.ones(150)) == pytest.approx(statistics.mean(ok), abs=1e-3)


def test_ratio_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(5)
    covered = rng.binomial(20, 0.7, 800) / 20 * (rng.random(800) < 0.6)
    ok = covered * rng.beta(3, 1, 800)
    estimate = ok.sum() / covered.sum()
    error = np.sqrt(np.sum((ok - estimate * covered) ** 2)) / covered.sum()
    interval = statistics.ratio(ok, covered)
    assert interval == pytest.approx((estimate - 1.96 * error, estimate + 1.96 * error), abs=2e-3)


def test_ratio_covers_as_promised() -> None:
    """Images are accepted with a chance of their own, and easy ones more often."""
    rng = np.random.default_rng(6)
    accepted = rng.beta(2, 1, (2000, 500))
    covered = rng.binomial(20, accepted) / 20
    ok = covered * rng.binomial(1, accepted)
    truth = (1 / 18 + 4 / 9) / (2 / 3)  # E[a²] / E[a] of the beta distribution
    coverage = np.mean(
        [covers(statistics.ratio(a, b), truth) for a, b in zip(ok, covered, strict=True)]
    )
    assert coverage == pytest.approx(0.95, abs=0.015)


def test_ratio_at_the_ends() -> None:
    accepted = np.repeat([0.5, 0.0], [40, 60])
    assert all(math.isnan(bound) for bound in statistics.ratio(np.zeros(9), np.zeros(9)))
    assert statistics.ratio(accepted, accepted) == statistics.proportion(40, 40)
    assert statistics.ratio(accepted * 0, accepted) == statistics.proportion(0, 40)


def test_draw_error_is_the_spread_over_fresh_draws() -> None:
    rng = np.random.default_rng(0)
    chance, draws = rng.beta(1, 1, 200), 20
    tables = rng.binomial(draws, chance, (4000, 200))
    estimated = np.mean([statistics.draw_error(counts, draws) for counts in tables])
    assert estimated == pytest.approx((tables / draws).mean(axis=1).std(), rel=0.03)


def test_draw_error_by_hand() -> None:
    assert statistics.draw_error(np.array([1, 2, 0]), 2) == pytest.approx(math.sqrt(0.25) / 3)
    assert statistics.draw_error(np.array([0, 5]), 5) == 0
    assert math.isnan(statistics.draw_error(np.array([0, 1]), 1))


@given(st.integers(1, 40).flatmap(lambda r: st.tuples(st.just(r), st.integers(1, r))))
def test_survival_is_the_quotient_of_binomials(case: tuple[int, int]) -> None:
    draws, k = case
    failures = np.arange(draws + 1, dtype=np.uint8)
    expected = [math.comb(draws - s, k) / math.comb(draws, k) for s in range(draws + 1)]
    found = statistics.survival(failures, draws, k)
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.all(np.diff(found) <= 0), "more failures, less survival"


def test_survival_is_unbiased() -> None:
    q, draws, k = 0.1, 20, 10  # exact expectation over the binomial number of failures
    probability = stats.binom.pmf(np.arange(draws + 1), draws, q)
    expected = probability @ statistics.survival(np.arange(draws + 1), draws, k)
    assert expected == pytest.approx((1 - q) ** k)  # 35 %: broken with probability 65 %


def test_mcnemar_by_hand_and_without_disagreement() -> None:
    a = np.repeat([True, True, False, False], [10, 8, 1, 5])
    b = np.repeat([True, False, True, False], [10, 8, 1, 5])
    assert statistics.mcnemar(a, b) == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.mcnemar(a, b) == pytest.approx(statistics.mcnemar(b, a))
    assert statistics.mcnemar(a, a) == 1


def test_permutation_is_exact_when_small() -> None:
    d = np.array([0.5, 0.25, -0.1, 0.4, 0.0, 0.3])
    signs = np.array(list(itertools.product([1, -1], repeat=len(d))))
    expected = np.mean(np.abs(signs @ d) >= d.sum() - 1e-12)
    assert statistics.permutation(d) == pytest.approx(expected)
    assert statistics.permutation(np.zeros(7)) == 1


def test_permutation_of_many_images_is_near_the_t_test_and_repeats() -> None:
    d = np.random.default_rng(4).normal(0.02, 0.2, 400)
    p = statistics.permutation(d)
    assert p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    assert p == statistics.permutation(d)
    assert p != statistics.permutation(d, seed=1)


def test_permutation_rejects_a_true_hypothesis_at_the_stated_rate() -> None:
    rng = np.random.default_rng(6)
    tables = rng.binomial(20, 0.5, (400, 40)) / 20 - rng.binomial(20, 0.5, (400, 40)) / 20
    p = [statistics.permutation(d, resamples=199) for d in tables]
    assert np.mean(np.array(p) <= 0.05) < 0.08


def test_paired_is_scipys_t_interval() -> None:
    a, b = beta_binomial(0.6, 1.0, 20, (2, 300), seed=8)
    difference, interval, p = statistics.paired(a, b, 0.9)
    expected = stats.ttest_rel(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert p == pytest.approx(expected.pvalue, abs=0.01)


@given(st.integers(1, 30), st.data())
@settings(max_examples=80, deadline=None)
def test_an_interval_of_a_difference_leaves_zero_out_just_where_p_is_small(
    n: int, data: st.DataObject
) -> None:
    draws = data.draw(st.sampled_from([1, 2, 20]))
    counts = st.lists(st.integers(0, draws), min_size=n, max_size=n)
    a, b = (np.array(data.draw(counts)) / draws for _ in range(2))
    confidence = data.draw(st.sampled_from([0.8, 0.95]))
    difference, interval, p = statistics.paired(a, b, confidence)
    assert covers(interval, difference)
    assert covers(interval, 0) == (p >= 1 - confidence)


@pytest.mark.parametrize("n", [6, 20, 500])
def test_paired_has_mcnemars_exact_p_down_to_one_in_a_hundred(n: int) -> None:
    """Below, the t test may have a larger one, where one side wins all the images that differ."""
    for first, second in itertools.product(range(0, min(n, 60) + 1, 3), repeat=2):
        if first + second > n:
            continue
        d = np.repeat([1.0, -1.0, 0.0], [first, second, n - first - second])
        a, b = np.maximum(d, 0), np.maximum(-d, 0)
        exact, p = statistics.mcnemar(a == 1, b == 1), statistics.paired(a, b).p
        assert p == pytest.approx(exact) if exact > 0.01 else exact <= p < 0.01


@pytest.mark.parametrize("differing", [0.06, 0.3])
def test_paired_rejects_a_true_hypothesis_at_most_at_the_stated_rate(differing: float) -> None:
    rng = np.random.default_rng(11)
    chances = [differing / 2, 1 - differing, differing / 2]
    tables = rng.choice([-1.0, 0.0, 1.0], p=chances, size=(1000, 100))
    p = [statistics.paired(np.maximum(d, 0), np.maximum(-d, 0)).p for d in tables]
    assert np.mean(np.array(p) < 0.05) < 0.055


def test_paired_without_spread_still_has_an_interval() -> None:
    unseen = statistics.proportion(0, 100).high
    same = np.full(100, 0.3)
    assert statistics.paired(same, same) == (0.0, Interval(-unseen, unseen), 1.0)
    difference, interval, _ = statistics.paired(np.ones(100), np.zeros(100))
    assert difference == 1
    assert interval == pytest.approx((1 - 2 * unseen, 1))


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p: list[float]) -> None:
    adjusted = statistics.holm(p)
    assert all(x <= y <= min(1, len(p) * x) + 1e-12 for x, y in zip(p, adjusted, strict=True))
    ranked = [y for _, y in sorted(zip(p, adjusted, strict=True))]
    assert ranked == sorted(ranked)


def placements(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    above = np.array([(first > each).mean() for each in second])
    return [above, np.array([(second < each).mean() for each in first])]


@pytest.mark.parametrize("together", [0.0, 0.8])
def test_the_interval_of_an_auc_covers_it(together: float) -> None:
    """Normal scores one standard deviation apart, of the same images with this correlation."""
    random, truth, hits = np.random.default_rng(0), stats.norm.cdf(1 / math.sqrt(2)), 0
    for _ in range(400):
        first, own = random.normal(size=60), random.normal(size=60)
        second = together * first + math.sqrt(1 - together**2) * own - 1
        low, high = statistics.placement(*placements(first, second))
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_an_auc_of_1_says_no_more_than_its_images() -> None:
    first, second = np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0, 2.0])
    assert statistics.placement(*placements(first, second)) == statistics.proportion(3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.proportion(3, 2), "3 of 2 is no proportion"),
        (lambda: statistics.proportion(0, 0), "0 of 0 is no proportion"),
        (lambda: statistics.proportion(1, 2, 95), "95 % is written 0.95"),
        (lambda: statistics.needed(40, 0.01), "40 % is written 0.4"),
        (lambda: statistics.needed(0.4, 1), "one point is written 0.01"),
        (lambda: statistics.mean([]), r"values has shape \(0,\)"),
        (lambda: statistics.placement([0.5], [0.5, 1]), "compare the same images"),
        (lambda: statistics.mean([[0.5]]), r"values has shape \(1, 1\)"),
        (lambda: statistics.mean([0.5, float("nan")]), "values holds NaN"),
        (lambda: statistics.mean([0.5, 1.5]), "reaches from 0.5 to 1.5"),
        (lambda: statistics.ratio([0.5], [0.4]), "numerator <= denominator"),
        (lambda: statistics.ratio([0.5], [0.5, 1]), "compare the same images"),
        (lambda: statistics.draw_error([3], 2), "do not fit 2 draws"),
        (lambda: statistics.draw_error([0.5], 2), "integer count"),
        (lambda: statistics.survival([0], 5, 6), "k = 6 tries cannot be estimated from 5 draws"),
        (lambda: statistics.survival([0], 5, 0), "k = 0 tries"),
        (lambda: statistics.mcnemar([True], [True, False]), "compare the same images"),
        (lambda: statistics.mcnemar([0.5], [0.5]), "for shares use permutation"),
        (lambda: statistics.permutation([float("inf")]), "d holds NaN or infinite"),
        (lambda: statistics.paired([1], [1, 0]), "compare the same images"),
        (lambda: statistics.holm([0.1, float("nan")]), "p-values in"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_over_runs_is_students(confidence: float) -> None:
    values = np.random.default_rng(0).normal(size=5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert statistics.runs(values, confidence) == pytest.approx(tuple(expected))
    assert statistics.runs([2.0, 2.0]) == (2.0, 2.0)
