"""HopSkipJump and Brendel-Bethge against closed forms, foolbox and hand counts."""

from __future__ import annotations

import importlib.util
import math
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.attacks import evasion
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import ABSTAIN, MeanLogits, Vote
from robbench.threat import Threat, distance

with warnings.catch_warnings():  # it uses names of SciPy that are on their way out
    warnings.simplefilter("ignore", DeprecationWarning)
    import foolbox

SHAPE = (1, 4, 4)
ATTACKS = [
    ("hopskipjump(steps=10)", "l2"),
    ("hopskipjump(steps=10)", "linf"),
    ("brendel-bethge(steps=4)", "linf"),
    ("brendel-bethge(steps=4)", "l2"),
    ("brendel-bethge(steps=4)", "l1"),
    ("brendel-bethge(steps=4)", "l0"),
]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """ART's Brendel-Bethge without its compiler, which would take longer than all that is here."""

    def jitclass(spec):
        def keep(plain):
            plain.class_type = SimpleNamespace(instance_type=None)
            return plain

        return keep

    found = importlib.util.find_spec("art.attacks.evasion.brendel_bethge")
    module = importlib.util.module_from_spec(found)
    with patch("numba.experimental.jitclass", jitclass):
        found.loader.exec_module(module)
    plain = patch.object(evasion, "BrendelBethgeAttack", module.BrendelBethgeAttack)
    with plain, np.errstate(all="ignore"):  # compiled code does not warn either
        yield


class Halfspace(nn.Module):
    """Label 1 on one side of a plane; the nearest point of it is known for every norm."""

    def __init__(self, noise=0.0, base=0.0):
        super().__init__()
        self.base = base
        torch.manual_seed(0)
        weight = torch.randn(16)
        self.weight, self.noise = nn.Parameter(weight / weight.norm()), noise

    def height(self, x):
        return (x.flatten(1) - 0.5) @ self.weight - self.base

    def forward(self, x):
        height = self.height(x)
        height = height + self.noise * torch.randn_like(height)
        return torch.stack([torch.zeros_like(height), height], dim=1)

    def nearest(self, x, norm):
        """(N,) the distance of the plane; the box is wide enough."""
        gap, weight = self.height(x).abs(), self.weight.abs()
        if norm == "l0":  # pixels by what each can give at most
            room = torch.where(self.weight < 0, 1 - x.flatten(1), x.flatten(1))
            gains = (room * weight).sort(dim=1, descending=True).values.cumsum(dim=1)
            return (gains < gap[:, None]).sum(dim=1) + 1.0
        return gap / {"l2": weight.norm(), "linf": weight.sum(), "l1": weight.max()}[norm]


def small(x):
    return F.avg_pool2d(x, 2)


def trained(seed):
    torch.manual_seed(seed)
    train = datasets.load("digits").train
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(network(small(train.x)), train.y).backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def networks():
    return [trained(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def digits(networks):
    """Images that every network knows."""
    subset = datasets.load("digits").subset(60)
    x = small(subset.x)
    right = torch.stack([n(x).argmax(dim=1) == subset.y for n in networks]).all(dim=0)
    return x[right][:12], subset.y[right][:12]


@pytest.fixture(scope="module")
def above():
    """Grey images on the side of label 1, at different heights."""
    rng = torch.Generator().manual_seed(0)
    step = torch.linspace(0.1, 0.3, 4).view(-1, 1) * Halfspace().weight.detach()
    x = (0.5 + step + 0.02 * torch.rand(4, 16, generator=rng)).view(-1, *SHAPE)
    return x, torch.ones(4, dtype=torch.int64)


def deployed(*members, rule=None, labels=10, draws=1):
    return Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, labels, draws)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spec", "norm", "factor"),
    [
        ("hopskipjump(steps=20)", "l2", 1.02),
        ("hopskipjump(steps=20)", "linf", 1.05),
        ("brendel-bethge(steps=20)", "l2", 1.01),
        ("brendel-bethge(steps=20)", "linf", 1.01),
        ("brendel-bethge(steps=20)", "l1", 1.1),
        ("brendel-bethge(steps=20)", "l0", 2),  # a pixel more here and there
    ],
)
def test_the_nearest_point_of_a_plane_is_found(spec, norm, factor, above):
    x, y = above
    plane = Halfspace()
    access = Access(deployed(plane, labels=2))
    length = distance(craft(spec, access, x, y, Threat(norm=norm)), x, norm)
    best = plane.nearest(x, norm).detach()
    assert (length >= 0.999 * best).all() and (length <= factor * best).all()


@pytest.mark.parametrize(("spec", "norm"), ATTACKS)
def test_every_point_is_in_the_box_and_wrong(spec, norm, networks, digits):
    x, y = digits[0][:3], digits[1][:3]
    defense = deployed(networks[0])
    result = craft(spec, Access(defense), x, y, Threat(norm=norm))
    assert (defense.decide(result, 1)[0] != y).all() and 0 <= result.min() <= result.max() <= 1


@pytest.mark.parametrize(("spec", "norm"), [*ATTACKS[:3], ATTACKS[5]])
def test_targets_are_reached(spec, norm, networks, digits):
    x, y = digits[0][:3], digits[1][:3]
    defense = deployed(networks[0])
    result = craft(spec, Access(defense), x, y, Threat(norm=norm, target=7))
    assert torch.equal(defense.decide(result, 1)[0], torch.where(y == 7, 8, 7))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_is_not_behind_that_of_foolbox(norm, networks, digits):
    x, y = digits
    access = Access(deployed(networks[0]))
    ours = craft("hopskipjump(steps=10)", access, x, y, Threat(norm=norm))
    model = foolbox.PyTorchModel(networks[0], bounds=(0, 1))
    torch.manual_seed(0)
    attack = foolbox.attacks.HopSkipJumpAttack(steps=10, constraint=norm)
    theirs = attack.run(model, x, foolbox.criteria.Misclassification(y))
    assert distance(ours, x, norm).median() <= 1.05 * distance(theirs, x, norm).median()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_asks_what_the_algorithm_says(norm, above):
    """16 pixels: 6 halvings under l2, 8 under linf. The image; its start; a bisection and a last
    look, then again in each step after its probes and the first stride, which reaches the side."""
    x, y = above[0][:1], above[1][:1]
    access = Access(deployed(Halfspace(), labels=2))
    craft("hopskipjump(steps=9, evaluations=100, most=250)", access, x, y, Threat(norm=norm))
    halvings = {"l2": 6, "linf": 8}[norm]
    probes = [min(int(100 * math.sqrt(step)), 250) for step in range(1, 10)]
    rng, starts = torch.Generator().manual_seed(0), 1
    while not Halfspace().height(torch.rand(1, *SHAPE, generator=rng)) <= 0:
        starts += 1
    assert access.cost.queries == 1 + starts + halvings + 1 + sum(
        count + 1 + halvings + 1 for count in probes
    )
    assert access.cost.backwards == 0


@pytest.mark.parametrize("spec", ["hopskipjump", "brendel-bethge"])
def test_an_image_that_is_wrong_already_is_left_alone(spec, above):
    x, y = above
    access = Access(deployed(Halfspace(), labels=2))
    assert torch.equal(craft(spec, access, x, 1 - y, Threat(norm="l2")), x)


@pytest.mark.parametrize("spec", ["hopskipjump(starts=5)", "brendel-bethge(starts=5)"])
def test_without_a_starting_point_an_image_is_left_alone(spec, above):
    x, y = above
    never = nn.Sequential(Halfspace(), Always())
    access = Access(deployed(never, labels=2))
    assert torch.equal(craft(spec, access, x, y, Threat(norm="l2")), x)


class Always(nn.Module):
    def forward(self, logits):
        return 0 * logits + torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("spec", ["hopskipjump(steps=5)", "brendel-bethge(steps=5)"])
def test_where_random_images_fail_another_image_of_the_batch_starts(spec, above):
    """Lost is only what is far on the other side: no noise and no gradient leads to it."""
    x = torch.cat([above[0][:1], (0.5 - 1.5 * Halfspace().weight.detach()).view(1, *SHAPE)])
    x, y = x.clamp(0, 1), torch.tensor([1, 0])
    access = Access(deployed(Cliff(), labels=2))
    result = craft(spec, access, x, y, Threat(norm="l2", target="none"))
    assert access.deployed.decide(result[:1], 1)[0] == 0


class Cliff(Halfspace):
    """The label changes in a step behind the plane, where random images do not come."""

    def forward(self, x):
        far = (self.height(x) < -1).float() * 2 + 0 * self.height(x)
        return torch.stack([far, torch.ones_like(far)], dim=1)


@pytest.mark.parametrize(
    ("spec", "norm"),
    [("hopskipjump(steps=10)", "l2"), ("brendel-bethge(steps=10)", "linf")],
)
def test_under_noise_the_majority_shows_the_plane(spec, norm, above):
    """One answer in five is wrong near the images: a walk by single answers ends anywhere."""
    x, y = above
    plane = Halfspace(noise=0.1)
    torch.manual_seed(0)
    result = craft(spec, Access(deployed(plane, labels=2)), x, y, Threat(norm=norm))
    best = plane.nearest(x, norm).detach()
    assert (distance(result, x, norm) / best - 1).abs().max() < 0.35
    assert (deployed(plane, labels=2).decide(result, 400) != y).float().mean() > 0.4


@pytest.mark.parametrize(("spec", "norm"), ATTACKS[:3])
def test_no_answer_is_no_error(spec, norm, networks, digits):
    x, y = digits[0][:3], digits[1][:3]
    defense = deployed(*networks, rule=Vote())
    answers = defense.decide(craft(spec, Access(defense), x, y, Threat(norm=norm)), 1)[0]
    assert ((answers != y) & (answers != ABSTAIN)).all()


@pytest.mark.parametrize(("goal", "last"), [("denial", 0.0), ("error", -0.3)])
def test_denial_is_reached_at_the_first_plane_and_an_error_at_the_last(goal, last, above):
    """Between their planes the two members disagree, so the vote has no answer."""
    x, y = above
    planes = Halfspace(), Halfspace(base=-0.3)
    access = Access(deployed(*planes, rule=Vote(), labels=2), goal=goal)
    result = craft("hopskipjump(steps=20)", access, x, y, Threat(norm="l2"))
    best = Halfspace(base=last).nearest(x, "l2").detach()
    assert (distance(result, x, "l2") / best - 1).abs().max() < 0.05


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_gradients_find_nearer_points_than_labels_alone(norm, networks, digits):
    x, y = digits[0][:5], digits[1][:5]
    lengths = [
        distance(craft(spec, Access(deployed(networks[0])), x, y, Threat(norm=norm)), x, norm)
        for spec in ("brendel-bethge(steps=10)", "hopskipjump(steps=15)")
    ]
    assert lengths[0].sum() <= 1.01 * lengths[1].sum()


@pytest.mark.parametrize(("spec", "norm"), [ATTACKS[0], ATTACKS[3]])
def test_the_seed_of_the_run_decides_and_global_streams_stay(spec, norm, networks, digits):
    x, y = digits[0][:2], digits[1][:2]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    defense, threat = deployed(networks[0]), Threat(norm=norm)
    first, again = (craft(spec, Access(defense), x, y, threat) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_without_numba_brendel_bethge_says_what_to_install(above, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    access = Access(deployed(Halfspace(), labels=2))
    with pytest.raises(InputError, match=r"needs the package numba; pip install 'robbench\[att"):
        craft("brendel-bethge", access, *above, Threat(norm="linf"))
