"""Detection scores against SciPy, scikit-learn, closed forms and the theorems of RCE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import KernelDensity, NearestNeighbors

from robbench.errors import InputError
from robbench.metrics.detection import (
    auc,
    confidence,
    k_density,
    lid,
    log_odds,
    non_me,
    threshold,
    tpr_at_fpr,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
TIED = st.lists(st.integers(0, 6), min_size=1, max_size=25).map(
    lambda values: np.array(values, dtype=float)
)
LOGITS = st.lists(st.integers(-160, 160), min_size=3, max_size=8).map(
    lambda values: torch.tensor([values], dtype=torch.float64) / 16
)
FPRS = st.integers(0, 100).map(lambda percent: percent / 100)
SATURATED = torch.tensor([[0.0, 1e4, -1e4, 3.0], [200.0, 0.0, 0.0, 0.0], [1e30, 0.0, -1e30, 1.0]])


def features(n, dimensions, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, dimensions, generator=rng, dtype=torch.float64)


@given(LOGITS)
@PROPERTY
def test_confidence_is_the_largest_probability(logits):
    expected = special.softmax(logits.numpy(), axis=1).max(axis=1)
    assert confidence(logits).numpy() == pytest.approx(expected)


@given(LOGITS)
@PROPERTY
def test_log_odds_are_the_logit_of_the_confidence(logits):
    expected = special.logit(special.softmax(logits.numpy(), axis=1).max(axis=1))
    assert log_odds(logits).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_log_odds_rank_and_differentiate_what_confidence_cannot():
    logits = torch.tensor([[50.0, 0.0, 0.0], [60.0, 0.0, 0.0]], requires_grad=True)
    odds = log_odds(logits)
    odds.sum().backward()
    assert confidence(logits).tolist() == [1, 1]
    assert odds[0] < odds[1] and (logits.grad[:, 0] == 1).all()


@given(LOGITS)
@PROPERTY
def test_non_me_is_the_entropy_of_the_other_labels(logits):
    p = np.sort(special.softmax(logits.numpy(), axis=1))[:, :-1]
    assert non_me(logits).item() == pytest.approx(stats.entropy(p, axis=1)[0], abs=1e-9)


@given(LOGITS)
@PROPERTY
def test_non_me_is_largest_where_the_other_labels_are_alike(logits):
    most = math.log(logits.shape[1] - 1)
    alike = logits.scatter(1, logits.argmax(dim=1, keepdim=True), 100.0)
    alike = torch.where(alike == 100, alike, 0)
    assert 0 <= non_me(logits).item() <= most + 1e-12
    assert non_me(alike).item() == pytest.approx(most)


@pytest.mark.parametrize("score", [confidence, log_odds, non_me])
def test_saturated_logits_have_finite_scores_and_gradients(score):
    logits = SATURATED.clone().requires_grad_()
    values = score(logits)
    values.sum().backward()
    assert values.isfinite().all() and logits.grad.isfinite().all()


def test_one_other_label_that_stands_out_has_no_entropy():
    assert non_me(torch.tensor([[1e5, 0.0, -500.0, -500.0]])).item() == 0


@given(LOGITS, st.sampled_from([1e-3, 0.03, 1.0]), st.floats(0, 20))
@PROPERTY
def test_rce_theorem_2_both_bounds_hold_for_reversed_logits(noise, scale, depth):
    """RCE theorem 2; with the error α that the trained softmax has, however large it is."""
    trained = scale * noise
    trained[0, 0] -= depth  # the true label, which reverse training pushes down
    labels = trained.shape[1]
    reverse = torch.full((labels,), 1 / (labels - 1), dtype=torch.float64)
    reverse[0] = 0
    alpha = (trained.softmax(dim=1)[0] - reverse).abs().max().item()
    reversed_ = (-trained).softmax(dim=1)[0]
    others = reversed_[1:]
    assert 1 - reversed_[0] <= alpha * (labels - 1) ** 2 + 1e-12
    assert others.max() - others.min() <= 2 * alpha**2 * (labels - 1) ** 2 + 1e-12


def test_rce_training_maximises_non_me_and_confidence_of_the_reversed_logits():
    """The reverse cross-entropy has its minimum log(L - 1) at the reverse label."""
    logits = features(5, 10).requires_grad_()
    y = torch.arange(5)
    optimiser = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        log = logits.log_softmax(dim=1)
        loss = (log.gather(1, y[:, None])[:, 0] - log.sum(dim=1)) / 9
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    assert loss.tolist() == pytest.approx([math.log(9)] * 5, abs=1e-3)
    assert (-logits).argmax(dim=1).equal(y)
    assert non_me(-logits).tolist() == pytest.approx([math.log(9)] * 5, abs=1e-3)
    assert confidence(-logits).min() > 0.95


@pytest.mark.parametrize("variance", [1 / 0.26, 0.1 / 0.26])
def test_k_density_is_scikit_learns_within_the_predicted_class(variance):
    """Its kernel has the standard deviation √(variance / 2) and is normalised."""
    query, references = features(6, 3), features(40, 3, seed=1)
    predicted, labels = torch.arange(6) % 2, torch.arange(40) % 2
    found = k_density(query, predicted, references, labels, variance)
    for label in (0, 1):
        kernels = KernelDensity(bandwidth=math.sqrt(variance / 2)).fit(references[labels == label])
        log = kernels.score_samples(query[predicted == label])
        expected = log + 3 / 2 * math.log(math.pi * variance)
        assert found[predicted == label].tolist() == pytest.approx(expected.tolist())


def test_k_density_far_from_all_references_is_finite_with_a_gradient_towards_them():
    """e^-1e6 is no float."""
    far = torch.full((1, 4), 500.0, requires_grad=True)
    zero, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    density = k_density(far, labels[:1], zero, labels, 1.0)
    density.sum().backward()
    assert density.item() == -1e6 and far.grad[0].tolist() == pytest.approx([-1000] * 4)


def test_k_density_on_a_reference_is_at_least_its_own_kernel():
    references, labels = features(50, 8), torch.zeros(50, dtype=torch.long)
    assert k_density(references, labels, references, labels, 0.01).min() >= -math.log(50) - 1e-12


def test_near_features_far_from_the_origin_keep_their_distance():
    """In float32 |f|² + |r|² - 2 f·r is off by a tenth here."""
    query, references = torch.full((30, 2), 1000.0), torch.tensor([[1000.5, 1000.0]]).expand(30, 2)
    labels = torch.zeros(30, dtype=torch.long)
    assert k_density(query, labels, references, labels, 1.0).tolist() == [-0.25] * 30


def test_lid_is_the_estimate_from_scikit_learns_neighbours():
    query, references = features(5, 4), features(60, 4, seed=1)
    near, _ = NearestNeighbors(n_neighbors=20).fit(references).kneighbors(query)
    expected = 1 / np.log(near / near[:, -1:]).mean(axis=1)
    assert lid(query, references).tolist() == pytest.approx(expected.tolist())


def test_lid_of_distances_that_double():
    references = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    expected = -1 / (1.5 * math.log(2))
    assert lid(torch.zeros(1, 1), references, k=4).item() == pytest.approx(expected)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_lid_finds_the_dimension_of_a_flat_in_feature_space(dimension):
    """k-1 ratios of volumes are uniform, so the mean slope is (k - 1) / k over the dimension."""
    rng = torch.Generator().manual_seed(3)
    flat = torch.linalg.qr(features(12, dimension, seed=2))[0].T
    points = torch.rand(4000, dimension, generator=rng, dtype=torch.float64) @ flat
    centre = torch.full((1, dimension), 0.5, dtype=torch.float64) @ flat
    queries = centre + 0.02 * torch.randn(60, dimension, generator=rng).double() @ flat
    slopes = -1 / lid(queries, points, k=20)
    assert slopes.mean().item() == pytest.approx(19 / 20 / dimension, rel=0.1)


@given(st.floats(1e-12, 1e12))
@PROPERTY
def test_lid_has_no_scale(scale):
    query, references = features(3, 4), features(30, 4, seed=1)
    found = lid(query * scale, references * scale, k=10)
    torch.testing.assert_close(found, lid(query, references, k=10))


@pytest.mark.parametrize("references", [torch.zeros(4, 3), torch.eye(3), torch.ones(5, 3)])
def test_lid_of_degenerate_neighbours_is_finite_with_a_finite_gradient(references):
    query = torch.zeros(1, 3, requires_grad=True)
    score = lid(query, references, k=3)
    score.sum().backward()
    assert score.isfinite().all() and query.grad.isfinite().all()


@pytest.mark.parametrize(
    "score",
    [
        confidence,
        log_odds,
        non_me,
        lambda f: k_density(f, torch.tensor([0, 1, 1]), features(9, 5), torch.arange(9) % 2, 2.0),
        lambda f: lid(f, features(9, 5), k=4),
    ],
    ids=["confidence", "log_odds", "non_me", "k_density", "lid"],
)
def test_gradients_of_scores_are_right(score):
    assert torch.autograd.gradcheck(score, features(3, 5, seed=1).requires_grad_())


@given(TIED, TIED)
@PROPERTY
def test_auc_is_scikit_learns_with_ties(normal, adversarial):
    labels = np.repeat([1, 0], [len(normal), len(adversarial)])
    expected = roc_auc_score(labels, np.concatenate([normal, adversarial]))
    assert auc(normal, adversarial) == pytest.approx(expected)


def test_auc_of_equal_scores_is_a_half():
    assert auc(np.ones(7), np.ones(3)) == 0.5


def test_auc_counts_nan_as_an_adversarial_example_that_was_not_detected():
    normal, caught = np.array([2.0, 3.0]), np.array([1.0, 1.0])
    assert auc(normal, caught) == 1
    assert auc(normal, np.array([1.0, np.nan])) == 0.5


@given(TIED, TIED, FPRS)
@PROPERTY
def test_tpr_is_the_best_on_scikit_learns_curve(normal, adversarial, fpr):
    labels = np.repeat([0, 1], [len(normal), len(adversarial)])
    scores = -np.concatenate([normal, adversarial])
    rates = roc_curve(labels, scores, drop_intermediate=False)
    expected = rates[1][rates[0] <= fpr + 1e-12].max()
    assert tpr_at_fpr(normal, adversarial, fpr) == pytest.approx(expected)


@given(TIED, FPRS)
@PROPERTY
def test_a_threshold_flags_as_many_normal_inputs_as_it_may(normal, fpr):
    at = threshold(normal, fpr)
    assert (normal < at).mean() <= fpr + 1e-12
    next_higher = min(normal[normal >= at], default=np.inf)
    assert at == np.inf or (normal <= next_higher).mean() > fpr


def test_a_share_that_floats_round_down_is_met():
    assert threshold(np.arange(100), 0.29) == 29


@pytest.mark.parametrize("fpr", [0.05, 1])
def test_nan_is_never_flagged(fpr):
    assert tpr_at_fpr(np.arange(20.0), np.array([-1.0, np.nan]), fpr) == 0.5


FEATURES, ONES = torch.zeros(2, 3), torch.ones(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence(torch.zeros(4, 1)), "give logits of two or more"),
        (lambda: k_density(FEATURES, ONES, FEATURES, ONES, 0), "variance is 0"),
        (lambda: k_density(FEATURES, 3 * ONES, FEATURES, ONES, 1), "no reference has the label 3"),
        (lambda: lid(FEATURES, FEATURES), "write 2 to 2"),
        (lambda: threshold(np.ones(3), 5), "a share from 0 to 1"),
        (lambda: auc(np.ones(3), np.array([])), "no adversarial score"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_give(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
