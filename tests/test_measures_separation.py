"""Class separation and sample density against SciPy, scikit-learn, sampling, and the theorems of
MMLDA and MMC."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from robbench.errors import InputError
from robbench.metrics.separation import (
    class_gaussians,
    expected_distance,
    log_sample_density,
    mahalanobis,
    measured_distance,
    robustness,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=50)
SEEDS = st.integers(0, 10**6)


def normal(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def simplex(labels, length):
    """(L, L) centres at equal angles: the unit vectors less their mean, at the given length."""
    centred = torch.eye(labels, dtype=torch.float64) - 1 / labels
    return length * centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)


def pair_of_gaussians(seed, dimension=3):
    """SciPy's two Gaussians with one covariance, their means (2, D) and that covariance."""
    factor, means = normal(seed, dimension, dimension), normal(seed + 1, 2, dimension)
    covariance = factor @ factor.T + 0.1 * torch.eye(dimension)
    laws = [stats.multivariate_normal(mean.numpy(), covariance.numpy()) for mean in means]
    return laws, means, covariance


@given(st.floats(0, 60))
@PROPERTY
def test_the_expected_distance_is_the_mean_of_a_folded_normal(delta):
    """MMLDA theorem 1 as SciPy knows it."""
    found = expected_distance(torch.tensor(delta, dtype=torch.float64)).item()
    assert found == pytest.approx(stats.foldnorm(delta / 2).mean())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_mmlda_theorem_1_sampled_distances_to_the_boundary(seed):
    """The log-density ratio is Δ times the Mahalanobis distance to where it is 0."""
    laws, means, covariance = pair_of_gaussians(seed)
    delta = mahalanobis(means, covariance)
    points = laws[0].rvs(40_000, random_state=seed)
    ratio = laws[0].logpdf(points) - laws[1].logpdf(points)
    distances = torch.from_numpy(np.abs(ratio)) / delta[0, 1]
    first, second = torch.zeros(len(points), dtype=torch.long), torch.ones(1, dtype=torch.long)
    measured = measured_distance(distances, first, second.expand(len(points)), labels=2)
    tolerance = 4 * stats.sem(distances.numpy())
    assert robustness(measured) == pytest.approx(
        robustness(expected_distance(delta)), abs=tolerance
    )


@given(st.floats(0, 30))
@PROPERTY
def test_mmlda_half_the_distance_between_means_bounds_the_expected_distance(delta):
    """RB is at least its approximation, and above it by less than a standard deviation."""
    excess = expected_distance(torch.tensor(delta, dtype=torch.float64)).item() - delta / 2
    assert -1e-12 <= excess <= math.sqrt(2 / math.pi)


@given(SEEDS, st.integers(2, 9), st.integers(1, 12), st.floats(0.1, 20))
@PROPERTY
def test_mmlda_no_random_centres_exceed_the_simplex(seed, labels, dimension, length):
    centres = normal(seed, labels, dimension)
    norms = torch.linalg.vector_norm(centres, dim=1, keepdim=True)
    found = robustness(mahalanobis(length * centres / norms))
    assert found <= length * math.sqrt(2 * labels / (labels - 1)) * (1 + 1e-12)
    assert found <= robustness(mahalanobis(simplex(labels, length))) * (1 + 1e-12)


@pytest.mark.parametrize("labels", [2, 3, 10, 100])
def test_mmlda_the_simplex_attains_the_bound(labels):
    found = robustness(mahalanobis(simplex(labels, 10.0)))
    assert found == pytest.approx(10 * math.sqrt(2 * labels / (labels - 1)))


def test_mahalanobis_distances_are_scipys():
    _, means, covariance = pair_of_gaussians(3)
    inverse = np.linalg.inv(covariance.numpy())
    expected = distance.mahalanobis(*means.numpy(), inverse)
    assert mahalanobis(means, covariance)[0, 1].item() == pytest.approx(expected)


def test_a_unit_that_is_always_off_changes_no_distance():
    _, means, covariance = pair_of_gaussians(4)
    wider = torch.zeros(4, 4, dtype=torch.float64)
    wider[:3, :3] = covariance
    found = mahalanobis(torch.nn.functional.pad(means, (0, 1)), wider)
    torch.testing.assert_close(found, mahalanobis(means, covariance))


def test_class_gaussians_are_those_of_linear_discriminant_analysis():
    y = torch.arange(60) % 3
    features = normal(5, 60, 4) + y[:, None]
    fitted = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(features, y)
    found = class_gaussians(features, y)
    torch.testing.assert_close(found.means, torch.from_numpy(fitted.means_))
    torch.testing.assert_close(found.covariance, torch.from_numpy(fitted.covariance_))


def test_pairs_that_no_attack_reached_are_unknown_and_left_out():
    distances = torch.tensor([1.0, 3.0, 5.0, 0.5])
    y, reached = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 1, 0, 1])
    found = measured_distance(distances, y, reached, labels=3)
    assert (found[0, 1], found[2, 0], found[1, 1]) == (2, 5, 0.5)
    assert found.isnan().sum() == 6 and robustness(found) == 2


def test_sample_density_of_uniform_points_is_their_number_over_the_area():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, size=(50_000, 2))
    distances = torch.from_numpy(np.linalg.norm(points, axis=1))
    found = log_sample_density(distances, torch.tensor([0, 0.4, 0.7, 1]), 2).exp()
    assert found.tolist() == pytest.approx([50_000 / 4] * 3, rel=0.03)


@pytest.mark.parametrize("dimension", [1, 2, 3, 6])
def test_sample_density_counts_per_volume_that_sampling_finds(dimension):
    """One feature in a shell: its density is one over the volume."""
    box = np.random.default_rng(1).uniform(-1, 1, size=(200_000, dimension))
    lengths = np.linalg.norm(box, axis=1)
    share = ((lengths >= 0.5) & (lengths < 0.9)).mean()
    found = log_sample_density(torch.tensor([0.7]), torch.tensor([0.5, 0.9]), dimension)
    assert -found.item() == pytest.approx(math.log(share * 2**dimension), abs=0.03)


def test_sample_density_of_wide_features_is_finite_and_of_an_empty_shell_zero():
    """In 640 dimensions a ball of radius 0.1 has the volume 1e-1314."""
    found = log_sample_density(torch.tensor([0.05, 300.0]), torch.tensor([0, 0.1, 1, 400]), 640)
    assert found.isfinite().tolist() == [True, False, True]
    assert found[1] == -math.inf


@pytest.mark.parametrize("dimension", [2, 5, 9])
def test_mmc_theorem_2_density_falls_with_the_loss_by_half_of_dimension_less_two(dimension):
    """MMC theorem 2, by sampling losses C from Exp(1).

    The printed exponent is (D - 1) / 2, which is that of a shell of fixed thickness in space; the
    neighbourhood that the paper defines has a fixed thickness in the loss, and r dr = dC.
    """
    losses = np.random.default_rng(2).exponential(size=400_000)
    edges = np.array([0.5, 0.52, 2.0, 2.05])
    distances = torch.from_numpy(np.sqrt(2 * losses))
    found = log_sample_density(distances, torch.from_numpy(np.sqrt(2 * edges)), dimension)
    drop = (found[0] - found[2]).item()
    of_the_law = stats.expon.logpdf(0.51) - stats.expon.logpdf(2.025)
    expected = of_the_law + (dimension - 2) / 2 * math.log(2.025 / 0.51)
    assert drop == pytest.approx(expected, abs=0.05)


def g_sce(points, centres, scales, biases):
    """(N,) the loss of two classes, the first one true: logits -σ |z - μ|² + B."""
    logits = torch.stack(
        [
            b - s * (points - m).square().sum(dim=1)
            for m, s, b in zip(centres, scales, biases, strict=True)
        ],
        dim=1,
    )
    return torch.nn.functional.cross_entropy(
        logits, torch.zeros(len(points), dtype=torch.long), reduction="none"
    )


def contour(loss, centres, scales, biases):
    """Centre and squared radius of the printed contour, B + log(e^C - 1) / (σ_k - σ_k')."""
    gap = scales[0] - scales[1]
    middle = (scales[0] * centres[0] - scales[1] * centres[1]) / gap
    apart = (centres[0] - centres[1]).square().sum()
    radius = scales[0] * scales[1] * apart / gap**2 + (biases[0] - biases[1]) / gap
    return middle, (radius + math.log(math.expm1(loss)) / gap).item()


@given(SEEDS, st.floats(0.5, 3), st.floats(0.05, 3))
@PROPERTY
def test_mmc_theorem_1_contours_of_the_g_sce_loss_are_the_printed_spheres(seed, ratio, loss):
    centres, biases = normal(seed, 2, 4), normal(seed + 1, 2)
    scales = torch.tensor([1.0, 1 + ratio], dtype=torch.float64)
    middle, squared = contour(loss, centres, scales, biases)
    assume(squared > 0)  # else no feature has this loss
    directions = torch.nn.functional.normalize(normal(seed + 2, 20, 4), dim=1)
    found = g_sce(middle + math.sqrt(squared) * directions, centres, scales, biases)
    torch.testing.assert_close(found, torch.full((20,), loss, dtype=torch.float64))


def test_mmc_theorem_1_density_is_that_of_the_shell_between_two_contours():
    """Uniform points of density 1: what lies between two contours fills the shell's volume."""
    centres = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.2, 0.0]], dtype=torch.float64)
    scales, biases = torch.tensor([1.0, 2.0]), torch.tensor([0.4, 0.0])
    box = np.random.default_rng(3).uniform(-4, 4, size=(200_000, 3))
    points = torch.from_numpy(box)
    losses = g_sce(points, centres, scales, biases)
    between = (losses >= 0.3) & (losses < 0.6)
    middle, _ = contour(0.3, centres, scales, biases)
    radii = [math.sqrt(contour(c, centres, scales, biases)[1]) for c in (0.6, 0.3)]
    distances = torch.linalg.vector_norm(points - middle, dim=1)[between]
    found = log_sample_density(distances, torch.tensor(radii, dtype=torch.float64), 3)
    assert len(distances) > 2000
    assert found.exp().item() == pytest.approx(200_000 / 8**3, rel=0.06)


DISTANCES = torch.tensor([1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_gaussians(torch.ones(2, 3), torch.tensor([0, 2])), "has the label 1"),
        (lambda: robustness(torch.zeros(1, 1)), "RB needs one"),
        (lambda: log_sample_density(DISTANCES, torch.tensor([1.0]), 2), "two or more"),
        (lambda: log_sample_density(DISTANCES, torch.tensor([1.0, 0.5]), 2), "ascending"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_give(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
