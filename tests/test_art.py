"""The adapter of ART: the library's own results, the labels it gets, and its known traps."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, art, art_table
from robbench.attacks.art_table import TABLE
from robbench.deployed import Deployed
from robbench.estimator import Estimator
from robbench.randomness import seed_everything
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance

SEED = int(torch.randint(2**31 - 1, (1,), generator=torch.Generator().manual_seed(0)))
LINF, L1, L2, L0 = Threat(eps="1/5"), Threat(norm="l1"), Threat(norm="l2"), Threat(norm="l0")


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(8)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def network(classifier):
    """A classifier of digits that errs on a few images."""
    return classifier(nn.ReLU())


def deploy(network, shape=(1, 8, 8), labels=10):
    return Deployed(nn.ModuleList([network]), MeanLogits(), shape, labels)


def craft(spec, network, x, y, threat):
    access = Access(deploy(network, tuple(x.shape[1:])))
    return Configured.of(f"art:{spec}")(access, x, y, threat, torch.Generator().manual_seed(0))


def alone(name, network, x, labels, **settings):
    """The library on a classifier of its own, from the seed that the adapter draws."""
    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1)
    )
    seed_everything(SEED)
    if "verbose" in getattr(evasion, name).attack_params:
        settings["verbose"] = False
    attack = getattr(evasion, name)(classifier, **settings)
    return torch.from_numpy(attack.generate(x.numpy(), np.eye(10, dtype=np.float32)[labels]))


@pytest.mark.parametrize(
    ("spec", "threat", "settings"),
    [
        ("FastGradientMethod", LINF, {"eps": 0.2}),
        ("BasicIterativeMethod(max_iter=5)", LINF, {"eps": 0.2, "eps_step": 0.1, "max_iter": 5}),
        (
            "ProjectedGradientDescent(max_iter=5, num_random_init=2)",
            LINF,
            {"eps": 0.2, "eps_step": 0.1, "max_iter": 5, "num_random_init": 2},
        ),
        (
            "ProjectedGradientDescent(max_iter=5, eps_step=1/8)",
            Threat(norm="l2", eps="1"),
            {"norm": 2, "eps": 1.0, "eps_step": 0.125, "max_iter": 5},
        ),
        (
            "MomentumIterativeMethod(max_iter=5)",
            LINF,
            {"eps": 0.2, "eps_step": 0.1, "max_iter": 5},
        ),
        (
            "AutoProjectedGradientDescent(max_iter=8)",
            LINF,
            {"eps": 0.2, "eps_step": 0.4, "max_iter": 8},
        ),
        ("SquareAttack(max_iter=30)", LINF, {"eps": 0.2, "max_iter": 30}),
        ("DeepFool", L2, {"batch_size": 8}),
        (
            "CarliniL2Method(binary_search_steps=2, initial_const=1)",
            L2,
            {"binary_search_steps": 2, "initial_const": 1.0, "batch_size": 8},
        ),
        (
            "ElasticNet(binary_search_steps=2, initial_const=1)",
            L1,
            {"binary_search_steps": 2, "initial_const": 1.0, "batch_size": 8},
        ),
    ],
)
def test_results_are_those_of_the_library_alone(spec, threat, settings, network, digits):
    x, y = digits
    ours = craft(spec, network, x, y, threat)
    expected = alone(spec.partition("(")[0], network, x, y, **settings)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert not torch.equal(ours, x)


def recorded(monkeypatch, name):
    """The labels and the attacks that reach `generate` of this class, which does nothing."""
    calls = []

    def generate(attack, x, y=None, **kwargs):
        calls.append((y, attack))
        return x

    monkeypatch.setattr(getattr(evasion, name), "generate", generate)
    return calls


def test_untargeted_labels_are_the_true_ones_and_never_a_guess(network, digits, monkeypatch):
    x, y = digits
    wrong = (y + 1) % 10  # not what the classifier says
    calls = recorded(monkeypatch, "DeepFool")
    craft("DeepFool", network, x, wrong, L2)
    [(labels, _)] = calls
    np.testing.assert_array_equal(labels, np.eye(10)[wrong])


@pytest.mark.parametrize("name", ["CarliniL2Method", "BoundaryAttack", "HopSkipJump", "ElasticNet"])
@pytest.mark.parametrize("target", ["none", 3])
def test_a_target_is_the_label_of_a_targeted_attack_only(
    name, target, network, digits, monkeypatch
):
    x, y = digits
    calls = recorded(monkeypatch, name)
    craft(name, network, x, y, Threat(norm="l2", target=target))
    [(labels, attack)] = calls
    expected = y if target == "none" else torch.where(y == 3, 4, 3)
    np.testing.assert_array_equal(labels.argmax(1), expected)
    assert attack.targeted == (target != "none")


@pytest.mark.parametrize("target", ["none", 3])
@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name].aims])
def test_what_takes_any_label_for_its_target_gets_targets(
    name, target, network, digits, monkeypatch
):
    x, y = digits
    calls = recorded(monkeypatch, name)
    norm = TABLE[name].norms[0]
    eps = "1/5" if norm == "linf" else None
    with pytest.raises(RuntimeError) if TABLE[name].moves else nullcontext():
        craft(name, network, x, y, Threat(norm=norm, eps=eps, target=target))
    labels = np.concatenate([labels.argmax(1) for labels, _ in calls])
    assert (labels != y.numpy()).all()
    assert target == "none" or (labels == torch.where(y == 3, 4, 3).numpy()).all()


def test_saliency_map_with_true_labels_would_do_nothing(network, digits):
    x, y = digits
    right = network(x).argmax(1) == y
    assert right.any() and torch.equal(alone("SaliencyMapMethod", network, x, y)[right], x[right])
    changed = (craft("SaliencyMapMethod", network, x, y, L0) != x).flatten(1).any(1)
    assert changed[right].all()


@pytest.mark.parametrize(
    "spec",
    [
        "NewtonFool",
        "SimBA",
        "VirtualAdversarialMethod",
        "UniversalPerturbation(attacker=newtonfool)",
    ],
)
def test_what_wants_probabilities_gets_them(spec, network, digits, monkeypatch):
    x, y = digits
    calls = recorded(monkeypatch, spec.partition("(")[0])
    norm = Threat(norm="l2", eps="1") if spec[0] in "UV" else L2
    with pytest.raises(RuntimeError) if spec[0] == "V" else nullcontext():
        craft(spec, network, x, y, norm)
    estimator = calls[0][1].estimator
    expected = network(x).softmax(1).detach().numpy()
    np.testing.assert_allclose(estimator.predict(x.numpy()), expected, atol=1e-6)
    leaf = x.clone().requires_grad_()
    network(leaf).softmax(1)[:, 3].sum().backward()
    found = estimator.class_gradient(x.numpy(), label=3)[:, 0]
    np.testing.assert_allclose(found, leaf.grad, atol=1e-6)


@pytest.mark.parametrize("attacker", ["fgsm", "bim", "pgd", "deepfool"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_inside_a_universal_one_has_the_same_ball(
    attacker, norm, network, digits, monkeypatch
):
    x, y = digits
    calls = recorded(monkeypatch, "UniversalPerturbation")
    spec = f"UniversalPerturbation(attacker={attacker})"
    craft(spec, network, x, y, Threat(norm=norm, eps="1/4"))
    [(_, universal)] = calls
    inner = universal._get_attack(attacker, universal.attacker_params)
    if attacker != "deepfool":
        assert inner.eps == 0.25 and inner.norm == {"linf": np.inf, "l2": 2}[norm]
    assert attacker == "fgsm" or inner.verbose is False


def test_a_universal_perturbation_is_one_for_all_images(network, digits):
    x, y = digits
    inner = 0.4 + 0.2 * x  # no pixel is clipped
    delta = craft("UniversalPerturbation(attacker=fgsm)", network, inner, y, LINF) - inner
    torch.testing.assert_close(delta, delta[:1].expand_as(delta), atol=1e-6, rtol=0)
    assert delta.abs().max() > 0.01


def test_a_common_target_is_reached_by_a_universal_perturbation(network, digits):
    x, y = digits
    threat = Threat(eps="0.4", target=3)
    answer = craft("TargetedUniversalPerturbation(max_iter=10)", network, x, y, threat)
    before, after = (network(points).softmax(1)[:, 3].mean() for points in (x, answer))
    assert after > before + 0.2


@pytest.mark.parametrize(
    ("spec", "norm", "eps"),
    [
        ("CarliniL0Method(binary_search_steps=3, initial_const=10)", "l0", None),
        ("PixelAttack(max_iter=3)", "l0", 5),
    ],
)
def test_a_pixel_that_is_not_chosen_is_not_touched(spec, norm, eps, network, digits):
    x, y = digits
    answer = craft(spec, network, x, y, Threat(norm=norm, eps=eps))
    moved = distance(answer, x, "l0")
    assert 0 < moved.max() <= (eps or 60)


def test_whole_pixel_values_do_not_leave_the_ball(network, digits):
    x, y = digits
    eps = 20.5 / 255
    answer = craft("ThresholdAttack(es=1, max_iter=3)", network, x, y, Threat(eps=eps))
    moved = (answer - x).abs()
    assert 0.06 < moved.max() <= eps + 1e-6


def test_all_parts_of_auto_attack_are_silent(network, digits, monkeypatch):
    calls = recorded(monkeypatch, "AutoAttack")
    monkeypatch.setattr(art_table, "_installed", lambda package: True)
    craft("AutoAttack", network, *digits, LINF)
    [(_, attack)] = calls
    assert len(attack.attacks) == 4 and not any(part.verbose for part in attack.attacks)


class Unlucky:
    """Asserts, as BrendelBethge does where no random image has the wanted label."""

    def generate(self, x, y):
        raise AssertionError


def test_an_image_without_a_start_stays_as_it_is(digits):
    x, y = (part.numpy() for part in digits)
    assert art._generate("BrendelBethgeAttack", Unlucky(), x, y) is x
    with pytest.raises(AssertionError):
        art._generate("DeepFool", Unlucky(), x, y)


def test_a_defense_on_another_device_stays_there(network):
    deployed = deploy(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).to("meta")
    Estimator(Access(deployed))  # ART knows cpu and cuda, and moves the model that it is given
    assert deployed.device.type == "meta"
