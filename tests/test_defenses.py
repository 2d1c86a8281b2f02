"""Defenses: every one in the registry, and the equations of papers 000 and 001."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from robbench import datasets, networks, registry
from robbench.checkpoints import common_rule, key_of
from robbench.defense import INFERENCE, canonical, resolve, with_preset
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.recipes import Adversarial
from robbench.rules import ABSTAIN, Draw, MeanProbabilities, Vote

SHAPE, LABELS = (1, 8, 8), 10
NAMES = list(registry.defenses)
RESIDUAL = "resnet8(width=4)"
PRESETS = [(name, preset) for name in NAMES for preset in registry.defenses.get(name).presets]
FIELDS = [
    (name, field)
    for name in NAMES
    for field in registry.defenses.get(name).model_fields
    if field != "members" or not registry.defenses.get(name).wraps
    if field != "known_seed" or resolve(name)[0].random  # refused where nothing is drawn
]
NOISE_FREE = ["ito(omega=0, members=1, draws=1)", "ito(members=1, draws=1, noise=false)"] + [
    f"enresnet(members=1, {off})" for off in ("a=0", "a=0, variance=batch", "noise=false")
]


def one(spec, **fields):
    """The single configured defense of a spec, on a small residual network."""
    return resolve(canonical(spec).with_settings({"network": RESIDUAL, **fields}))[0]


def fresh(defense, seed=0, shape=SHAPE):
    """Members in evaluation mode whose BN statistics are not 0 and 1."""
    torch.manual_seed(seed)
    members = defense.build(shape, LABELS)
    for module in members.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return members.eval()


def images(n, seed=1, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def deployed(defense):
    return Deployed(fresh(defense), defense.rule(), SHAPE, LABELS, defense.draws)


@pytest.mark.parametrize(
    "spec",
    [*NAMES, *NOISE_FREE]
    + [
        f"ito(members=1, where={w}, downsampling={d})"
        for w in ("out", "branch")
        for d in (True, False)
    ]
    + ["enresnet(variance=batch)", "enresnet(average=logits)", "ito(omega=0.01, clock=fraction)"],
)
def test_a_defense_says_itself_whether_it_is_stochastic(spec):
    defense = one(spec)
    assert defense.stochastic == deployed(defense).stochastic


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_survives_being_written_as_text(name, preset):
    fields = registry.defenses.get(name).presets[preset]
    spec = with_preset(name, *preset.split(":")) if ":" in preset else with_preset(name, preset, "")
    assert canonical(str(spec)) == spec
    (configured,) = resolve(str(spec))
    assert (configured,) == resolve(spec)
    # a base takes the preset too, so it may say more than the field
    assert configured == registry.defenses.get(name)(**{**fields, "base": configured.base})


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_what_is_given_wins_over_the_preset(name, preset):
    spec = with_preset(f"{name}(epochs=7, network={RESIDUAL})", preset, "")
    configured, plain = resolve(spec)[0], registry.defenses.get(name).presets[preset]
    given = {"epochs": 7, "network": RESIDUAL}
    assert (configured.epochs, configured.network) == (7, RESIDUAL)
    assert configured == registry.defenses.get(name)(**plain | given | {"base": configured.base})


@pytest.mark.parametrize("name", ["pgd-at", "trades", "enresnet"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet", "folder:my/images"])
def test_colour_images_are_trained_at_their_own_budget(name, dataset):
    assert float(resolve(with_preset(name, "quick", dataset))[0].adversarial.eps) == 8 / 255


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar10", "tiny-imagenet"])
def test_large_datasets_train_as_few_epochs_as_mnist(dataset):
    for name in ("standard", "pgd-at", "rce", "ito"):
        configured, mnist = (resolve(with_preset(name, "quick", d))[0] for d in (dataset, "mnist"))
        assert configured.epochs == mnist.epochs


def test_adversarial_training_without_training_is_refused():
    with pytest.raises(InputError, match="epochs = 0 trains nothing"):
        resolve("random-resize-pad(epochs=0, adversarial=fgsm)")


def test_the_preset_of_the_dataset_precedes_the_general_one():
    assert resolve(with_preset("ito", "paper", "imagenet"))[0].members == 5
    assert resolve(with_preset("ito & ito(omega=0.3)", "paper", "cifar10"))[1].members == 20
    with pytest.raises(InputError, match="did you mean 'paper'"):
        with_preset("ito", "papr", "imagenet")


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_builds_members_for_32_by_32_images(name, preset):
    wraps = registry.defenses.get(name).wraps
    spec = with_preset(name if wraps else f"{name}(members=2)", preset, "")
    with torch.device("meta"):  # the shapes of all layers without their memory
        defense = resolve(spec)[0]
        members = defense.build((3, 32, 32), LABELS)
        assert len(members) == (sum(base.members for base in defense.bases()) if wraps else 2)
        for member in members:
            assert member.eval()(torch.zeros(3, 3, 32, 32)).shape == (3, 10)


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_taken_or_refused_in_one_line(name, network):
    wraps = registry.defenses.get(name).wraps
    defense = resolve(f"{name}(network={network}{'' if wraps else ', members=1'})")[0]
    with torch.device("meta"):
        try:
            assert len(defense.build((3, 32, 32), LABELS)) == (len(defense.bases()) if wraps else 1)
        except InputError as error:
            assert network in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize("network", ["mlp", "lstm", "vgg16"])
@pytest.mark.parametrize("name", ["ito", "enresnet"])
def test_noise_in_residual_blocks_needs_residual_blocks(name, network):
    with torch.device("meta"), pytest.raises(InputError, match=f"residual network, not {network}"):
        resolve(f"{name}(network={network})")[0].build((3, 32, 32), LABELS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong",
    ["epochs=0", "members=0", "draws=0", "batch_size=1", "lr=0", "lr=inf", "decay_at=[80, 120]"]
    + ["adversarial=pgd(eps=8)", "adversarial=pgd(norm=l0)", "adversarial=fgsm(steps=3)"],
)
def test_values_that_cannot_be_meant_are_refused(name, wrong):
    if wrong == "epochs=0" and registry.defenses.get(name).wraps:
        wrong = "epochs=0, base=none"  # what goes around a base may leave its weights alone
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        resolve(f"{name}({wrong})")


def test_unknown_names_come_with_the_nearest_known_one():
    for spec, near in {
        "itto": "ito",
        "ito(omga=0.4)": "omega",
        "ito(network=resnet9)": "resnet8",
        "pgd-at(adversarial=pdg)": "pgd",
        "pgd-at(adversarial=pgd(epss=0.1))": "eps",
    }.items():
        with pytest.raises(InputError, match=f"did you mean '{near}'"):
            canonical(spec)


def changed(name, field):
    """Another valid value for a field, by the type of its default."""
    cls = registry.defenses.get(name)
    value, annotation = cls.model_fields[field].default, cls.model_fields[field].annotation
    named = {"network": RESIDUAL, "base": "pgd-at(epochs=2)", "adversarial": "pgd(eps=0.125)"}
    named |= {"detector": "non-me", "known_seed": 3}
    if field in named:
        return named[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return next(option for option in get_args(annotation) if option != value)
    if isinstance(value, tuple):
        return value[:-1]
    if isinstance(value, int) or value > 1:
        return value + 1
    return value / 2 or 0.125


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_is_in_the_key_unless_it_only_matters_at_inference(name, field, digits):
    needed = {"fpr": {"detector": "lid"}, "adversarial": {"epochs": 1}}.get(field, {})
    plain = canonical(name).with_settings(needed)
    defense = resolve(plain.with_settings({field: changed(name, field)}))[0]
    same_key = key_of(defense, digits, 0) == key_of(resolve(plain)[0], digits, 0)
    assert same_key == (INFERENCE in type(defense).model_fields[field].metadata)


def test_ito_votes_and_draws_are_decided_at_inference():
    fields = registry.defenses.get("ito").model_fields
    marked = {name for name, field in fields.items() if INFERENCE in field.metadata}
    assert marked == {"draws", "ballot", "quorum", "noise", "detector", "fpr", "known_seed"}


@given(
    eps=st.fractions(Fraction(1, 512), Fraction(1, 2)),
    steps=st.integers(1, 9),
    beta=st.floats(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_adversarial_training_survives_being_written_as_text(eps, steps, beta):
    adversarial = Adversarial(kind="trades", eps=eps, steps=steps, beta=beta)
    defense = registry.defenses.get("standard")(adversarial=adversarial)
    assert resolve(str(defense.spec)) == (defense,)


def test_the_base_is_trained_on_the_network_of_what_builds_on_it():
    assert str(resolve("ito(network=resnet20)")[0].base_spec()) == "standard(network=resnet20)"
    own = "ito(network=resnet20, base=standard(network=resnet8, epochs=2))"
    assert str(resolve(own)[0].base_spec()) == "standard(epochs=2, network=resnet8)"
    assert resolve("ito(base=none)")[0].base_spec() is None
    assert resolve("ito(base=torchvision:IMAGENET1K_V1)")[0].base_spec() is None


def test_a_base_is_one_defense():
    with pytest.raises(InputError, match="base is one defense"):
        registry.defenses.get("ito")(base="standard & pgd-at").base_spec()


def test_joined_defenses_keep_their_order_and_settings():
    spec = canonical("enresnet(a=0.2, members=2) & standard(network='quick')")
    assert str(spec) == "enresnet(a=0.2) & standard"
    assert [type(part).name for part in resolve(spec)] == ["enresnet", "standard"]


@pytest.mark.parametrize("network", [RESIDUAL, "resnet8(pre_activation=true, width=4)"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spec", NOISE_FREE)
def test_without_noise_it_is_the_plain_network_bit_for_bit(spec, training, network):
    plain = fresh(one("standard", network=network)).train(training)
    quiet = fresh(one(spec, network=network), seed=5).train(training)
    quiet.load_state_dict(plain.state_dict())
    x = images(16)
    scores = one(spec).rule().scores(Draw(torch.stack([m(x) for m in quiet])[None]))
    assert torch.equal(scores, plain[0](x))


@pytest.mark.parametrize("spec", NOISE_FREE)
def test_without_noise_the_answer_is_the_plain_argmax(spec):
    model, x = deployed(one(spec)), images(64)
    with torch.no_grad():
        assert torch.equal(model.decide(x, 2), model.members[0](x).argmax(1).expand(2, -1))


def added(network, site, x):
    """What the modules at a site of every block added in one pass, in order."""
    differences = []
    hooks = [
        getattr(block, site).register_forward_hook(
            lambda module, inputs, output: differences.append(output - inputs[0])
        )
        for block in network.blocks
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return differences


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("downsampling", [True, False])
@pytest.mark.parametrize("where", ["sum", "out", "branch"])
@pytest.mark.parametrize("clock", ["index", "one-based", "fraction", "epoch"])
def test_ito_noise_has_the_deviation_of_the_paper_in_every_block(
    clock, where, downsampling, training
):
    omega, blocks = 0.4, 9
    defense = one(
        f"ito(members=1, omega={omega}, clock={clock}, where={where}, downsampling={downsampling})",
        network="resnet20(width=4)",
        epochs=5,
    )
    network = fresh(defense)[0].train(training)
    expected = {
        "index": [omega / (1 + i) for i in range(blocks)],
        "one-based": [omega / (2 + i) for i in range(blocks)],
        "fraction": [omega / (1 + i / blocks) for i in range(blocks)],
        "epoch": [omega / 5] * blocks,
    }[clock]
    for site in ("sum", "out", "branch"):
        for index, noise in enumerate(added(network, site, images(100))):
            silent = site != where or (index in (3, 6) and not downsampling)
            # the smallest maps hold 6,400 numbers: four standard errors are 3.6 %
            sigma = 0 if silent else pytest.approx(expected[index], rel=0.036)
            assert float(noise.std()) == sigma
            assert abs(float(noise.mean())) <= 4 * expected[index] / noise.numel() ** 0.5


def test_a_step_of_one_part_in_n_divides_the_noise_by_its_root():
    unit, euler = (
        one(f"ito(clock=fraction, step={step})").sigma(2, 9, 0) for step in ("unit", "fraction")
    )
    assert euler == pytest.approx(unit / 3)


def test_the_full_matrix_adds_one_number_to_a_whole_image():
    network = fresh(one("ito(members=1, omega=0.4, matrix=full)"))[0]
    noise = added(network, "sum", images(2000))[0].flatten(1)
    first = noise[:, :1]
    torch.testing.assert_close(noise, first.expand_as(noise), rtol=0, atol=1e-4)
    # derivation of section 3: n elements of deviation sigma each, all alike
    expected = 0.4 * noise.shape[1] ** 0.5
    assert float(first.std()) == pytest.approx(expected, rel=0.07)


def test_the_clock_of_training_runs_by_epochs_and_stops_at_the_last():
    defense = one("ito(members=1, omega=0.4, clock=epoch, epochs=3)")
    members = fresh(defense)
    sigmas = []
    for epoch in range(3):
        defense.start_epoch(members, epoch)
        sigmas.append(members[0].blocks[0].sum.sigma)
    assert sigmas == [0.4, 0.2, pytest.approx(0.4 / 3)]
    assert fresh(defense)[0].blocks[0].sum.sigma == sigmas[-1]


def test_at_least_half_answers_where_more_than_half_abstains():
    ballots = F.one_hot(torch.tensor([1, 1, 0, 2]), 3).float()[:, None, None] * 9  # (4, 1, 1, 3)
    answers = [
        one(f"ito(quorum={q})").rule().decide(Draw(ballots)).item() for q in ("majority", "half")
    ]
    assert answers == [ABSTAIN, 1]


def test_joined_defenses_vote_where_all_of_them_vote():
    for text, kind in (("ito & ito(omega=0.2)", Vote), ("ito & standard", MeanProbabilities)):
        assert type(common_rule(resolve(text))) is kind


def test_ito_noise_is_independent_between_pixels_images_and_passes():
    network = fresh(one("ito(members=1, downsampling=false)"))[0]
    x = images(1).expand(500, *SHAPE)
    first, again = (added(network, "sum", x)[0].flatten(1) for _ in range(2))
    pairs = [(first, again), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:])]
    for one_side, other in pairs:
        correlation = np.corrcoef(one_side.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 4 / one_side.numel() ** 0.5


def variance_noise(variance, a=0.3):
    return fresh(one(f"enresnet(members=1, a={a}, variance={variance})"))[0].blocks[0].sum


def scaled_images():
    """Eight tensors in float64 whose spreads and means are far apart."""
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x * torch.arange(1, 9).view(-1, 1, 1, 1) + torch.arange(8).view(-1, 1, 1, 1)


@pytest.mark.parametrize("variance", ["image", "batch"])
def test_enresnet_noise_is_a_share_of_the_deviation_of_the_sum(variance):
    x, site = scaled_images(), variance_noise(variance)
    torch.manual_seed(3)
    noisy = site(x).numpy()
    torch.manual_seed(3)
    xi = torch.randn_like(x).numpy()
    axes = (1, 2, 3) if variance == "image" else None
    sigma = 0.3 * np.sqrt(x.numpy().var(axis=axes, ddof=1, keepdims=True))
    np.testing.assert_allclose(noisy, x.numpy() + sigma * xi, rtol=1e-12)


@pytest.mark.parametrize("variance", ["image", "batch"])
def test_enresnet_gradient_flows_through_the_deviation(variance):
    x, a = scaled_images().requires_grad_(), 0.3
    site = variance_noise(variance, a)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    torch.manual_seed(3)
    (site(x) * v).sum().backward()
    torch.manual_seed(3)
    xi, o = torch.randn_like(x), x.detach()
    axes = (1, 2, 3) if variance == "image" else (0, 1, 2, 3)
    n = o[0].numel() if variance == "image" else o.numel()
    centred = (o - o.mean(axes, keepdim=True)) / ((n - 1) * o.std(axes, keepdim=True))
    expected = v + a * (v * xi).sum(axes, keepdim=True) * centred
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(x.grad, v, atol=1e-3)  # what a detached deviation would give


def test_enresnet_noise_of_a_dead_block_has_a_finite_gradient():
    x = torch.zeros(2, 4, 6, 6, requires_grad=True)
    variance_noise("image")(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("variance", "coupled"), [("image", False), ("batch", True)])
def test_a_prediction_depends_on_its_batch_mates_only_per_batch(variance, coupled):
    network = fresh(one(f"enresnet(members=1, variance={variance})"))[0]
    x = images(8)
    mates = torch.cat([x[:1], 3 * images(7, seed=9)])
    with torch.no_grad():
        torch.manual_seed(6)
        alone = network(x)[0]
        torch.manual_seed(6)
        moved = network(mates)[0]
    assert torch.allclose(alone, moved, atol=1e-6, rtol=0) != coupled


def test_every_residual_sum_of_enresnet_gets_noise_and_nothing_else_does():
    defense = one("enresnet(members=1)", network="resnet20(pre_activation=true, width=4)")
    network = fresh(defense)[0]
    x = images(100)
    assert all(float(noise.std()) > 0 for noise in added(network, "sum", x))
    others = added(network, "out", x) + added(network, "branch", x)
    assert len(others) == 18
    assert not any(bool(noise.any()) for noise in others)


@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(1, 4), members=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_enresnet_averages_probabilities_by_eq_10_or_logits_as_the_code(seed, draws, members):
    logits = np.random.default_rng(seed).normal(scale=5, size=(draws, members, 6, 3))
    draw = Draw(torch.from_numpy(logits))
    by_softmax = one("enresnet").rule().scores(draw).softmax(1).numpy()
    np.testing.assert_allclose(by_softmax, special.softmax(logits, -1).mean((0, 1)), atol=1e-12)
    by_logits = one("enresnet(average=logits)").rule().scores(draw).numpy()
    np.testing.assert_allclose(by_logits, logits.mean((0, 1)), atol=1e-12)


def test_the_two_averages_of_enresnet_can_disagree():
    draw = Draw(torch.tensor([[[[6.0, 0.0]], [[-2.0, 0.0]], [[-2.0, 0.0]]]]))
    assert one("enresnet").rule().decide(draw).item() == 1
    assert one("enresnet(average=logits)").rule().decide(draw).item() == 0


def votes(table, labels=3):
    """(S, M) labels of one image -> a Draw."""
    return Draw(torch.eye(labels)[torch.tensor(table)][:, :, None])


def decide(options, table):
    return one(f"ito({options})").rule().decide(votes(table)).item()


def test_half_of_all_votes_is_no_majority():
    assert decide("ballot=flat", [[0] * 20] * 10 + [[1] * 20] * 10) == ABSTAIN
    table = [[0] * 20] * 10 + [[1] * 20] * 10
    table[19] = [0] + [1] * 19
    assert decide("ballot=flat", table) == 0


def test_flat_and_nested_votes_can_disagree():
    table = [[0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 1], [0, 1, 1]]  # five draws of three members
    assert decide("ballot=flat", table) == 0
    assert decide("ballot=nested", table) == 1


def test_a_member_that_cannot_settle_counts_among_the_voters():
    table = [[0, 0, 1, 1], [0, 1, 0, 2]]  # member 0 says 0, the other three are split
    assert decide("ballot=nested", table) == ABSTAIN
    assert decide("ballot=nested, quorum=plurality", table) == 0


def test_a_plurality_needs_no_half_but_no_tie_either():
    assert decide("quorum=majority", [[0, 0, 0, 1, 1, 2, 2]]) == ABSTAIN
    assert decide("quorum=plurality", [[0, 0, 0, 1, 1, 2, 2]]) == 0
    assert decide("quorum=plurality", [[0, 0, 1, 1, 2]]) == ABSTAIN


def by_hand(ballots, majority):
    """The label of most ballots (None is an empty one), or ABSTAIN."""
    ranked = Counter(ballot for ballot in ballots if ballot is not None).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0] if not majority or 2 * ranked[0][1] > len(ballots) else None


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_votes_agree_with_counting_by_hand(data):
    draws, members = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 2), min_size=members, max_size=members)
    table = data.draw(st.lists(row, min_size=draws, max_size=draws))
    settled = [by_hand([row[m] for row in table], majority=False) for m in range(members)]
    ballots = {"flat": [label for row in table for label in row], "nested": settled}
    for ballot, cast in ballots.items():
        for quorum in ("majority", "plurality"):
            expected = by_hand(cast, quorum == "majority")
            found = decide(f"ballot={ballot}, quorum={quorum}", table)
            assert found == (ABSTAIN if expected is None else expected)
