"""Mixup inference: partners, shares, pools, the switch of the combined rule, and its gradient."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets, registry
from robbench.checkpoints import Shelf
from robbench.datasets import Split
from robbench.defense import INFERENCE, canonical, resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanProbabilities

CPU = torch.device("cpu")
SHAPE, LABELS = (1, 8, 8), 10
TINY = "network=resnet8(width=2), epochs=1, batch_size=16"
BASE = f"base=mixup({TINY})"
VARIANTS = ["ol", "pl", "combined"]
module = inspect.getmodule(registry.defenses.get("mixup-inference"))


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:64] for tensor in digits.train)))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf([tmp_path_factory.mktemp("shelf")])


def members(spec, shelf, dataset):
    return shelf.members(resolve(spec)[0], dataset, 0, CPU)[0]


class Fixed(nn.Module):
    """A network that gives every image the label of its first pixel, in tenths."""

    def forward(self, x):
        distance = x.flatten(1)[:, :1] * 10 - torch.arange(LABELS)
        return -(distance**2)


class Keeping(Fixed):
    """The same, which keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x)
        return super().forward(x)


def labelled_pool(size=3):
    """Images of label y are y / 10 everywhere."""
    values = torch.arange(LABELS).view(LABELS, 1, 1, 1, 1) / 10
    return values.expand(LABELS, size, *SHAPE).contiguous()


def around(network, spec="mixup-inference"):
    return module.MixupInference(network, labelled_pool(), resolve(spec)[0]).eval()


@pytest.mark.parametrize("variant", ["ol", "pl"])
def test_an_image_on_its_own_is_the_base_bit_for_bit(variant, shelf, dataset):
    spec = f"mixup-inference({BASE}, variant={variant}, lam_pl=1, lam_ol=1)"
    alone, base = members(spec, shelf, dataset)[0], members(f"mixup({TINY})", shelf, dataset)[0]
    x = dataset.test.x[:50]
    assert torch.equal(alone(x), base(x))
    if variant == "ol":
        assert torch.equal(alone.features(x), base.features(x))


def test_while_training_nothing_is_mixed(shelf, dataset):
    mixing = members(f"mixup-inference({BASE})", shelf, dataset)[0].train()
    x = dataset.test.x[:20]
    assert torch.equal(mixing(x), mixing.network(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_distributions_over_labels(variant, shelf, dataset):
    spec = f"mixup-inference({BASE}, variant={variant})"
    trained = shelf.deploy(spec, dataset, 0, CPU).deployed
    torch.manual_seed(0)
    scores = trained.rule.scores(trained.draw(dataset.test.x[:30], trained.draws))
    torch.testing.assert_close(scores.softmax(1).sum(1), torch.ones(30))
    combined_once = trained.draw(dataset.test.x[:30], 1).logits[0, 0]
    if variant == "combined":
        torch.testing.assert_close(combined_once.exp().sum(1), torch.ones(30))


def partners(predicted, label=4, n=2000):
    """The labels of the partners of n images that the network gives one label."""
    mixing, x = around(Fixed()), torch.full((n, *SHAPE), label / 10)
    torch.manual_seed(0)
    share = resolve("mixup-inference")[0].lam_pl if predicted else 0.6
    mixed = mixing.mixed(x, torch.full((n,), label), predicted)
    partner = (mixed - share * x)[:, 0, 0, 0] / (1 - share)
    return torch.bincount((partner * 10).round().long(), minlength=LABELS)


def test_the_predicted_labels_partners_all_have_it():
    assert partners(predicted=True).nonzero().flatten().tolist() == [4]


def test_other_labels_partners_never_have_it_and_are_uniform():
    counts = partners(predicted=False)
    assert counts[4] == 0
    others = counts[counts > 0] / 2000
    assert len(others) == LABELS - 1
    assert (others - 1 / 9).abs().amax() < 0.03


def test_the_label_is_the_networks_own():
    network = Keeping()
    x = torch.full((1, *SHAPE), 0.7)
    around(network, "mixup-inference(variant=pl)")(x)
    direct, mixed = network.asked
    assert torch.equal(direct, x)
    torch.testing.assert_close(mixed, torch.full_like(x, 0.7))


@pytest.fixture(scope="module")
def smooth():
    """A network with a derivative everywhere, in float64."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, LABELS)
    return nn.Sequential(*layers).double()


def slope(network, x):
    """The gradient of one logit by the image."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(network(x)[:, 3].sum(), x)[0]


def repeated(mixing):
    def answer(x):
        torch.manual_seed(1)
        return mixing(x)

    return answer


def test_gradients_through_other_labels_are_exact(smooth):
    x = torch.rand(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(repeated(around(smooth).double()), x)


@pytest.mark.parametrize("variant", ["pl", "ol"])
def test_the_gradient_is_the_share_of_that_at_the_mixture(variant, smooth):
    spec = f"mixup-inference(variant={variant}, lam_{variant}=0.3)"
    mixing, x = around(smooth, spec).double(), torch.rand(5, *SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    expected = 0.3 * slope(smooth, mixing.mixture(x))
    if variant == "pl":  # and that at the image, which decides on the partners
        expected += slope(smooth, x)
    torch.testing.assert_close(slope(repeated(mixing), x), expected)


def test_what_steers_the_gradient_adds_nothing_to_the_answer(smooth):
    mixing = around(smooth, "mixup-inference(variant=pl)").double()
    x = torch.rand(5, *SHAPE, dtype=torch.float64)
    answer = repeated(mixing)(x)
    torch.manual_seed(1)
    assert torch.equal(answer, smooth(mixing.mixture(x)))


SHARES = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(
    lambda values: torch.tensor([values], dtype=torch.float64) / sum(values)
)


@given(direct=SHARES, own=SHARES, other=SHARES, gap=st.floats(0, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_switch_asks_by_how_much_the_confidence_falls(direct, own, other, gap):
    chosen = module.switch(direct.log(), own.log(), other.log(), gap)
    fall = max(direct[0].log().exp().tolist()) - max(own[0].log().exp().tolist())
    assert torch.equal(chosen, (own if fall < gap else other).log())


def test_worked_gaps_around_the_published_threshold():
    own, other = torch.tensor([[0.5, 0.5]] * 3).log(), torch.tensor([[0.1, 0.9]] * 3).log()
    direct = torch.tensor([[0.69, 0.31], [0.71, 0.29], [0.55, 0.45]]).log()
    chosen = module.switch(direct, own, other, 0.2)
    assert chosen.argmax(1).tolist()[1] == 1
    assert torch.equal(chosen[[0, 2]], own[[0, 2]])


def test_the_combined_rule_asks_once_five_and_fifteen_times():
    network = Keeping()
    around(network, "mixup-inference(variant=combined)")(torch.rand(2, *SHAPE))
    assert [len(x) for x in network.asked] == [2, 10, 30]


def test_the_mean_over_mixtures_is_that_of_their_probabilities():
    mixing = around(Fixed())
    x, label = torch.rand(4, *SHAPE), torch.tensor([0, 3, 3, 9])
    torch.manual_seed(0)
    averaged = mixing.average(x, label, 6, predicted=False)
    torch.manual_seed(0)
    mixed = mixing.mixed(x.repeat(6, 1, 1, 1), label.repeat(6), predicted=False)
    expected = Fixed()(mixed).softmax(1).view(6, 4, LABELS).mean(0)
    torch.testing.assert_close(averaged.exp(), expected)


def rows(x):
    return {tuple(image.flatten().tolist()) for image in x}


def test_the_pool_holds_training_images_of_its_label_and_no_evaluated_one(shelf, dataset):
    pool = members(f"mixup-inference({BASE}, pool=4)", shelf, dataset)[0].pool
    evaluated = rows(dataset.test.x) | rows(dataset.validation.x)
    for label in range(LABELS):
        known = rows(dataset.train.x[dataset.train.y == label])
        kept = rows(pool[label])
        assert len(kept) == 4
        assert kept <= known
        assert not kept & evaluated


def test_a_pool_larger_than_the_training_images_repeats_them(shelf, dataset):
    pool = members(f"mixup-inference({BASE}, pool=50)", shelf, dataset)[0].pool
    assert pool.shape == (LABELS, 50, *SHAPE)
    assert rows(pool[3]) == rows(dataset.train.x[dataset.train.y == 3])


def test_a_label_without_training_images_is_an_input_error(dataset):
    kept = dataset.train.y != 7
    without = replace(dataset, train=Split(dataset.train.x[kept], dataset.train.y[kept]))
    defense = resolve(f"mixup-inference({BASE})")[0]
    with pytest.raises(InputError, match="mixes with every label; 7 has no images"):
        defense.calibrate(defense.build(SHAPE, LABELS), without)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_a_batch_have_partners_of_their_own(variant):
    defense = resolve(f"mixup-inference({BASE}, variant={variant})")[0]
    members = defense.build(SHAPE, LABELS).eval()
    assert Deployed(members, MeanProbabilities(), SHAPE, LABELS).randomness == ["image"]


def test_one_checkpoint_serves_all_variants():
    fields = registry.defenses.get("mixup-inference").model_fields
    marked = {name for name, field in fields.items() if INFERENCE in field.metadata}
    assert {"variant", "lam_pl", "lam_ol", "gap", "draws"} <= marked
    assert "pool" not in marked


def test_the_combined_rule_has_shares_and_draws_of_its_own():
    combined = resolve("mixup-inference(variant=combined)")[0]
    assert (combined.lam_pl, combined.lam_ol, combined.gap, combined.draws) == (0.5, 0.4, 0.2, 1)
    assert resolve(str(canonical("mixup-inference(variant=combined)"))) == (combined,)
    given = resolve("mixup-inference(variant=combined, lam_ol=0.5, draws=2)")[0]
    assert (given.lam_ol, given.draws) == (0.5, 2)


@pytest.mark.parametrize("variant", ["combined", "pl"])
def test_only_other_labels_have_hidden_activations_that_lead_to_the_answer(variant):
    with pytest.raises(InputError, match="write variant=ol"):
        around(Fixed(), f"mixup-inference(variant={variant})").features(torch.rand(1, *SHAPE))
