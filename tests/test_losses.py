"""Losses against torchattacks, ART and values worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import nn

from robbench.access import Access
from robbench.attacks.losses import SCORE_LOSSES, TEMPERED, Votes, ce, choose, dlr, margin
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.estimator import Estimator
from robbench.rules import Draw, MeanLogits

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SCORES = st.lists(st.integers(-400, 400), min_size=5, max_size=5).map(
    lambda values: torch.tensor([values], dtype=torch.float64) / 16
)
LABELS = st.permutations(range(5)).map(
    lambda order: (torch.tensor(order[:1]), torch.tensor(order[1:2]))
)
WORKED = [  # scores 3, 1, 0, -2: loss, true label, target, value
    (margin, 0, None, 1 - 3),
    (margin, 2, None, 3 - 0),
    (margin, 0, 1, 1 - 3),
    (margin, 3, 0, 3 - 1),
    (dlr, 0, None, (1 - 3) / (3 - 0)),
    (dlr, 2, None, (3 - 0) / (3 - 0)),
    (dlr, 0, 1, (1 - 3) / (3 - (0 - 2) / 2)),
    (dlr, 3, 0, (3 + 2) / (3 - (0 - 2) / 2)),
    (ce, 0, None, math.log(1 + math.exp(-2) + math.exp(-3) + math.exp(-5))),
    (ce, 0, 1, 1 - math.log(math.exp(3) + math.exp(1) + 1 + math.exp(-2))),
]


def labelled(n=64, labels=10):
    """Random scores (n, labels) above zero, true labels and other labels."""
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(n, labels, generator=rng, dtype=torch.float64) * 5 + 0.1
    y = torch.randint(labels, (n,), generator=rng)
    return scores, y, (y + torch.randint(1, labels, (n,), generator=rng)) % labels


def access_to(*members, **options):
    deployed = Deployed(nn.ModuleList(members), MeanLogits(), (1, 2, 5), 10)
    return Access(deployed, **options)


@pytest.mark.parametrize(("loss", "y", "target", "expected"), WORKED)
def test_worked_values(loss, y, target, expected):
    scores = torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    aim = None if target is None else torch.tensor([target])
    assert loss(scores, torch.tensor([y]), aim).item() == pytest.approx(expected, rel=1e-6)


def test_dlr_of_two_labels_is_refused_because_it_is_a_constant():
    access = SimpleNamespace(deployed=SimpleNamespace(labels=2), losses={})
    with pytest.raises(InputError, match="constant with 2 labels; write loss=ce"):
        choose(access, "dlr")


def test_dlr_is_torchattacks():
    scores, y, target = labelled()
    apgd, apgdt = torchattacks.APGD(nn.Linear(1, 1)), torchattacks.APGDT(nn.Linear(1, 1))
    torch.testing.assert_close(dlr(scores, y), apgd.dlr_loss(scores, y))
    torch.testing.assert_close(dlr(scores, y, target), apgdt.dlr_loss_targeted(scores, y, target))


def test_margin_is_torchattacks_carlini_wagner_where_that_is_right():
    scores, y, target = labelled()  # its masking by zeros is wrong for scores below zero
    theirs = torchattacks.CW(nn.Linear(1, 1), kappa=1e9)  # kappa: no clip
    torch.testing.assert_close(margin(scores, y), -theirs.f(scores, y))
    theirs.set_mode_targeted_by_label(quiet=True)
    torch.testing.assert_close(margin(scores, y, target), -theirs.f(scores, target))


def test_ce_is_what_art_computes():
    scores, y, target = labelled()
    estimator = Estimator(access_to(nn.Flatten()))
    images = scores.float().view(-1, 1, 2, 5).numpy()
    theirs = estimator.compute_loss(images, np.eye(10)[y], reduction="none")
    np.testing.assert_allclose(ce(scores, y), theirs, rtol=1e-5)
    theirs = estimator.compute_loss(images, np.eye(10)[target], reduction="none")
    np.testing.assert_allclose(ce(scores, y, target), -theirs, rtol=1e-5)


@PROPERTY
@given(SCORES, LABELS, st.integers(-800, 800), st.booleans())
@pytest.mark.parametrize("loss", SCORE_LOSSES.values(), ids=SCORE_LOSSES)
def test_a_shift_of_all_scores_changes_nothing(loss, scores, labels, shift, targeted):
    y, target = labels[0], labels[1] if targeted else None
    expected = loss(scores, y, target)
    torch.testing.assert_close(loss(scores + shift / 8, y, target), expected)


@PROPERTY
@given(SCORES, LABELS, st.floats(0.01, 100), st.booleans())
def test_dlr_does_not_depend_on_the_scale(scores, labels, scale, targeted):
    y, target = labels[0], labels[1] if targeted else None
    ranked = scores.sort(descending=True).values[0]
    assume(ranked[0] > ranked[2])
    torch.testing.assert_close(dlr(scale * scores, y, target), dlr(scores, y, target))


@PROPERTY
@given(SCORES, LABELS)
def test_margin_and_dlr_tell_by_their_sign_who_wins(scores, labels):
    y = labels[0]
    assume(scores.sort().values.diff().ne(0).all())
    wrong = scores.argmax(1) != y
    assert (margin(scores, y) > 0).equal(wrong) and (dlr(scores, y) > 0).equal(wrong)


@PROPERTY
@given(SCORES, LABELS)
@pytest.mark.parametrize("loss", [ce, margin], ids=["ce", "margin"])
def test_more_for_the_target_is_a_larger_targeted_loss(loss, scores, labels):
    y, target = labels
    assume(scores.sort().values.diff().ne(0).all())
    leaf = scores.clone().requires_grad_()
    slope = torch.autograd.grad(loss(leaf, y, target).sum(), leaf)[0][0]
    assert slope[target] >= 0 and slope[y] <= 0


# Two draws of two members, three images of true label 0: margins of the four ballots.
BALLOTS = torch.tensor(
    [[[4.0, -2.0, 0.5], [-1.0, -2.0, 0.5]], [[3.0, -6.0, 0.75], [2.0, -2.0, 9.0]]]
)


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [
        (1.0, [(1 - 1 + 1 + 1) / 4, (-2 - 2 - 6 - 2) / 4, (0.5 + 0.5 + 0.75 + 1) / 4]),
        (0.0, [(0 - 1 + 0 + 0) / 4, (-2 - 2 - 6 - 2) / 4, 0.0]),
        (100.0, [(4 - 1 + 3 + 2) / 4, (-2 - 2 - 6 - 2) / 4, (0.5 + 0.5 + 0.75 + 9) / 4]),
    ],
)
def test_votes_is_the_mean_of_clipped_margins(kappa, expected):
    logits = torch.stack([torch.zeros_like(BALLOTS), BALLOTS], dim=-1)  # (S, M, N, L)
    loss = Votes(kappa)(Draw(logits), torch.zeros(3, dtype=torch.int64), None)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_votes_for_a_target():
    logits = torch.tensor([[[[5.0, 1.0, 2.0]]], [[[0.0, 8.0, 2.0]]]])  # margins -4 and 6
    loss = Votes()(Draw(logits), torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor([(-4.0 + 1.0) / 2]))


def test_a_draw_that_is_lost_gets_no_gradient():
    leaf = torch.stack([torch.zeros_like(BALLOTS), BALLOTS], dim=-1).requires_grad_()
    loss = Votes()(Draw(leaf), torch.zeros(3, dtype=torch.int64), None)
    slope = torch.autograd.grad(loss.sum(), leaf)[0][..., 1]
    torch.testing.assert_close(slope, (BALLOTS < 1).float() / 4)


def test_auto_is_the_own_loss_and_else_cross_entropy():
    scores, y, _ = labelled()
    own, plain = access_to(nn.Flatten(), losses={"two": Votes(2.0)}), access_to(nn.Flatten())
    assert choose(own, "auto") == choose(own, "two") == Votes(2.0)
    blind = access_to(nn.Flatten(), losses={"two": Votes(2.0)}, knows=False)
    assert choose(blind, "two") == Votes(2.0)
    assert choose(blind, "auto") != Votes(2.0)
    assert choose(own, "vote") == Votes()
    draw = Draw(scores[None, None])
    torch.testing.assert_close(choose(plain, "auto")(draw, y, None), ce(scores, y))
    torch.testing.assert_close(choose(own, "margin")(draw, y, None), margin(scores, y))


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match=r"^unknown loss 'dlrr'; did you mean 'dlr'\?$"):
        choose(access_to(nn.Flatten()), "dlrr")


@given(SCORES, LABELS, st.sampled_from([10, 100]), st.booleans())
@PROPERTY
def test_a_tempered_loss_is_the_cross_entropy_of_cooler_scores(scores, labels, by, targeted):
    y, target = labels
    found = TEMPERED[f"ce-t{by}"](scores, y, target if targeted else None)
    label = int(target if targeted else y)
    expected = logsumexp(scores.numpy()[0] / by) - scores.numpy()[0, label] / by
    assert float(found) == pytest.approx(-expected if targeted else expected, abs=1e-9)


@pytest.mark.parametrize("name", TEMPERED)
def test_a_tempered_loss_has_a_gradient_where_that_of_cross_entropy_is_gone(name):
    scores = torch.tensor([[150.0, 0.0, -50.0, 10.0]])
    y = torch.tensor([0])
    gradients = []
    for loss in (ce, TEMPERED[name]):
        leaf = scores.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, y).sum(), leaf)[0])
    assert not gradients[0].any() and gradients[1].all() and gradients[1].isfinite().all()
    assert gradients[1].argmax() == 3  # towards the likeliest wrong label


@pytest.mark.parametrize("name", TEMPERED)
def test_an_attack_takes_a_tempered_loss_by_its_name(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    access = Access(Deployed(nn.ModuleList([network]), MeanLogits(), (1, 2, 2), 3))
    x, y = torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    loss, by = choose(access, name), float(name.removeprefix("ce-t"))
    found = access.gradient(x, y, loss)
    torch.testing.assert_close(found.loss, ce(network(x) / by, y))
    leaf = x.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: TEMPERED[name](leaf.flatten(1)[:, :3] * 50, y), leaf
    )
