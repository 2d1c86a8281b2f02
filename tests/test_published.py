"""The papers' own attacks: their settings, and the weaknesses that they are there to show."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Generator, nn

from robbench import datasets, registry
from robbench.access import Access
from robbench.attacks import Configured, find
from robbench.attacks.published import TABLE, effective
from robbench.attacks.success import broken
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.randomness import preserved_random_state, seed_everything
from robbench.rules import MeanLogits
from robbench.threat import NORM_NAMES, Threat, distance

SHAPE = (1, 8, 8)
# fewer steps than the papers', so that every variant can be run here
QUICK = {"cw": "steps=5, search=2", "ead": "steps=5", "spsa": "steps=2, samples=8"}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").subset(32)


def craft(spec, network, x, y, threat):
    access = Access(Deployed(nn.ModuleList([network]), MeanLogits(), SHAPE, 10), knows=False)
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(0))


VARIANTS = [(name, paper) for name, papers in TABLE.items() for paper in papers]


@pytest.mark.parametrize(("name", "paper"), VARIANTS)
def test_every_variant_stays_within_its_threat(name, paper, network, digits):
    entry = find(f"{name}:as-published")
    norm = next(norm for norm in NORM_NAMES if norm in entry.norms)
    eps = None if entry.minimal or norm == "none" else "0.1"
    fewer = f", {QUICK[name]}" if name in QUICK else ""
    x, y = digits.x[:6], digits.y[:6]
    threat = Threat(norm=norm, eps=eps)
    found = craft(f"{name}:as-published(paper={paper}{fewer})", network, x, y, threat)
    assert found.shape == x.shape
    assert found.min() >= 0 and found.max() <= 1
    if eps:
        assert distance(found, x, norm).max() <= 0.1 + 1e-6


def test_every_variant_is_listed_with_its_plain_attack():
    for name in TABLE:
        entry = registry.attacks.get(f"{name}:as-published")
        plain = find(name)
        assert (entry.norms, entry.needs, entry.minimal) == (
            plain.norms, plain.needs, plain.minimal
        )  # fmt: skip


@pytest.mark.parametrize("paper", ["adp", "pdd"])
def test_ten_steps_of_a_tenth_are_the_library_s(paper, network, digits):
    guess = network(digits.x).argmax(dim=1)
    theirs = torchattacks.BIM(network, eps=0.1, alpha=0.01, steps=10)(digits.x, guess)
    spec = f"bim:as-published(paper={paper})"
    ours = craft(spec, network, digits.x, digits.y, Threat(eps="0.1"))
    assert (ours - theirs).abs().max() <= 1e-6


def test_attacking_the_guess_repairs_images_that_were_wrong(network):
    x, y = datasets.load("digits").train
    wrong = network(x).argmax(dim=1) != y
    assert wrong.sum() >= 10
    threat = Threat(eps="0.15")
    published = craft("pgd:as-published(paper=adp)", network, x[wrong], y[wrong], threat)
    ours = craft("pgd", network, x[wrong], y[wrong], threat)
    repaired = [(network(found).argmax(1) == y[wrong]).sum() for found in (published, ours)]
    assert repaired[0] > 0
    assert repaired[1] == 0


def test_settings_can_be_given_on_top(network, digits):
    x, y = digits.x[:4], digits.y[:4]
    threat = Threat(eps="0.1")
    plain = craft("bim(steps=10, step=0.02, loss=ce, keep=last)", network, x, y, threat)
    spec = "bim:as-published(paper=adp, step=0.02, label=truth)"
    assert torch.equal(craft(spec, network, x, y, threat), plain)


def test_the_paper_of_a_variant_must_be_one_of_its_papers():
    with pytest.raises(InputError, match="'adp'"):
        Configured.of("mim:as-published(paper=pdd)")
    with pytest.raises(InputError, match="unknown setting of attack mim:as-published"):
        Configured.of("mim:as-published(papr=adp)")


def test_a_step_may_be_written_as_a_fraction(network, digits):
    threat = Threat(eps="8/255")
    found = craft("bim(steps=2, step=2/255, keep=last)", network, digits.x, digits.y, threat)
    assert abs(float(distance(found, digits.x, "linf").max()) - 4 / 255) < 1e-6


@pytest.mark.parametrize(("name", "paper"), VARIANTS)
def test_the_settings_of_a_variant_are_those_of_its_attack_but_for_the_paper_s(name, paper):
    variant = Configured.of(f"{name}:as-published(paper={paper})")
    found = effective(variant.entry.name, variant.settings)
    plain, own = Configured.of(name).settings, TABLE[name][paper]
    assert {key: found[key] for key in own} == dict(own)
    assert {key: found[key] for key in set(plain) - set(own)} == {
        key: plain[key] for key in set(plain) - set(own)
    }
    assert set(found) == set(plain) | set(own)  # and no word of the paper's name


def test_what_is_given_on_top_outweighs_the_paper_in_the_settings_too():
    variant = Configured.of("pgd:as-published(paper=adp, steps=7, keep=best)")
    found = effective("pgd:as-published", variant.settings)
    assert (found["steps"], found["keep"], found["label"]) == (7, "best", "predicted")


@pytest.mark.parametrize(("paper", "per_step"), [("adp", 1), ("pdd", 2)])
def test_jsma_steps_as_often_as_features_may_change(paper, per_step, network, digits):
    """floor(γ D) features, one or two a step, whatever a step of 0.1 leaves to be gone."""
    x, y, threat = digits.x[:8], digits.y[:8], Threat(norm="l0", eps=64)
    own = effective(
        "jsma:as-published", Configured.of(f"jsma:as-published(paper={paper})").settings
    )
    steps = int(0.3 * 64) // per_step
    given = {key: own[key] for key in ("theta", "pairs", "targets") if key in own}
    settings = ", ".join(f"{key}={str(value).lower()}" for key, value in given.items())
    goal = Threat(norm="l0", eps=64, target="random") if own.get("target") else threat
    plain = craft(f"jsma({settings}, gamma=0.3, steps={steps})", network, x, y, goal)
    spec = f"jsma:as-published(paper={paper}, gamma=0.3)"
    assert torch.equal(craft(spec, network, x, y, threat), plain)


class Mostly(nn.Module):
    """Right about label 0 in three draws of four."""

    def forward(self, x):
        right = torch.rand(len(x), device=x.device) < 0.75
        logits = torch.stack([right.float(), (~right).float()], dim=1)
        return logits + 0 * x.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "norm"), [("fgsm-line-search", "linf"), ("deepfool", "l2"), ("local-search", "l0")]
)
def test_in_paper_002_one_draw_that_errs_ends_a_search(name, norm):
    """A quarter of the images errs before anything has changed, and is handed back as it came."""
    x, y = torch.rand(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64)
    seen = {}
    for spec in (name, f"{name}:as-published"):
        with preserved_random_state():
            seed_everything(0)
            access = Access(Deployed(nn.ModuleList([Mostly()]), MeanLogits(), (1, 4, 4), 2))
            Configured.of(spec)(access, x, y, Threat(norm=norm, eps=None), Generator())
        seen[spec] = access.cost.forwards
    assert seen[f"{name}:as-published"] < seen[name]
    access.lucky = True
    assert broken(access, x, y, None).float().mean() > 0.1
    access.lucky = False
    assert not broken(access, x, y, None).any()
