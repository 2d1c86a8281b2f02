"""Every class of torchattacks and ART through its adapter: traits, settings, promises, refusals."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks import evasion
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, choose_targets, find
from robbench.attacks.art_table import TABLE as ART
from robbench.attacks.library import FILLED, Job, arguments
from robbench.attacks.torchattacks import TABLE as TORCHATTACKS
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance, within

TRAITS = {f"torchattacks:{name}": traits for name, traits in TORCHATTACKS.items()}
TRAITS |= {f"art:{name}": traits for name, traits in ART.items()}
RUNNING = [name for name in TRAITS if find(name).refusal is None]
REFUSED = [name for name in TRAITS if find(name).refusal is not None]
EPS = {"linf": "0.3", "l2": "2", "l1": "10", "l0": "20"}

SETTINGS = {  # where the defaults take seconds, or cannot work on images of 8 x 8
    "torchattacks:CW": "steps=60, c=10, lr=0.05",
    "torchattacks:OnePixel": "steps=4",
    "torchattacks:SPSA": "nb_iter=10, lr=0.05",
    "torchattacks:Square": "n_queries=200",
    "art:BoundaryAttack": "max_iter=5",
    "art:BrendelBethgeAttack": "steps=5",
    "art:CarliniL0Method": "binary_search_steps=3, max_iter=5, initial_const=10",
    "art:CarliniL2Method": "binary_search_steps=3, initial_const=1",
    "art:CarliniLInfMethod": "max_iter=40, learning_rate=0.1, initial_const=1, const_factor=10",
    "art:ElasticNet": "max_iter=20, binary_search_steps=3, initial_const=1",
    "art:HopSkipJump": "max_iter=3, max_eval=100",
    "art:PixelAttack": "max_iter=5",
    "art:ShadowAttack": "nb_steps=100, lambda_tv=0.1",
    "art:SignOPTAttack": "max_iter=1, k=5, num_trial=10",
    "art:SimBA": "max_iter=150",
    "art:SpatialTransformation": "max_rotation=40, num_rotations=5",
    "art:ThresholdAttack": "es=1, max_iter=5",
    "art:UniversalPerturbation": "max_iter=2, attacker=fgsm",
    "art:VirtualAdversarialMethod": "finite_diff=0.1, max_iter=3",
    "art:Wasserstein": "max_iter=4, ball=inf, conjugate_sinkhorn_max_iter=10",
    "art:ZooAttack": "use_resize=false, nb_parallel=64, max_iter=100, initial_const=10",
}
# no attacks, and one that may go the wrong way, as their faults say
HARMLESS = {"torchattacks:VANILA", "torchattacks:GN", "art:VirtualAdversarialMethod"}


class Head(nn.Module):
    """A classifier with buffers and a part that stays in train mode, as in MC dropout."""

    def __init__(self, channels, size):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AvgPool2d(size // 8),
        )
        self.idle = nn.Dropout(0)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, x):
        return self.head(self.idle(self.body(x).flatten(1)))


def trained(data, channels, size):
    torch.manual_seed(0)
    network = Head(channels, size)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(2):
        for part in torch.randperm(len(data.x)).split(64):
            optimizer.zero_grad()
            x = colour(data.x[part], size) if channels == 3 else data.x[part]
            F.cross_entropy(network(x), data.y[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    network.eval().idle.train()
    return network


def colour(x, size):
    tint = torch.tensor([0.9, 0.6, 0.8]).view(3, 1, 1)
    return 0.05 + tint * F.interpolate(x, size=size)


@pytest.fixture(scope="module")
def grey():
    """(defense, x, y): rightly classified digits."""
    data = datasets.load("digits")
    network, some = trained(data.train, 1, 8), data.subset(12)
    return prepared(network, some.x, some.y)


@pytest.fixture(scope="module")
def coloured():
    """The same with three channels of 32 x 32."""
    data = datasets.load("digits")
    network, some = trained(data.train, 3, 32), data.subset(12)
    return prepared(network, colour(some.x, 32), some.y)


def prepared(network, x, y):
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), tuple(x.shape[1:]), 10)
    right = (deployed.decide(x, 1)[0] == y).nonzero()[:4, 0]
    return deployed, x[right], y[right]


def spec_of(name):
    return f"{name}({SETTINGS[name]})" if name in SETTINGS else name


def threat_of(name, norm, target="none"):
    free = TRAITS[name].minimal or norm == "none"
    return Threat(norm=norm, eps=None if free else EPS[norm], target=target)


def craft(spec, defense, threat, seed=0):
    deployed, x, y = defense
    rng = torch.Generator().manual_seed(seed)
    return Configured.of(spec)(Access(deployed), x, y, threat, rng)


def surroundings(deployed):
    """What an attack must leave as it was: random streams, working directory, the defense."""
    modes = tuple(module.training for module in deployed.modules())
    tensors = [*deployed.parameters(), *deployed.buffers(), torch.get_rng_state()]
    gradients = any(parameter.grad is not None for parameter in deployed.parameters())
    streams = (random.getstate(), str(np.random.get_state()))
    return modes, gradients, streams, Path.cwd(), tuple(t.numpy().tobytes() for t in tensors)


def broken_promises(name, defense, threat):
    """Run once and list what an adapted attack did although it must not."""
    deployed, x, y = defense
    before, said, given = surroundings(deployed), io.StringIO(), x.clone()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        result = craft(spec_of(name), defense, threat)
    proper = result.dtype == torch.float32 and result.is_contiguous() and not result.requires_grad
    inside = within(distance(result, x, threat.norm), threat)
    broken = {
        "prints": said.getvalue() != "",
        "leaves traces": surroundings(deployed) != before,
        "changes its input": not torch.equal(x, given),
        "has another shape": result.shape != x.shape,
        "is no plain float32": not proper,
        "is not finite": not result.isfinite().all(),
        "leaves the box": bool((result < 0).any() or (result > 1).any()),
        "leaves the ball": not inside.all(),
        "has no effect": not threat.targeted and name not in HARMLESS and idle(defense, result),
        "misses its targets": threat.targeted and away(defense, result, threat),
    }
    return [promise for promise, is_broken in broken.items() if is_broken]


def idle(defense, result):
    """No image has a less likely true label than before."""
    deployed, x, y = defense
    return bool((truth(deployed, result, y) >= truth(deployed, x, y)).all())


def away(defense, result, threat):
    deployed, x, y = defense
    rng = torch.Generator().manual_seed(0)
    torch.randint(2**31 - 1, (1,), generator=rng)  # the seed that a run draws first
    target = choose_targets(Access(deployed), x, y, threat, rng)
    return bool(truth(deployed, result, target).mean() <= truth(deployed, x, target).mean())


@torch.no_grad()
def truth(deployed, x, y):
    return deployed.rule.scores(deployed.sample(x, 1)).softmax(1).gather(1, y[:, None])[:, 0]


CASES = [
    pytest.param(name, norm, target, id=f"{name}-{norm}-{target}")
    for name in RUNNING
    for norm in TRAITS[name].norms
    for target in ("none", "random")
    if target == "none" or TRAITS[name].targeted
]


@pytest.mark.parametrize(("name", "norm", "target"), CASES)
def test_an_adapted_attack_keeps_its_promises(name, norm, target, grey, request):
    only_colour = TRAITS[name].channels == (3,)
    defense = request.getfixturevalue("coloured") if only_colour else grey
    assert broken_promises(name, defense, threat_of(name, norm, target)) == []


@pytest.mark.parametrize(
    ("spec", "norm"),
    [
        ("torchattacks:PGD", "linf"),
        ("torchattacks:Square(n_queries=50)", "linf"),
        ("art:HopSkipJump(max_iter=1)", "l2"),
        ("art:BoundaryAttack(max_iter=1)", "l2"),
        ("art:SimBA(max_iter=40, attack=px)", "l2"),
    ],
)
def test_the_seed_of_the_run_decides(spec, norm, grey):
    threat = threat_of(spec.partition("(")[0], norm)
    first, again, other = (craft(spec, grey, threat, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def constructor(name):
    library, _, inner = name.partition(":")
    if library == "torchattacks":
        return inspect.signature(getattr(torchattacks, inner)).parameters
    return inspect.signature(getattr(evasion, inner)).parameters


@pytest.mark.parametrize("name", RUNNING)
def test_the_traits_name_arguments_of_the_constructor(name):
    traits, given = TRAITS[name], constructor(name)
    named = {traits.eps, traits.step, traits.steps, *traits.keeps, *traits.drops, *traits.decimals}
    named |= {*traits.choices, *traits.overrides} - {""}
    unbounded = traits.minimal or traits.norms == ("none",)
    assert named - set(given) <= ({"eps", ""} if unbounded else {""})


@pytest.mark.parametrize("name", RUNNING)
def test_a_setting_is_an_argument_with_the_default_of_the_library(name):
    traits, given = TRAITS[name], constructor(name)
    fields = find(name).settings.model_fields
    changed = {traits.step, *traits.overrides}
    for key, field in fields.items():
        assert key in changed or field.default == given[key].default, key
    # what no setting offers is filled in, the step's place, or nothing that a spec could write
    hidden = [parameter for key, parameter in given.items() if key not in {*fields, *FILLED}]
    for parameter in hidden:
        known = parameter.name in {traits.eps, *traits.drops}
        assert known or parameter.default in (None, inspect.Parameter.empty), parameter


PACE = {"torchattacks:FFGSM": 1.25} | dict.fromkeys(  # these adapt it, or take no other
    [
        "art:AutoAttack",
        "art:AutoConjugateGradient",
        "art:AutoProjectedGradientDescent",
        "art:RescalingAutoConjugateGradient",
    ],
    2.0,
)


@pytest.mark.parametrize("name", [name for name in RUNNING if TRAITS[name].step])
def test_a_step_that_is_not_given_is_two_and_a_half_radii_over_the_steps(name, grey):
    deployed, x, y = grey
    traits = TRAITS[name]
    settings = {traits.step: None} | ({traits.steps: 8} if traits.steps else {})
    job = Job(Access(deployed), x, y, None, Threat(eps="1/5"), settings, 0)
    values = arguments(job, traits, None)
    assert values[traits.step] == pytest.approx(0.2 * PACE.get(name, 2.5 / 8))


def test_a_step_that_is_given_is_a_fraction_or_a_decimal(grey):
    threat = Threat(eps="8/255")
    specs = ("torchattacks:BIM(alpha=2/255)", f"torchattacks:BIM(alpha={2 / 255!r})")
    assert torch.equal(*(craft(spec, grey, threat) for spec in specs))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_attack_gives_its_reason_before_it_runs(name, grey):
    reason = find(name).refusal
    assert len(reason.split()) >= 4
    with pytest.raises(InputError) as caught:
        craft(name, grey, Threat(norm="none"))
    assert str(caught.value) == f"attack {name}: {reason}"


@pytest.mark.parametrize(
    ("spec", "threat", "message"),
    [
        ("torchattacks:PGD", Threat(norm="l2", eps="1"), r"PGD: has no norm l2; it has linf$"),
        ("art:DeepFool", Threat(norm="linf", eps="0.1"), r"DeepFool: has no norm linf"),
        ("torchattacks:FGSM", Threat(norm="linf"), r"FGSM: needs an ε under linf$"),
        ("art:DeepFool", Threat(norm="l2", target=1), r"DeepFool: has no targeted mode that works"),
        ("torchattacks:PGD(stepz=3)", Threat(eps="0.1"), r"'stepz'; did you mean 'steps'"),
        ("torchattacks:PGD(steps=0)", Threat(eps="0.1"), r"steps = 0: .*greater than or equal"),
        ("art:ElasticNet(decision_rule=L3)", Threat(norm="l1"), r"decision_rule = 'L3'"),
        ("torchattacks:PDG", Threat(eps="0.1"), r"attack 'PDG'; did you mean '.*PGD"),
        ("art:Deepfool", Threat(norm="l2"), r"art attack 'Deepfool'; did you mean 'DeepFool'"),
    ],
)
def test_what_a_class_cannot_do_is_refused(spec, threat, message, grey):
    with pytest.raises(InputError, match=message):
        craft(spec, grey, threat)


class Stairs(nn.Module):
    """Masks the gradient: zero everywhere."""

    def forward(self, x):
        return x.round() + 0 * x


@pytest.mark.parametrize("name", ["torchattacks:FGSM", "art:ProjectedGradientDescent"])
def test_an_attack_that_moves_nothing_has_not_run(name, grey):
    deployed, x, y = grey
    masked = nn.ModuleList([nn.Sequential(Stairs(), deployed.members[0])])
    stairs = Deployed(masked, MeanLogits(), (1, 8, 8), 10)
    with pytest.raises(RuntimeError, match=rf"^attack {name} changed nothing on all 4 rightly"):
        craft(name, (stairs, x, stairs.decide(x, 1)[0]), Threat(eps="0.1"))


@pytest.mark.parametrize("name", ["torchattacks:PGD", "art:ProjectedGradientDescent"])
def test_a_crash_leaves_no_traces_either(name, grey, monkeypatch):
    deployed = grey[0]
    before = surroundings(deployed)
    monkeypatch.setattr(Access, "forward", broken_forward)
    with pytest.raises(RuntimeError, match=r"^simulated$"):
        craft(name, grey, Threat(eps="0.1"))
    assert surroundings(deployed) == before


def broken_forward(access, x):
    """Crashes after it has done all the harm it can."""
    torch.rand(1), np.random.rand(), random.random()
    for module in access.deployed.members.modules():
        module.training = not module.training
    raise RuntimeError("simulated")


def test_a_class_without_its_library_is_named_with_it():
    with pytest.raises(InputError, match="did you mean torchattacks:APGD?"):
        find("APGD")
    with pytest.raises(InputError, match="did you mean art:ElasticNet?"):
        find("elasticnet")
