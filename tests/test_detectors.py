"""Detectors: scores against scikit-learn, thresholds, and the attacker who knows them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity, NearestNeighbors
from torch import nn

from robbench import datasets, registry
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.losses import Scored, Votes
from robbench.checkpoints import Shelf, key_of
from robbench.cli import main
from robbench.datasets import Split
from robbench.defense import canonical, resolve, with_preset
from robbench.deployed import Deployed
from robbench.detectors import DETECTORS, Denial, Detected, Evasion, calibrate, configure
from robbench.errors import InputError
from robbench.grid import Block
from robbench.metrics.detection import auc
from robbench.rules import ABSTAIN, Draw, MeanProbabilities
from robbench.threat import Threat

CPU = torch.device("cpu")
SPEC = "network=mlp(hidden=[32]), epochs=15"
NOISY = "ito(network=quick(width=2), epochs=1, base=standard(epochs=2), members=2, draws=2)"
OF_FEATURES = ["k-density", "lid", "union"]


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf([tmp_path_factory.mktemp("shelf")])


@pytest.fixture(scope="module")
def deploy(shelf, digits):
    """A trained defense: a small network with these further settings."""
    return lambda name, text="": shelf.deploy(f"{name}({SPEC}{text})", digits, 0, CPU)


def randoms(draws=2, members=2, n=7, labels=3, width=4, seed=0):
    """A Draw in float64, and what references of every label may be."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    logits, features = normal(draws, members, n, labels), normal(draws, members, n, width)
    return Draw(logits, features), [normal(members, 12 + label, width) for label in range(labels)]


def scored(detector, draw):
    return detector.score(draw, MeanProbabilities().scores(draw))


@pytest.mark.parametrize("bandwidth", [0.62, 2.0])
def test_k_density_is_the_mean_of_scikit_learns_over_draws_and_members(bandwidth):
    draw, references = randoms()
    found = scored(configure(f"k-density(bandwidth={bandwidth})").fit(references), draw)
    h, width = bandwidth / 2**0.5, draw.features.shape[-1]
    peak = (2 * np.pi * h**2) ** (width / 2)  # scikit-learn's kernels integrate to one
    expected = []
    for image, label in enumerate(MeanProbabilities().decide(draw).tolist()):
        kernels = [KernelDensity(bandwidth=h).fit(own.numpy()) for own in references[label]]
        own = [
            np.exp(kernel.score_samples(draw.features[:, m, image].numpy())) * peak
            for m, kernel in enumerate(kernels)
        ]
        expected.append(np.log(np.mean(own)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_the_default_bandwidth_is_the_median_distance_within_labels():
    _, references = randoms(members=1)
    fitted = configure("k-density").fit(references)
    distances = np.concatenate([pdist(own[0].numpy()) for own in references])
    nearest = np.sort(distances)[(len(distances) - 1) // 2]  # torch takes the lower of two
    assert fitted._variances == [pytest.approx(nearest**2)]


def test_lid_is_the_estimate_of_its_paper_from_scikit_learns_neighbours():
    draw, references = randoms(draws=1, members=1)
    found = scored(configure("lid(k=5)").fit(references), draw)
    nearest = NearestNeighbors(n_neighbors=5).fit(torch.cat(references, 1)[0].numpy())
    r, _ = nearest.kneighbors(draw.features[0, 0].numpy())
    np.testing.assert_allclose(-found.numpy(), -1 / np.log(r / r[:, -1:]).mean(1), rtol=1e-9)


@pytest.mark.parametrize("dimension", [2, 8])
def test_lid_is_the_dimension_of_uniform_references(dimension):
    rng = torch.Generator().manual_seed(0)
    references = torch.rand(1, 20_000, dimension, generator=rng)
    inside = 0.25 + 0.5 * torch.rand(1, 1, 500, dimension, generator=rng)
    fitted = configure("lid(k=100)").fit([references])
    found = scored(fitted, Draw(torch.zeros(1, 1, 500, 2), inside))
    assert -float(found.mean()) == pytest.approx(dimension, rel=0.1)  # the cube's sides bias it


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_have_the_gradient_of_finite_differences(name):
    draw, references = randoms(n=3)
    detector = configure(name)
    if name in OF_FEATURES:
        detector = detector.fit(references)
    inputs = [tensor.requires_grad_() for tensor in draw]
    assert torch.autograd.gradcheck(lambda *parts: scored(detector, Draw(*parts)), inputs)


@pytest.mark.parametrize("name", DETECTORS)
def test_saturated_logits_and_far_features_score_finite_with_finite_gradients(name):
    logits = torch.tensor([[300.0, 0.0, -300.0], [-40.0, 1e4, 0.0]])[None, None]
    features = torch.full((1, 1, 2, 4), 1e3)
    draw = Draw(logits.requires_grad_(), features.requires_grad_())
    detector = configure(name)
    if name in OF_FEATURES:
        detector = detector.fit([own.float() for own in randoms(members=1)[1]])
    found = scored(detector, draw)
    gradients = torch.autograd.grad(found.sum(), list(draw), materialize_grads=True)
    assert all(bool(tensor.isfinite().all()) for tensor in (found, *gradients))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("fpr", [0.02, 0.1])
def test_it_refuses_about_the_wanted_share_of_held_out_clean_images(name, fpr, deploy, digits):
    model = deploy("rce", f", detector={name}, fpr={fpr}").deployed
    refused = [
        int((model.decide(split.x, 1) == ABSTAIN).sum()) / len(split.y)
        for split in (digits.validation, digits.test)
    ]
    assert refused[0] <= fpr
    # both shares are of a sample: four standard errors of the threshold and of the count
    error = 4 * (fpr * (1 - fpr) * (1 / 200 + 1 / 500)) ** 0.5
    assert refused[1] == pytest.approx(fpr, abs=error)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_threshold_that_nothing_is_below_leaves_the_defense_bit_for_bit(name, deploy, digits):
    plain, detected = deploy("rce").deployed, deploy("rce", f", detector={name}").deployed
    rule = detected.rule
    never = Detected(rule.rule, rule.detector, torch.full_like(rule.thresholds, -torch.inf))
    open_to_all = Deployed(detected.members, never, digits.shape, 10)
    x = digits.test.x
    assert torch.equal(plain.decide(x, 1), open_to_all.decide(x, 1))
    assert torch.equal(Access(plain).scores(x), Access(open_to_all).scores(x))


@pytest.mark.parametrize("name", DETECTORS)
def test_labels_are_refused_never_changed(name, deploy, digits):
    plain, detected = deploy("rce").deployed, deploy("rce", f", detector={name}, fpr=0.3").deployed
    before, after = plain.decide(digits.test.x, 1), detected.decide(digits.test.x, 1)
    assert torch.equal(after[after != ABSTAIN], before[after != ABSTAIN])


def test_a_threshold_for_each_label_refuses_the_share_of_each(deploy, digits):
    spec = ", detector='confidence(per=label)', fpr=0.2"
    plain, detected = deploy("rce").deployed, deploy("rce", spec).deployed
    x = digits.validation.x
    labels, refused = plain.decide(x, 1)[0], detected.decide(x, 1)[0] == ABSTAIN
    counts = [(int(refused[labels == k].sum()), int((labels == k).sum())) for k in range(10)]
    assert [found for found, _ in counts] == [int(0.2 * n + 1e-9) for _, n in counts]


@given(fpr=st.floats(0, 0.99))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_a_higher_rate_refuses_no_fewer(fpr, deploy, digits):
    model, text = deploy("rce").deployed, "non-me"
    low, high = (calibrate(model, text, rate, digits, 0).thresholds for rate in (fpr / 2, fpr))
    assert bool((low <= high).all())


@pytest.mark.parametrize("name", OF_FEATURES)
def test_the_same_seed_gives_the_same_detector_and_leaves_the_random_streams(name, deploy, digits):
    model, text = deploy("rce").deployed, f"{name}(images=20)"
    state = torch.get_rng_state()
    one, same, other = (calibrate(model, text, 0.05, digits, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.thresholds, same.thresholds)
    assert not torch.equal(one.thresholds, other.thresholds)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_defense_with_noise_votes_and_members_takes_one(name, shelf, digits):
    small = replace(digits, train=Split(*(tensor[:300] for tensor in digits.train)))
    trained = shelf.deploy(with_detector(NOISY, name), small, 0, CPU)
    access = Access(trained.deployed, draws=4)
    access.deployed.chunk = 10  # a pass holds one draw, so that draws are replayed
    x, y = digits.test.x[:10], digits.test.y[:10]
    for loss in (trained.losses["evasion"], Votes()):
        step = access.gradient(x, y, loss)
        assert step.gradient.isfinite().all()
        assert step.gradient.abs().sum() > 0
    assert trained.deployed.decide(digits.test.x[:20], 3).shape == (3, 20)


def with_detector(text, name):
    return str(canonical(text).with_settings({"detector": name}))


@pytest.mark.parametrize("name", DETECTORS)
def test_the_attacker_who_knows_the_detector_passes_it_more_often(name, deploy, digits):
    trained, subset = deploy("standard", f", detector={name}"), digits.subset(100)
    threat, passed = Threat(norm="linf", eps="0.15"), []
    for losses in (trained.losses, {}):
        access, rng = Access(trained.deployed, losses=losses), torch.Generator().manual_seed(0)
        x = Configured.of("pgd(steps=30)")(access, subset.x, subset.y, threat, rng)
        answers = trained.deployed.decide(x, 1)[0]
        passed.append(int(((answers != subset.y) & (answers != ABSTAIN)).sum()))
    assert passed[0] > passed[1]


def test_its_loss_is_that_of_the_defense_until_the_prediction_is_wrong():
    draw, references = randoms(n=40)
    rule = Detected(MeanProbabilities(), configure("k-density").fit(references), torch.ones(3))
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    value, base = Evasion(rule, Votes())(draw, y, None), Votes()(draw, y, None)
    wrong = rule.scores(draw).argmax(1) != y
    assert torch.equal(value[~wrong], base[~wrong])
    lacking = 1 - rule.detector.score(draw, rule.scores(draw))
    torch.testing.assert_close(value[wrong], (base - Evasion.weight * lacking)[wrong])


def parts_of(model, x):
    """(P, N) the score of each detector of a union."""
    draw = model.draw(x, 1)
    return model.rule.detector.parts(draw, model.rule.scores(draw)).numpy()


def test_a_union_refuses_where_one_of_its_detectors_is_below_its_own_threshold(deploy, digits):
    model = deploy("rce", ", detector=union, fpr=0.1").deployed
    clean, parts = parts_of(model, digits.validation.x), parts_of(model, digits.test.x)
    middle, low = (np.quantile(clean, q, axis=1, keepdims=True) for q in (0.5, 0.05))
    depth = float(model.rule.thresholds[0])  # in units of the distance from the median to 5 %
    alarms = parts < middle + depth * (middle - low)
    assert alarms.sum(axis=1).all()
    refused = model.decide(digits.test.x, 1)[0] == ABSTAIN
    np.testing.assert_array_equal(refused.numpy(), alarms.any(axis=0))


def test_no_detector_of_a_union_gives_nearly_all_of_its_alarms(deploy, digits):
    model = deploy("rce", ", detector=union, fpr=0.1").deployed
    detector, clean = model.rule.detector, parts_of(model, digits.validation.x)
    first = ((clean - detector._medians.numpy()) / detector._spreads.numpy()).argmin(axis=0)
    refused = (model.decide(digits.validation.x, 1)[0] == ABSTAIN).numpy()
    assert np.bincount(first[refused], minlength=4).max() <= 0.75 * refused.sum()


@pytest.mark.parametrize("name", ["confidence", "k-density"])
def test_a_union_of_one_detector_refuses_what_that_one_does(name, deploy, digits):
    text = f"'union(of=[{name}])'"
    alone, union = (deploy("rce", f", detector={spec}").deployed for spec in (name, text))
    assert torch.equal(alone.decide(digits.test.x, 1), union.decide(digits.test.x, 1))


def test_denial_is_positive_for_a_refusal_or_an_error_and_for_nothing_else():
    draw, references = randoms(n=60)
    detector = configure("k-density").fit(references)
    middle = scored(detector, draw).median()
    rule = Detected(MeanProbabilities(), detector, middle.expand(3))
    y = torch.randint(3, (60,), generator=torch.Generator().manual_seed(3))
    value, answers = Denial(rule, Scored(rule))(draw, y, None), rule.decide(draw)
    assert torch.equal(value > 0, answers != y)
    assert bool((answers == ABSTAIN).any()) and bool((answers == y).any())


@pytest.mark.parametrize("name", ["confidence", "lid"])
def test_the_attacker_who_wants_no_answer_leaves_fewer_right_ones(name, deploy, digits):
    trained, subset = deploy("standard", f", detector={name}"), digits.subset(100)
    rule, right = trained.deployed.rule, []
    for goal, loss in (
        ("denial", Denial(rule, Scored(rule))),
        ("error", trained.losses["evasion"]),
    ):
        access = Access(trained.deployed, losses={"own": loss}, goal=goal)
        threat, rng = Threat(norm="linf", eps="0.05"), torch.Generator().manual_seed(0)
        x = Configured.of("pgd(steps=10)")(access, subset.x, subset.y, threat, rng)
        right.append(int((trained.deployed.decide(x, 1)[0] == subset.y).sum()))
    assert right[0] < right[1]


def test_scores_rank_attacked_images_as_scikit_learn_counts(deploy, digits):
    trained = deploy("rce", ", detector=k-density")
    model, subset = trained.deployed, digits.subset(100)
    threat, rng = Threat(norm="linf", eps="0.1"), torch.Generator().manual_seed(0)
    x = Configured.of("fgsm")(Access(model), subset.x, subset.y, threat, rng)
    normal, adversarial = (
        model.rule.excess(model.draw(images, 1)).numpy() for images in (subset.x, x)
    )
    kinds = np.repeat([1, 0], [len(normal), len(adversarial)])
    expected = roc_auc_score(kinds, np.concatenate([normal, adversarial]))
    assert auc(normal, adversarial) == pytest.approx(expected)
    assert expected > 0.7


def test_a_detector_leaves_the_weights_their_key(digits):
    plain, detected = (resolve(f"rce{text}")[0] for text in ("", "(detector=lid, fpr=0.1)"))
    assert key_of(plain, digits, 0) == key_of(detected, digits, 0)


def test_a_detector_makes_an_adaptive_cell(digits):
    block = Block(defense="standard(detector=lid)", attack="pgd", eps="0.1")
    assert [cell.setting.kind for cell in block.cells(digits)] == ["whitebox", "adaptive"]


@pytest.mark.parametrize(
    "text",
    ["rce(detector=k-density)", "rce(detector='k-density(bandwidth=0.62)', fpr=0.01)"]
    + ["rce(detector='union(of=[lid, non-me])')"]
    + ["standard(detector='lid(k=5, per=label)') & rce(detector='lid(per=label, k=5)')"],
)
def test_a_detector_survives_being_written_as_text(text):
    spec = canonical(text)
    assert canonical(str(spec)) == spec
    assert resolve(str(with_preset(text, "quick", "mnist"))) == tuple(
        part.model_copy(update={"epochs": 3}) for part in resolve(spec)
    )


@pytest.mark.parametrize("text", ["5%", "0.05", 0.05])
def test_a_rate_is_a_share_or_a_percentage(text):
    assert resolve(canonical("rce(detector=lid)").with_settings({"fpr": text}))[0].fpr == 0.05


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rce(detector=k-densty)", "did you mean 'k-density'"),
        ("rce(detector='k-density(bandwith=1)')", "did you mean 'bandwidth'"),
        ("rce(detector='k-density(bandwidth=0)')", "bandwidth = 0"),
        ("rce(detector='lid & non-me')", "cannot be joined"),
        ("rce(detector='union(of=[lod])')", "of.0 = 'lod'"),
        ("rce(detector=lid, fpr=5)", "write one such as 5% or 0.05"),
        ("rce(detector=lid, fpr=some)", "some is no share"),
        ("rce(fpr=0.1)", "add detector="),
        ("rce(detector=lid) & rce", "the same detector"),
        ("rce(detector=lid) & rce(detector=lid, fpr=0.1)", "the same detector"),
        ("ito(base=standard(detector=lid))", "the detector of a base is never asked"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(spec, message):
    with pytest.raises(InputError, match=message) as raised:
        resolve(spec)
    assert "\n" not in str(raised.value)


class Bare(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


class Wide(Bare):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def features(self, x):
        return x.flatten(1)[:, : self.width]

    def readout(self, hidden):
        return hidden[:, :10]


class Bypass(Wide):
    def __init__(self):
        super().__init__(10)

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("members", "change", "message"),
    [
        ([Bare()], {}, "Bare gives none; write detector=confidence"),
        ([Wide(11), Wide(12)], {}, "11 and 12"),
        ([Bypass()], {}, "readout(features(x)) differs"),
        ([Wide(10)], {"validation": 0}, "needs validation images"),
        ([Wide(10)], {"train": 3}, "of the label"),
    ],
)
def test_what_a_detector_needs_and_has_not_is_said_in_one_line(members, change, message, digits):
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in change.items()}
    model = Deployed(nn.ModuleList(members), MeanProbabilities(), digits.shape, 10)
    with pytest.raises(InputError, match=re.escape(message)):
        calibrate(model, "k-density", 0.05, replace(digits, **splits), 0)


@pytest.mark.parametrize("name", list(registry.defenses))
def test_every_defense_takes_a_detector(name, digits):
    few = replace(digits, validation=Split(*(t[:40] for t in digits.validation)))
    defense = resolve(canonical(name).with_settings({"network": "quick(width=2)"}))[0]
    torch.manual_seed(0)
    members = defense.build(digits.shape, 10).eval()
    defense.calibrate(members, few)
    model = Deployed(members, defense.rule(), digits.shape, 10, defense.draws)
    model.rule = calibrate(model, "k-density(images=5)", 0.05, few, 0)
    refused = model.decide(few.validation.x, 1)[0] == ABSTAIN
    assert defense.stochastic or model.rule.rule.abstains or int(refused.sum()) <= 2


def test_a_network_without_activations_takes_a_detector_of_scores(digits):
    model = Deployed(nn.ModuleList([Bare()]), MeanProbabilities(), digits.shape, 10)
    for text in ("confidence", "union(of=[confidence, non-me])"):
        rule = calibrate(model, text, 0.05, digits, 0)
        assert rule.decide(model.draw(digits.test.x, 1)).shape == (500,)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["run", "--attack", "fgsm", "-n", "10", "--workers", "1", *arguments])
    return left.value.code or 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector", "k-densty"], "did you mean 'k-density'"),
        (["--detector", "lid", "--fpr", "150%"], "write one such as 5% or 0.05"),
        (["--fpr", "5%"], "add --detector"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(options, message, capsys):
    code, printed = run(capsys, "--defense", "rce", *options)
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_option_sets_the_detector_of_the_defense_and_not_of_the_baseline(capsys, tmp_path):
    options = ["--detector", "none,lid(k=5)", "--fpr", "10%", "--setting", "whitebox"]
    options += ["--defense", f"rce({SPEC}) & standard({SPEC})", "--baseline", f"standard({SPEC})"]
    code, _ = run(capsys, *options, "--eps", "0.1", "--json", "--out", str(tmp_path))
    assert code == 0
    folders = {path.parent.name for path in tmp_path.glob("records/*/*/*.json")}
    assert sum("lid" in folder for folder in folders) == 1
    assert len(folders) == 3
