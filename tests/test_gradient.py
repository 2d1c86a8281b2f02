"""The gradient engine against torchattacks, ART, autograd and closed forms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks.evasion import (
    BasicIterativeMethod,
    FastGradientMethod,
    MomentumIterativeMethod,
    ProjectedGradientDescent,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, choose_targets, gradient
from robbench.attacks.losses import SCORE_LOSSES, Votes, ce
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.estimator import Estimator
from robbench.rules import MeanLogits, MeanProbabilities, Vote
from robbench.threat import Threat, distance, within

SHAPE = (1, 8, 8)
ART_NORMS = {"linf": np.inf, "l2": 2, "l1": 1}
EPS = {"linf": "1/10", "l2": "1/2", "l1": "1/4"}


class Noise(nn.Module):
    """Gaussian noise, fresh for every image and pass."""

    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


def classifier(seed, *front):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)]
    return nn.Sequential(*front, *layers).eval()


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def network():
    """A classifier of digits that is right on most images and sure of few."""
    train = datasets.load("digits").train
    trained = classifier(0)
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(trained(train.x), train.y).backward()
        optimizer.step()
    return trained.requires_grad_(False)


@pytest.fixture
def access(network):
    return access_to(network)


def access_to(*members, rule=None, per_call=1, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, 10, per_call)
    return Access(deployed, **options)


def own(deployed):
    """Access that gives no example up, as if the answers came from an oracle."""
    return Access(deployed, own=False)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def interior(x):
    """The same images with room to both ends of the box, so that nothing is clipped to it."""
    return 0.35 + 0.3 * x


def assert_close(ours, theirs, x, norm):
    assert not torch.equal(ours, x)
    if norm == "linf":
        assert (ours - theirs).abs().max() <= 1e-6
    else:
        error = (ours - theirs).flatten(1).norm(dim=1)
        assert (error <= 1e-5 * (theirs - x).flatten(1).norm(dim=1) + 1e-7).all()


def by_art(attack, x, labels):
    return torch.from_numpy(attack.generate(x.numpy(), labels.numpy()))


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        ("fgsm(loss=ce)", lambda model: torchattacks.FGSM(model, eps=0.1)),
        (
            "bim(steps=8, step=0.02, loss=ce, keep=last)",
            lambda model: torchattacks.BIM(model, eps=0.1, alpha=0.02, steps=8),
        ),
        (
            "pgd(steps=8, step=0.03, random=false, loss=ce, keep=last)",
            lambda model: torchattacks.PGD(model, 0.1, 0.03, 8, random_start=False),
        ),
        (
            "mim(steps=8, step=0.02, loss=ce, keep=last)",
            lambda model: torchattacks.MIFGSM(model, eps=0.1, alpha=0.02, steps=8, decay=1.0),
        ),
    ],
    ids=["FGSM", "BIM", "PGD", "MIFGSM"],
)
@pytest.mark.parametrize("target", ["none", "least-likely"])
def test_linf_agrees_with_torchattacks(spec, theirs, target, network, access, digits):
    x, y = digits
    attack = theirs(network)
    if target == "least-likely":
        attack.set_mode_targeted_least_likely(quiet=True)
    ours = craft(spec, access, x, y, Threat(eps="1/10", target=target))
    assert_close(ours, attack(x, y), x, "linf")


def test_random_start_is_where_torchattacks_goes_on(network, access, digits, monkeypatch):
    x, y = digits
    start = (x + 0.1 * (2 * torch.rand(x.shape) - 1)).clamp(0, 1)
    monkeypatch.setattr(gradient, "random_start", lambda *_: start)
    ours = craft("pgd(steps=5, step=0.03, loss=ce, keep=last)", access, x, y, Threat(eps="1/10"))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.copy_(start - x))
    theirs = torchattacks.PGD(network, eps=0.1, alpha=0.03, steps=5, random_start=True)(x, y)
    assert_close(ours, theirs, x, "linf")


def test_l2_agrees_with_torchattacks(network, access, digits):
    x, y = interior(digits[0]), digits[1]
    ours = craft(
        "bim(steps=8, step=0.1, loss=ce, keep=last)", access, x, y, Threat(norm="l2", eps="1/4")
    )
    theirs = torchattacks.PGDL2(network, eps=0.25, alpha=0.1, steps=8, random_start=False)
    assert_close(ours, theirs(x, y), x, "l2")


# ART steps along l1 by the pixel of the largest gradient, even one that is at its end of the box
# and cannot move, where ours takes the next; its ball is a rescaling, as ours. So l1 is compared
# on images with room to both ends, where the two rules are one.
@pytest.mark.parametrize("norm", EPS)
def test_fgsm_agrees_with_art(norm, access, digits):
    x, y = interior(digits[0]) if norm == "l1" else digits[0], digits[1]
    theirs = FastGradientMethod(
        Estimator(access), norm=ART_NORMS[norm], eps=float(Fraction(EPS[norm]))
    )
    ours = craft("fgsm(loss=ce)", access, x, y, Threat(norm=norm, eps=EPS[norm]))
    assert_close(ours, by_art(theirs, x, y), x, norm)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_agrees_with_art(norm, targeted, access, digits):
    x, y = interior(digits[0]) if norm == "l1" else digits[0], digits[1]
    eps = float(Fraction(EPS[norm]))
    theirs = ProjectedGradientDescent(
        Estimator(access),
        ART_NORMS[norm],
        eps,
        eps / 4,
        max_iter=8,
        targeted=targeted,
        verbose=False,
    )
    threat = Threat(norm=norm, eps=EPS[norm], target=3 if targeted else "none")
    aim = torch.where(y == 3, 4, 3) if targeted else y
    spec = f"pgd(steps=8, step={eps / 4}, random=false, loss=ce, keep=last)"
    assert_close(craft(spec, access, x, y, threat), by_art(theirs, x, aim), x, norm)


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        (
            "bim(steps=8, step=0.02, loss=ce, keep=last)",
            lambda estimator: BasicIterativeMethod(estimator, 0.1, 0.02, max_iter=8, verbose=False),
        ),
        (
            "mim(steps=8, step=0.02, decay=0.9, loss=ce, keep=last)",
            lambda estimator: MomentumIterativeMethod(
                estimator, eps=0.1, eps_step=0.02, decay=0.9, max_iter=8, verbose=False
            ),
        ),
    ],
    ids=["BIM", "MIM"],
)
def test_linf_agrees_with_art(spec, theirs, access, digits):
    x, y = digits
    ours = craft(spec, access, x, y, Threat(eps="1/10"))
    assert_close(ours, by_art(theirs(Estimator(access)), x, y), x, "linf")


def linear(seed=0):
    """Two labels; the gradient of the cross-entropy by x is a multiple of w1 - w0 everywhere."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    weight = network[1].weight.detach()
    return network, (weight[1] - weight[0]).view(SHAPE)


@pytest.mark.parametrize(
    ("norm", "unit"),
    [("linf", lambda w: w.sign()), ("l2", lambda w: w / w.norm())],
    ids=["linf", "l2"],
)
@pytest.mark.parametrize("spec", ["fgsm", "bim(steps=5, step=0.07)"])
def test_a_linear_model_is_left_along_its_weights(norm, unit, spec, digits):
    x, y = interior(digits[0]), torch.zeros_like(digits[1])
    network, weight = linear()
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), SHAPE, 2)
    answer = craft(f"{spec}", own(deployed), x, y, Threat(norm=norm, eps="1/5"))
    torch.testing.assert_close(answer, x + 0.2 * unit(weight), rtol=1e-5, atol=1e-6)


def test_l1_moves_the_steepest_pixel_of_a_linear_model(digits):
    x, y = interior(digits[0]), torch.zeros_like(digits[1])
    network, weight = linear()
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), SHAPE, 2)
    answer = craft("fgsm", own(deployed), x, y, Threat(norm="l1", eps="1/5"))
    moved = (answer - x).flatten(1)
    steepest = weight.flatten().abs().argmax()
    assert (moved[:, steepest] - 0.2 * weight.flatten()[steepest].sign()).abs().max() < 1e-6
    assert moved.count_nonzero() == len(x)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(["random", "least-likely", 0, 9]),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_a_target_is_another_label(rule, seed, labels):
    y = torch.tensor(labels)
    access = access_to(classifier(seed))
    rng = torch.Generator().manual_seed(seed)
    target = choose_targets(access, torch.rand(len(y), *SHAPE), y, Threat(target=rule), rng)
    assert target.dtype == torch.int64
    assert (target != y).all() and (target >= 0).all() and (target < 10).all()
    if isinstance(rule, int):
        assert (target[y != rule] == rule).all()


def test_random_targets_are_all_other_labels(access):
    y = torch.full((300,), 4)
    target = choose_targets(
        access, torch.rand(300, *SHAPE), y, Threat(target="random"), torch.Generator()
    )
    assert set(target.tolist()) == set(range(10)) - {4}


def test_a_target_that_is_no_label(access, digits):
    with pytest.raises(InputError, match=r"^target = 10, but labels are 0 to 9$"):
        craft("fgsm", access, *digits, Threat(eps="0.1", target=10))


@pytest.mark.parametrize("rule", ["random", "least-likely", 7])
@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_a_targeted_attack_gets_nearer_to_its_target(rule, loss, access, digits):
    x, y = digits
    threat = Threat(eps="0.3", target=rule)
    target = choose_targets(access, x, y, threat, torch.Generator().manual_seed(0))
    answer = craft(f"bim(loss={loss})", access, x, y, threat)
    with torch.no_grad():
        before, after = (access(points).softmax(1) for points in (x, answer))
    column = target[:, None]
    reached = after.argmax(1) == target
    assert (reached | (after.gather(1, column) > before.gather(1, column))[:, 0]).all()
    assert reached.float().mean() > 0.5


def test_an_untargeted_attack_leaves_the_true_label_and_not_the_prediction(access, digits):
    x = digits[0]
    with torch.no_grad():
        predicted = access(x).argmax(1)
    y = (predicted + 1) % 10
    answer = craft("bim(loss=ce, keep=last)", access, x, y, Threat(eps="0.1"))
    with torch.no_grad():
        before, after = access(x).softmax(1), access(answer).softmax(1)
    assert (after.gather(1, y[:, None]) < before.gather(1, y[:, None])).all()


class Recorder(nn.Module):
    """Keeps every image that it was asked about."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.inner(x)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(
        ["pgd(steps=3)", "pgd(steps=2, restarts=2)", "fgsm(random=true)", "mim(steps=3)"]
    ),
    st.sampled_from(list(EPS)),
    st.fractions(Fraction(1, 255), 1, max_denominator=255),
    st.integers(0, 2**31),
)
def test_starts_iterates_and_results_are_in_ball_and_box(spec, norm, eps, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(1, *SHAPE).round(decimals=1), torch.tensor([seed % 10])
    recorder = Recorder(classifier(seed))
    access = access_to(recorder)
    recorder.seen.clear()  # the probe's
    threat = Threat(norm=norm, eps=eps)
    points = torch.cat([craft(spec, access, x, y, threat, seed), *recorder.seen])
    assert points.isfinite().all() and points.min() >= 0 and points.max() <= 1
    assert within(distance(points, x.expand_as(points), norm), threat).all()


def outcome(access, points, y):
    """(lost, loss) of a deterministic defense, per image."""
    with torch.no_grad():
        scores = access.scores(points)
    return scores.argmax(1) != y, ce(scores, y)


def at_least_as_bad(ours, theirs):
    return (ours[0] & ~theirs[0]) | ((ours[0] == theirs[0]) & (ours[1] >= theirs[1] - 1e-6))


def test_restarts_keep_the_worst_of_each_image(network, digits):
    x, y = digits
    threat = Threat(eps="0.1")
    access = own(access_to(network).deployed)  # no early leaving: the losses can be compared
    both = craft("pgd(steps=2, restarts=2, keep=last)", access, x, y, threat)
    winner = torch.from_numpy(access.trace["restart"]).bool()
    rng = torch.Generator().manual_seed(0)
    single = Configured.of("pgd(steps=2, keep=last)")
    first, second = (single(access, x, y, threat, rng) for _ in range(2))
    assert 0 < winner.sum() < len(x)
    assert torch.equal(both, torch.where(winner.view(-1, 1, 1, 1), second, first))
    for one in (first, second):
        assert at_least_as_bad(outcome(access, both, y), outcome(access, one, y)).all()


@pytest.mark.parametrize("exact", [True, False], ids=["own", "oracle"])
def test_the_best_iterate_is_at_least_as_bad_as_the_last(exact, network, digits):
    x, y = digits
    access = Access(access_to(network).deployed, own=exact)
    spec = "bim(steps=6, step=0.08, keep={})"  # steps so long that the climb overshoots
    best, last = (
        craft(spec.format(keep), access, x, y, Threat(eps="0.1")) for keep in ("best", "last")
    )
    ours, theirs = outcome(access, best, y), outcome(access, last, y)
    if exact:
        assert (ours[0] | (~theirs[0] & (ours[1] >= theirs[1] - 1e-6))).all()
    else:
        assert at_least_as_bad(ours, theirs).all()
    assert not torch.equal(best, last)


def test_a_broken_image_leaves_a_deterministic_defense(network, digits):
    x, y = digits
    access = access_to(network)
    with torch.no_grad():
        y = access(x).argmax(1)
    y[:5] = (y[:5] + 1) % 10  # these are broken from the start
    access.cost.forwards = access.cost.backwards = 0
    answer = craft("bim(steps=4)", access, x, y, Threat(eps="1e-6"))
    # one more pass judges the last iterate of those that are left
    assert access.cost.forwards == 32 + 4 * 27
    assert access.cost.backwards == 32 + 3 * 27
    assert torch.equal(answer[:5], x[:5])


def test_no_image_leaves_a_stochastic_defense(network, digits):
    x, y = digits
    access = access_to(nn.Sequential(Noise(), network), draws=3)
    craft("bim(steps=4)", access, x, (y + 1) % 10, Threat(eps="1e-6"))
    assert access.cost.backwards == 32 * 4 * 3
    assert access.cost.forwards == 32 * 4 * 3 + 2 * 32 * 20  # best and last on selection draws


def test_no_image_leaves_an_oracle(network, digits):
    x, y = digits
    access = own(access_to(network).deployed)
    craft("bim(steps=4)", access, x, (y + 1) % 10, Threat(eps="1e-6"))
    assert access.cost.backwards == 32 * 4


def test_candidates_meet_the_same_selection_draws(network, digits):
    x, y = digits
    access = access_to(nn.Sequential(Noise(), network))
    loss = access.score_loss(ce)
    torch.manual_seed(0)
    worst, winner = gradient.worst_of(access, [x, x.clone()], y, None, loss)
    assert winner.eq(0).all()  # equal points tie on equal draws; on fresh ones half would win


class Brightness(nn.Module):
    """Label 0 above a mean grey of `level`, 1 below it; the logits' distance is `scale`."""

    def __init__(self, level, scale=1.0):
        super().__init__()
        self.level, self.scale = level, scale

    def forward(self, x):
        grey = self.scale * (x.mean(dim=(1, 2, 3)) - self.level)
        rest = torch.full((len(x), 8), -100.0)
        return torch.cat([grey[:, None], -grey[:, None], rest], dim=1)


def test_an_attack_goes_on_from_no_answer_to_an_error():
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])
    access = access_to(Brightness(0.9), Brightness(0.4), rule=Vote())
    assert access.deployed.decide(x, 1).tolist() == [[-1]]
    adversarial = craft("bim(steps=4)", access, x, y, Threat(eps=0.2))
    assert access.deployed.decide(adversarial, 1).tolist() == [[1]]


def test_no_answer_is_kept_when_an_error_is_out_of_reach():
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])
    access = access_to(Brightness(0.45), Brightness(0.1), rule=Vote())
    adversarial = craft("bim(steps=4)", access, x, y, Threat(eps=0.2))
    assert access.deployed.decide(adversarial, 1).tolist() == [[-1]]


def test_a_wrong_decision_outweighs_lost_votes_and_loss():
    y = torch.tensor([0])
    members = [Brightness(level, 9.0 if level == 0.1 else 1.0) for level in (0.5, 0.5, 0.1)]
    access = access_to(*members, rule=MeanLogits())
    votes, decision = (torch.full((1, 1, 8, 8), grey) for grey in (0.45, 0.05))
    loss = lambda draw, y, target: -draw.logits[0, 2, :, 1]  # noqa: E731  larger at `votes`
    assert access.judge(votes, y, loss, None, 1).votes == pytest.approx(2 / 3)
    worst, winner = gradient.worst_of(access, [votes, decision], y, None, loss)
    assert winner == 1 and torch.equal(worst, decision)


def by_hand(rule, logits, y):
    """Cross-entropy (N,) of the mean over draws and members, written out."""
    if rule == "logits":
        return F.cross_entropy(logits.mean((0, 1)), y, reduction="none")
    return -logits.softmax(-1).mean((0, 1)).gather(1, y[:, None])[:, 0].log()


@pytest.mark.parametrize("per_call", [1, 3, 6], ids="{} draws per call".format)
@pytest.mark.parametrize(
    ("rule", "mean"),
    [(MeanLogits(), "logits"), (MeanProbabilities(), "softmax"), (Vote(), "softmax")],
    ids=["logits", "probabilities", "vote"],
)
def test_eot_gradient_is_that_of_the_mean_over_calls(rule, mean, per_call, network, digits):
    x, y = digits
    members = [nn.Sequential(Noise(), network), nn.Sequential(Noise(), classifier(1))]
    access = access_to(*members, rule=rule, draws=6, per_call=per_call)
    torch.manual_seed(5)
    step = access.gradient(x, y, access.score_loss(ce))
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    logits = torch.stack(
        [member(torch.cat([leaf] * 6)).view(6, len(x), 10) for member in members], dim=1
    )
    losses = torch.stack([by_hand(mean, call, y) for call in logits.split(per_call)]).mean(dim=0)
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    torch.testing.assert_close(step.loss, losses.detach())
    torch.testing.assert_close(step.gradient, expected, rtol=1e-4, atol=1e-6)


def test_mean_logits_and_mean_probabilities_have_different_gradients(network, digits):
    x, y = digits
    members = [network, classifier(1)]
    steps = []
    for rule in (MeanLogits(), MeanProbabilities()):
        access = access_to(*members, rule=rule)
        steps.append(access.gradient(x, y, access.score_loss(ce)).gradient)
    assert not torch.allclose(*steps, rtol=1e-2)


@pytest.mark.parametrize("spec", ["pgd(steps=5, restarts=2)", "mim(steps=5)"])
def test_the_chunk_does_not_matter_for_a_deterministic_defense(spec, network, digits):
    x, y = digits
    answers = []
    for chunk in (2048, 5, 1):
        access = access_to(network)
        access.deployed.chunk = chunk
        answers.append(craft(spec, access, x, y, Threat(eps="0.1")))
    assert (answers[0] - answers[1]).abs().max() <= 1e-6
    assert (answers[0] - answers[2]).abs().max() <= 1e-6


class Small(nn.Module):
    """A network on a machine with memory for five images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if len(x) > 5:
            raise torch.OutOfMemoryError("simulated")
        return self.inner(x)


def test_a_short_memory_halves_the_chunk_and_changes_nothing(network, digits):
    x, y = digits
    spec, threat = "pgd(steps=4, restarts=2)", Threat(eps="0.1")
    access = access_to(Small(network))
    access.deployed.chunk = 32
    answer = craft(spec, access, x, y, threat)
    assert access.deployed.chunk == 4
    expected = craft(spec, access_to(network), x, y, threat)
    assert (answer - expected).abs().max() <= 1e-6


def test_memory_that_is_too_short_for_one_image(digits):
    class Greedy(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise torch.OutOfMemoryError("simulated")
            return x.flatten(1)[:, :10]

    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        craft("bim", access_to(Greedy()), *digits, Threat(eps="0.1"))


def test_weights_get_no_gradient_and_do_not_change(digits):
    network = classifier(0)  # its parameters ask for gradients
    before = [parameter.clone() for parameter in network.parameters()]
    craft("pgd(steps=2)", access_to(network), *digits, Threat(eps="0.1"))
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, old)


class Faulty(nn.Module):
    """Logits, or their gradient, are not a number where the first pixel is one."""

    def __init__(self, inner, fault):
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, x):
        marked = x[:, 0, 0, :1] == 1
        if self.fault == "loss":
            return torch.where(marked, torch.nan, self.inner(x))
        return self.inner(x) + (1 - x[:, 0, 0, :1]).sqrt()  # 0 * inf in the backward pass


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_attack(fault, network, digits):
    x, y = digits[0].clone(), digits[1]
    x[:3, 0, 0, 0] = 1
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 for 3 images$"):
        craft("bim(loss=ce)", access_to(Faulty(network, fault)), x, y, Threat(eps="0.1"))


@pytest.mark.parametrize("steps", [1, 3, 5, 20])
def test_the_trace_has_five_losses_per_image(steps, network, digits):
    x, y = digits
    access = own(access_to(network).deployed)
    craft(f"bim(steps={steps}, loss=ce)", access, x, y, Threat(eps="0.1"))
    shapes = {key: (value.shape, value.dtype) for key, value in access.trace.items()}
    assert shapes == {
        "loss": ((5, 32), np.float16),
        "zero_gradient": ((32,), np.float16),
        "dead": ((32,), np.float16),
        "lost_seen": ((2, 32), np.float16),
        "selected_lost": ((32,), np.float16),
        "restart": ((32,), np.uint8),
    }
    with torch.no_grad():
        start = ce(access.scores(x), y)
    np.testing.assert_allclose(access.trace["loss"][0], start, rtol=2e-3, atol=1e-4)
    assert np.isfinite(access.trace["loss"]).all()
    assert (access.trace["zero_gradient"] < 1).all() and (access.trace["dead"] == 0).all()


def test_the_trace_of_a_broken_image_ends(network, digits):
    x, y = digits
    access = access_to(network)
    with torch.no_grad():
        wrong = (access(x).argmax(1) + 1) % 10
    craft("bim(steps=10)", access, x, wrong, Threat(eps="0.1"))
    assert np.isfinite(access.trace["loss"][0]).all()
    assert np.isnan(access.trace["loss"][1:]).all()


class Hot(nn.Module):
    """Logits so large that their cross-entropy is beyond half precision."""

    def forward(self, x):
        return 1e7 * x


def test_the_trace_of_a_huge_loss_is_the_largest_number(network, digits):
    access = own(access_to(nn.Sequential(network, Hot())).deployed)
    craft("bim(steps=5, loss=margin)", access, *digits, Threat(eps="0.1"))
    assert np.isfinite(access.trace["loss"]).all()
    assert np.abs(access.trace["loss"]).max() == np.finfo(np.float16).max


def test_the_trace_accuses_a_zero_gradient(network, digits):
    access = own(access_to(nn.Sequential(Threshold(), network)).deployed)
    craft("pgd(steps=3, restarts=2)", access, *digits, Threat(eps="0.1"))
    assert (access.trace["dead"] == 1).all() and (access.trace["zero_gradient"] == 1).all()


class Threshold(nn.Module):
    """Masks the gradient."""

    def forward(self, x):
        return (x > 0.5).float() + 0 * x


def test_the_adaptive_default_is_the_loss_of_the_defense(network, digits):
    x, y = digits
    noisy = nn.Sequential(Noise(), network)
    access = access_to(noisy, draws=4, losses={"vote": Votes()})
    answers = []
    for loss in ("auto", "vote", "ce"):
        torch.manual_seed(0)
        answers.append(craft(f"bim(steps=3, loss={loss})", access, x, y, Threat(eps="0.1")))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_the_step_is_two_and_a_half_radii_over_the_steps(access, digits):
    x, y = digits
    threat = Threat(eps="0.1")
    answers = [craft(f"bim({s})", access, x, y, threat) for s in ("steps=5", "steps=5, step=0.05")]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pgd(steps=0)", "attack pgd: steps = 0: Input should be greater than or equal to 1"),
        ("pgd(stepz=2)", "unknown setting of attack pgd 'stepz'; did you mean 'step' or 'steps'"),
        ("mim(decay=-1)", "attack mim: decay = -1: Input should be greater"),
        ("pgd(step=0)", "attack pgd: step = 0: ε = 0 is not positive"),
        ("pgd & mim", "attacks cannot be joined by '&': pgd & mim; run them one by one"),
        ("pdg", "unknown attack 'pdg'; did you mean 'pgd'"),
        ("pgd(steps=0, stepz=2)", "'stepz'; did you mean .*; attack pgd: steps = 0"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        Configured.of(spec)


def test_an_unknown_loss_is_named(access, digits):
    with pytest.raises(InputError, match=r"^unknown loss 'cee'; did you mean 'ce'"):
        craft("pgd(loss=cee)", access, *digits, Threat(eps="0.1"))


def test_the_spec_keeps_what_differs_from_the_defaults():
    assert str(Configured.of("pgd(steps=20, step=8/255, restarts=2)").spec) == (
        "pgd(restarts=2, step=8/255)"
    )
    assert str(Configured.of("ifgsm").spec) == "bim"


def test_an_image_that_leaves_early_is_judged_by_the_gradients_it_had(network, digits):
    x, y = digits
    access = own(access_to(nn.Sequential(Threshold(), network)).deployed)
    wrong = (access(x).argmax(dim=1) + 1) % 10  # lost at the first of 20 steps
    craft("pgd(random=false)", access, x, wrong, Threat(eps="0.1"))
    assert (access.trace["dead"] == 1).all()


class Watched(Access):
    """Access that keeps what each gradient and each selection told."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps, self.verdicts = [], []

    def gradient(self, x, *rest):
        self.steps.append((x.clone(), super().gradient(x, *rest)))
        return self.steps[-1][1]

    def judge(self, x, *rest):
        self.verdicts.append((x.clone(), super().judge(x, *rest)))
        return self.verdicts[-1][1]


def watched(network, **options):
    return Watched(access_to(network).deployed, **options)


def halves(values):
    """As the trace stores shares."""
    return torch.stack(values).half().numpy()


def test_the_trace_keeps_the_worst_and_the_last_share_that_the_attack_saw_lost(network, digits):
    access = watched(nn.Sequential(Noise(), network), draws=5)
    torch.manual_seed(0)
    craft("pgd(steps=6, restarts=2)", access, *digits, Threat(eps="0.1"))
    lost = torch.stack([step.lost for _, step in access.steps])  # (12, N): no image leaves
    assert 0 < float(lost.mean()) < 1
    expected = halves([lost.amax(dim=0), lost[-1]])
    np.testing.assert_array_equal(access.trace["lost_seen"], expected)


def test_of_an_image_that_left_the_trace_keeps_the_look_by_which_it_did(network, digits):
    x, y = digits
    access = watched(network)
    craft("pgd(steps=10)", access, x, y, Threat(eps="0.06"))
    active, last = torch.arange(len(y)), torch.zeros(len(y))
    for here, _ in access.steps:
        wrong = network(here).argmax(dim=1) != y[active]
        last[active] = wrong.float()
        active = active[~wrong]
    assert 0 < len(active) < len(y)
    # what is lost for certain is looked at no more: the worst look is the last one
    np.testing.assert_array_equal(access.trace["lost_seen"], halves([last, last]))


def test_the_trace_keeps_what_the_selection_draws_said_of_the_point_that_is_returned(
    network, digits
):
    x, y = digits
    deployed = access_to(nn.Sequential(Noise(), network), per_call=3).deployed
    access = Watched(deployed, draws=6)  # two calls, so that a lost one is more than lost draws
    torch.manual_seed(0)
    found = craft("pgd(steps=4, restarts=3)", access, x, y, Threat(eps="0.1"))
    points = torch.stack([point for point, _ in access.verdicts])  # best and last of each restart
    lost = torch.stack([verdict.lost for _, verdict in access.verdicts])
    assert len(points) == 6
    same = (points == found).flatten(2).all(dim=2)
    expected = torch.stack([lost[same[:, i], i].amax() for i in range(len(y))])
    np.testing.assert_array_equal(access.trace["selected_lost"], halves([expected])[0])
    np.testing.assert_array_equal(access.trace["selected_lost"], halves([lost.amax(dim=0)])[0])
    by_start = halves([lost[:2].amax(dim=0), lost[2:4].amax(dim=0), lost[4:].amax(dim=0)])
    np.testing.assert_array_equal(access.trace["restarts_lost"], by_start)


def test_restarts_of_a_deterministic_defense_are_lost_or_not(network, digits):
    x, y = digits
    access = watched(network)
    found = craft("pgd(steps=3, restarts=4)", access, x, y, Threat(eps="0.06"))
    ends = [point for point, _ in access.verdicts if len(point) == len(x)][-4:]
    broken = torch.stack([network(point).argmax(dim=1) != y for point in ends]).float()
    assert 0 < broken.mean() < 1
    np.testing.assert_array_equal(access.trace["restarts_lost"], broken.half().numpy())
    returned = (network(found).argmax(dim=1) != y).half().numpy()
    np.testing.assert_array_equal(access.trace["selected_lost"], returned)


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("fgsm", {"selected_lost", "restarts_lost"}),
        ("pgd(steps=2)", {"selected_lost", "restarts_lost"}),
        ("pgd(steps=2, restarts=2)", set()),
    ],
)
def test_what_was_not_chosen_has_no_trace_of_a_choice(spec, missing, access, digits):
    craft(spec, access, *digits, Threat(eps="0.1"))
    assert {"lost_seen", "selected_lost", "restarts_lost"} - set(access.trace) == missing
