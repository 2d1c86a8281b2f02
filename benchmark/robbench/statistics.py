"""Intervals and paired tests: what stands behind the +- and the p-values of every table.

The sampling unit is the image. Draws of a stochastic defense are never pooled into n * r trials,
because draws of one image are not independent evidence: the interval would be too short by up to
sqrt(r). An interval covers the sampling of images only; robust accuracy itself stays an upper
bound, whatever the interval.

scipy is imported inside the functions: it takes longer to load than a table takes to print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robbench.errors import InputError

DIFFERING = 10  # images that must differ for a bootstrap to see the spread
SMALL = 200  # images; below, the mean of shares is too skewed for a normal approximation
RESAMPLES = 9_999
BATCH = 1_000_000  # resampled values held at once, 8 MB


class Interval(NamedTuple):
    low: float
    high: float


class Paired(NamedTuple):
    """A comparison on the same images; the interval leaves 0 out if and only if p is small."""

    difference: float
    interval: Interval
    p: float  # two-sided


@cache
def proportion(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of a share of n images, each right or wrong (deterministic defenses).

    Wilson (JASA 22, 1927); at 0/n and n/n Clopper-Pearson (Biometrika 26, 1934), where Wilson is
    too optimistic.
    """
    from scipy import stats

    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise InputError(
            f"{successes} of {n} is no proportion; need n >= 1 and 0 <= successes <= n"
        )
    if successes in (0, n):
        exact = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
        return Interval(float(exact.low), float(exact.high))
    return _wilson(successes / n, n, confidence)


def needed(share: float, halfwidth: float, confidence: float = 0.95) -> int:
    """Images for which the interval of `proportion` is share ± halfwidth or narrower.

    share in [0, 1], halfwidth in (0, 0.5): half the length of the interval, which is not symmetric
    about the share. Wilson's interval solved for n; at 0 and 1 Clopper-Pearson's.
    """
    from scipy import stats

    _check_confidence(confidence)
    if not 0 <= share <= 1:
        raise InputError(f"share = {share} is not between 0 and 1; 40 % is written 0.4")
    if not 0 < halfwidth < 0.5:
        raise InputError(
            f"halfwidth = {halfwidth} is not between 0 and 0.5; one point is written 0.01"
        )
    if share in (0, 1):
        n = math.log((1 - confidence) / 2) / math.log1p(-2 * halfwidth)
    else:
        z2, spread = float(stats.norm.ppf((1 + confidence) / 2)) ** 2, share * (1 - share)
        root = math.sqrt(spread**2 + halfwidth**2 * (1 - 4 * spread))
        n = z2 * (spread + root) / (2 * halfwidth**2) - z2
    return max(1, math.ceil(n * (1 - 1e-9)))  # rounding must not ask for one image more


def mean(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of the mean of per-image shares in [0, 1], (N,), of a stochastic defense.

    A share is right draws / draws. Wilson with the effective sample size mean (1 - mean) / SE^2, SE
    = sd / sqrt(N); a BCa bootstrap over images for N < 200. The spread between images already
    contains the draw noise. Shares that are nearly all alike would promise more than N images can
    show: the spread is that of the sample with one more image of share 0 and one of share 1, and a
    bootstrap needs ten images that differ. Shares that are all alike: Clopper-Pearson at 0 and 1,
    else Wilson of N images.
    """
    _check_confidence(confidence)
    shares = _shares(values, "values")
    n, center = len(shares), float(shares.mean())
    if np.all(shares == shares[0]):
        return _alike(float(shares[0]), n, confidence)
    if n < SMALL and _differing(shares) >= DIFFERING:
        return _bca((shares,), np.mean, center, confidence)
    return _wilson(center, _effective(shares, np.ones(n)), confidence)


def ratio(numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of sum(numerator) / sum(denominator), both (N,) shares, the first no larger.

    For selective accuracy, sum(ok) / sum(ok + err): Wilson with the effective sample size of the
    ratio's standard error by the delta method; a BCa bootstrap over images for N < 200; both as
    for `mean` where the shares are nearly all alike. Images
    that were never accepted (denominator 0) add nothing to either sum and are left out, so that no
    resample is undefined. NaN when the denominator is zero everywhere: at zero coverage there is no
    accuracy, and certainly not 100 %.
    """
    _check_confidence(confidence)
    above, below = _shares(numerator, "numerator"), _shares(denominator, "denominator")
    _same_length(above, below)
    if np.any(above > below):
        raise InputError("ratio needs numerator <= denominator for every image (ok <= ok + err)")
    above, below = above[below > 0], below[below > 0]
    if len(below) == 0:
        return Interval(float("nan"), float("nan"))
    each = above / below
    if np.all(each == each[0]):
        return _alike(float(each[0]), len(each), confidence)
    center = float(above.sum() / below.sum())
    if len(below) >= SMALL or _differing(each) < DIFFERING:
        return _wilson(center, _effective(above, below), confidence)

    def share(a: NDArray[Any], b: NDArray[Any], axis: int = -1) -> Any:
        return a.sum(axis=axis) / b.sum(axis=axis)

    return _bca((above, below), share, center, confidence)


def placement(above: ArrayLike, below: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of an AUC whose two classes are the same images, without and with a perturbation.

    above: (N,) shares of the other class that lie on the right side of each image of the one class,
    below: (N,) the same of the other; the mean of both is the AUC. Wilson with the effective sample
    size of what each image adds to it in both classes (DeLong et al., Biometrics 44, 1988); as for
    `mean` at 0 and 1 and where images are nearly all alike.
    """
    _check_confidence(confidence)
    first, second = _shares(above, "above"), _shares(below, "below")
    _same_length(first, second)
    center = float(first.mean())
    added = first + second - center
    if np.all(added == added[0]):
        return _alike(center, len(added), confidence)
    return _wilson(center, _effective(added, np.ones(len(added))), confidence)


def draw_error(ok: ArrayLike, draws: int) -> float:
    """Standard error from the draws alone, for these images: sqrt(sum p_i (1 - p_i) / (r - 1)) / n.

    `ok` is the (N,) counts of right draws out of `draws`. NaN for one draw, which cannot show its
    own noise. Choose draws so that this stays below a third of the total standard error.
    """
    counts = _counts(ok, draws, "ok")
    if draws == 1:
        return float("nan")
    p = counts / draws
    return float(np.sqrt(np.sum(p * (1 - p)) / (draws - 1)) / len(p))


def survival(failures: ArrayLike, draws: int, k: int) -> NDArray[np.float64]:
    """Chance that an image survives k tries of the same x', (N,): C(r - s, k) / C(r, k).

    Unbiased for k <= r. `failures` is the (N,) counts s of wrong draws out of r = `draws`; the mean
    over images is RA@k, the robust accuracy against a persistent attacker. The estimator is that of
    pass@k (Chen et al. 2021, arXiv 2107.03374).
    """
    counts = _counts(failures, draws, "failures")
    if not 1 <= k <= draws:
        raise InputError(
            f"k = {k} tries cannot be estimated from {draws} draws; need 1 <= k <= draws"
        )
    tries = np.arange(k)
    left = np.clip((draws - counts)[:, None] - tries, 0, None)  # (N, k)
    return np.asarray(np.prod(left / (draws - tries), axis=1), dtype=np.float64)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided p of two deterministic defenses, (N,) bool right/wrong on the same images.

    Binomial test on the images where just one of them is right (McNemar, Psychometrika 12, 1947); 1
    if there is none.
    """
    from scipy import stats

    first, second = np.asarray(a), np.asarray(b)
    _same_length(first, second)
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        raise InputError(
            f"mcnemar takes bool arrays, got {first.dtype} and {second.dtype}; "
            "for shares use permutation"
        )
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def permutation(d: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of per-image differences d, (N,), under random signs.

    Exact when 2^N <= resamples. Images without a difference do not change under a sign flip and are
    left out: the p-value is the same.
    """
    from scipy import stats

    differences = _finite(d, "d")
    differences = differences[differences != 0]
    if len(differences) < 2:  # the other sign of a single image is just as far from zero
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(1, BATCH // len(differences)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def runs(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of a number over runs that have no seed in common, (K,),
    K >= 2. It covers their randomness, not the sampling of images."""
    from scipy import stats

    _check_confidence(confidence)
    found = np.asarray(values, dtype=np.float64)
    center, error = float(found.mean()), float(found.std(ddof=1)) / math.sqrt(len(found))
    half = float(stats.t.ppf((1 + confidence) / 2, len(found) - 1)) * error
    return Interval(center - half, center + half)


def paired(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Paired:
    """Mean of a - b over the same images, (N,) shares each, its t interval within [-1, 1], and p.

    p is exact, by McNemar where every difference is -1, 0 or 1, else by permutation, unless the t
    test has a larger one; the interval reaches 0 where p is not below 1 - confidence. So neither
    says more than the other, and neither promises more than it keeps where few images differ.
    Differences that are all alike (two defenses that never disagree) get an interval too: a share u
    of the images that N looks can miss, by Clopper-Pearson, may differ by anything.
    """
    from scipy import stats

    _check_confidence(confidence)
    first, second = _shares(a, "a"), _shares(b, "b")
    _same_length(first, second)
    d = first - second
    n, center = len(d), float(d.mean())
    if np.all(d == d[0]):
        center = float(d[0])  # the mean of equal floats can be off in the last bit
        unseen = proportion(0, n, confidence).high
        around = Interval(center - unseen * (1 + center), center + unseen * (1 - center))
        # the level at which that interval reaches 0; McNemar's p where all differ by 1
        return Paired(center, around, min(1.0, 2 * (1 + abs(center)) ** -n))
    error = float(d.std(ddof=1) / np.sqrt(n))
    exact = mcnemar(d > 0, d < 0) if np.all(np.isin(d, (-1, 0, 1))) else permutation(d)
    p = max(exact, 2 * float(stats.t.sf(abs(center) / error, n - 1)))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    low, high = max(-1.0, center - half), min(1.0, center + half)
    if p >= 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Paired(center, Interval(low, high), p)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for a whole table, same order (Holm, Scand. J. Statist. 6, 1979)."""
    values = np.asarray(p, dtype=np.float64)
    if not np.all((values >= 0) & (values <= 1)):  # also refuses NaN
        raise InputError(f"holm takes p-values in [0, 1], got {list(p)}")
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return [float(value) for value in adjusted]


def _wilson(p: float, n: float, confidence: float) -> Interval:
    """Wilson's score interval; n may be an effective sample size."""
    from scipy import stats

    z = float(stats.norm.ppf((1 + confidence) / 2))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return _around(p, middle - half, middle + half)


def _alike(share: float, n: int, confidence: float) -> Interval:
    """n images that all have the same share."""
    return (
        proportion(round(share) * n, n, confidence)
        if share in (0.0, 1.0)
        else _wilson(share, n, confidence)
    )


def _effective(above: NDArray[Any], below: NDArray[Any]) -> float:
    """How many 0/1 images would leave the ratio of the sums as uncertain as these do: p (1 - p) /
    SE^2 by the delta method, with one image of share 0 and one of share 1 added."""
    n = len(above)
    above, below = np.append(above, (0.0, 1.0)), np.append(below, (1.0, 1.0))
    center = above.sum() / below.sum()
    scatter = (above - center * below).var(ddof=1) / n / below.mean() ** 2
    return float(center * (1 - center) / scatter)


def _differing(shares: NDArray[Any]) -> int:
    """How many images do not have the most frequent share."""
    return len(shares) - int(np.unique(shares, return_counts=True)[1].max())


def _bca(
    data: tuple[NDArray[Any], ...], statistic: Any, estimate: float, confidence: float
) -> Interval:
    """BCa bootstrap over images (Efron, JASA 82, 1987); a fixed seed, so that tables repeat."""
    from scipy import stats

    result = stats.bootstrap(
        data,
        statistic,
        paired=len(data) > 1,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // len(data[0])),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return _around(estimate, float(low), float(high))


def _around(estimate: float, low: float, high: float) -> Interval:
    """The interval within [0, 1] that holds its estimate even where rounding moved a bound."""
    return Interval(max(0.0, min(low, estimate)), min(1.0, max(high, estimate)))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence} is not between 0 and 1; 95 % is written 0.95")


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"{name} has shape {array.shape}; need one value per image, (N,), N >= 1")
    if not np.all(np.isfinite(array)):
        raise InputError(f"{name} holds NaN or infinite values; a failed cell has no interval")
    return array


def _shares(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = _finite(values, name)
    if array.min() < 0 or array.max() > 1:
        raise InputError(
            f"{name} reaches from {array.min():g} to {array.max():g}; shares lie in [0, 1]"
        )
    return array


def _counts(values: ArrayLike, draws: int, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {array.dtype} {array.shape}; need one integer count per image, (N,), N >= 1"
        )
    if draws < 1 or array.min() < 0 or array.max() > draws:
        raise InputError(
            f"{name} counts from {array.min()} to {array.max()} do not fit {draws} draws"
        )
    # uint8 as records store them would wrap around in r - s - j
    return array.astype(np.int64)


def _same_length(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"paired values differ in shape, {a.shape} and {b.shape}; compare the same images"
        )
