"""The Square attack against its authors' code, hand counts and defenses that are random or vote."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.square import _Search
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits, Vote
from robbench.threat import Threat, distance, within

SIDE = 10  # a multiple of 5: the authors' start covers the image and does not crash
EPS = {"linf": "0.1", "l2": "1.2", "l1": "6"}
THEIR_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Noise(nn.Module):
    """So much noise on the logits that many a single answer is wrong."""

    def forward(self, logits):
        return logits + 3 * torch.randn_like(logits)


def prepared(x):
    tint = torch.tensor([0.9, 0.6, 0.8]).view(3, 1, 1)
    return F.interpolate(x, size=SIDE) * tint


def trained(seed):
    torch.manual_seed(seed)
    train = datasets.load("digits").train
    x = prepared(train.x)
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(x), train.y).backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def network():
    return trained(0)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return prepared(subset.x), subset.y


def deployed(*members, rule=None, shape=(3, SIDE, SIDE), labels=10, draws=1):
    return Deployed(nn.ModuleList(members), rule or MeanLogits(), shape, labels, draws)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def errors(defense, x, y, times=1):
    """Share of calls with a wrong answer that is given, per image."""
    labels = defense.decide(x, times)
    return ((labels != y) & (labels >= 0)).float().mean(dim=0)


class Fixed(nn.Module):
    """The label 0 whatever it sees."""

    def forward(self, x):
        return x.flatten(1).sum(dim=1, keepdim=True) * 0 + torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_random_numbers_give_the_authors_points(norm, rescale, network, digits):
    x, y = digits
    eps = float(EPS[norm])
    spec = f"square(queries=200, edges=false, rescale={str(rescale).lower()})"
    ours = craft(spec, Access(deployed(network)), x, y, Threat(norm=norm, eps=EPS[norm]))
    attack = SquareAttack(network, THEIR_NORMS[norm], 200, eps, resc_schedule=rescale)
    theirs = attack.perturb(x, y)
    broken = errors(deployed(network), theirs, y) == 1
    assert broken.sum() > 5 and (ours - theirs)[broken].abs().max() < 1e-5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targets_are_reached_by_the_authors_points(norm, network, digits):
    x, y = digits
    target = torch.where(y == 3, 4, 3)
    eps = 2 * float(EPS[norm])
    threat = Threat(norm=norm, eps=eps, target=3)
    spec = "square(queries=200, edges=false, loss=ce)"
    ours = craft(spec, Access(deployed(network)), x, y, threat)
    theirs = SquareAttack(network, THEIR_NORMS[norm], 200, eps, targeted=True).perturb(x, target)
    reached = network(theirs).argmax(dim=1) == target
    assert reached.sum() > 5 and (ours - theirs)[reached].abs().max() < 1e-5


def test_restarts_go_on_where_the_authors_do(network, digits):
    x, y = digits
    threat = Threat(eps=EPS["linf"])
    ours = craft("square(queries=100, restarts=3, edges=false)", Access(deployed(network)), *digits,
                 threat)  # fmt: skip
    theirs = SquareAttack(network, "Linf", 100, 0.1, n_restarts=3).perturb(x, y)
    broken = errors(deployed(network), theirs, y) == 1
    assert broken.sum() > 5 and (ours - theirs)[broken].abs().max() < 1e-5


def test_under_l1_it_breaks_as_many_as_the_authors_with_as_many_queries(network, digits):
    """Their windows normalise what rounding left in them, so the paths part after some steps."""
    x, y = digits
    access = Access(deployed(network))
    threat = Threat(norm="l1", eps=EPS["l1"])
    ours = craft("square(queries=120, edges=false)", access, x, y, threat)
    asked = []

    def counted(images):
        asked.append(len(images))
        return network(images)

    theirs = SquareAttack(counted, "L1", 120, float(EPS["l1"])).perturb(x, y)
    defense = deployed(network)
    gap = errors(defense, ours, y).sum() - errors(defense, theirs, y).sum()
    assert abs(gap) <= 3 and access.cost.queries == pytest.approx(sum(asked), rel=0.2)


def test_under_l1_the_first_steps_are_the_authors(network, digits):
    x, y = digits
    threat = Threat(norm="l1", eps="16")
    ours = craft("square(queries=5, edges=false)", Access(deployed(network)), x, y, threat)
    theirs = SquareAttack(network, "L1", 5, 16.0).perturb(x, y)
    broken = errors(deployed(network), theirs, y) == 1
    assert broken.sum() > 5 and (ours - theirs)[broken].abs().max() < 1e-4


@pytest.mark.parametrize("rescale", [True, False])
def test_the_squares_shrink_as_the_authors_do(rescale, network):
    theirs = SquareAttack(network, n_queries=700, p_init=0.6, resc_schedule=rescale)
    access = Access(deployed(network))
    ours = _Search(access, None, None, 1, 700, 1, 0.6, rescale)
    assert [ours._share(step) for step in range(700)] == [
        theirs.p_selection(step) for step in range(700)
    ]


@pytest.mark.parametrize(("restarts", "queries"), [(1, 1 + 31), (3, 1 + 3 * 31 + 3)])
def test_a_point_that_never_breaks_costs_every_query(restarts, queries):
    """The clean image, a start and 30 steps a restart, and each candidate once at the end."""
    access = Access(deployed(Fixed(), shape=(1, 6, 6), labels=2))
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    craft(f"square(queries=30, restarts={restarts})", access, x, y, Threat(eps="0.1"))
    assert access.cost.queries == 4 * queries


def test_an_image_that_is_wrong_already_costs_one_query():
    access = Access(deployed(Fixed(), shape=(1, 6, 6), labels=2))
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.ones(4, dtype=torch.int64)
    result = craft("square(queries=30)", access, x, y, Threat(eps="0.1"))
    assert torch.equal(result, x) and access.cost.queries == 4


def test_each_call_of_an_average_is_a_query():
    """500 queries are 90 steps of 5 calls and 9 comparisons of 5 calls on new draws, 495 in all."""
    defense = deployed(nn.Sequential(Fixed(), Noise()), shape=(1, 6, 6), labels=2)
    access = Access(defense)
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    craft("square(queries=500, average=5)", access, x, y, Threat(eps="0.1"))
    assert access.cost.queries == 4 * 495


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 13), st.integers(2, 13)),
    eps=st.floats(0.01, 3),
    seed=st.integers(0, 1000),
)
def test_points_stay_in_ball_and_box(norm, shape, eps, seed):
    eps = min(eps, 1.0) if norm == "linf" else eps
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed))
    y, threat = torch.zeros(3, dtype=torch.int64), Threat(norm=norm, eps=eps)
    access = Access(deployed(Fixed(), shape=shape, labels=2), own=False)
    result = craft("square(queries=6)", access, x, y, threat, seed)
    assert (
        within(distance(result, x, norm), threat).all() and 0 <= result.min() <= result.max() <= 1
    )


class LastRow(nn.Module):
    """Is never broken, but the nearer to it the brighter the last row."""

    def forward(self, x):
        brightness = x[:, :, -1].sum(dim=(1, 2))
        return torch.stack([torch.full_like(brightness, 100), brightness], dim=1)


@pytest.mark.parametrize(("edges", "whole"), [(True, True), (False, False)])
def test_only_with_edges_a_step_reaches_the_last_row(edges, whole):
    defense = deployed(LastRow(), shape=(1, 8, 8), labels=2)
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    spec = f"square(queries=600, edges={str(edges).lower()})"
    result = craft(spec, Access(defense), x, y, Threat(eps="0.1"))
    assert bool((result[:, :, -1] > 0.5).all()) is whole


def test_the_attack_draws_from_its_own_stream_only(network, digits):
    before = torch.get_rng_state()
    first, again, other = (
        craft("square(queries=20)", Access(deployed(network)), *digits, Threat(eps="0.1"), seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_where_the_authors_search_freezes_by_luck_the_averaged_one_goes_on(network, digits):
    x, y = digits
    noisy = nn.Sequential(*network, Noise())
    defense = deployed(noisy)
    torch.manual_seed(0)
    ours = craft("square(queries=2000)", Access(defense), x, y, Threat(eps="0.1"))
    theirs = SquareAttack(noisy, "Linf", 2000, 0.1).perturb(x, y)
    clean, naive, averaged = (errors(defense, z, y, 200).mean() for z in (x, theirs, ours))
    assert abs(naive - clean) < 0.05 and averaged > clean + 0.15


@pytest.mark.parametrize("own", [True, False])
def test_a_lucky_draw_ends_nothing(own, network, digits):
    """Every image keeps all its queries, where one call in three is wrong by chance."""
    x, y = digits
    access = Access(deployed(nn.Sequential(*network, Noise())), own=own)
    craft("square(queries=220, average=5)", access, x, y, Threat(eps="0.1"))
    assert access.cost.queries == len(x) * 220


def test_the_search_passes_through_abstention_to_an_error(network, digits):
    x, y = digits
    defense = deployed(network, trained(1), trained(2), rule=Vote())
    found = {
        goal: craft("square(queries=300)", Access(defense, goal=goal), x, y, Threat(eps="0.15"))
        for goal in ("error", "denial")
    }
    wrong = {goal: errors(defense, z, y).sum() for goal, z in found.items()}
    unanswered = (defense.decide(found["denial"], 1)[0] == -1).sum()
    assert unanswered > 0 and wrong["error"] > wrong["denial"]


def test_on_a_noisy_vote_it_wins_calls(network, digits):
    x, y = digits
    noisy = nn.Sequential(*network, Noise())
    defense = deployed(noisy, rule=Vote(), draws=5)
    torch.manual_seed(0)
    result = craft("square(queries=400, average=4)", Access(defense), x, y, Threat(eps="0.1"))
    gained = errors(defense, result, y, 40).mean() - errors(defense, x, y, 40).mean()
    assert gained > 0.1


@pytest.mark.parametrize(
    ("spec", "eps", "message"),
    [
        ("square", None, r"the attack square needs an ε; write one"),
        ("square(p=2)", "0.1", r"p = 2: .*less than or equal to 1"),
        ("square(queries=0)", "0.1", r"queries = 0: .*greater than or equal to 1"),
        ("square(loss=margni)", "0.1", r"unknown loss 'margni'; did you mean 'margin'"),
    ],
)
def test_what_square_cannot_do_is_said_in_a_line(spec, eps, message, network, digits):
    with pytest.raises(InputError, match=message):
        craft(spec, Access(deployed(network)), *digits, Threat(eps=eps))
