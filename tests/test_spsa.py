"""SPSA against closed forms, torch's Adam, the gradient engine and hand counts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, choose_targets, spsa
from robbench.attacks.losses import choose
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance, within

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return subset.x, subset.y


def access_to(*members, labels=10, **options):
    deployed = Deployed(nn.ModuleList(members), MeanLogits(), SHAPE, labels)
    return Access(deployed, gradients=False, **options)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """Keeps every image that it was asked about."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.inner(x)


class Quadratic(nn.Module):
    """The margin of the label 1 over 0 is a quadratic form of the image, of known gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.matrix = torch.randn(64), torch.randn(64, 64) / 8

    def forward(self, x):
        flat = x.flatten(1)
        value = flat @ self.weight + ((flat @ self.matrix) * flat).sum(dim=1)
        return torch.stack([torch.zeros_like(value), value], dim=1)

    def gradient(self, x):
        flat = x.flatten(1)
        return self.weight + flat @ (self.matrix + self.matrix.T)


@pytest.mark.parametrize("chunk", [2048, 8])
def test_the_estimate_is_the_mean_of_slopes_along_its_directions(chunk, digits):
    """Central differences are exact on a quadratic form: each slope is the product with g."""
    x, y = digits[0][:8], torch.zeros(8, dtype=torch.int64)
    model = Quadratic()
    access = access_to(model.double(), labels=2)
    access.deployed.chunk = chunk
    model.weight, model.matrix = model.weight.double(), model.matrix.double()
    answer = spsa.estimate(access, x.double(), y, None, choose(access, "margin"), 5, 0.01, seeded())
    rng, expected = seeded(), torch.zeros(8, 64, dtype=torch.float64)
    for count in [5] if chunk == 2048 else [1] * 5:
        signs = torch.randint(0, 2, (count, *x.shape), generator=rng, dtype=torch.int8)
        v = (2 * signs.double() - 1).flatten(2)
        expected += ((v * model.gradient(x.double())).sum(dim=2, keepdim=True) * v).sum(dim=0) / 5
    torch.testing.assert_close(answer.flatten(1), expected)


def test_many_directions_point_along_the_gradient(digits):
    x, y = digits[0][:4], torch.zeros(4, dtype=torch.int64)
    model = Quadratic()
    access = access_to(model, labels=2)
    answer = spsa.estimate(access, x, y, None, choose(access, "margin"), 4000, 0.01, seeded())
    true = model.gradient(x)
    cosine = torch.cosine_similarity(answer.flatten(1), true, dim=1)
    # n random directions of d leave about sqrt(n / (n + d)) of the cosine: 0.992 here
    assert (cosine > 0.98).all()
    torch.testing.assert_close(answer.flatten(1).norm(dim=1), true.norm(dim=1), rtol=0.05, atol=0)


def test_every_image_has_directions_of_its_own():
    x, y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    access = access_to(Quadratic(), labels=2)
    one, two = spsa.estimate(access, x, y, None, choose(access, "margin"), 3, 0.01, seeded())
    assert not torch.allclose(one, two)


def test_noise_cancels_between_the_ends_of_a_direction(digits):
    class Noise(nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 10)

    access = access_to(Noise(), draws=3)
    loss = choose(access, "margin")
    torch.manual_seed(0)
    answer = spsa.estimate(access, *digits, None, loss, 20, 0.01, seeded())
    assert (answer == 0).all()


def test_averaged_draws_are_fresh_in_every_step(network, digits):
    class Noise(nn.Module):
        drawn: list[float] = []

        def forward(self, x):
            noise = torch.randn(len(x), 10)
            self.drawn.append(float(noise[0, 0]))
            return noise

    recorder = Noise()
    access = access_to(recorder)
    recorder.drawn.clear()
    torch.manual_seed(0)
    craft("spsa(steps=3, samples=2)", access, *digits, Threat(eps="0.1"))
    answers, ends = recorder.drawn[::3][:4], [recorder.drawn[i : i + 2] for i in (1, 4, 7)]
    assert all(plus == minus for plus, minus in ends)
    assert len({*answers, *(plus for plus, _ in ends)}) == 7


def test_the_steps_are_those_of_torchs_adam():
    torch.manual_seed(0)
    start = torch.rand(3, *SHAPE)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    adam = spsa._Adam(start, 0.02)
    reference = torch.optim.Adam([theirs], lr=0.02, maximize=True)
    for _ in range(6):
        gradient = torch.randn(start.shape)
        ours = ours + adam.step(gradient, torch.arange(3))
        theirs.grad = gradient
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_queries_by_hand(digits):
    linear = nn.Linear(64, 10)
    linear.bias.data[0] = 1e4
    access = access_to(nn.Sequential(nn.Flatten(), linear))
    x, y = digits[0], torch.zeros_like(digits[1])
    craft("spsa(steps=3, samples=7)", access, x, y, Threat(eps="0.1"))
    # in each step an answer to where it is and two ends of every direction; then the last answer
    assert access.cost.queries == len(x) * (3 * (1 + 2 * 7) + 1)
    assert access.cost.backwards == 0


def test_queries_of_a_stochastic_defense_by_hand(digits):
    class Noise(nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 10)

    access = access_to(Noise(), draws=4)
    craft("spsa(steps=3, samples=7)", access, *digits, Threat(eps="0.1"))
    walked = 4 * (3 * (1 + 2 * 7) + 1)
    assert access.cost.queries == 32 * (walked + 2 * 20)  # best and last on selection draws


def lost(access, points, y):
    return access.deployed.decide(points, 1)[0] != y


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_breaks_nearly_what_the_gradient_breaks(norm, network, digits):
    x, y = digits
    threat = Threat(norm=norm, eps="0.15" if norm == "linf" else "0.8")
    access = access_to(network)
    ours = lost(access, craft("spsa(samples=64)", access, x, y, threat), y)
    theirs = lost(access, craft("pgd(steps=40)", Access(access.deployed), x, y, threat), y)
    before = lost(access, x, y)
    assert before.sum() < 0.5 * theirs.sum()
    assert ours.sum() >= 0.9 * theirs.sum()


@pytest.mark.parametrize("rule", ["least-likely", "random", 3])
def test_targeted_reaches_its_target(rule, network, digits):
    x, y = digits
    threat = Threat(eps="0.4", target=rule)
    access = access_to(network)
    answer = craft("spsa(steps=60, samples=16, lr=0.02)", access, x, y, threat)
    target = choose_targets(access, x, y, threat, seeded())
    assert (access.deployed.decide(answer, 1)[0] == target).float().mean() > 0.9


def test_a_broken_image_leaves(network, digits):
    x = digits[0]
    access = access_to(network)
    y = (access.deployed.decide(x, 1)[0] + 1) % 10
    assert torch.equal(craft("spsa", access, x, y, Threat(eps="0.1")), x)
    assert access.cost.queries == len(x)


@pytest.mark.parametrize("own", [True, False], ids=["own", "oracle"])
def test_the_answer_is_the_worst_of_all_iterates(own, network, digits):
    """Steps so long that the walk overshoots, in a ball so small that nothing breaks."""
    x, y = digits
    recorder = Recorder(network)
    access = access_to(recorder, own=own)
    y = access.deployed.decide(x, 1)[0]
    recorder.seen.clear()
    answer = craft("spsa(steps=6, samples=2, lr=0.02)", access, x, y, Threat(eps="0.01"))
    # in each step where it is, then the ends of all directions; then where it came to
    iterates = [points for points in recorder.seen[: 6 * 3 + 1] if len(points) == len(x)]
    assert len(iterates) == 7
    loss = choose(access, "margin")
    values = torch.stack([access.judge(points, y, loss, None, 1).loss for points in iterates])
    assert (values < 0).all() and (values.argmax(dim=0) < 6).any()
    reached = access.judge(answer, y, loss, None, 1).loss
    torch.testing.assert_close(reached, values.max(dim=0).values)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.sampled_from(["linf", "l2"]),
    st.fractions(Fraction(1, 255), 1, max_denominator=255),
    st.integers(0, 2**31),
)
def test_answers_are_in_ball_and_box(norm, eps, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(2, *SHAPE).round(decimals=1), torch.tensor([seed % 10, 3])
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    threat = Threat(norm=norm, eps=eps)
    answer = craft("spsa(steps=3, samples=4, lr=0.5)", access_to(network), x, y, threat, seed)
    assert answer.min() >= 0 and answer.max() <= 1
    assert within(distance(answer, x, norm), threat).all()


def test_the_same_stream_gives_the_same_answer(network, digits):
    spec, threat = "spsa(steps=4, samples=4)", Threat(eps="0.1")
    first, again, other = (
        craft(spec, access_to(network), *digits, threat, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_any_loss_can_be_climbed(loss, network, digits):
    x, y = digits
    access = access_to(network)
    answer = craft(f"spsa(steps=20, samples=16, loss={loss})", access, x, y, Threat(eps="0.2"))
    assert lost(access, answer, y).sum() > 2 * lost(access, x, y).sum() + 8


def test_a_loss_that_does_not_exist_is_named(network, digits):
    with pytest.raises(InputError, match=r"^unknown loss 'margn'; did you mean 'margin'"):
        craft("spsa(loss=margn)", access_to(network), *digits, Threat(eps="0.1"))
