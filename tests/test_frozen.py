"""Draws that are always the same: a surrogate, and a defense whose seed the attacker knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import robbench
from robbench import datasets, registry
from robbench.checkpoints import Shelf
from robbench.defense import canonical, resolve, with_preset
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.frozen import Frozen
from robbench.grid import Block
from robbench.judge import score
from robbench.rules import MeanLogits, Vote
from robbench.siblings import siblings

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")
SIGMA = 0.5
SHORT = "epochs=1, network=mlp(hidden=[8])"
NOISY = f"sdr-learnable({SHORT})"
KNOWN = f"sdr-learnable(known_seed=3, {SHORT})"
VOTING = "ito(known_seed=0, base=none, draws=7, members=2, epochs=1, network=resnet8(width=1))"


class PerImage(nn.Module):
    """Noise on the image, of each image its own."""

    def forward(self, x):
        return x + SIGMA * torch.randn_like(x)


class PerCall(nn.Module):
    """Noise on the image, of all images of a call the same."""

    def forward(self, x):
        return x + SIGMA * torch.randn_like(x[:1])


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").subset(12)


@pytest.fixture(params=[PerImage, PerCall], ids=["image", "call"])
def deployed(request):
    """A random linear defense, whose logits have a mean and a variance in closed form."""
    return Deployed(nn.ModuleList([nn.Sequential(request.param(), linear())]), MeanLogits(),
                    SHAPE, 10)  # fmt: skip


# ----------------------------------------------------------------------------------------- draws


def test_frozen_draws_do_not_depend_on_the_streams_of_the_caller_nor_move_them(deployed, digits):
    frozen = Frozen(deployed, [1, 2])
    torch.manual_seed(0)
    first = frozen.sample(digits.x, 1).logits
    ahead = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(ahead, torch.rand(3))
    assert torch.equal(frozen.sample(digits.x, 1).logits, first)


def test_an_image_meets_the_same_draws_in_any_order_and_alone(deployed, digits):
    frozen = Frozen(deployed, [1, 2])
    whole = frozen.sample(digits.x, 1).logits
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(frozen.sample(digits.x[order], 1).logits, whole[:, :, order])
    alone = torch.cat([frozen.sample(x[None], 1).logits for x in digits.x], dim=2)
    torch.testing.assert_close(alone, whole)
    frozen.chunk = 5
    torch.testing.assert_close(frozen.draw(digits.x, 1).logits, whole)


def test_the_mean_over_many_seeds_is_the_mean_of_fresh_draws_in_closed_form(deployed, digits):
    count = 600
    logits = Frozen(deployed, range(count)).sample(digits.x[:3], 1).logits[:, 0]
    layer = deployed.members[0][1][1]
    spread = SIGMA * layer.weight.norm(dim=1)
    expected = layer(digits.x[:3].flatten(1))
    error = (logits.mean(dim=0) - expected).abs() / (spread / math.sqrt(count))
    assert error.max() < 4.5
    ratio = logits.var(dim=0) / spread**2  # of chi-squares with so many degrees of freedom
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / count)


def test_known_and_fresh_draws_have_one_distribution(deployed, digits):
    known = Frozen(deployed, range(300)).sample(digits.x[:1], 1).logits[:, 0, 0]
    torch.manual_seed(0)
    fresh = deployed.sample(digits.x[:1], 300).logits[:, 0, 0]
    labels = range(10)
    assert min(stats.ks_2samp(known[:, i], fresh[:, i]).pvalue for i in labels) > 1e-3


def test_members_do_not_share_their_noise(digits):
    """A mean over members that do would be as noisy as one of them."""
    member = nn.Sequential(PerImage(), linear())
    deployed = Deployed(nn.ModuleList([member, member]), MeanLogits(), SHAPE, 10)
    seeds = torch.randint(2**31, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = Frozen(deployed, seeds).sample(digits.x[:1], 1).logits
    first, second = drawn[:, :, 0, 0].T.numpy()
    assert stats.pearsonr(first, second).pvalue > 1e-3
    ratio = drawn.mean(dim=1).var(dim=0) / drawn[:, 0].var(dim=0)
    assert (ratio - 0.5).abs().max() < 0.15


def test_what_is_deterministic_beside_what_is_random_stays_as_it_is(digits):
    members = nn.ModuleList([nn.Sequential(PerImage(), linear()), linear(1)])
    logits = Frozen(Deployed(members, MeanLogits(), SHAPE, 10), [1, 2]).sample(digits.x, 1).logits
    assert not torch.equal(logits[0, 0], logits[1, 0])
    assert torch.equal(logits[0, 1], logits[1, 1])
    torch.testing.assert_close(logits[0, 1], members[1](digits.x))


def test_a_frozen_defense_is_deterministic_and_has_the_gradient_of_its_draws(deployed, digits):
    frozen = Frozen(deployed, [5])
    assert deployed.stochastic and not frozen.stochastic
    x = digits.x[:2].double().requires_grad_()
    double = Frozen(deployed.double(), [5])
    assert torch.autograd.gradcheck(lambda x: double.sample(x, 1).logits, x)


# ---------------------------------------------------------------------------- a seed that is known


RANDOM = [
    name for name in registry.defenses if resolve(with_preset(name, "quick", "digits"))[0].random
]


@pytest.mark.parametrize("name", RANDOM)
def test_the_draws_of_every_random_defense_can_be_fixed(name, digits):
    """Without training: fresh networks draw as trained ones do."""
    data = datasets.load("digits")
    (defense,) = resolve(with_preset(name, "quick", "digits").with_settings({"known_seed": 0}))
    torch.manual_seed(0)
    members = defense.build(data.shape, 10).eval()
    defense.calibrate(members, data)
    deployed = Deployed(members, defense.rule(), data.shape, 10, defense.draws)
    assert deployed.stochastic
    frozen = Frozen(deployed, range(2))
    whole = frozen.sample(digits.x, 1).logits
    assert torch.equal(frozen.sample(digits.x, 1).logits, whole)
    torch.testing.assert_close(frozen.sample(digits.x[4:7], 1).logits, whole[:, :, 4:7])
    assert not torch.allclose(whole[0], whole[1])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf([tmp_path_factory.mktemp("shelf")])


def deploy(shelf, text):
    return shelf.deploy(text, datasets.load("digits"), 0, CPU)


def outcome(trained, digits, seed, draws=1):
    return score(trained, digits.x, digits.y, draws, seed)


def test_a_defense_with_a_known_seed_gives_the_same_answers_every_time(shelf, digits):
    known = deploy(shelf, KNOWN)
    first, second = outcome(known, digits, 0), outcome(known, digits, 99)
    assert all(map(np.array_equal, first, second))
    assert not known.deployed.stochastic


def test_another_seed_is_another_realisation_of_the_same_weights(shelf, digits):
    one, other = deploy(shelf, KNOWN), deploy(shelf, KNOWN.replace("=3", "=4", 1))
    assert one.keys == other.keys == deploy(shelf, NOISY).keys
    logits = [each.deployed.sample(digits.x, 1).logits for each in (one, other)]
    assert logits[0].shape == logits[1].shape and not torch.allclose(*logits)


def test_a_known_seed_fixes_as_many_draws_as_a_decision_takes(shelf, digits):
    known = deploy(shelf, VOTING).deployed
    drawn = known.sample(digits.x, 1).logits
    assert drawn.shape == (7, 2, 12, 10)
    ballots = drawn.argmax(dim=-1).flatten(0, 1)  # (14, N)
    for image, label in enumerate(known.decide(digits.x, 1)[0]):
        counts = torch.bincount(ballots[:, image], minlength=10)
        assert label == (counts.argmax() if counts.max() > 7 else -1)


def test_the_mean_over_known_seeds_is_the_accuracy_of_fresh_draws(digits):
    """What is averaged are whole realisations: each is right or wrong on an image for good."""
    member = nn.Sequential(PerImage(), linear())
    random = Deployed(nn.ModuleList([member] * 3), Vote(majority=False), SHAPE, 10, 2)
    count, rng = 150, torch.Generator().manual_seed(0)
    seeds = torch.randint(2**31, (count, 2), generator=rng).tolist()
    fixed = torch.stack([Frozen(random, each).decide(digits.x, 1)[0] for each in seeds])
    torch.manual_seed(0)
    fresh = random.decide(digits.x, count)
    for image in range(len(digits.y)):
        counts = [torch.bincount(each[:, image] + 1, minlength=11) for each in (fixed, fresh)]
        table = torch.stack(counts).numpy()
        table = table[:, table.sum(axis=0) > 0]
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(
    "text", ["standard", "ito(noise=false)", "sdr-learnable(test=mean)", "smoothing(noise=false)"]
)
def test_a_seed_is_refused_where_nothing_is_drawn(text):
    known = canonical(text).with_settings({"known_seed": 0})
    with pytest.raises(InputError, match="known_seed fixes draws, and nothing here is drawn"):
        resolve(known)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(InputError, match="known_seed = -1"):
        resolve("ito(known_seed=-1)")


def test_joined_defenses_have_one_known_seed():
    with pytest.raises(InputError, match="all random parts need the same known_seed"):
        resolve("ito(known_seed=1) & enresnet")
    with pytest.raises(InputError, match="all random parts need the same known_seed"):
        resolve("ito(known_seed=1) & enresnet(known_seed=2)")
    assert len(resolve("ito(known_seed=1) & enresnet(known_seed=1)")) == 2
    assert len(resolve("ito(known_seed=1) & standard")) == 2  # in which nothing is drawn


def test_a_base_has_no_known_seed():
    with pytest.raises(InputError, match="give known_seed to what builds on it"):
        resolve("mixup-inference(base='ito(known_seed=1)')")


def test_a_known_seed_is_attacked_like_what_is_deterministic():
    blocks = {text: Block(defense=text, attack="pgd", eps="0.1", n=10) for text in (NOISY, KNOWN)}
    data = datasets.load("digits")
    eot = {text: [c.setting.eot for c in block.cells(data)] for text, block in blocks.items()}
    assert max(eot[NOISY]) == 20 and set(eot[KNOWN]) == {1}


def test_a_defense_with_a_known_seed_is_scored_once_and_holds_bitwise():
    results = [
        robbench.evaluate(KNOWN, "digits", "fgsm", eps="0.1", n=10, setting="whitebox", seed=seed)
        for seed in (0, 1)
    ]
    (first,), (second,) = (result.records for result in results)
    assert first.draws == 1
    assert np.array_equal(first.clean_ok, second.clean_ok)
    assert np.array_equal(first.ok, second.ok)  # one step without a random start


@pytest.mark.parametrize("name", ["ito", "enresnet", "sdr-learnable", "smoothing"])
def test_without_noise_a_defense_is_the_same_whatever_the_seed_was(name):
    plain = siblings(name, "digits", "noise-off")
    assert siblings(f"{name}(known_seed=0)", "digits", "noise-off") == plain
    (quiet,) = plain
    (part,) = resolve(quiet)
    assert part.known_seed is None and not part.random


def test_without_noise_all_parts_and_members_are_quiet():
    (quiet,) = siblings("enresnet(known_seed=0)[1]", "digits", "noise-off")
    assert quiet == "enresnet(noise=false)[1]"
    (joined,) = siblings("ito(known_seed=0) & standard", "digits", "noise-off")
    assert [part.random for part in resolve(joined)] == [False, False]
