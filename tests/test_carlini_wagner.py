"""cw, cw-linf and ead against foolbox, ART, torch.optim, scipy and closed forms."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from art.attacks.evasion import CarliniL2Method, ElasticNet
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, carlini_wagner, choose_targets
from robbench.attacks.carlini_wagner import Adam, slope, to_w, to_x
from robbench.attacks.carlini_wagner_linf import subgradient
from robbench.attacks.elastic_net import shrink
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.estimator import Estimator
from robbench.rules import MeanLogits, MeanProbabilities, Vote
from robbench.threat import Threat, distance, within

with warnings.catch_warnings():  # it imports a name that scipy has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import foolbox

SHAPE = (1, 8, 8)
L1, L2, TENTH = Threat(norm="l1"), Threat(norm="l2"), Threat(eps="0.1")
MINIMAL = pytest.mark.parametrize(("name", "threat"), [("cw", L2), ("ead", L1)], ids=["cw", "ead"])
FORMS = pytest.mark.parametrize("form", ["clipped", "tanh", "released"])


@pytest.fixture(scope="module")
def digits(network):
    """Images that the network has right, and their labels."""
    subset = datasets.load("digits").subset(24)
    right = network(subset.x).argmax(dim=1) == subset.y
    return subset.x[right], subset.y[right]


def access_to(*members, rule=None, labels=10, **options):
    return Access(Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, labels), **options)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def interior(x):
    """The same images with room to both ends of the box."""
    return 0.35 + 0.3 * x


@MINIMAL
def test_the_points_are_those_of_foolbox_where_the_variable_is_the_same(
    name, threat, network, digits, monkeypatch
):
    x = interior(digits[0])
    y = network(x).argmax(dim=1)
    monkeypatch.setattr(carlini_wagner, "STRETCH", 0.999999)  # theirs, without room for 0 and 1
    monkeypatch.setattr(carlini_wagner, "EDGE", math.atanh(0.999999))
    their = {"cw": foolbox.attacks.L2CarliniWagnerAttack, "ead": foolbox.attacks.EADAttack}[name]
    options = {"binary_search_steps": 3, "steps": 25, "initial_const": 1.0, "abort_early": False}
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    theirs = their(**options).run(model, x, y)
    rule = "" if name == "cw" else ", rule=EN"
    spec = f"{name}(search=3, steps=25, c=1, abort=false{rule})"
    ours = craft(spec, access_to(network), x, y, threat)
    won = network(theirs).argmax(dim=1) != y
    assert won.sum() > 12 and torch.equal(ours[~won], x[~won])
    torch.testing.assert_close(ours[won], theirs[won], rtol=0, atol=2e-4)


def test_cw_is_nearer_than_foolbox_for_the_same_steps(network, digits):
    x, y = digits
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2CarliniWagnerAttack(2, 100, initial_const=1.0)
    theirs = distance(attack.run(model, x, y), x, "l2")
    ours = craft("cw(search=2, steps=100, c=1)", access_to(network), x, y, L2)
    assert (network(ours).argmax(dim=1) != y).all()
    assert distance(ours, x, "l2").median() <= theirs.median()


# ART searches the step of each iteration on a line, so its iterations are not counted as ours are;
# its EAD has no hinge, which is further from the text and a few percent nearer to x.
@pytest.mark.parametrize(
    ("spec", "norm", "attack", "slack"),
    [
        ("cw(search=3, steps=120, c=0.3)", "l2", partial(CarliniL2Method, max_iter=5), 1),
        (
            "ead(search=3, steps=40, c=0.3)",
            "l1",
            partial(ElasticNet, max_iter=40, beta=0.01, decision_rule="L1"),
            1.15,
        ),
    ],
    ids=["cw", "ead"],
)
def test_what_art_breaks_is_broken_as_near(spec, norm, attack, slack, network, digits):
    x, y = digits
    options = {"binary_search_steps": 3, "initial_const": 0.3, "batch_size": 24, "verbose": False}
    theirs = attack(Estimator(access_to(network)), **options).generate(x.numpy(), y.numpy())
    theirs = torch.from_numpy(theirs)
    ours = craft(spec, access_to(network), x, y, Threat(norm=norm))
    won = network(theirs).argmax(dim=1) != y
    assert won.sum() > 12 and (network(ours).argmax(dim=1) != y)[won].all()
    near, far = distance(ours, x, norm)[won], distance(theirs, x, norm)[won]
    assert near.median() <= slack * far.median()


def linear(digits):
    """Two labels; the images, all of label 0, with the plane w·x + b = 0 where 1 begins."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    w = (network[1].weight[1] - network[1].weight[0]).double()
    gap = -(digits[0].flatten(1).double() @ w).amax() - 0.05
    network[1].bias.copy_(torch.tensor([0.0, gap]))
    y = torch.zeros_like(digits[1])
    margin = -(digits[0].flatten(1).double() @ w + network[1].bias[1])
    return network, w.numpy(), y, margin.numpy()


def nearest_l2(x, w, margin):
    """The nearest point of the plane in the box: each pixel goes λ w, or to its end."""

    def moved(multiplier):
        return np.clip(multiplier * w, -x, 1 - x)

    multiplier = brentq(lambda value: w @ moved(value) - margin, 0, 1e4)
    return np.linalg.norm(moved(multiplier))


def nearest_l1(x, w, margin):
    """The same in l1 as a linear programme in the parts up and down."""
    bounds = [(0, 1 - value) for value in x] + [(0, value) for value in x]
    answer = linprog(np.ones(2 * len(x)), A_ub=[np.r_[-w, w]], b_ub=[-margin], bounds=bounds)
    return answer.fun


@pytest.mark.parametrize(
    ("spec", "norm", "nearest", "slack"),
    [
        ("cw(c=0.3, search=3, steps=120)", "l2", nearest_l2, 1.01),
        ("ead(c=1, search=4, steps=80, beta=0.02)", "l1", nearest_l1, 1.05),
    ],
    ids=["cw", "ead"],
)
def test_a_linear_classifier_is_left_at_the_nearest_point(spec, norm, nearest, slack, digits):
    x = digits[0]  # most pixels are at an end of the box
    network, w, y, margin = linear(digits)
    ours = craft(spec, access_to(network, labels=2), x, y, Threat(norm=norm))
    assert (network(ours).argmax(dim=1) == 1).all()
    found = distance(ours, x, norm).numpy()
    images = x.flatten(1).double().numpy()
    least = np.array([nearest(image, w, gap) for image, gap in zip(images, margin, strict=True)])
    assert (found >= least * (1 - 1e-4)).all()
    assert np.median(found / least) <= slack


def test_a_larger_beta_gives_a_smaller_l1_distance(digits):
    network, _, y, _ = linear(digits)
    medians = [
        distance(
            craft(f"ead(search=2, steps=40, c=1, beta={beta})", access, digits[0], y, L1),
            digits[0],
            "l1",
        ).median()
        for beta in (0, 0.003, 0.01)
        for access in [access_to(network, labels=2)]
    ]
    assert medians == sorted(medians, reverse=True)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.floats(0, 1), st.floats(-1, 2), st.floats(0, 0.5))
def test_shrinkage_is_the_proximal_point_in_the_box(x, point, beta):
    x, point = torch.tensor([x]), torch.tensor([point])
    grid = torch.linspace(0, 1, 1001)

    def cost(z):
        return (z - point) ** 2 / 2 + beta * (z - x).abs()

    shrunk = shrink(point, x, beta)
    assert 0 <= shrunk <= 1
    assert cost(shrunk) <= cost(grid).min() + 1e-6


class Shifted(nn.Module):
    """The same classifier with other logits: a constant added, or as log-probabilities."""

    def __init__(self, inner, by):
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x):
        logits = self.inner(x)
        return logits.log_softmax(dim=1) if self.by is None else logits + self.by


@MINIMAL
@pytest.mark.parametrize("by", [-40, 40, None], ids=["-40", "+40", "log softmax"])
def test_a_constant_in_the_logits_changes_nothing(name, threat, by, network, digits):
    x, y = digits
    spec = f"{name}(search=2, steps=30, c=1)"
    plain = craft(spec, access_to(network), x, y, threat)
    shifted = craft(spec, access_to(Shifted(network, by)), x, y, threat)
    assert not torch.equal(plain, x)
    lengths = [distance(points, x, threat.norm) for points in (plain, shifted)]
    torch.testing.assert_close(*lengths, rtol=2e-2, atol=1e-3)


@MINIMAL
def test_pixels_that_are_exactly_0_or_1_move(name, threat, network, digits):
    x, y = digits[0].round(), digits[1]
    ours = craft(f"{name}(search=3, steps=60, c=0.3, lr=0.03)", access_to(network), x, y, threat)
    assert (network(ours).argmax(dim=1) != y).all()
    assert ours.min() >= 0 and ours.max() <= 1


def test_the_variable_gives_the_pixels_back_and_a_slope_at_both_ends():
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    w = to_w(x).requires_grad_()
    torch.testing.assert_close(to_x(w), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope(w), torch.autograd.grad((w.tanh() / 1.8).sum(), w)[0])
    assert slope(w).min() > 0.1


def test_adam_is_that_of_torch_also_for_the_images_that_stay():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 1, 2, 2), torch.randn(9, 4, 1, 2, 2)
    theirs, ours = start.clone().requires_grad_(), start.clone()
    optimizer, adam = torch.optim.Adam([theirs], lr=0.05), Adam(start, 0.05)
    for step, gradient in enumerate(gradients):
        images = torch.arange(4) if step < 5 else torch.tensor([0, 3])
        theirs.grad = gradient.clone()
        optimizer.step()
        ours[images] -= adam.move(gradient[images], images)
    torch.testing.assert_close(ours[[0, 3]], theirs.detach()[[0, 3]])


@MINIMAL
def test_confidence_is_the_margin_that_is_reached_and_no_more(name, threat, network, digits):
    x, y = digits
    spec = f"{name}(search=3, steps=60, c=1, lr=0.03, confidence=3)"
    ours = craft(spec, access_to(network), x, y, threat)
    logits = network(ours)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    margin = others - logits.gather(1, y[:, None])[:, 0]
    assert margin.min() >= 3 - 1e-4 and margin.median() < 3.1


@MINIMAL
@pytest.mark.parametrize("rule", ["random", "least-likely"])
def test_a_targeted_attack_reaches_its_target(name, threat, rule, network, digits):
    x, y = digits
    access = access_to(network)
    threat = threat.model_copy(update={"target": rule})
    target = choose_targets(access, x, y, threat, torch.Generator().manual_seed(0))
    ours = craft(f"{name}(search=3, steps=60, c=1, lr=0.03)", access, x, y, threat)
    assert torch.equal(network(ours).argmax(dim=1), target)


@MINIMAL
def test_an_image_that_is_wrong_already_costs_one_query(name, threat, network, digits):
    x, y = digits
    access = access_to(network)
    assert torch.equal(craft(name, access, x, (y + 1) % 10, threat), x)
    assert access.cost.forwards == len(x) and access.cost.backwards == 0


@MINIMAL
def test_the_predicted_label_is_left_where_that_is_asked_for(name, threat, network, digits):
    x, y = digits
    spec = f"{name}(search=1, steps=60, c=10, label=predicted)"
    ours = craft(spec, access_to(network), x, (y + 1) % 10, threat)
    assert (network(ours).argmax(dim=1) != y).all()


class Constant(nn.Module):
    """Always label 0."""

    def forward(self, x):
        return torch.eye(10)[0].expand(len(x), 10) + 0 * x.flatten(1)[:, :10]


@MINIMAL
def test_what_cannot_be_broken_is_returned_as_it_was(name, threat, digits):
    access = access_to(Constant())
    ours = craft(f"{name}(search=3, steps=5)", access, digits[0], 0 * digits[1], threat)
    assert torch.equal(ours, digits[0])
    assert np.isnan(access.trace["c"]).all() and (access.trace["dead"] == 1).all()


@pytest.mark.parametrize(
    ("spec", "per_step"), [("cw(search=3, steps=7, abort=false)", 1), ("ead(search=3, steps=7)", 2)]
)
def test_passes_are_those_counted_by_hand(spec, per_step, network, digits):
    x, y = digits
    access = access_to(network)
    craft(spec, access, x, y, L2)
    assert access.cost.backwards == len(x) * 3 * 7
    assert access.cost.forwards == len(x) * (1 + 3 * 7 * per_step)


def test_a_fixed_c_that_is_too_small_breaks_nothing(network, digits):
    x, y = digits
    small, large = (craft(f"cw(search=1, c={c})", access_to(network), x, y, L2) for c in (1e-4, 10))
    assert torch.equal(small, x) and (network(large).argmax(dim=1) != y).all()


def test_an_early_abort_spares_passes_and_costs_no_distance(network, digits):
    x, y = digits
    medians, passes = [], []
    for abort in ("true", "false"):
        access = access_to(network)
        ours = craft(f"cw(search=2, c=1, abort={abort})", access, x, y, L2)
        medians.append(distance(ours, x, "l2").median())
        passes.append(access.cost.backwards)
    assert passes[0] < 0.9 * passes[1]
    assert medians[0] <= 1.02 * medians[1]


class Noise(nn.Module):
    """Gaussian noise, fresh for every image and pass."""

    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


@MINIMAL
@pytest.mark.parametrize("draws", [1, 10])
def test_a_success_on_a_stochastic_defense_lasts(name, threat, draws, network, digits):
    x, y = digits
    torch.manual_seed(0)
    noisy = nn.Sequential(Noise(), network)
    ours = craft(
        f"{name}(search=3, steps=40, c=1, lr=0.03)", access_to(noisy, draws=draws), x, y, threat
    )
    wrong = torch.stack([noisy(ours).argmax(dim=1) != y for _ in range(200)]).float().mean(dim=0)
    assert wrong.min() > 0.25 and wrong.median() > 0.4


class Brightness(nn.Module):
    """Label 0 above a mean grey of `level`, 1 below it."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        grey = 8 * (x.mean(dim=(1, 2, 3)) - self.level)
        return torch.cat([grey[:, None], -grey[:, None], torch.full((len(x), 8), -100.0)], dim=1)


@pytest.mark.parametrize(("goal", "level"), [("error", 0.4), ("denial", 0.5)])
def test_through_a_vote_no_answer_is_a_success_for_denial_only(goal, level):
    x, y = torch.full((1, *SHAPE), 0.6), torch.tensor([0])
    access = access_to(Brightness(0.5), Brightness(0.4), rule=Vote(), goal=goal)
    ours = craft("cw(search=5, steps=80, c=1, lr=0.02)", access, x, y, L2)
    # all pixels move alike, in l2 by 8 times the way of one
    assert distance(ours, x, "l2").item() == pytest.approx(8 * (0.6 - level), rel=0.02)


@MINIMAL
def test_averaged_probabilities_are_attacked(name, threat, network, classifier, digits):
    x, y = digits
    members = [network, classifier(nn.ReLU())]
    access = access_to(*members, rule=MeanProbabilities())
    ours = craft(f"{name}(search=3, steps=60, c=1, lr=0.03)", access, x, y, threat)
    assert (access.deployed.decide(ours, 1) != y).all()


@FORMS
@pytest.mark.parametrize("eps", ["8/255", "0.3"])
def test_cw_linf_stays_in_ball_and_box(form, eps, network, digits):
    x, y = digits
    threat = Threat(eps=eps)
    ours = craft(f"cw-linf(form={form}, lr=0.05)", access_to(network), x, y, threat)
    assert ours.min() >= 0 and ours.max() <= 1 and not torch.equal(ours, x)
    assert within(distance(ours, x, "linf"), threat).all()


def test_cw_linf_breaks_a_linear_classifier_exactly_where_its_ball_does(digits):
    x = interior(digits[0])
    network, w, y, _ = linear((x, digits[1]))
    margin = -(x.flatten(1).double() @ torch.from_numpy(w) + network[1].bias[1])
    reach = 50 * 6e-4 * 255 / 8 * 0.05 * np.abs(w).sum()  # 50 steps of 6e-4 at 8/255
    network[1].bias[1] += margin.median() - reach  # half of the images are within reach
    margin = margin - (margin.median() - reach)
    assert (margin > 0).sum() > 6
    ours = craft("cw-linf", access_to(network, labels=2), x, y, Threat(eps="0.05"))
    broken = network(ours).argmax(dim=1) == 1
    clear = (margin - reach).abs() > 0.02 * reach
    assert torch.equal(broken[clear], (margin < reach)[clear]) and clear.sum() > 12


def test_the_subgradient_of_linf_is_that_of_autograd_also_on_ties():
    torch.manual_seed(0)
    delta = torch.randint(-3, 4, (5, 1, 4, 4)).float().requires_grad_()
    (expected,) = torch.autograd.grad(delta.flatten(1).abs().amax(dim=1).sum(), delta)
    torch.testing.assert_close(subgradient(delta.detach()), expected)


def test_cw_linf_of_the_authors_is_what_torch_optim_makes_of_their_loss(network, digits):
    x = digits[0]
    ours = craft("cw-linf(form=released, lr=0.005)", access_to(network), x, digits[1], TENTH)
    scores = network(x)
    best, second = scores.topk(2, dim=1).indices.T[..., None]
    w = x.clone().requires_grad_()
    optimizer, least = torch.optim.Adam([w], lr=0.005), torch.full((len(x),), torch.inf)
    answer = x.clone()
    for _ in range(50):
        logits = network(w)
        hinge = (logits.gather(1, best) - logits.gather(1, second)).relu()[:, 0]
        total = ((w - x) ** 2).sum(dim=(1, 2, 3)) + 10 * hinge
        better = total < least
        least[better], answer[better] = total.detach()[better], w.detach()[better]
        optimizer.zero_grad()
        total.sum().backward()
        optimizer.step()
    expected = (x + (answer.clamp(0, 1) - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_cw_linf_of_the_authors_does_not_look_at_the_label(network, digits):
    x, y = digits
    answers = [
        craft("cw-linf(form=released)", access_to(network), x, label, TENTH)
        for label in (y, (y + 1) % 10)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize(("form", "lr"), [("clipped", 0.01), ("tanh", 0.03)])
def test_cw_linf_is_as_strong_as_pgd_on_the_margin(form, lr, network, digits):
    x, y = digits
    left = []
    for spec in (f"cw-linf(form={form}, lr={lr})", "pgd(steps=50, loss=margin)"):
        ours = craft(spec, access_to(network), x, y, TENTH)
        left.append((network(ours).argmax(dim=1) == y).sum().item())
    assert left[0] <= left[1] + 1 < len(x)


def test_cw_linf_reaches_a_target(network, digits):
    x, y = digits
    threat = Threat(eps="0.4", target="least-likely")
    access = access_to(network)
    target = choose_targets(access, x, y, threat, torch.Generator())
    ours = craft("cw-linf", access, x, y, threat)
    assert (network(ours).argmax(dim=1) == target).float().mean() > 0.9


@pytest.mark.parametrize("form", ["clipped", "tanh"])
def test_cw_linf_keeps_more_than_a_lucky_draw(form, network, digits):
    x, y = digits
    torch.manual_seed(0)
    noisy = nn.Sequential(Noise(), network)
    threat = Threat(eps="0.3")
    ours = craft(f"cw-linf(form={form}, lr=0.02)", access_to(noisy, draws=5), x, y, threat)
    wrong = torch.stack([noisy(ours).argmax(dim=1) != y for _ in range(50)]).float()
    assert wrong.mean() > 0.8


class Faulty(nn.Module):
    """Logits, or their gradient, are not a number where the first pixel is one."""

    def __init__(self, inner, fault):
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, x):
        if self.fault == "loss":
            return torch.where(x[:, 0, 0, :1] == 1, torch.nan, self.inner(x))
        return self.inner(x) + (1 - x[:, 0, 0, :1]).sqrt()  # 0 * inf in the backward pass


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("spec", ["cw", "ead", "cw-linf", "cw-linf(form=released)"])
def test_what_is_not_a_number_stops_the_attack(spec, fault, network, digits):
    x, y = digits[0].clone(), digits[1]
    x[:3, 0, 0, 0] = 1
    with pytest.raises(FloatingPointError, match=r"not finite .*for 3 images$"):
        craft(spec, access_to(Faulty(network, fault)), x, y, TENTH)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cw(c=0)", "attack cw: c = 0: Input should be greater than 0"),
        ("cw(search=0)", "attack cw: search = 0: Input should be greater than or equal to 1"),
        ("ead(rule=l2)", "attack ead: rule = 'l2': Input should be 'EN' or 'L1'"),
        ("cw-linf(form=printed)", "Input should be 'clipped', 'tanh' or 'released'"),
        ("cw-linf(lr=0)", "attack cw-linf: lr = 0: ε = 0 is not positive"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(InputError, match=message):
        Configured.of(spec)
