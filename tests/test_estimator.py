"""Rules worked by hand, draws, counting, and both libraries run on the estimator as it is."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art import metrics
from art.attacks import evasion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access, Verdict
from robbench.attacks.losses import Votes, ce
from robbench.deployed import Deployed, images_at_once
from robbench.estimator import Estimator
from robbench.randomness import preserved_random_state, sandboxed, seed_everything
from robbench.rules import ABSTAIN, Draw, MeanLogits, MeanProbabilities, Vote

SHAPE = (1, 8, 8)
RULES = [MeanLogits(), MeanProbabilities(), Vote(), Vote(nested=True), Vote(majority=False)]


class Noise(nn.Module):
    """x plus noise: fresh for every image, or one for all images of a call."""

    def __init__(self, shared=False):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        return x + torch.randn_like(x[:1] if self.shared else x)


class Foreign(nn.Module):
    """Noise from the streams of NumPy and of Python."""

    def forward(self, x):
        noise = np.random.standard_normal(x.shape).astype(np.float32)
        return x + torch.from_numpy(noise) + random.gauss(0, 1)


class Named(nn.Module):
    """A network in two halves, as those with features are."""

    def __init__(self, seed=0, noise=True):
        super().__init__()
        torch.manual_seed(seed)
        self.noise = Noise() if noise else nn.Identity()
        self.hidden, self.readout = nn.Linear(64, 6), nn.Linear(6, 10)

    def features(self, x):
        return self.hidden(self.noise(x).flatten(1)).tanh()

    def forward(self, x):
        return self.readout(self.features(x))


def classifier(seed, *front):
    torch.manual_seed(seed)
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def deploy(*members, rule=None, draws=1, labels=10):
    return Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, labels, draws)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(16)
    return subset.x, subset.y


def ballots(table, labels=3):
    """Votes (S, M) as a Draw of one image whose logits are largest at the label voted for."""
    votes = torch.tensor(table)[..., None]  # (S, M, 1)
    return Draw(F.one_hot(votes, labels).float())


# rows are draws, columns are members
ONE_SIDED = [[0, 1, 1], [0, 1, 1], [0, 0, 1]]  # 0: four, 1: five; members settle on 0, 1, 1
SPLIT = [[0, 1, 2], [0, 1, 2]]  # two votes each; members settle on 0, 1, 2
LEANING = [[0, 0, 1], [0, 2, 1], [0, 2, 0]]  # 0: five, 1: two, 2: two; members settle on 0, 2, 1
UNDECIDED = [[0, 1, 0], [1, 0, 0]]  # 0: four, 1: two; members settle on nobody, nobody, 0
PLURAL = [[0, 0, 0, 1, 2, 1, 2]]  # 0: three of seven
WASTED = [[0, 1, 1], [0, 0, 2]]  # 0: three, 1: two, 2: one; members on 0, nobody, nobody
TALLIES = [
    # table, flat majority, flat plurality, nested majority, nested plurality
    (ONE_SIDED, 1, 1, 1, 1),
    (SPLIT, ABSTAIN, ABSTAIN, ABSTAIN, ABSTAIN),
    (LEANING, 0, 0, ABSTAIN, ABSTAIN),
    (UNDECIDED, 0, 0, ABSTAIN, 0),
    (PLURAL, ABSTAIN, 0, ABSTAIN, 0),
    (WASTED, ABSTAIN, 0, ABSTAIN, 0),
    ([[0], [1]], ABSTAIN, ABSTAIN, ABSTAIN, ABSTAIN),  # half is not more than half
    ([[2]], 2, 2, 2, 2),
]


@pytest.mark.parametrize(
    ("nested", "majority", "column"),
    [(False, True, 1), (False, False, 2), (True, True, 3), (True, False, 4)],
    ids=["flat-majority", "flat-plurality", "nested-majority", "nested-plurality"],
)
@pytest.mark.parametrize("tally", TALLIES, ids=str)
def test_votes_by_hand(nested, majority, column, tally):
    decided = Vote(nested, majority).decide(ballots(tally[0]))
    assert decided.dtype == torch.int64
    assert decided.tolist() == [tally[column]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_flat_vote_is_a_count(table):
    votes = [vote for row in table for vote in row]
    counts = sorted((votes.count(label) for label in range(4)), reverse=True)
    most = max(range(4), key=votes.count)
    clear = counts[0] > counts[1]
    draw = ballots(table, labels=4)
    assert Vote(majority=False).decide(draw).item() == (most if clear else ABSTAIN)
    assert Vote().decide(draw).item() == (most if 2 * counts[0] > len(votes) else ABSTAIN)


def test_a_vote_decides_image_by_image():
    draws = [ballots(table).logits for table in ([[0, 0, 1]], [[0, 1, 2]], [[2, 2, 2]])]
    assert Vote().decide(Draw(torch.cat(draws, dim=2))).tolist() == [0, ABSTAIN, 2]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_one_draw_of_one_member_scores_its_logits_bit_for_bit(rule, digits):
    network = classifier(0)
    deployed = deploy(network, rule=rule)
    expected = network(digits[0])
    assert torch.equal(rule.scores(deployed.sample(digits[0], 1)), expected)
    assert torch.equal(Access(deployed)(digits[0]), expected)
    assert torch.equal(rule.decide(Draw(expected[None, None])), expected.argmax(1))


def test_mean_logits_and_mean_probabilities_are_the_means():
    logits = 5 * torch.randn(4, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    draw = Draw(logits)
    torch.testing.assert_close(MeanLogits().scores(draw), logits.flatten(0, 1).mean(0))
    mean = logits.double().softmax(-1).flatten(0, 1).mean(0)
    for rule in (MeanProbabilities(), Vote(nested=True)):
        torch.testing.assert_close(rule.scores(draw).double().exp(), mean)
    assert MeanProbabilities().decide(draw).equal(mean.argmax(1))


def test_the_two_means_can_disagree():
    # two draws lean to label 1 by little, one to label 0 by much
    logits = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 1.0]]], [[[9.0, 0.0]]]])
    assert MeanLogits().decide(Draw(logits)).item() == 0
    assert MeanProbabilities().decide(Draw(logits)).item() == 0
    assert Vote().decide(Draw(logits)).item() == 1
    logits[2, 0, 0, 0] = 2.5
    assert MeanLogits().decide(Draw(logits)).item() == 0
    assert MeanProbabilities().decide(Draw(logits)).item() == 1


def test_probabilities_that_vanish_have_finite_scores():
    draw = Draw(torch.tensor([[[[0.0, 500.0]]], [[[0.0, 700.0]]]], requires_grad=True))
    scores = MeanProbabilities().scores(draw)
    slope = torch.autograd.grad(scores[0, 0], draw.logits)[0]
    assert scores[0, 0].item() == pytest.approx(-500 - np.log(2))
    assert slope.isfinite().all()


def test_the_deployed_mode_cannot_be_changed():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    network.eval()[2].train()
    deployed = deploy(network)
    access = Access(deployed)
    modes = [module.training for module in network.modules()]
    for module in (deployed, access):
        assert module.train() is module and module.eval() is module
        module.train(True)
        assert [module.training for module in network.modules()] == modes
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert access.to(torch.float64) is access
    assert network[3].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("front", "kind"),
    [(nn.Identity(), "none"), (Noise(), "image"), (Noise(shared=True), "call")]
    + [(nn.Dropout(0.5), "image"), (Foreign(), "image")],
    ids=["none", "image", "call", "dropout", "foreign"],
)
def test_the_kind_of_randomness_is_found_out(front, kind):
    deployed = deploy(nn.Sequential(front, nn.Flatten(), nn.Linear(64, 10, bias=False)), draws=6)
    assert deployed.randomness == [kind]
    assert deployed.stochastic == (kind != "none")
    assert deployed.draws == (1 if kind == "none" else 6)
    assert Access(deployed, draws=20).draws == (1 if kind == "none" else 20)
    assert Access(deployed).exact == (kind == "none")


def test_probing_leaves_the_random_streams_alone():
    network = classifier(0, Foreign(), Noise())
    before = streams()
    deploy(network)
    assert streams() == before


def streams():
    """The state of all three global random streams, comparable."""
    name, keys, *rest = np.random.get_state()
    state = torch.get_rng_state()
    return random.getstate(), (name, keys.tobytes(), *rest), state.numpy().tobytes()


@pytest.mark.parametrize("shared", [False, True], ids=["image", "call"])
def test_draws_in_one_pass_are_distributed_as_one_by_one(shared):
    torch.manual_seed(0)
    deployed = deploy(nn.Sequential(Noise(shared), nn.Flatten(), nn.Linear(64, 3)), labels=3)
    x = torch.rand(2, *SHAPE)
    together = deployed.sample(x, 4000).logits[:, 0]  # (S, N, L)
    apart = torch.stack([deployed.sample(x, 1).logits[0, 0] for _ in range(4000)])
    spread = apart.std(0)
    assert ((together.mean(0) - apart.mean(0)).abs() < 5 * spread * (2 / 4000) ** 0.5).all()
    torch.testing.assert_close(together.std(0), spread, rtol=0.08, atol=0)
    for logits in (together, apart):  # do two images share their noise?
        centred = (logits - logits.mean(0)) / logits.std(0)
        correlation = (centred[:, 0] * centred[:, 1]).mean(0)
        assert torch.allclose(correlation, torch.tensor(float(shared)), atol=0.08)
        following = (centred[:-1] * centred[1:]).mean(0)
        assert following.abs().max() < 0.08  # draws are independent


def test_a_draw_has_all_members_in_their_order(digits):
    x = digits[0]
    networks = [classifier(0), classifier(1, Noise()), classifier(2)]
    logits = deploy(*networks).sample(x, 5).logits
    assert logits.shape == (5, 3, 16, 10)
    for member in (0, 2):
        assert torch.equal(logits[:, member], networks[member](x).expand(5, 16, 10))
    assert not torch.equal(logits[0, 1], logits[1, 1])


@pytest.mark.parametrize("noise", [False, True])
def test_features_are_those_of_the_same_draw(noise, digits):
    members = [Named(0, noise), Named(1, noise)]
    draw = deploy(*members).sample(digits[0], 3, features=True)
    assert draw.features.shape == (3, 2, 16, 6)
    for index, member in enumerate(members):
        logits = member.readout(draw.features[:, index])
        torch.testing.assert_close(logits, draw.logits[:, index])


@pytest.mark.parametrize("chunk", [1, 5, 2048])
def test_passes_of_any_size_give_the_same_draws(chunk, digits):
    deployed = deploy(classifier(0), classifier(1))
    expected = deployed.sample(digits[0], 1).logits
    deployed.chunk = chunk
    torch.testing.assert_close(deployed.draw(digits[0], 1).logits, expected)


@pytest.mark.parametrize(("times", "draws"), [(1, 1), (7, 5), (3, 100)])
def test_every_decision_has_draws_of_its_own(times, draws, digits):
    deployed = deploy(classifier(0, Noise()), rule=Vote(majority=False), draws=draws)
    torch.manual_seed(0)
    decisions = deployed.decide(digits[0], times)
    assert decisions.shape == (times, 16) and decisions.dtype == torch.int64
    torch.manual_seed(0)
    group = max(1, 64 // draws)  # entries that are drawn together
    counts = [min(group, times - start) for start in range(0, times, group)]
    logits = torch.cat([deployed.draw(digits[0], count * draws).logits for count in counts])
    for index, decided in enumerate(decisions):
        own = Draw(logits[index * draws : (index + 1) * draws])
        assert torch.equal(decided, deployed.rule.decide(own))


@pytest.mark.parametrize(
    ("shape", "n"), [((1, 8, 8), 2048), ((3, 32, 32), 341), ((3, 224, 224), 8)]
)
def test_images_at_once(shape, n):
    assert images_at_once(shape) == n


class Small(nn.Module):
    """A network on a machine with memory for five images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if len(x) > 5:
            raise torch.OutOfMemoryError("simulated")
        return self.inner(x)


@pytest.mark.parametrize(
    "ask",
    [lambda access, x: access(x), lambda access, x: access.deployed.draw(x, 1).logits[0, 0]],
    ids=["forward", "draw"],
)
def test_a_short_memory_halves_the_chunk(ask, digits):
    network = classifier(0)
    access = Access(deploy(Small(network)))
    access.deployed.chunk = 16
    torch.testing.assert_close(ask(access, digits[0]), network(digits[0]))
    assert access.deployed.chunk == 4


def test_a_pass_is_repeated_with_the_same_randomness(digits):
    short, long = deploy(Small(classifier(0, Noise()))), deploy(classifier(0, Noise()))
    short.chunk, long.chunk = 16, 4
    answers = []
    for deployed in (short, long):
        torch.manual_seed(0)
        answers.append(deployed.draw(digits[0], 1).logits)
    torch.testing.assert_close(*answers)


class Spread:
    """A loss of logits and features that is no mean over draws."""

    features = True

    def __call__(self, draw, y, target):
        return ce(MeanProbabilities().scores(draw), y) + draw.features.square().sum((0, 1, 3)).log()


LOSSES = {"ce": None, "vote": Votes(), "features": Spread()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("noise", [Noise(), Foreign()], ids=["torch", "foreign"])
def test_a_replayed_gradient_is_that_of_one_pass(loss, noise, digits):
    x, y = digits
    network = Named(0)
    network.noise = noise
    members = [network, Named(1, noise=False)]
    steps = []
    for chunk in (16 * 8, 16 * 2):  # eight draws in one pass, and in four
        access = Access(deploy(*members, rule=MeanProbabilities()), draws=8)
        access.deployed.chunk = chunk
        assert len(access.deployed.slices(16, 8)) == 16 * 8 / chunk
        seed_everything(3)
        # Python's stream gives one number a pass: fix it, that passes of any size are alike
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "gauss", lambda mean, deviation: 0.5)
            steps.append(access.gradient(x, y, LOSSES[loss] or access.score_loss(ce)))
    torch.testing.assert_close(steps[1].loss, steps[0].loss)
    torch.testing.assert_close(steps[1].gradient, steps[0].gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps[1].lost, steps[0].lost)


def test_a_replay_repeats_what_every_stream_gave(digits):
    x, y = digits
    seen = []
    network = classifier(0, Foreign(), Noise())
    network[1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    access = Access(deploy(network), draws=6)
    access.deployed.chunk = 16 * 2
    seen.clear()
    access.gradient(x, y, access.score_loss(ce))
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("own", [True, False])
def test_lost_is_the_decision_and_votes_are_draws_and_members(own, digits):
    x, y = digits
    right, wrong = (Constant(F.one_hot(label, 10).float()) for label in (y, (y + 1) % 10))
    for members, rule, lost, votes in (
        ([right, wrong, wrong], MeanLogits(), 1, 2 / 3),
        ([right, right, wrong], MeanLogits(), 0, 1 / 3),
        ([right, wrong], Vote(), 0.5, 1 / 2),  # no answer is half an error
        ([right], Vote(), 0, 0),
    ):
        access = Access(deploy(*members, rule=rule), own=own)
        verdict = access.judge(x, y, access.score_loss(ce), None, 5)
        assert verdict.lost.tolist() == [lost] * 16
        torch.testing.assert_close(verdict.votes, torch.full((16,), float(votes)))
        step = access.gradient(x, y, access.score_loss(ce))
        assert torch.equal(step.lost, verdict.lost)


def test_lost_counts_calls_of_the_whole_defense(digits):
    x, y = digits
    logits = F.one_hot(torch.stack([y, y, y + 1, y, y + 1, y + 1, y + 1]) % 10, 10).float()
    draw = Draw(logits[:, None])
    access = Access(deploy(classifier(0, Noise()), rule=Vote(), draws=3), draws=7)
    lost = access._lost(draw, y, None)
    assert lost.tolist() == pytest.approx([2 / 3] * 16)  # right, wrong, and one draw alone: wrong


def test_a_verdict_is_worse_by_its_first_difference():
    rows = [[0, 0, 9], [0, 1, 0], [0, 1, 1], [0.5, 0, 0], [1, 0, 0]]
    for i, low in enumerate(rows):
        for j, high in enumerate(rows):
            one, other = (Verdict(*torch.tensor(row).split(1)) for row in (high, low))
            assert bool(one.worse_than(other)) == (j > i)


class Constant(nn.Module):
    """Always these logits, the first of them for a batch of another size."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        rows = self.logits if len(x) == len(self.logits) else self.logits[:1].expand(len(x), -1)
        return rows + 0 * x.flatten(1)[:, :1]


def test_targeted_lost_counts_the_target(digits):
    x, y = digits
    target = (y + 1) % 10
    access = Access(deploy(Constant(F.one_hot(target, 10).float())))
    loss = access.score_loss(ce)
    assert (access.gradient(x, y, loss, target).lost == 1).all()
    assert (access.gradient(x, y, loss, (target + 1) % 10).lost == 0).all()


def test_passes_are_counted(digits):
    x, y = digits
    members = [classifier(0, Noise()), classifier(1, Noise())]
    access = Access(deploy(*members, draws=5), draws=3)
    scores = access(x.clone().requires_grad_())
    assert cost(access) == (16 * 3 * 2, 0, 16 * 3)
    scores.sum().backward()
    assert cost(access) == (16 * 3 * 2, 16 * 3 * 2, 16 * 3)
    access.cost.forwards = access.cost.backwards = access.cost.queries = 0
    access.gradient(x, y, access.score_loss(ce))
    assert cost(access) == (16 * 3 * 2, 16 * 3 * 2, 16 * 3)
    access.deployed.chunk = 16  # three passes: a replay asks twice
    access.gradient(x, y, access.score_loss(ce))
    assert cost(access)[:2] == (3 * 16 * 3 * 2, 2 * 16 * 3 * 2)
    access.gradient(x, y, Votes())  # a mean over draws needs no replay
    assert cost(access)[:2] == (4 * 16 * 3 * 2, 3 * 16 * 3 * 2)


def cost(access):
    return access.cost.forwards, access.cost.backwards, access.cost.queries


def test_predictions_are_counted_by_the_deployed_draws(digits):
    access = Access(deploy(classifier(0, Noise()), draws=5), draws=3)
    Estimator(access).predict(digits[0].numpy())
    assert cost(access) == (16 * 5, 0, 16 * 5)


def test_any_float_in_any_layout_is_taken(digits):
    network = classifier(0)
    access = Access(deploy(network))
    x = digits[0].double().transpose(2, 3).requires_grad_()
    scores = access(x)
    assert torch.equal(scores, network(digits[0].transpose(2, 3).contiguous()))
    slope = torch.autograd.grad(scores.sum(), x)[0]
    assert slope.dtype == torch.float64 and slope.shape == x.shape
    predicted = Estimator(access).predict(x.detach().numpy())
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, scores.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_query_access_has_no_gradient(digits):
    x = digits[0].clone().requires_grad_()
    network = classifier(0)
    queries, full = (Access(deploy(network), gradients=g) for g in (False, True))
    assert not queries(x).requires_grad and full(x).requires_grad
    assert torch.equal(queries(x), full(x))


def test_predict_gives_log_scores_of_the_deployed_draws(digits):
    x = digits[0]
    members = [classifier(0, Noise()), classifier(1, Noise())]
    deployed = deploy(*members, rule=Vote(), draws=5)
    estimator = Estimator(Access(deployed))
    torch.manual_seed(0)
    predicted = estimator.predict(x.numpy())
    torch.manual_seed(0)
    mean = deployed.sample(x, 5).logits.softmax(-1).mean((0, 1))
    assert predicted.dtype == np.float32 and predicted.shape == (16, 10)
    np.testing.assert_allclose(np.exp(predicted), mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["fit", "fit_generator"])
def test_a_deployed_defense_cannot_be_trained(name, digits):
    estimator = Estimator(Access(deploy(classifier(0))))
    with pytest.raises(NotImplementedError, match="cannot be trained; use 'robbench train'"):
        getattr(estimator, name)(digits[0].numpy(), digits[1].numpy())


def test_arts_gradients_are_those_of_autograd(digits):
    x, y = digits
    network = classifier(0)
    estimator = Estimator(Access(deploy(network)))
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(network(leaf), y)
    expected = torch.autograd.grad(loss, leaf)[0].numpy()
    found = estimator.loss_gradient(x.numpy(), np.eye(10, dtype=np.float32)[y])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)
    jacobian = estimator.class_gradient(x.numpy(), label=3)[:, 0]
    expected = torch.autograd.grad(network(leaf)[:, 3].sum(), leaf)[0].numpy()
    np.testing.assert_allclose(jacobian, expected, rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def trained():
    """A defense whose mode matters: normalised in eval, dropout in train, trained a little."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(1),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 10),
    )
    split = datasets.load("digits").train
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(split.x), split.y).backward()
        optimizer.step()
    optimizer.zero_grad()
    network.eval()[5].train()
    return network


def state(module):
    """All that an attack could leave behind, comparable."""
    return (
        {name: m.training for name, m in module.named_modules()},
        {name: b.numpy().tobytes() for name, b in module.named_buffers()},
        {name: p.detach().numpy().tobytes() for name, p in module.named_parameters()},
        {name: (p.grad, p.requires_grad) for name, p in module.named_parameters()},
        streams(),
        Path.cwd(),
    )


ART = {
    "FastGradientMethod": {"eps": 0.2},
    "BasicIterativeMethod": {"eps": 0.2, "eps_step": 0.05, "max_iter": 3},
    "ProjectedGradientDescent": {"eps": 0.2, "eps_step": 0.1, "max_iter": 3, "num_random_init": 1},
    "MomentumIterativeMethod": {"eps": 0.2, "eps_step": 0.1, "max_iter": 3},
    "AutoProjectedGradientDescent": {"eps": 0.2, "max_iter": 3, "nb_random_init": 1},
    "DeepFool": {"max_iter": 5},
    "CarliniL2Method": {"max_iter": 5, "binary_search_steps": 1, "initial_const": 10.0},
    "ElasticNet": {"max_iter": 5, "binary_search_steps": 1, "initial_const": 10.0},
    "NewtonFool": {"max_iter": 3},
    "SaliencyMapMethod": {"theta": 0.5, "gamma": 0.2},
    "SquareAttack": {"eps": 0.3, "max_iter": 10, "nb_restarts": 1},
    "HopSkipJump": {"max_iter": 1, "max_eval": 20, "init_eval": 5},
}
TORCHATTACKS = {
    "FGSM": {"eps": 0.2},
    "BIM": {"eps": 0.2, "alpha": 0.1, "steps": 3},
    "PGD": {"eps": 0.2, "alpha": 0.1, "steps": 3},
    "MIFGSM": {"eps": 0.2, "alpha": 0.1, "steps": 3},
    "PGDL2": {"eps": 1.0, "alpha": 0.5, "steps": 3},
    "EOTPGD": {"eps": 0.2, "alpha": 0.1, "steps": 3, "eot_iter": 2},
    "APGD": {"eps": 0.2, "steps": 3},
    "TPGD": {"eps": 0.2, "alpha": 0.1, "steps": 3},
    "DeepFool": {"steps": 5},
    "Square": {"eps": 0.3, "n_queries": 20},
    "Jitter": {"eps": 0.2, "alpha": 0.1, "steps": 3},
    "OnePixel": {"pixels": 3, "steps": 2, "popsize": 4},
}


def run_art(name, options, access, x, y):
    if "verbose" in getattr(evasion, name).attack_params:
        options = options | {"verbose": False}
    attack = getattr(evasion, name)(Estimator(access), **options)
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def run_torchattacks(name, options, access, x, y):
    return getattr(torchattacks, name)(access, **options)(x, y)


RUNS = [(run_art, *case) for case in ART.items()]
RUNS += [(run_torchattacks, *case) for case in TORCHATTACKS.items()]


@pytest.mark.parametrize(
    ("run", "name", "options"), RUNS, ids=[f"{case[0].__name__[4:]}-{case[1]}" for case in RUNS]
)
def test_a_library_works_on_the_defense_as_it_is_and_leaves_it_so(
    run, name, options, trained, digits
):
    x, y = digits[0][:6], digits[1][:6]
    access = Access(deploy(trained, trained, rule=MeanProbabilities(), draws=3), draws=2)
    before, given = state(access), x.clone()
    with sandboxed(access, seed=1):
        answer = run(name, options, access, x, y)
    assert state(access) == before
    assert torch.equal(x, given)
    assert answer.shape == x.shape and answer.isfinite().all() and not torch.equal(answer, x)


@pytest.mark.parametrize(
    "measure",
    [
        lambda estimator, x, y: metrics.empirical_robustness(
            estimator, x, "fgsm", {"eps_step": 0.05, "eps": 1.0}
        ),
        lambda estimator, x, y: metrics.loss_sensitivity(estimator, x, y),
        lambda estimator, x, y: metrics.clever_u(
            estimator, x[0], nb_batches=8, batch_size=4, radius=1, norm=2, verbose=False
        ),
        lambda estimator, x, y: metrics.adversarial_accuracy(
            estimator, x, y, "fgsm", {"eps": 0.05}
        ),
    ],
    ids=["empirical_robustness", "loss_sensitivity", "clever_u", "adversarial_accuracy"],
)
def test_arts_metrics_take_the_estimator(measure, trained, digits):
    x, y = digits[0][:8].numpy(), np.eye(10, dtype=np.float32)[digits[1][:8]]
    access = Access(deploy(trained, rule=MeanProbabilities(), draws=3))
    before = state(access)
    with sandboxed(access, seed=1):
        value = measure(Estimator(access), x, y)
    assert state(access) == before
    assert np.isfinite(value) and value > 0


def test_empirical_robustness_of_a_linear_model_is_its_margin(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = 0.4 + 0.2 * digits[0]
    with torch.no_grad():
        scores = network(x)
        weight = (network[1].weight[0] - network[1].weight[1]).abs().sum()
    radius = (scores[:, 0] - scores[:, 1]).abs() / weight  # the linf distance to the border
    step = 1e-3
    value = metrics.empirical_robustness(
        Estimator(Access(deploy(network, labels=2))),
        x.numpy(),
        "fgsm",
        {"eps_step": step, "eps": 1.0, "norm": np.inf},
    )
    relative = radius / x.flatten(1).amax(1)
    assert relative.mean() <= value <= relative.mean() + 1.1 * step / float(x.amin((1, 2, 3)).min())


def test_the_sandbox_undoes_what_bad_code_does(trained):
    deployed = deploy(trained)
    before = state(deployed)
    with pytest.raises(RuntimeError, match="as planned"), sandboxed(deployed, seed=0):
        assert Path.cwd() != before[-1]
        for module in trained.modules():
            nn.Module.train(module)
        trained[0].running_mean.fill_(7)
        for parameter in trained.parameters():
            parameter.requires_grad_()
        trained(torch.rand(4, *SHAPE)).sum().backward()
        seed_everything(99)
        Path("left-behind").touch()
        raise RuntimeError("as planned")
    assert state(deployed) == before
    assert not Path("left-behind").exists()


def test_the_sandbox_has_streams_of_its_own_seed():
    deployed = deploy(classifier(0))
    numbers = []
    for seed in (1, 1, 2):
        with sandboxed(deployed, seed):
            numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert numbers[0] == numbers[1]
    assert all(a != b for a, b in zip(numbers[0], numbers[2], strict=True))


def test_streams_are_given_back_also_after_an_error():
    before = streams()
    with pytest.raises(RuntimeError), preserved_random_state():
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError
    assert streams() == before


class Either(nn.Module):
    """One of two answers for a whole call, by a stream of the caller's choice."""

    def __init__(self, toss):
        super().__init__()
        self.toss = toss

    def forward(self, x):
        return x.flatten(1)[:, :10] * (1 if self.toss() else -1)


@pytest.mark.parametrize(
    "toss",
    [lambda: torch.rand(()) < 0.2, lambda: random.random() < 0.5, lambda: np.random.rand() < 0.5],
    ids=["torch", "python", "numpy"],
)
def test_a_choice_that_is_made_once_per_call_is_seen(toss):
    deployed = Deployed(nn.ModuleList([Either(toss)]), MeanLogits(), (1, 8, 8), 10)
    assert deployed.randomness == ["call"]


def test_weights_that_foreign_code_writes_are_put_back():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), (1, 8, 8), 10)
    before = [parameter.clone() for parameter in network.parameters()]
    with sandboxed(deployed, 0):
        for parameter in network.parameters():
            parameter.data.zero_()
    assert all(map(torch.equal, before, network.parameters()))


def test_the_sandbox_names_what_was_changed_and_only_that():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout())
    deployed = Deployed(nn.ModuleList([network.eval()]), MeanLogits(), (1, 8, 8), 10)
    with sandboxed(deployed, 0) as changed:
        deployed.sample(torch.rand(4, 1, 8, 8), 1)
    assert changed == []
    with sandboxed(deployed, 0) as changed:
        nn.Module.train(network[3])
        network[2].running_mean.add_(1)
        network[1].bias.data.add_(1)
        assert changed == [], "it is told afterwards"
    assert changed == ["members.0.3", "members.0.2.running_mean", "members.0.1.bias"]
    with sandboxed(deployed, 0) as changed:
        pass
    assert changed == [], "all was put back"


def test_the_sandbox_names_what_was_changed_before_an_error():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout()).eval()
    deployed = Deployed(nn.ModuleList([network]), MeanLogits(), (1, 8, 8), 10)
    with pytest.raises(RuntimeError), sandboxed(deployed, 0) as changed:
        nn.Module.train(network[2])
        raise RuntimeError
    assert changed == ["members.0.2"]
