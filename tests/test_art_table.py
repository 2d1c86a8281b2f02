"""What is written down of ART's classes: all of them, as they are, and the refusals."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from art.attacks import evasion
from art.attacks.attack import EvasionAttack
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, art, art_table, find
from robbench.attacks.art_table import TABLE
from robbench.attacks.library import Job
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat

L2 = Threat(norm="l2")


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(8)
    return subset.x, subset.y


def craft(spec, x, y, threat, labels=10):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, labels))
    access = Access(Deployed(nn.ModuleList([network]), MeanLogits(), (1, 8, 8), labels))
    return Configured.of(f"art:{spec}")(access, x, y, threat, torch.Generator())


def test_every_class_that_the_library_exports_has_a_name():
    exported = {
        name
        for name, cls in vars(evasion).items()
        if inspect.isclass(cls) and issubclass(cls, EvasionAttack)
    }
    # without numba the library hides one class
    assert set(art.names()) == exported | {"BrendelBethgeAttack"}


@pytest.mark.parametrize("name", [name for name in TABLE if find(f"art:{name}").refusal is None])
def test_traits_agree_with_the_attributes_of_the_class(name):
    cls, traits = getattr(evasion, name), TABLE[name]
    given = inspect.signature(cls).parameters
    several = len(traits.norms) > 1 and name != "ElasticNet"  # its norm is its decision rule
    assert several <= ("norm" in given)
    broken = ("AutoAttack", "CarliniLInfMethod", "SignOPTAttack")  # as their faults say
    forced = ("SaliencyMapMethod", "TargetedUniversalPerturbation")  # always targeted
    assert traits.targeted == (("targeted" in given and name not in broken) or name in forced)
    assert traits.aims == (name in (*forced, "ShadowAttack"))


@pytest.mark.parametrize(
    ("spec", "threat", "message"),
    [
        ("CarliniLInfMethod", Threat(target=1), r"has no targeted mode that works"),
        ("SpatialTransformation", Threat(norm="none"), r"its defaults turn and shift nothing"),
        ("SpatialTransformation(max_rotation=9)", Threat(norm="none"), r"is no search"),
        ("ZooAttack", L2, r"write use_resize=false"),
        ("ZooAttack(use_resize=false)", L2, r"nb_parallel=128 is more .*; write at most 64"),
        ("SimBA(freq_dim=9)", L2, r"not below freq_dim, these are 8x8"),
        ("SimBA(stride=3)", L2, r"must be a multiple of stride"),
        ("ThresholdAttack(es=1)", Threat(eps="1/300"), r"steps of 1/255, ε = .* is less"),
        ("AdversarialPatch", Threat(norm="none"), r"AdversarialPatch: makes one patch for many"),
        ("CarliniWagnerASR", Threat(norm="none"), r"ASR: needs a speech recogniser"),
    ],
)
def test_what_cannot_work_is_refused(spec, threat, message, digits):
    with pytest.raises(InputError, match=message):
        craft(spec, *digits, threat)


def test_a_ratio_of_three_logits_needs_three_labels(digits):
    x, y = digits
    spec = "AutoConjugateGradient(loss_type=difference_logits_ratio)"
    with pytest.raises(InputError, match=r"needs at least 3 labels, the defense has 2"):
        craft(spec, x, y % 2, Threat(eps="0.1"), labels=2)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("BrendelBethgeAttack", "numba"),
        ("CompositeAdversarialAttackPyTorch", "kornia"),
        ("AutoAttack", "multiprocess"),
    ],
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setattr(art_table, "_installed", lambda package: False)
    assert find(f"art:{name}").refusal == f"needs the package {package}; pip install {package}"
    monkeypatch.setattr(art_table, "_installed", lambda package: True)
    assert find(f"art:{name}").refusal is None


@pytest.mark.parametrize("spec", ["PixelAttack(es=0)", "ThresholdAttack"])
def test_the_evolution_strategy_needs_its_package(spec, digits, monkeypatch):
    monkeypatch.setattr(art_table, "_installed", lambda package: False)
    threat = Threat(norm=TABLE[spec.partition("(")[0]].norms[0], eps="1")
    with pytest.raises(InputError, match=r"es=0 needs the package cma; .* or write es=1"):
        craft(spec, *digits, threat)


def test_geoda_needs_an_old_numpy(monkeypatch):
    monkeypatch.delattr(np, "mat", raising=False)
    assert f"which NumPy {np.__version__} no longer has" in art_table.available("GeoDA").refusal
    monkeypatch.setattr(np, "mat", np.asmatrix, raising=False)
    assert art_table.available("GeoDA").refusal is None


def test_composite_attacks_know_one_size(digits):
    x, y = digits
    job = Job(None, x, y, None, Threat(norm="none"), {}, 0)
    assert art_table._composite(job) == "works on images of 32x32 only, these are 8x8"
    assert art_table._composite(job._replace(x=torch.zeros(1, 3, 32, 32))) is None
