"""Ensembles: one member is `standard`, decisions counted by hand and by SciPy, joined defenses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import nn

from robbench import datasets
from robbench.checkpoints import Shelf, key_of
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.recipes import Batch
from robbench.rules import ABSTAIN, Draw
from robbench.training import train

CPU = torch.device("cpu")
SHAPE, LABELS = (1, 8, 8), 10
TINY = "epochs=2, batch_size=16, network=resnet8(width=2)"
FGSM = "adversarial=fgsm(eps=0.1)"
PGD = "adversarial=pgd(eps=0.05, low=0.01, steps=2, reach=1, clean=1)"
TRADES = "adversarial=trades(eps=0.1, steps=1)"


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:64] for tensor in digits.train)))


def tiny(name, *settings):
    return resolve(f"{name}({', '.join([TINY, *settings])})")[0]


def fresh(defense, seed=0):
    torch.manual_seed(seed)
    return defense.build(SHAPE, LABELS)


def trained(defense, dataset, members=None):
    members = fresh(defense) if members is None else members
    train(defense, members, dataset, 0, CPU)
    return members


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("adversarial", ["adversarial=none", FGSM, PGD, TRADES])
@pytest.mark.parametrize("training", ["joint", "separate"])
def test_one_member_is_the_plain_network_bit_for_bit(training, adversarial, dataset):
    one = tiny("ensemble", "members=1", f"training={training}", adversarial)
    plain = tiny("standard", adversarial)
    members, network = trained(one, dataset), trained(plain, dataset)
    assert same(members, network)
    x = dataset.test.x[:16]
    assert torch.equal(one.scores(members, x), network[0](x))


def test_members_on_the_sum_of_cross_entropies_learn_as_if_each_were_alone(dataset):
    defense = tiny("ensemble", "members=3")
    together = trained(defense, dataset)
    for member, start in zip(together, fresh(defense), strict=True):
        assert same(nn.ModuleList([member]), trained(defense, dataset, nn.ModuleList([start])))


def test_a_separate_member_is_adversarially_trained_like_a_network_of_its_own(dataset):
    defense = tiny("ensemble", "members=2", "training=separate", FGSM)
    both, plain = trained(defense, dataset), tiny("standard", FGSM)
    alone = trained(plain, dataset, nn.ModuleList([*fresh(defense)][:1]))
    assert same(nn.ModuleList([both[0]]), alone)


def test_joint_examples_climb_the_cross_entropy_of_the_mean_probability():
    eps = 0.05
    defense = tiny("ensemble", "members=2", f"adversarial=fgsm(eps={eps}, random=false)")
    torch.manual_seed(1)
    members = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)) for _ in range(2))
    x = (0.2 + 0.6 * torch.rand(8, *SHAPE)).requires_grad_()
    y = torch.randint(5, (8,))
    probability = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    gradient = torch.autograd.grad(F.nll_loss(probability.log(), y), x)[0]
    clean = x.detach()
    batch = defense.batch(members, Batch(clean, y, clean, 5), torch.Generator())
    torch.testing.assert_close(batch.x, clean + eps * gradient.sign())


def test_the_loss_is_the_sum_over_members():
    logits = torch.randn(1, 4, 6, LABELS, generator=torch.Generator().manual_seed(2)).double()
    y = torch.arange(6)
    loss = tiny("ensemble").criterion(Draw(logits), y, torch.zeros(6, *SHAPE))
    log = special.log_softmax(logits[0].numpy(), axis=-1)
    np.testing.assert_allclose(loss, -log[:, np.arange(6), y].sum(axis=0))


def winner(ballots, majority):
    """The label of most ballots, or ABSTAIN."""
    (label, most), *others = Counter(ballots).most_common()
    tied = bool(others) and others[0][1] == most
    return ABSTAIN if tied or (majority and 2 * most <= len(ballots)) else label


@given(
    seed=st.integers(0, 10**6),
    members=st.integers(2, 5),
    name=st.sampled_from(["ensemble", "joined"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_decisions_are_those_of_softmaxes_logits_and_votes_by_hand(seed, members, name):
    logits = np.random.default_rng(seed).normal(scale=4, size=(1, members, 9, 3))
    draw, labels = Draw(torch.from_numpy(logits)), logits[0].argmax(-1).T
    expected = {
        "probabilities": special.softmax(logits[0], -1).mean(0).argmax(-1),
        "logits": logits[0].mean(0).argmax(-1),
        "majority": [winner(ballots.tolist(), True) for ballots in labels],
        "plurality": [winner(ballots.tolist(), False) for ballots in labels],
    }
    for decision, answers in expected.items():
        rule = resolve(f"{name}(decision={decision})")[0].rule()
        assert rule.decide(draw).tolist() == list(answers)


@pytest.mark.parametrize("name", ["ensemble", "joined"])
def test_another_decision_needs_no_other_weights(name, dataset):
    keys = {
        key_of(resolve(f"{name}(decision={decision})")[0], dataset, 0)
        for decision in ("probabilities", "logits", "majority", "plurality")
    }
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["ensemble", "joined"])
def test_votes_are_attacked_one_by_one_and_means_as_they_are(name):
    decisions = ("probabilities", "logits", "majority", "plurality")
    own = [list(resolve(f"{name}(decision={decision})")[0].losses) for decision in decisions]
    assert own == [[], [], ["vote"], ["vote"]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf([tmp_path_factory.mktemp("shelf")])


def deploy(shelf, dataset, text):
    return shelf.deploy(text, dataset, 0, CPU).deployed


A, B = f"enresnet({TINY}, members=2, adversarial=none)", f"standard({TINY})"


def test_joined_members_are_those_of_the_parts_in_order(shelf, dataset):
    joined = deploy(shelf, dataset, f"joined(base='{A} & {B}')")
    parts = deploy(shelf, dataset, f"{A} & {B}")
    assert joined.randomness == parts.randomness == ["image", "image", "none"]
    assert same(joined.members, parts.members)


@pytest.mark.parametrize("decision", ["majority", "plurality"])
def test_joined_defenses_abstain_where_their_two_members_differ(decision, shelf, dataset):
    other = f"standard({TINY}, lr=0.02)"
    voting = deploy(shelf, dataset, f"joined(base='{B} & {other}', decision={decision})")
    x = dataset.test.x[:200]
    with torch.no_grad():
        first, second = (member(x).argmax(1) for member in voting.members)
    assert bool((first != second).any())
    assert torch.equal(voting.decide(x, 1)[0], first.where(first == second, ABSTAIN))


def test_joined_defenses_can_be_trained_on_together(shelf, dataset):
    other = f"standard({TINY}, lr=0.02)"
    before = deploy(shelf, dataset, f"joined(base='{B} & {other}')")
    after = deploy(shelf, dataset, f"joined(base='{B} & {other}', epochs=1, batch_size=16)")
    x, y = dataset.train
    losses = [F.cross_entropy(d.rule.scores(d.draw(x, 1)), y) for d in (before, after)]
    assert losses[1] < losses[0]


def test_joining_needs_something_to_join():
    with pytest.raises(InputError, match="keeps the weights of a base, and there is none"):
        resolve("joined(base=none)")
