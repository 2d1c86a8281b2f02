"""Draws chosen by evidence, and queries that run out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robbench
from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.evidence import DRAWS, enough_draws
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.grid import Block
from robbench.metered import Metered, OutOfQueries, within_limit
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").subset(24)


class Noise(nn.Module):
    """Gaussian noise on the gradient alone: the answer does not change, its derivative does."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + 1e-3 * torch.randn_like(x) + self.scale * torch.randn_like(x) * (x - x.detach())


def access_to(*members, **options):
    return Access(Deployed(nn.ModuleList(members), MeanLogits(), SHAPE, 10), **options)


def chosen(network, digits, scale):
    access = access_to(nn.Sequential(Noise(scale), network), draws=5)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return enough_draws(access, digits.x, digits.y, Threat(eps="0.05"), generator)


def test_more_draws_are_taken_where_gradients_differ_more(network, digits):
    found = [chosen(network, digits, scale) for scale in (0.1, 8.0)]
    assert found[0][0] <= 2
    assert found[1][0] >= 20
    for draws, seen in found:
        assert seen["draws"] == list(DRAWS[: len(seen["draws"])])
        assert seen["cosine"][-1] >= 0.5 or seen["signs"][-1] >= 0.7 or draws == DRAWS[-1]
        assert all(-1 <= value <= 1 for value in seen["cosine"])


def test_the_cosine_is_that_of_the_noise(network, digits):
    """E cos of two K-draw means of g (1 + s·ξ): 1 / (1 + s² / K) for many pixels."""
    _, seen = chosen(network, digits, 3.0)
    expected = [1 / (1 + 9 / draws) for draws in seen["draws"]]
    assert all(abs(a - b) < 0.15 for a, b in zip(seen["cosine"], expected, strict=True))


def test_a_cell_with_auto_records_what_was_seen():
    result = robbench.evaluate(
        "smoothing(network=mlp, epochs=1, draws=5)", "digits", "pgd(steps=3)", eps="0.1", n=24,
        setting="adaptive", eot="auto",
    )  # fmt: skip
    (record,) = result.records
    seen = record.provenance["eot"]
    assert record.cell.setting.eot == "auto"
    assert seen["chosen"] in [k * 2**i for k in DRAWS for i in range(7)]
    assert len(seen["cosine"]) == len(seen["draws"])
    assert "EOT auto" in str(result)


def test_only_numbers_and_auto_are_draws():
    for given in (0, "many", True, 1.5):
        with pytest.raises(ValueError, match="no number of draws"):
            Block(defense="ito", attack="pgd", eot=given)


def test_queries_run_out_at_the_limit_and_the_best_point_asked_is_handed_in(network, digits):
    access = access_to(network, gradients=False)
    attack = Configured.of("torchattacks:Square(n_queries=1000)")
    threat, generator = Threat(eps="0.05"), torch.Generator().manual_seed(0)
    found = within_limit(attack, access, digits.x, digits.y, threat, generator, limit=25)
    assert access.cost.queries <= 25 * len(digits.y)
    assert distance(found, digits.x, "linf").max() <= 0.05 + 1e-6
    clean = (network(digits.x).argmax(1) == digits.y).float().mean()
    broken = (network(found).argmax(1) == digits.y).float().mean()
    assert broken < clean


@pytest.mark.parametrize("spec", ["square", "spsa(steps=2, samples=4)", "local-search"])
def test_every_search_can_be_cut_short(spec, network, digits):
    norm = "l0" if spec == "local-search" else "linf"
    attack, threat = Configured.of(spec), Threat(norm=norm, eps=None if norm == "l0" else "0.2")
    for limit in (1, 30):
        access = access_to(network, gradients=False)
        rng = torch.Generator().manual_seed(0)
        found = within_limit(attack, access, digits.x, digits.y, threat, rng, limit)
        assert access.cost.queries <= limit * len(digits.y)
        assert found.shape == digits.x.shape


def test_the_best_point_is_the_one_of_the_largest_margin_within_the_ball(network, digits):
    x, y = digits.x[:1], digits.y[:1]
    metered = Metered(access_to(network), x, y, Threat(eps="0.1"), 6)
    points = (x + torch.linspace(-0.2, 0.2, 5).view(-1, 1, 1, 1)).clamp(0, 1)
    scores = metered.scores(points)
    inside = distance(points, x.expand_as(points), "linf") <= 0.1 + 1e-6
    others = scores.scatter(1, y.expand(5)[:, None], float("-inf")).amax(1)
    margins = (others - scores[:, y[0]]).masked_fill(~inside, float("-inf"))
    assert torch.equal(metered.best, points[margins.argmax()][None])
    with pytest.raises(OutOfQueries):
        metered.scores(points[:2])
    assert metered.cost.queries == 5


def test_limits_are_for_attacks_that_ask():
    with pytest.raises(ValueError, match="max_queries: it limits attacks that ask"):
        Block(defense="standard", attack="pgd", max_queries=10)
    cells = Block(defense="standard", attack="square", max_queries=10, n=4, eps="0.1").cells(
        datasets.load("digits")
    )
    assert [cell.setting.queries for cell in cells] == [10]


def test_options_that_would_do_nothing_are_refused():
    for given in (
        {"attack": "pgd", "setting": "whitebox", "eot": 7},
        {"attack": "spsa", "eot": 7},
        {"attack": "square", "setting": "transfer", "oracle": "pgd-at", "max_queries": 5},
    ):
        with pytest.raises(ValueError, match="eot: draws behind|max_queries: it limits"):
            Block(defense="standard", **given)


def test_a_minimal_attack_has_the_same_draws_at_every_radius():
    def measured(*eps):
        result = robbench.evaluate(
            "smoothing(network=mlp, epochs=1, draws=5)", "digits", "deepfool(steps=2)",
            eps=list(eps), n=16, setting="adaptive", eot="auto",
        )  # fmt: skip
        return {str(r.cell.threat.eps): (r.provenance["eot"], r.ok.sum()) for r in result.records}

    both, alone = measured("0.02", "0.3"), measured("0.3")
    assert both["3/10"] == alone["3/10"]
    with pytest.raises(InputError, match="has none for l0; write a number"):
        robbench.evaluate(
            "smoothing(network=mlp, epochs=1, draws=5)", "digits", "jsma(steps=2)", norm="l0",
            eps=5, n=4, setting="adaptive", eot="auto",
        )  # fmt: skip


def test_denial_is_asked_only_of_what_can_refuse():
    block = Block(defense="standard, ito", attack="pgd", goal="denial,error", eps="0.1", n=4,
                  setting="whitebox")  # fmt: skip
    found = [(cell.defense, cell.threat.goal) for cell in block.cells(datasets.load("digits"))]
    assert found == [("standard", "error"), ("ito", "denial"), ("ito", "error")]
    with pytest.raises(ValueError, match="denial is reached by any answer"):
        Block(defense="ito", attack="pgd", goal="denial", target=3)


def test_an_unknown_budget_and_a_setting_for_a_suite_are_refused():
    with pytest.raises(InputError, match="strongest"):
        Configured.of("strongest(budget=huge)")
    with pytest.raises(ValueError, match="leave the setting"):
        Block(defense="ito", attack="strongest", setting="whitebox")
