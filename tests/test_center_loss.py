"""Learned centres against closed forms, torch's distributions and softmax regression."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from robbench import datasets
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.recipes import Batch
from robbench.rules import Draw
from robbench.training import train

SHAPE, LABELS = (1, 8, 8), 10
PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)


def one(spec):
    """The single defense of `name(...)`, on a tiny network."""
    name, _, rest = spec.partition("(")
    return resolve(f"{name}(network=mlp(hidden=[12]), {rest or ')'}")[0]


def fresh(defense):
    torch.manual_seed(0)
    return defense.build(SHAPE, LABELS)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n):
    return numbers(n, *SHAPE).float().sigmoid(), torch.arange(n) % LABELS


def mixture(diagonal=True, scale=0.3):
    """A readout in float64 whose variances differ, and the same Gaussians in torch's words."""
    kind = "diagonal" if diagonal else "unit"
    readout = fresh(one(f"l-gm(variance={kind})"))[0].readout.double()
    if diagonal:
        readout.log_excess.data = scale * numbers(LABELS, 12, seed=3)
    spread = readout.variances().sqrt()
    return readout, Independent(Normal(readout.means, spread), 1)


@pytest.fixture(scope="module")
def digits():
    whole = datasets.load("digits")
    return replace(whole, train=Split(*(tensor[:200] for tensor in whole.train)))


def trained(spec, digits):
    defense = one(spec)
    members = fresh(defense)
    curve = train(defense, members, digits, 0, torch.device("cpu"))
    return members, curve


@pytest.mark.parametrize("adversarial", ["none", "pgd(eps=0.1, steps=2, clean=1)"])
def test_without_its_weight_center_loss_is_the_plain_network_bit_for_bit(adversarial, digits):
    options = f"epochs=2, adversarial={adversarial}"
    plain, _ = trained(f"standard({options})", digits)
    ours, _ = trained(f"center-loss(lam=0, {options})", digits)
    x, _ = images(32)
    assert torch.equal(ours[0](x), plain[0](x))


def test_centres_move_by_the_update_of_the_paper():
    """Wen et al. 2016, eq. 4, worked by hand: two images of label 0, one of label 2."""
    centres = fresh(one("center-loss(rate=0.5)"))[0].centres.train()
    centres.centres[0], centres.centres[2] = 1.0, -2.0
    z = torch.stack([torch.full((12,), value) for value in (3.0, 6.0, 4.0)])
    distances = centres(z, torch.tensor([0, 0, 2]))
    assert distances.tolist() == [12 * 4 / 2, 12 * 25 / 2, 12 * 36 / 2]  # before the move
    assert centres.centres[0].tolist() == pytest.approx([1 + 0.5 * (2 + 5) / 3] * 12)
    assert centres.centres[2].tolist() == pytest.approx([-2 + 0.5 * 6 / 2] * 12)
    assert not centres.centres[[1, *range(3, LABELS)]].any()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), steps=st.integers(1, 4))
@PROPERTY
def test_centres_close_in_on_the_class_mean_geometrically(seed, n, steps):
    """From 0, with all of the batch of one label: c = (1 - (1 / (1 + n))^k) mean."""
    centres = fresh(one("center-loss(rate=1)"))[0].double().centres.train()
    z, y = numbers(n, 12, seed=seed), torch.zeros(n, dtype=torch.int64)
    for _ in range(steps):
        centres(z, y)
    expected = (1 - (1 + n) ** -steps) * z.mean(dim=0)
    torch.testing.assert_close(centres.centres[0], expected)


def test_centres_rest_in_evaluation_mode():
    centres = fresh(one("center-loss"))[0].centres.eval()
    centres(torch.ones(4, 12), torch.arange(4))
    assert not centres.centres.any()


def test_the_center_loss_passes_gradcheck_and_pulls_to_the_centre():
    centres = fresh(one("center-loss"))[0].double().centres.eval()
    centres.centres.copy_(numbers(LABELS, 12, seed=1))
    z, y = numbers(4, 12).requires_grad_(), torch.tensor([1, 1, 0, 7])
    assert torch.autograd.gradcheck(lambda z: centres(z, y), z)
    pull = torch.autograd.grad(centres(z, y).sum(), z)[0]
    torch.testing.assert_close(pull, (z - centres.centres[y]).detach())


@pytest.mark.parametrize("members", [1, 2])
def test_the_weight_of_the_center_loss_is_lambda_per_member(members):
    x, y = images(8)
    losses = []
    for lam in (0.0, 0.5, 1.5):
        defense = one(f"center-loss(lam={lam}, members={members})")
        built = fresh(defense).eval()
        losses.append(defense.loss_on(built, x, y))
        squares = [member.features(x).square().sum(dim=1) for member in built]  # centres are 0
    for lam, loss in ((0.5, losses[1]), (1.5, losses[2])):
        torch.testing.assert_close(loss - losses[0], lam / 2 * sum(squares))


def test_center_loss_gathers_the_features_of_a_label(digits):
    """What the paper is about: less scatter within labels, in shares of that between them."""
    shares = []
    for lam in (0, 1):
        members, _ = trained(f"center-loss(lam={lam}, epochs=15, batch_size=16)", digits)
        x, y = digits.train
        with torch.no_grad():
            z = members[0].features(x)
        means = torch.stack([z[y == label].mean(dim=0) for label in range(LABELS)])
        shares.append(float((z - means[y]).square().sum() / (z - z.mean(dim=0)).square().sum()))
    assert shares[1] < 0.75 * shares[0]


@pytest.mark.parametrize("diagonal", [True, False])
def test_mixture_scores_are_log_densities(diagonal):
    readout, gaussians = mixture(diagonal)
    z = numbers(20, 12, seed=5)
    constant = 6 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    expected = gaussians.log_prob(z[:, None]) + constant
    torch.testing.assert_close(readout(z), expected)


def test_without_margin_l_gm_is_the_posterior_and_the_likelihood():
    """-log p(y | z) - λ log p(z | y), the Gaussians equally probable."""
    readout, gaussians = mixture()
    z, y = numbers(20, 12, seed=5), torch.arange(20) % LABELS
    joint = MixtureSameFamily(Categorical(logits=torch.zeros(LABELS)), gaussians)
    likelihood = gaussians.log_prob(z[:, None]).gather(1, y[:, None])[:, 0]
    posterior = likelihood - torch.log(torch.tensor(LABELS)) - joint.log_prob(z)
    constant = 6 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    found = one("l-gm(alpha=0, lam=0.25)").mixture_loss(
        readout(z), readout.half_log_determinant(), y
    )
    torch.testing.assert_close(found, -posterior - 0.25 * (likelihood + constant))


def test_the_margin_counts_the_distance_to_the_label_more_often():
    readout, _ = mixture()
    z, y, alpha = numbers(20, 12, seed=5), torch.arange(20) % LABELS, 0.7
    offsets = (z - readout.means[y]).square() / readout.variances()[y]
    scores = readout(z)
    kept = scores - alpha * F.one_hot(y, LABELS) * offsets.sum(dim=1, keepdim=True) / 2
    found = one(f"l-gm(alpha={alpha}, lam=0)").mixture_loss(
        scores, readout.half_log_determinant(), y
    )
    torch.testing.assert_close(found, F.cross_entropy(kept, y, reduction="none"))


def test_with_unit_variances_and_no_extras_it_is_softmax_regression():
    defense = one("l-gm(alpha=0, lam=0, variance=unit)")
    members, (x, y) = fresh(defense).double(), images(20)
    means, z = members[0].readout.means, members[0].features(x.double())
    logits = F.linear(z, means, -means.square().sum(dim=1) / 2)
    expected = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(defense.loss_on(members, x.double(), y), expected)


def test_the_l_gm_loss_and_its_readout_pass_gradcheck():
    readout, _ = mixture()
    z, y = numbers(4, 12, seed=5).requires_grad_(), torch.tensor([1, 1, 0, 7])
    names = [name for name, _ in readout.named_parameters()]

    def log_densities(z, *values):
        return torch.func.functional_call(readout, dict(zip(names, values, strict=True)), (z,))

    def loss(scores, half_log_determinant):
        return one("l-gm").mixture_loss(scores, half_log_determinant, y)

    parameters = [value.detach().clone().requires_grad_() for value in readout.parameters()]
    assert torch.autograd.gradcheck(log_densities, (z, *parameters))
    inputs = readout(z), readout.half_log_determinant()
    assert torch.autograd.gradcheck(loss, [value.detach().requires_grad_() for value in inputs])


@given(logarithm=st.floats(-1e4, 10))
@PROPERTY
def test_variances_stay_positive_and_the_loss_a_number(logarithm):
    readout, _ = mixture()
    readout.log_excess.data.fill_(logarithm)
    y = torch.arange(LABELS)
    loss = one("l-gm").mixture_loss(readout(readout.means), readout.half_log_determinant(), y)
    assert (readout.variances() > 0).all()
    assert loss.isfinite().all()


@pytest.mark.parametrize("name", ["center-loss", "l-gm"])
@pytest.mark.parametrize("adversarial", ["fgsm", "pgd(steps=2, targeted=true)", "trades(steps=2)"])
def test_adversarial_training_goes_with_learned_centres(name, adversarial, digits):
    members, curve = trained(f"{name}(epochs=4, adversarial={adversarial})", digits)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_adversarial_examples_for_l_gm_ascend_the_log_odds():
    defense = one("l-gm(adversarial=pgd(eps=0.1, steps=10, random=false))")
    members, (x, y) = fresh(defense), images(16)
    moved = defense.batch(members, Batch(x, y, x, LABELS), torch.Generator().manual_seed(0)).x
    before, after = (
        defense.losses["log-odds"](defense.forward(members, v), y, None) for v in (x, moved)
    )
    assert (after > before).all()


def test_the_log_odds_of_l_gm_are_those_of_its_densities():
    readout, gaussians = mixture()
    z, y, target = (
        numbers(20, 12, seed=5),
        torch.arange(20) % LABELS,
        (torch.arange(20) + 3) % LABELS,
    )
    logs = gaussians.log_prob(z[:, None])
    others = logs.masked_fill(F.one_hot(target, LABELS).bool(), -torch.inf).logsumexp(dim=1)
    found = one("l-gm").losses["log-odds"](Draw(readout(z)[None, None]), y, target)
    torch.testing.assert_close(found, logs.gather(1, target[:, None])[:, 0] - others)


@pytest.mark.parametrize(
    "wrong", ["center-loss(rate=2)", "center-loss(lam=-1)", "l-gm(alpha=-1)", "l-gm(variance=full)"]
)
def test_values_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(InputError, match=wrong.partition("(")[2].partition("=")[0]):
        one(wrong)
