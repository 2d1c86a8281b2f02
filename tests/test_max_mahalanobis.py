"""Max-Mahalanobis centres and losses against linear algebra, known optimal codes and theorems."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.spatial.distance import pdist
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks.losses import ce
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.recipes import Batch
from robbench.rules import Draw
from robbench.training import train

NETWORK = "network=mlp(hidden=[16])"
SHAPE = (1, 8, 8)
NAMES = ["mmlda", "mmc", "mmc-rand"]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)


def one(spec):
    """The single defense of `name(...)`, on a tiny network."""
    name, _, rest = spec.partition("(")
    return resolve(f"{name}({NETWORK}, {rest or ')'}")[0]


def readout(spec, labels=10):
    torch.manual_seed(0)
    return one(spec).build(SHAPE, labels)[0].readout


def numbers(*shape, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)


def draw_of(scores):
    return Draw(scores[None, None])


@pytest.fixture(scope="module")
def digits():
    whole = datasets.load("digits")
    return replace(whole, train=Split(*(tensor[:200] for tensor in whole.train)))


@pytest.mark.parametrize("norm", [1.0, 10.0])
@pytest.mark.parametrize(("labels", "dimension"), [(2, 2), (3, 2), (10, 9), (10, 256), (100, 99)])
def test_centres_have_the_gram_matrix_of_the_regular_simplex(labels, dimension, norm):
    centres = readout(f"mmc(dimension={dimension}, centre_norm={norm})", labels).centres.double()
    expected = norm**2 * (labels * torch.eye(labels) - 1) / (labels - 1)
    torch.testing.assert_close(centres @ centres.T, expected.double(), rtol=0, atol=2e-6 * norm**2)


def test_centres_sum_to_zero():
    assert readout("mmc").centres.sum(dim=0).abs().max() < 1e-5


def test_the_construction_is_the_cholesky_factor_of_the_gram_matrix():
    labels, c = 7, 9.0
    gram = c * (labels * np.eye(labels) - 1) / (labels - 1)
    factor = np.linalg.cholesky(gram[:-1, :-1])  # the whole matrix has rank L - 1
    built = readout("mmc(dimension=6, centre_norm=3)", labels).centres[:-1]
    np.testing.assert_allclose(built, factor, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "dimension", "cosine"),
    [
        (5, 2, np.cos(2 * np.pi / 5)),  # regular polygons
        (10, 2, np.cos(2 * np.pi / 10)),
        (6, 3, 0.0),  # Rankin 1955: 0 from d + 2 to 2 d points
        (10, 8, 0.0),
        (12, 3, 5**-0.5),  # the icosahedron
        (10, 4, 1 / 6),  # the Petersen code
        (16, 5, 1 / 5),  # the Clebsch code
    ],
)
def test_too_many_centres_for_a_simplex_are_the_best_known_code(labels, dimension, cosine):
    units = readout(f"mmc(dimension={dimension}, centre_norm=1)", labels).centres
    gram = units @ units.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(labels))
    assert gram.fill_diagonal_(-1).max().item() == pytest.approx(cosine, abs=1e-5)


@given(seed=st.integers(0, 2**32 - 1), labels=st.integers(2, 6), dimension=st.integers(5, 8))
@PROPERTY
def test_no_other_centres_of_that_norm_are_further_apart(seed, labels, dimension):
    """What follows Theorem 1 of paper 003: the smallest distance bounds the robustness."""
    other = np.random.default_rng(seed).standard_normal((labels, dimension))
    other *= 10 / np.linalg.norm(other, axis=1, keepdims=True)
    ours = readout(f"mmc(dimension={dimension})", labels).centres.double().numpy()
    assert pdist(other).min() <= pdist(ours).min() + 1e-5


def test_centres_do_not_depend_on_the_seed_unless_they_are_random():
    for name, alike in (("mmc", True), ("mmc-rand", False)):
        members = one(f"{name}(members=2)").build(SHAPE, 10)
        first, second = (member.readout.centres for member in members)
        assert torch.equal(first, second) == alike


def test_random_centres_have_the_same_norm():
    norms = readout("mmc-rand(centre_norm=7)").centres.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((10,), 7.0))


@pytest.mark.parametrize("name", NAMES)
def test_centres_are_no_parameters_and_stay_where_they_are(name, digits):
    defense = one(f"{name}(epochs=1)")
    torch.manual_seed(0)
    members = defense.build(SHAPE, 10)
    before = members[0].readout.centres.clone()
    train(defense, members, digits, 0, torch.device("cpu"))
    assert torch.equal(members[0].readout.centres, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_label_is_that_of_the_nearest_centre_and_of_the_largest_product(name):
    layer, h = readout(name), numbers(200, 16, scale=5).float()
    z, labels = layer.embed(h), layer(h).argmax(dim=1)
    assert torch.equal(labels, torch.cdist(z, layer.centres).argmin(dim=1))
    assert torch.equal(labels, (z @ layer.centres.T).argmax(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_readout_passes_gradcheck(name):
    layer = readout(f"{name}(dimension=3)", 4).double()
    assert torch.autograd.gradcheck(layer, numbers(3, 16).requires_grad_())


@pytest.mark.parametrize("factor", [0.5, 1])
def test_mmlda_is_the_softmax_of_minus_the_squared_distances(factor):
    """Paper 003: softmax(-½‖z - μ‖²) = softmax(<z, μ>); the code's factor is 1."""
    layer = readout(f"mmlda(factor={factor}, dimension=12)").double()
    h, y = numbers(20, 16), torch.arange(20) % 10
    loss = one("mmlda").criterion(draw_of(layer(h)), y, h)
    squares = torch.cdist(layer.embed(h), layer.centres) ** 2
    expected = F.cross_entropy(-factor * squares, y, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)  # norms are those of float32


def test_mmlda_keeps_its_digits_when_z_is_large():
    layer, h = readout("mmlda"), 1e5 * numbers(20, 16)
    exact = deepcopy(layer).double()(h).diff(dim=1)
    rough = layer(h.float()).double().diff(dim=1)
    torch.testing.assert_close(rough, exact, rtol=0, atol=1e-6 * exact.abs().max().item())


@given(seed=st.integers(0, 2**32 - 1))
@PROPERTY
def test_softmax_regression_is_a_case_of_the_quadratic_scores(seed):
    """Paper 003, g-SCE: W z + b are the scores -‖z - W/2‖² + ¼‖W‖² + b up to a common shift."""
    w, b, z = numbers(4, 6, seed=seed), numbers(4, seed=seed + 1), numbers(9, 6, seed=seed + 2)
    layer = readout("mmc(dimension=6, factor=1)", 4).double()
    layer.embed, layer.centres = nn.Identity(), w / 2
    logits = layer(z) + w.square().sum(dim=1) / 4 + b
    torch.testing.assert_close(logits.softmax(1), F.linear(z, w, b).softmax(1))


@pytest.mark.parametrize("factor", [0.5, 1])
def test_mmc_is_half_the_squared_distance_and_its_gradient_the_offset(factor):
    defense, layer = one(f"mmc(factor={factor})"), readout(f"mmc(factor={factor})").double()
    z, y = numbers(8, 256, scale=3).requires_grad_(), torch.arange(8)
    layer.embed = nn.Identity()
    loss = defense.criterion(draw_of(layer(z)), y, z)
    offset = (z - layer.centres[y]).detach()
    torch.testing.assert_close(loss.detach(), factor * offset.norm(dim=1) ** 2)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    torch.testing.assert_close(gradient, 2 * factor * offset)


def test_mmc_is_zero_at_the_centre_and_nowhere_below():
    layer, y = readout("mmc"), torch.arange(10)
    layer.embed = nn.Identity()
    for z, zero in (
        (layer.centres, True),
        (layer.centres + 1e-4 * numbers(10, 256).float(), False),
    ):
        loss = one("mmc").criterion(draw_of(layer(z)), y, z)
        assert ((loss == 0) if zero else (loss > 0)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", ["log-odds", "margin", "distance"])
@pytest.mark.parametrize("targeted", [False, True])
def test_attack_losses_pass_gradcheck(name, loss, targeted):
    y, target = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1]) if targeted else None
    function = one(name).losses[loss]
    scores = numbers(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: function(draw_of(s), y, target), scores)


@pytest.mark.parametrize("targeted", [False, True])
def test_log_odds_are_scipys_logit_of_the_probability(targeted):
    scores, y, target = numbers(20, 10), torch.arange(20) % 10, (torch.arange(20) + 3) % 10
    label, sign = (target, 1) if targeted else (y, -1)
    expected = sign * special.logit(special.softmax(scores.numpy(), axis=1))[range(20), label]
    found = one("mmc").losses["log-odds"](draw_of(scores), y, target if targeted else None)
    np.testing.assert_allclose(found, expected)


@given(seed=st.integers(0, 2**32 - 1))
@PROPERTY
def test_log_odds_have_the_direction_of_cross_entropy(seed):
    scores, y = numbers(5, 4, seed=seed).requires_grad_(), torch.arange(5) % 4
    losses = ce(scores, y), one("mmc").losses["log-odds"](draw_of(scores), y, None)
    slopes = [torch.autograd.grad(loss.sum(), scores)[0] for loss in losses]
    torch.testing.assert_close(*(F.normalize(slope) for slope in slopes))


def test_the_linear_margin_is_a_difference_of_products():
    layer, z, y = readout("mmc").double(), numbers(20, 256, scale=4), torch.arange(20) % 10
    layer.embed = nn.Identity()
    products = z @ layer.centres.T
    others = products.masked_fill(F.one_hot(y, 10).bool(), -torch.inf).amax(dim=1)
    found = one("mmc").losses["margin"](draw_of(layer(z)), y, None)
    expected = others - products.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # norms are those of float32


@pytest.mark.parametrize("name", ["mmlda", "mmc"])
def test_at_a_centre_cross_entropy_has_no_gradient_and_the_log_odds_have_one(name):
    """Why the attacker's losses have no softmax."""
    layer, y = readout(name), torch.arange(10)
    layer.embed = nn.Identity()
    z = layer.centres.clone().requires_grad_()
    draw = draw_of(layer(z))
    losses = ce(draw.logits[0, 0], y), next(iter(one(name).losses.values()))(draw, y, None)
    slopes = [torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for loss in losses]
    assert [(slope != 0).any(dim=1).tolist() for slope in slopes] == [[False] * 10, [True] * 10]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targeted", ["true", "false"])
def test_adversarial_training_moves_images_within_the_ball_to_higher_loss(name, targeted):
    defense = one(f"{name}(adversarial=pgd(eps=0.1, steps=10, targeted={targeted}, random=false))")
    torch.manual_seed(0)
    members = defense.build(SHAPE, 10)
    x, y = numbers(16, *SHAPE).float().sigmoid(), torch.arange(16) % 10
    moved = defense.batch(members, Batch(x, y, x, 10), torch.Generator().manual_seed(0)).x
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    shift = torch.randint(1, 10, (16,), generator=torch.Generator().manual_seed(0))
    target = (y + shift) % 10 if targeted == "true" else None
    before, after = (defense.objective(defense.forward(members, v), y, target) for v in (x, moved))
    assert (after > before).all()


def test_mmc_ascends_its_loss_or_the_log_odds():
    scores, y = numbers(6, 10), torch.arange(6)
    losses = one("mmc").losses
    for ascend, name in (("loss", "distance"), ("log-odds", "log-odds")):
        found = one(f"mmc(ascend={ascend})").objective(draw_of(scores), y, None)
        assert torch.equal(found, losses[name](draw_of(scores), y, None))


@pytest.mark.parametrize("name", NAMES)
def test_the_log_odds_break_what_is_undefended_otherwise(name, digits):
    defense = one(f"{name}(epochs=30, batch_size=16)")
    torch.manual_seed(0)
    members = defense.build(SHAPE, 10)
    train(defense, members, digits, 0, torch.device("cpu"))
    access = Access(Deployed(members, defense.rule(), SHAPE, 10))
    clean, y = (tensor[:64] for tensor in digits.train)
    x = clean
    for _ in range(20):
        step = access.gradient(x, y, defense.losses["log-odds"])
        x = (x + 0.04 * step.gradient.sign()).clamp(clean - 0.3, clean + 0.3).clamp(0, 1)
    labels = access.scores(torch.cat([clean, x])).argmax(dim=1).view(2, -1)
    kept, robust = ((labels == y).float().mean(dim=1)).tolist()
    assert (kept > 0.9, robust < 0.1) == (True, True)


@pytest.mark.parametrize("wrong", ["dimension=1", "centre_norm=0", "factor=0", "centres=best"])
def test_values_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        one(f"mmc({wrong})")
