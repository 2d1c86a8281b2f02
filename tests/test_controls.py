"""Controls: what must fall to nothing does, and what has a known robust accuracy has exactly it.

The planted models are linear, f(x) = W x + b: inside the ball, and away from the ends of the box,
the nearest point of another label lies at (f_y - f_j) / ||w_y - w_j|| in the dual norm.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

import robbench
from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.datasets import LARGE_CONTROL
from robbench.datasets.dataset import take
from robbench.deployed import Deployed
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance, within

SHAPE, LABELS = (1, 6, 6), 4
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
EPS = {"linf": 0.0053, "l2": 0.0247, "l1": 0.062}
BOUNDED = {
    "pgd(steps=40, restarts=2, loss=margin)": ("linf", "l2"),
    "mim(steps=40, loss=margin)": ("linf", "l2"),
    "apgd(steps=50, loss=margin, targets=3)": ("linf", "l2", "l1"),
    "autoattack": ("linf", "l2"),
}
MINIMAL = {
    "fab(targets=3, steps=50)": ("linf", "l2", "l1"),
    "deepfool": ("linf", "l2"),
    "cw(steps=200, search=8)": ("l2",),
}


@pytest.fixture(scope="module")
def planted():
    """(Deployed, x, y, {norm: (N,) distance to the nearest other label}); some images are wrong."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(40, *SHAPE, generator=generator)
    linear = nn.Linear(36, LABELS)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(LABELS, 36, generator=generator))
        linear.bias.copy_(-linear.weight.sum(dim=1) / 2)
    model = nn.Sequential(nn.Flatten(), linear).eval().requires_grad_(False)
    logits = model(x)
    y = logits.argmax(dim=1)
    y[:3] = (y[:3] + 1) % LABELS
    nearest = {}
    for norm, dual in DUAL.items():
        away = torch.full((len(x), LABELS), float("inf"))
        for label in range(LABELS):
            others = linear.weight[y] - linear.weight[label]
            margin = logits.gather(1, y[:, None])[:, 0] - logits[:, label]
            length = others.norm(p=dual, dim=1)
            away[:, label] = torch.where(y == label, float("inf"), margin / length.clamp_min(1e-9))
        nearest[norm] = away.amin(dim=1).clamp_min(0)
    return Deployed(nn.ModuleList([model]), MeanLogits(), SHAPE, LABELS), x, y, nearest


def attacked(spec, planted, norm, eps):
    deployed, x, y, _ = planted
    threat = Threat(norm=norm, eps=eps)
    rng = torch.Generator().manual_seed(0)
    return Configured.of(spec)(Access(deployed), x, y, threat, rng)


@pytest.mark.parametrize(
    ("spec", "norm"), [(spec, norm) for spec, norms in BOUNDED.items() for norm in norms]
)
def test_an_attack_within_the_ball_breaks_exactly_what_can_be_broken(planted, spec, norm):
    deployed, x, y, nearest = planted
    eps = EPS[norm]
    found = attacked(spec, planted, norm, str(eps))
    robust = deployed.decide(found, 1)[0] == y
    clear = (nearest[norm] / eps - 1).abs() > 0.02  # nearer to ε than float32 and 50 steps resolve
    assert torch.equal(robust[clear], (nearest[norm] > eps)[clear])
    assert 0.3 < robust.float().mean() < 0.7
    assert clear.float().mean() > 0.9


@pytest.mark.parametrize(
    ("spec", "norm"), [(spec, norm) for spec, norms in MINIMAL.items() for norm in norms]
)
def test_a_search_for_the_smallest_change_finds_it(planted, spec, norm):
    deployed, x, y, nearest = planted
    found = attacked(spec, planted, norm, None)
    assert (deployed.decide(found, 1)[0] != y).all()
    length = distance(found, x, norm)
    broken = nearest[norm] > 0
    ratio = length[broken] / nearest[norm][broken]
    assert (ratio > 0.999).all()
    assert ratio.median() < 1.03
    for eps in (EPS[norm] / 2, EPS[norm]):  # one run answers every ε
        share = within(length, Threat(norm=norm, eps=str(eps))).float().mean()
        assert abs(share - (nearest[norm] <= eps).float().mean()) <= 0.05


def test_an_undefended_twin_falls_to_nothing_at_the_control_radius():
    """digits at linf 0.5: any image can become grey."""
    control = datasets.load("digits").control
    assert control == Fraction(1, 2)
    result = robbench.evaluate(
        "standard(network=mlp, epochs=3)", "digits", ["pgd", "apgd", "mim"], eps=str(control), n=60
    )
    assert all(record.ok.sum() == 0 for record in result.records)
    assert all(record.clean_ok.mean() > 0.7 for record in result.records)


def test_an_undefended_twin_falls_to_nothing_on_colour_images():
    """linf 32/255 on images of CIFAR's size: the digits, enlarged and coloured."""
    digits = datasets.load("digits")

    def coloured(subset, count):
        part = take(subset, range(count))
        x = nn.functional.interpolate(part.x, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
        return 0.35 + 0.3 * x, part.y

    x, y = coloured(digits.train, 200)
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(),
                          nn.Linear(32, 10))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    attacks = ["pgd", "apgd"]
    found = robbench.evaluate(model.eval(), (x[:60], y[:60]), attacks, eps=str(LARGE_CONTROL))
    assert all(record.ok.sum() == 0 for record in found.records)
    assert all(record.clean_ok.mean() > 0.9 for record in found.records)
