"""Diversity of ensembles against QR, SciPy, closed forms and the theorems of ADP and SDR."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.spatial import distance

from robbench.errors import InputError
from robbench.metrics.diversity import (
    RIDGE,
    cumulative_variance,
    discrimination,
    ensemble_diversity,
    entropy_measure,
    gradient_angles,
    gradient_cosines,
    log_diversity,
    transfer_matrix,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
SEEDS = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_logits(seed, members=3, images=4, labels=7, scale=3.0):
    """(K, N, L) logits in float64 and (N,) labels."""
    rng = generator(seed)
    logits = torch.randn(members, images, labels, generator=rng, dtype=torch.float64) * scale
    return logits, torch.randint(labels, (images,), generator=rng)


def partition(members, labels, f_y):
    """(K, 1, L) probabilities of ADP's corollary 1, the true label being 0."""
    p = torch.zeros(members, 1, labels, dtype=torch.float64)
    p[..., 0] = f_y
    for own, chunk in zip(p, torch.arange(1, labels).chunk(members), strict=True):
        own[0, chunk] = (1 - f_y) * members / (labels - 1)
    return p


def adp_objective(probabilities, alpha, beta):
    """Sum of cross-entropies minus ADP's regulariser, for the true label 0 and (K, 1, L)."""
    mean = probabilities.mean(dim=0)
    entropy = torch.special.entr(mean).sum()
    ce = -probabilities[..., 0].log().sum()
    if not beta:
        return float(ce - alpha * entropy)
    ed = ensemble_diversity(probabilities.log(), torch.tensor([0]))
    return float(ce - alpha * entropy - beta * ed.log())


def adp_optimum(members, labels, alpha):
    """F_y that solves ADP's eq. 7."""
    return optimize.brentq(
        lambda f: 1 / f - alpha / members * math.log(f * (labels - 1) / (1 - f)),
        1 / labels,
        1 - 1e-15,
    )


@given(SEEDS, st.integers(2, 5), st.sampled_from([0.1, 1.0, 10.0, 60.0]))
@PROPERTY
def test_diversity_is_the_squared_volume_by_qr(seed, members, scale):
    """ADP, ED = Vol²: the diagonal of R multiplies to the volume."""
    logits, y = random_logits(seed, members, images=3, scale=scale)
    found = ensemble_diversity(logits, y)
    for image, label in enumerate(y):
        wrong = np.delete(logits[:, image].softmax(dim=-1).numpy(), label, axis=1).T
        r = np.linalg.qr(wrong / np.linalg.norm(wrong, axis=0), mode="r")
        assert float(found[image]) == pytest.approx(np.prod(np.diag(r)) ** 2, abs=1e-9)


def test_members_that_share_no_wrong_label_have_diversity_one():
    logits = partition(3, 10, 0.4).log()
    assert ensemble_diversity(logits, torch.tensor([0])).item() == pytest.approx(1)


@given(SEEDS)
@PROPERTY
def test_more_members_than_wrong_labels_have_no_volume(seed):
    logits, y = random_logits(seed, members=5, labels=5)
    assert ensemble_diversity(logits, y).max() < 1e-12


@given(SEEDS, st.permutations(range(3)), st.floats(-50, 50))
@PROPERTY
def test_diversity_ignores_the_order_of_members_and_their_confidence(seed, order, confidence):
    logits, y = random_logits(seed)
    changed = logits[list(order)].scatter_add(
        2, y.expand(3, -1)[..., None], torch.full((3, 4, 1), confidence, dtype=torch.float64)
    )
    torch.testing.assert_close(ensemble_diversity(changed, y), ensemble_diversity(logits, y))


def test_log_diversity_of_equal_members_is_its_lower_bound_with_finite_gradients():
    logits, y = random_logits(0, members=1)
    same = logits.expand(3, -1, -1).float().requires_grad_()
    found = log_diversity(same, y)
    bound = math.log(3 + RIDGE) + 2 * math.log(RIDGE)
    torch.testing.assert_close(found, torch.full((4,), bound), rtol=1e-6, atol=0)
    found.sum().backward()
    assert same.grad.isfinite().all()


@given(SEEDS)
@PROPERTY
def test_log_diversity_is_the_logarithm_of_diversity(seed):
    logits, y = random_logits(seed)
    expected = ensemble_diversity(logits, y).log()
    torch.testing.assert_close(log_diversity(logits, y, ridge=1e-14), expected, rtol=1e-4, atol=0)


def test_saturated_members_have_a_diversity_and_a_gradient():
    """Float32 probabilities of all wrong labels are 0 here, and their lengths 0 / 0."""
    logits, y = random_logits(1, scale=1e4)
    logits = logits.scatter(2, y.expand(3, -1)[..., None], 1e6).float().requires_grad_()
    found = log_diversity(logits, y)
    found.sum().backward()
    assert found.isfinite().all() and logits.grad.isfinite().all()


def test_gradients_of_log_diversity_are_right():
    logits, y = random_logits(2, images=2)
    assert torch.autograd.gradcheck(lambda z: log_diversity(z, y), logits.requires_grad_())


@given(SEEDS, st.floats(0, 5), st.floats(0.1, 10))
@PROPERTY
def test_adp_theorem_1_without_entropy_nothing_is_below_the_one_hot_limit(seed, beta, scale):
    """ADP theorem 1: cross-entropies and -log ED are never negative."""
    logits, _ = random_logits(seed, images=1, scale=scale)
    assert adp_objective(logits.softmax(dim=-1), 0, beta) >= 0


@pytest.mark.parametrize("beta", [0, 0.5, 5])
def test_adp_theorem_1_the_objective_tends_to_zero_at_the_one_hot_labels(beta):
    """A limit: at F^k = 1_y itself no wrong prediction is left that could be normalised."""
    assert adp_objective(partition(3, 10, 1 - 1e-9), 0, beta) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("members", "labels", "alpha"), [(3, 10, 2.0), (2, 5, 0.5), (5, 11, 9.0)])
def test_adp_theorem_2_gradient_descent_arrives_at_the_printed_optimum(members, labels, alpha):
    """ADP theorem 2, eq. 7: shared F_y, and a mean prediction that is flat elsewhere."""
    logits = random_logits(3, members, 1, labels, scale=1)[0].requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        log = logits.log_softmax(dim=-1)
        mean = log.logsumexp(dim=0) - math.log(members)
        loss = -log[..., 0].sum() + alpha * (mean.exp() * mean).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    p = logits.detach().softmax(dim=-1)
    f_y = adp_optimum(members, labels, alpha)
    assert p[:, 0, 0].tolist() == pytest.approx([f_y] * members, abs=1e-4)
    mean = p.mean(dim=0)[0, 1:].tolist()
    assert mean == pytest.approx([(1 - f_y) / (labels - 1)] * (labels - 1), abs=1e-4)


@given(SEEDS, st.floats(0.1, 5), st.floats(0.1, 2), st.sampled_from([0.01, 0.3, 3.0]))
@PROPERTY
def test_adp_corollary_1_no_predictions_are_better_than_the_partition(seed, alpha, beta, scale):
    """ADP corollary 1, K = 3 divides L - 1 = 9; random predictions near it and anywhere."""
    best = partition(3, 10, adp_optimum(3, 10, alpha))
    noise = random_logits(seed, 3, 1, 10, scale)[0]
    other = ((best + 1e-6).log() + noise).softmax(dim=-1)
    assert adp_objective(other, alpha, beta) >= adp_objective(best, alpha, beta) - 1e-12


def test_adp_corollary_1_the_partition_solves_equation_7_with_full_diversity():
    alpha = 2.0
    best = partition(3, 10, adp_optimum(3, 10, alpha))
    free = adp_objective(best.mean(dim=0, keepdim=True).expand(3, 1, 10), alpha, 0)
    assert adp_objective(best, alpha, 0.5) == pytest.approx(free)


@pytest.mark.parametrize("members", [2, 3, 4, 5])
def test_the_entropy_measure_counts_the_smaller_side_of_every_vote(members):
    """All outcomes of K members once: a binomial distribution of how many are right."""
    outcomes = torch.tensor(list(itertools.product([0, 1], repeat=members))).T
    smaller = stats.binom(members, 0.5).expect(lambda right: np.minimum(right, members - right))
    assert entropy_measure(outcomes) == pytest.approx(smaller / (members // 2))


@pytest.mark.parametrize(("rights", "expected"), [([0, 5], 0), ([2, 3], 1), ([1, 4], 0.5)])
def test_the_entropy_measure_of_five_members_by_hand(rights, expected):
    correct = torch.arange(5)[:, None] < torch.tensor(rights)
    assert entropy_measure(correct) == expected


def test_discrimination_of_active_features_is_welchs_statistic():
    """Equal counts n: t² = (n - 1) times the score of eq. 6."""
    features = torch.rand(2, 6, 32, generator=generator(4)) + 0.1
    welch = stats.ttest_ind(features[0].numpy(), features[1].numpy(), axis=1, equal_var=False)
    expected = torch.from_numpy(welch.statistic**2 / 31)
    torch.testing.assert_close(discrimination(features), expected.double(), rtol=1e-4, atol=0)


def test_discrimination_leaves_inactive_units_out_and_sums_over_pairs():
    features = torch.randn(3, 1, 40, generator=generator(5)).relu()
    active = [row[row > 0].double().numpy() for row in features[:, 0]]
    expected = sum(
        (a.mean() - b.mean()) ** 2 / (a.var() + b.var())
        for a, b in itertools.combinations(active, 2)
    )
    assert discrimination(features).item() == pytest.approx(expected)


def test_discrimination_is_undefined_for_a_member_without_active_units():
    features = torch.ones(2, 2, 4)
    features[0, :, 0] = 3
    features[1, 1] = 0
    assert discrimination(features).isnan().tolist() == [False, True]


def test_cosines_of_input_gradients_are_scipys():
    gradients = torch.randn(3, 2, 1, 4, 4, generator=generator(6), dtype=torch.float64)
    flat = gradients.flatten(2).numpy()
    expected = [
        [1 - distance.cosine(a, b) for a, b in zip(flat[i], flat[j], strict=True)]
        for i, j in [(0, 1), (0, 2), (1, 2)]
    ]
    torch.testing.assert_close(gradient_cosines(gradients), torch.tensor(expected))


def test_gradients_of_equal_members_point_one_way():
    gradients = torch.randn(1, 5, 8, generator=generator(7)).expand(4, -1, -1)
    torch.testing.assert_close(gradient_cosines(gradients).sum(dim=0), torch.full((5,), 6.0))


def test_gradients_of_linear_members_have_the_cosines_of_their_weights():
    """With two labels the input gradient of the loss is a multiple of w_1 - w_0."""
    weights = torch.randn(2, 2, 6, generator=generator(8), dtype=torch.float64)
    x = torch.rand(5, 6, generator=generator(9), dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 1, 0, 1, 1])
    gradients = torch.stack(
        [torch.autograd.grad(F.cross_entropy(x @ w.T, y), x)[0] for w in weights]
    )
    a, b = weights[:, 1] - weights[:, 0]
    expected = F.cosine_similarity(a, b, dim=0).expand(1, 5)
    torch.testing.assert_close(gradient_cosines(gradients), expected)


@pytest.mark.parametrize("degrees", [0, 1, 60, 90, 135, 180])
def test_angles_are_in_degrees(degrees):
    turn = math.radians(degrees)
    gradients = torch.tensor([[[1.0, 0.0]], [[math.cos(turn), math.sin(turn)]]])
    assert gradient_angles(gradients).item() == pytest.approx(degrees, abs=1e-4)


@given(st.floats(1e-37, 1e37))
@PROPERTY
def test_cosines_have_no_scale(scale):
    gradients = torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]]]) * torch.tensor([scale, 1])[:, None, None]
    assert gradient_cosines(gradients).item() == pytest.approx(24 / 25, rel=1e-6)


def test_a_vanished_gradient_has_no_direction_and_no_nan():
    gradients = torch.zeros(2, 1, 3, dtype=torch.float64)
    gradients[1] = torch.randn(1, 3, generator=generator(10))
    gradients.requires_grad_()
    cosine = gradient_cosines(gradients)
    (first,) = torch.autograd.grad(cosine.sum(), gradients, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), gradients)
    assert cosine.item() == 0 and gradient_angles(gradients).item() == pytest.approx(90)
    assert first.isfinite().all() and second.isfinite().all()


def test_cosines_can_be_differentiated_twice():
    gradients = torch.randn(3, 2, 5, generator=generator(11), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gradient_cosines, gradients)
    assert torch.autograd.gradgradcheck(gradient_cosines, gradients)


def test_sdr_theorem_1_the_risk_grows_by_the_variance_that_the_inputs_see():
    """SDR theorem 1, E|y - Xw|² = |y - Xμ|² + tr(XΣXᵀ), for a full covariance, by Monte Carlo."""
    rng = np.random.default_rng(0)
    x, y, mean = rng.normal(size=(7, 4)), rng.normal(size=7), rng.normal(size=4)
    factor = rng.normal(size=(4, 4))
    covariance = factor @ factor.T
    weights = rng.multivariate_normal(mean, covariance, size=40_000)
    risks = np.square(y - weights @ x.T).sum(axis=1)
    expected = np.square(y - x @ mean).sum() + np.trace(x @ covariance @ x.T)
    assert risks.mean() == pytest.approx(expected, abs=4 * stats.sem(risks))


def test_sdr_theorem_1_orthonormal_inputs_pay_the_cumulative_variance():
    rng = np.random.default_rng(1)
    x = np.linalg.qr(rng.normal(size=(9, 5)))[0]
    deviations = rng.normal(size=5)  # signed, as the authors train them
    weights = rng.normal(size=(40_000, 5)) * deviations
    risks = np.square(weights @ x.T).sum(axis=1)  # y = 0 = μ
    parts = [torch.from_numpy(part) for part in np.split(deviations, [2])]
    assert risks.mean() == pytest.approx(cumulative_variance(parts), abs=4 * stats.sem(risks))


def test_attacks_on_members_of_separate_pixels_do_not_transfer():
    """Member k reads pixel k alone; label 1 is right for all but the second image of member 2."""
    images = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]])
    examples = []
    for attacked in range(3):
        x = images.clone()
        x[:, attacked] = -1.0
        examples.append(x)

    def members(x):
        return torch.stack([torch.zeros_like(x.T), x.T], dim=-1)

    found = transfer_matrix(examples, members, torch.tensor([1, 1]))
    assert found.tolist() == [[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]


LOGITS, LABELS = torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ensemble_diversity(LOGITS[0], LABELS), "the logits of all members"),
        (lambda: log_diversity(LOGITS, LABELS[:3]), "one label per image"),
        (lambda: log_diversity(LOGITS, LABELS, ridge=0), "duplicates need a positive one"),
        (lambda: entropy_measure(torch.ones(1, 4)), "needs two or more"),
        (lambda: gradient_cosines(torch.ones(1, 4, 2)), "pairs need two members"),
        (lambda: discrimination(torch.ones(1, 4, 2)), "pairs need two members"),
        (lambda: transfer_matrix([LOGITS], lambda _: LOGITS, LABELS), "give one per member"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_give(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
