"""The adapter of torchattacks: the library's own results, and its known traps refused."""

from __future__ import annotations

import re

import pytest
import torch
import torchattacks
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.torchattacks import TABLE, names
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.randomness import seed_everything
from robbench.rules import MeanLogits
from robbench.threat import Threat

SEED = int(torch.randint(2**31 - 1, (1,), generator=torch.Generator().manual_seed(0)))
RUNNING = [name for name in names() if TABLE[name].refusal is None]


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(8)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def network(classifier):
    return classifier(nn.ReLU())


class Lowered(nn.Module):
    """The same decisions and probabilities, with every logit below zero."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) - 1000


def craft(spec, network, x, y, threat, labels=10):
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), tuple(x.shape[1:]), labels)
    rng = torch.Generator().manual_seed(0)
    return Configured.of(f"torchattacks:{spec}")(Access(deployed), x, y, threat, rng)


def test_every_class_that_the_library_exports_has_a_name():
    assert set(names()) == set(torchattacks.__all__)


@pytest.mark.parametrize("name", RUNNING)
def test_norms_are_those_that_the_class_documents(name):
    documented = re.search(r"Distance Measure : (.*)", getattr(torchattacks, name).__doc__)
    norms = re.findall(r"L\w+", documented[1]) if documented else ["none"]
    # FAB crashes under L1: it never sets the distance that it compares with ε
    assert set(TABLE[name].norms) == {norm.lower() for norm in norms} - {
        "l1" if name == "FAB" else ""
    }


@pytest.mark.parametrize("name", RUNNING)
def test_only_classes_with_a_targeted_mode_are_targeted(name, network):
    modes = getattr(torchattacks, name)(network).supported_mode
    broken = name in ("FAB", "SPSA")  # as their faults say
    assert TABLE[name].targeted == ("targeted" in modes and not broken)


LINF, L2 = Threat(eps="1/5"), Threat(norm="l2", eps="1")


@pytest.mark.parametrize(
    ("spec", "threat", "theirs"),
    [
        ("FGSM", LINF, lambda model: torchattacks.FGSM(model, 0.2)),
        ("PGD(steps=5)", LINF, lambda model: torchattacks.PGD(model, 0.2, 0.1, 5)),
        ("PGD(steps=5, alpha=1/50)", LINF, lambda model: torchattacks.PGD(model, 0.2, 0.02, 5)),
        ("PGDL2(steps=5)", L2, lambda model: torchattacks.PGDL2(model, 1, 0.5, 5)),
        ("EOTPGD(steps=5)", LINF, lambda model: torchattacks.EOTPGD(model, 0.2, 0.1, 5)),
        ("MIFGSM(steps=5)", LINF, lambda model: torchattacks.MIFGSM(model, 0.2, 0.1, 5)),
        ("DIFGSM(steps=5)", LINF, lambda model: torchattacks.DIFGSM(model, 0.2, 0.1, 5)),
        ("FFGSM", LINF, lambda model: torchattacks.FFGSM(model, 0.2, 0.25)),
        ("TPGD(steps=5)", LINF, lambda model: torchattacks.TPGD(model, 0.2, 0.1, 5)),
        ("CW(c=5)", Threat(norm="l2"), lambda model: torchattacks.CW(model, c=5)),
        ("DeepFool", Threat(norm="l2"), torchattacks.DeepFool),
        ("APGD", L2, lambda model: torchattacks.APGD(model, "L2", 1, seed=SEED)),
        ("FAB", LINF, lambda model: torchattacks.FAB(model, "Linf", 0.2, seed=SEED)),
        (
            "Square(n_queries=50)",
            LINF,
            lambda model: torchattacks.Square(model, "Linf", 0.2, 50, seed=SEED),
        ),
        (
            "AutoAttack",
            LINF,
            lambda model: torchattacks.AutoAttack(model, "Linf", 0.2, "standard", 10, SEED),
        ),
        ("OnePixel(steps=2)", Threat(norm="l0", eps=3), lambda m: torchattacks.OnePixel(m, 3, 2)),
    ],
)
def test_results_are_those_of_the_library_alone(spec, threat, theirs, network, digits):
    ours = craft(spec, network, *digits, threat)
    seed_everything(SEED)
    expected = theirs(network)(*digits).detach()
    assert torch.equal(ours, expected) and not torch.equal(ours, digits[0])


@pytest.mark.parametrize("spec", ["BIM(steps=5)", "Jitter(steps=5)", "UPGD(steps=5)"])
def test_targets_are_those_of_the_library_alone(spec, network, digits):
    x, y = digits
    threat = Threat(eps="1/5", target=3)
    ours = craft(spec, network, x, y, threat)
    target = torch.where(y == 3, 4, 3)
    seed_everything(SEED)
    attack = getattr(torchattacks, spec.partition("(")[0])(network, 0.2, 0.1, 5)
    attack.set_mode_targeted_by_function(lambda images, labels: target, quiet=True)
    assert torch.equal(ours, attack(x, y).detach())


def binary(x):
    return (x > 0.5).float()


@pytest.mark.parametrize(("name", "norm"), [("CW", "l2"), ("EADL1", "l1"), ("EADEN", "l2")])
def test_a_margin_that_dies_on_negative_logits_is_refused(name, norm, network, digits):
    with pytest.raises(InputError, match=rf"{name}: all logits of 8 images are negative.*art:"):
        craft(name, Lowered(network), *digits, Threat(norm=norm))


def test_cw_on_images_that_its_change_of_variables_cannot_move(network, digits):
    x, y = digits
    with pytest.raises(InputError, match=r"CW: every pixel of 8 images is 0 or 1"):
        craft("CW", network, binary(x), y, Threat(norm="l2"))
    # it is so: the library alone returns them as they are
    alone = torchattacks.CW(network, c=10, steps=20, lr=0.1)(binary(x), y)
    right = network(binary(x)).argmax(1) == y
    assert right.any() and torch.equal(alone[right], binary(x)[right])


@pytest.mark.parametrize(
    ("spec", "threat", "labels", "message"),
    [
        ("JSMA", Threat(norm="l0"), 7, r"aims at \(label \+ 1\) % 10, the defense has 7 labels"),
        ("SPSA", Threat(eps="0.1", target=1), 10, r"SPSA: has no targeted mode that works"),
        ("TIFGSM", Threat(eps="0.1"), 10, r"TIFGSM: works on images of 3 channels only, .* 1$"),
        ("PIFGSM", Threat(eps="0.1"), 10, r"PIFGSM: works on images of 3 channels only, .* 1$"),
        ("APGDT", Threat(eps="0.1"), 3, r"APGDT: needs at least 4 labels, the defense has 3"),
        ("AutoAttack", Threat(eps="0.1"), 3, r"standard needs at least 4 labels, .* has 3"),
        ("APGD(loss=dlr)", Threat(eps="0.1"), 2, r"dlr needs at least 3 labels, .* has 2"),
        ("UPGD(loss=dlr)", Threat(eps="0.1", target=1), 3, r"dlr needs at least 4 labels"),
        ("EADL1(max_iterations=5)", Threat(norm="l1"), 10, r"max_iterations below 10 divides by"),
    ],
)
def test_what_cannot_work_is_refused(spec, threat, labels, message, network, digits):
    x, y = digits
    fewer = nn.Sequential(network, nn.Linear(10, labels)) if labels != 10 else network
    with pytest.raises(InputError, match=message):
        craft(spec, fewer, x, y % labels, threat, labels)


def test_jsma_does_not_fill_the_memory(network):
    x = torch.rand(1, 3, 64, 64)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    with pytest.raises(InputError, match=r"holds matrices of 12288 x 12288; images up to 3x32x32"):
        craft("JSMA", wide, x, torch.zeros(1, dtype=torch.int64), Threat(norm="l0"))


def test_ead_is_brought_back_into_the_box(network, digits):
    x, y = digits
    alone = torchattacks.EADL1(network, max_iterations=20, initial_const=5)(x, y)
    ours = craft("EADL1(max_iterations=20, initial_const=5)", network, x, y, Threat(norm="l1"))
    assert alone.min() < -0.01 and torch.equal(ours, alone.detach().clamp(0, 1))
