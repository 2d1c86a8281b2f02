"""robbench.evaluate on models that robbench never saw, and what it refuses to believe of them."""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import robbench
from robbench import datasets, registry
from robbench.attacks import find
from robbench.attacks.losses import Votes
from robbench.audit import badge
from robbench.evaluation import Evaluation, _placed
from robbench.records import Store
from robbench.rules import MeanLogits, Vote

TINY = "standard(epochs=1, network=mlp(hidden=[8]))"


class Noisy(nn.Module):
    """Noise on the image in front of a network, whatever its mode."""

    def __init__(self, network, sigma=0.3):
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, x):
        return self.network(x + self.sigma * torch.randn_like(x))


class Fixed(nn.Module):
    """Answers with the outcome of a function of x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def linear():
    """Two pixels, two labels: label 0 exactly where the first pixel is the brighter one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    model[1].weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return model


def quick(model, **options):
    given = {"dataset": "digits", "attack": "fgsm", "eps": "0.05", "n": 20, "device": "cpu"}
    return robbench.evaluate(model, **(given | options))


# -------------------------------------------------------------------------------- what it answers


def test_the_line_of_the_readme_runs_and_its_number_is_what_the_margins_say(linear):
    margins = torch.tensor([0.01, 0.02, 0.05, 0.07, 0.10])  # half of each is the linf distance
    x = torch.stack([0.5 + margins / 2, 0.5 - margins / 2], dim=1).view(5, 1, 1, 2)
    result = robbench.evaluate(
        linear, dataset=(x, torch.zeros(5, dtype=int)), attack="pgd", norm="linf", eps="8/255"
    )
    (record,) = result.records
    assert record.clean_ok.tolist() == [1] * 5
    assert record.ok.tolist() == [int(margin / 2 > 8 / 255) for margin in margins]


def test_numpy_images_in_bytes_are_the_same_as_floats(network, digits):
    x = (digits.test.x[:20] * 16).round().to(torch.uint8) * 15
    floats = quick(network, dataset=(x.float() / 255, digits.test.y[:20]))
    integers = quick(network, dataset=(x.numpy(), digits.test.y[:20].numpy()))
    assert integers.records[0].cell == floats.records[0].cell
    assert np.array_equal(integers.records[0].ok, floats.records[0].ok)


def test_without_n_all_images_are_taken_up_to_500(linear):
    x, y = torch.rand(7, 1, 1, 2), torch.zeros(7, dtype=int)
    (record,) = quick(linear, dataset=(x, y), n=None).records
    assert record.cell.n == 7


def test_an_image_folder_is_attacked_with_the_budgets_of_cifar(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 4)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{index}.png")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 2)).eval()
    result = robbench.evaluate(model, dataset=f"folder:{tmp_path}", attack="fgsm")
    assert list(result.frame().eps) == ["2/255", "4/255", "8/255", "16/255"]
    assert [len(record.ok) for record in result.records] == [8] * 4


def test_models_and_specs_stand_in_one_result(network):
    result = quick([network, TINY], attack=["fgsm", "pgd(steps=2)"], norm=["linf", "l2"])
    frame = result.frame()
    assert len(frame) == 8
    (model,) = {name for name in frame.defense if name.startswith("model:Sequential:")}
    assert set(frame.defense) == {model, TINY}
    assert set(zip(frame.attack, frame.norm, strict=True)) == {
        (attack, norm) for attack in ("fgsm", "pgd(steps=2)") for norm in ("linf", "l2")
    }


def test_attacks_of_the_libraries_run_by_name_on_a_model_of_the_caller(network):
    names = ["torchattacks:FGSM", "art:FastGradientMethod", "fgsm"]
    outcomes = [quick(network, attack=name).records[0].ok.tolist() for name in names]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert 0 < sum(outcomes[0]) < 20


def test_a_model_that_is_random_gets_whitebox_and_adaptive_and_20_draws(network):
    result = quick(Noisy(network).eval(), eot=3)
    settings = [(record.cell.setting.kind, record.cell.setting.eot) for record in result.records]
    assert settings == [("whitebox", 1), ("adaptive", 3)]
    assert [record.draws for record in result.records] == [20, 20]


def test_a_deterministic_model_has_no_adaptive_cell_of_its_own(network):
    (record,) = quick(network).records
    assert (record.cell.setting.kind, record.draws) == ("whitebox", 1)


def test_a_module_of_a_model_may_stay_in_training_mode_to_be_random(network):
    model = nn.Sequential(network, nn.Dropout(0.5)).eval()
    model[1].train()
    assert {record.draws for record in quick(model, eot=2).records} == {20}


@pytest.fixture
def opponent(network):
    """Ranks all labels the other way round, three times as loud."""
    turned = copy.deepcopy(network)
    turned[3].weight.data *= -3
    turned[3].bias.data *= -3
    return turned


def test_an_ensemble_of_two_alike_is_worth_one(network, digits):
    twins = robbench.deploy([network, network], digits, device="cpu")
    assert np.array_equal(quick(twins).records[0].ok, quick(network).records[0].ok)


def test_the_mean_of_logits_follows_the_louder_member(network, opponent, digits):
    pair = robbench.deploy([network, opponent], digits, rule=MeanLogits(), device="cpu")
    (record,) = quick(pair).records
    assert not record.clean_ok.any() and record.clean_err.all()


def test_a_vote_of_one_against_one_abstains(network, opponent, digits):
    pair = robbench.deploy([network, opponent], digits, rule=Vote(), device="cpu")
    (record,) = quick(pair).records
    assert not record.clean_ok.any() and not record.clean_err.any()


def test_the_loss_of_an_attacker_who_knows_the_defense_makes_an_adaptive_cell(network, digits):
    def useless(draw, y, target):
        return 0 * draw.logits.mean(dim=(0, 1)).sum(dim=1)

    known = robbench.deploy(network, digits, loss=useless, device="cpu")
    whitebox, adaptive = quick(known).records
    assert adaptive.cell.setting.kind == "adaptive"
    assert np.array_equal(adaptive.ok, adaptive.clean_ok)  # that loss leads nowhere
    assert whitebox.ok.sum() < whitebox.clean_ok.sum()


def test_an_oracle_of_the_caller_crafts_the_transfer_attack(network):
    other = copy.deepcopy(network)
    other[3].bias.data += 1.0  # the same gradients under another name
    (record,) = quick(network, setting="transfer", oracle=other).records
    assert record.cell.setting.oracle.startswith("model:Sequential:")
    assert np.array_equal(record.ok, quick(network).records[0].ok)


# ------------------------------------------------------------------------------ the caller's model


def test_the_model_is_left_as_it_was(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).eval()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    model[1].train()  # its statistics would move with every pass
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    stream = torch.get_rng_state()
    quick(model, attack=["fgsm", "torchattacks:PGD(steps=2)"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    assert torch.equal(torch.get_rng_state(), stream)


def name_of(model, **options):
    return quick(model, **options).records[0].cell.defense


def test_the_name_of_a_model_is_the_same_for_the_same_model(network):
    assert name_of(network) == name_of(copy.deepcopy(network))


def changed(network):
    """Models that answer differently, each in one way."""
    weights, mode = copy.deepcopy(network), nn.Sequential(network, nn.Dropout(0.5)).eval()
    weights[1].weight.data[0, 0] += 1e-3
    random = copy.deepcopy(mode)
    random[1].train()
    layer = copy.deepcopy(network)
    layer[2] = nn.ReLU()
    return {"weights": (network, weights), "layer": (network, layer), "mode": (mode, random)}


@pytest.mark.parametrize("what", ["weights", "layer", "mode"])
def test_the_name_of_a_model_changes_with(what, network):
    first, second = changed(network)[what]
    assert name_of(first, eot=1) != name_of(second, eot=1)


def test_the_name_of_a_model_changes_with_its_rule_draws_and_loss(network, digits):
    def loss(draw, y, target):
        return draw.logits.mean(dim=(0, 1)).sum(dim=1)

    noisy = Noisy(network).eval()
    options = [{}, {"rule": MeanLogits()}, {"rule": Vote()}, {"draws": 3}, {"loss": loss}]
    deployed = [robbench.deploy(noisy, digits, device="cpu", **each) for each in options]
    assert len({name_of(each, eot=1) for each in deployed}) == len(options)


# ------------------------------------------------------------------------------------ what is kept


def test_records_are_kept_under_out_and_read_again(network, tmp_path, monkeypatch):
    first = quick(network, out=tmp_path)
    (stored,) = (each for each in Store(tmp_path).all() if each.cell.attack != "probe")
    assert stored.text() == first.records[0].text()
    monkeypatch.setattr("robbench.executors.perform", None)  # nothing may run
    again = quick(network, out=tmp_path)
    assert again.records[0].text() == stored.text()


def test_nothing_is_written_without_out(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(network)
    assert list(tmp_path.iterdir()) == []


def test_the_frame_has_a_row_for_each_cell_with_shares_and_intervals(network):
    result = quick(network, eps=["0.02", "0.05"])
    frame = result.frame()
    assert list(frame.eps) == ["0.02", "0.05"]
    for share in ("accuracy", "incorrect", "abstained", "correct_or_abstained", "robust", "clean"):
        assert (frame[f"{share}_low"] <= frame[share]).all()
        assert (frame[share] <= frame[f"{share}_high"]).all()
    assert list(frame.accuracy) == [float(record.ok.mean()) for record in result.records]
    assert set(frame.columns) >= {"dataset", "n", "defense", "attack", "norm", "setting", "id"}
    json.dumps(frame.to_dict("records"), allow_nan=False)


def test_a_result_prints_as_a_table(network):
    result = quick(network)
    text = str(result)
    assert "fgsm, linf, n = 20" in text and "accuracy %" in text
    assert f"{100 * result.records[0].ok.mean():.1f} (" in text


def test_a_cell_that_fails_is_a_record_and_no_exception(linear):
    x = torch.rand(4, 1, 1, 2)
    broken = Fixed(lambda x: linear(x) * torch.where(x.amax() > 0.99, torch.nan, 1.0))
    result = quick(broken.eval(), dataset=(x.clamp(0, 0.9), [0, 1, 0, 1]), n=4, eps="0.5")
    (record,) = result.records
    assert record.status == "failed" and record.reason
    assert "failed" in str(result) and list(result.frame().status) == ["failed"]


@pytest.fixture
def plugin(monkeypatch):
    """Registers a function as an attack until the end of the test."""
    list(registry.attacks)  # the native ones are registered first
    monkeypatch.setattr(registry.attacks, "_entries", dict(registry.attacks._entries))
    return lambda name, run: robbench.attack(name, norms=("linf",))(run)


def refusing(access, x, y, threat, rng):
    raise robbench.InputError("needs colours")


def test_what_is_refused_while_others_run_is_a_record_beside_theirs(network, plugin, tmp_path):
    plugin("refusing", refusing)
    options = {"attack": ["refusing", "fgsm"], "out": tmp_path}
    for _ in range(2):  # also where the others had finished before
        found = {record.cell.attack: record for record in quick(network, **options).records}
        assert (found["refusing"].status, found["refusing"].reason) == ("failed", "needs colours")
        assert found["fgsm"].status == "ok"


def test_what_is_refused_alone_is_an_input_error(network, plugin, tmp_path):
    plugin("refusing", refusing)
    with pytest.raises(robbench.InputError, match="^needs colours$"):
        quick(network, attack="refusing", eps=["0.1", "0.2"], out=tmp_path)
    assert list(Store(tmp_path).all()) == []


def stuck(access, x, y, threat, rng):
    """Takes every error for its own and tries again."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def test_a_stuck_attack_on_a_model_of_the_caller_is_interrupted(network, plugin):
    plugin("stuck", stuck)
    before = signal.getsignal(signal.SIGALRM)
    records = quick(network, attack=["stuck", "fgsm"], timeout=2).records
    assert {record.cell.attack: record.reason for record in records} == {
        "stuck": "TimeoutError: not done after 2 s",
        "fgsm": None,
    }
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_timeout_that_could_not_be_kept_is_refused(network):
    caught = []

    def elsewhere():
        try:
            quick(network, timeout=60)
        except robbench.InputError as error:
            caught.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "only in the main thread" in caught[0]


def test_a_model_on_another_device_is_copied_to_the_one_that_is_asked_for(network, digits):
    """The device `meta` stands for an accelerator: it is always there."""
    deployed = robbench.deploy(network, digits, device="cpu")
    moved = _placed(deployed, torch.device("meta"))
    assert {each.device.type for each in moved.deployed.state_dict().values()} == {"meta"}
    assert {each.device.type for each in deployed.deployed.state_dict().values()} == {"cpu"}
    assert _placed(deployed, torch.device("cpu")) is deployed


# ------------------------------------------------------------------------------- what it refuses


def logits(count, width=10):
    return torch.linspace(-1, 1, width).expand(count, width)


def wordless(x):
    raise AssertionError


REFUSED = {
    "training mode": (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), r"model\.eval\(\) first"),
    "probabilities": (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(dim=1)).eval(),
        "returns probabilities.*return the logits",
    ),
    "another image size": (nn.Sequential(nn.Flatten(), nn.Linear(65, 10)).eval(), "cannot take"),
    "an error of any kind": (Fixed(lambda x: {}["x"]).eval(), "cannot take images.*: 'x'"),
    "an error without words": (Fixed(wordless).eval(), "cannot take images.*: AssertionError"),
    "one number an image": (Fixed(lambda x: logits(len(x))[:, 0]).eval(), r"\(N, labels\)"),
    "a map of logits": (Fixed(lambda x: logits(len(x))[:, :, None]).eval(), r"\(N, labels\)"),
    "a tuple": (Fixed(lambda x: (logits(len(x)), None)).eval(), r"\(N, labels\), not tuple"),
    "one row for all": (Fixed(lambda x: logits(1)).eval(), r"not \(1, 10\)"),
    "too few labels": (Fixed(lambda x: logits(len(x), 9)).eval(), "scores 9 labels.*has 10"),
    "a function": (torch.relu, "no defense"),
    "a list with a function": ([torch.relu], "neither a torch.nn.Module"),
    "nothing": ([], "defense is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_attacked_as_it_is_is_refused(case):
    model, message = REFUSED[case]
    with pytest.raises(robbench.InputError, match=message):
        quick(model)


def test_more_outputs_than_labels_are_no_mistake(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12)).eval()
    assert quick(model).records[0].status == "ok"


BAD = {
    "a dataset of no kind": ({"dataset": 5}, "dataset is int; give a name, 'folder:PATH'"),
    "images alone": ({"dataset": (torch.rand(2, 1, 8, 8),)}, r"\(x, y\)"),
    "an unknown dataset": ({"dataset": "digit"}, "did you mean 'digits'"),
    "flat images": ({"dataset": (torch.rand(2, 64), [0, 1])}, r"need \(N, C, H, W\)"),
    "bright images": ({"dataset": (2 * torch.ones(2, 1, 8, 8), [0, 1])}, r"floats in \[0, 1\]"),
    "an unknown attack": ({"attack": "pdg"}, "did you mean 'pgd'"),
    "an epsilon of 255": ({"eps": 8}, "write 8/255"),
    "a negative epsilon": ({"eps": ["0.1", -1]}, "not positive"),
    "an unknown norm": ({"norm": "l3"}, "unknown norm"),
    "too many images": ({"n": 501}, "has 500 images"),
    "no oracle": ({"setting": "transfer"}, "needs an oracle"),
    "no time": ({"timeout": -1}, "timeout = -1: write a positive number of seconds"),
    "an unknown device": ({"device": "tpu"}, "unknown device 'tpu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_an_input_error(case, network):
    options, message = BAD[case]
    with pytest.raises(robbench.InputError, match=message):
        quick(network, **options)


def test_a_defense_cannot_be_trained_on_test_images_alone():
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    with pytest.raises(robbench.InputError, match="train"):
        quick(TINY, dataset=(x, y))


# ------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("name", robbench.__all__)
def test_every_public_name_exists(name):
    assert getattr(robbench, name) is not None
    assert name in dir(robbench)


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        robbench.evaluat  # noqa: B018


class Shift(nn.Module):
    """A layer whose number is neither a weight nor in its repr."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def test_a_name_tells_attributes_and_losses_apart(network, digits):
    def loss(kappa):
        return lambda draw, y, target: draw.logits.mean(dim=(0, 1)).sum(dim=1) * kappa

    made = [
        robbench.deploy(nn.Sequential(Shift(0.0), network).eval(), digits, device="cpu"),
        robbench.deploy(nn.Sequential(Shift(0.1), network).eval(), digits, device="cpu"),
        robbench.deploy(network, digits, loss=loss(1.0), device="cpu"),
        robbench.deploy(network, digits, loss=loss(-1.0), device="cpu"),
        robbench.deploy(network, digits, loss=Votes(1.0), device="cpu"),
        robbench.deploy(network, digits, loss=Votes(50.0), device="cpu"),
    ]
    result = robbench.evaluate(made, attack="fgsm", eps=0.1, n=10, setting="whitebox", device="cpu")
    assert len({record.cell.defense for record in result.records}) == len(made)


def test_nothing_to_run_is_an_input_error():
    with pytest.raises(robbench.InputError, match="nothing to run"):
        robbench.evaluate("standard", setting="adaptive", n=4)


def test_own_models_are_shown_by_the_names_that_they_are_given(digits, network):
    named = {"mine": network, "twin": network}
    result = robbench.evaluate(named, digits, "fgsm", eps=0.1, n=8, device="cpu")
    assert [name.split(":")[1] for name in result.frame()["defense"]] == ["mine", "twin"]
    assert result.frame()["accuracy"].nunique() == 1


@pytest.mark.parametrize("name", ["a b", "a:b", "", 3])
def test_a_name_that_no_table_can_show_is_refused(name, digits, network):
    with pytest.raises(robbench.InputError, match="cannot name a model"):
        robbench.evaluate({name: network}, digits)


# ---------------------------------------------------------------------------- what speaks for it


def attacks_of(records):
    return sorted(record.cell.attack for record in records)


def test_every_estimator_is_probed_beside_its_attacks(network, opponent):
    result = quick([network, opponent], attack=["fgsm", "pgd(steps=2)"])
    assert attacks_of(result.evidence) == ["probe", "probe"]
    assert len({record.cell.defense for record in result.evidence}) == 2
    assert set(result.frame().attack) == {"fgsm", "pgd(steps=2)"}


def test_flags_are_of_the_records_that_were_asked_for(network):
    result = quick(network, attack=["fgsm", "pgd(steps=2)"])
    found = result.flags()
    assert set(found) == {record.id for record in result.records}
    assert all({"F17", "F18", "F20", "F31"} <= set(each.assessed) for each in found.values())
    alone = Evaluation(result.records).flags()
    assert not any("F17" in each.assessed for each in alone.values())


def test_more_evidence_makes_more_checks(network):
    results = {
        depth: quick(network, attack="pgd(steps=2)", n=6, audit=depth)
        for depth in ("probe", "quick", "thorough")
    }
    made = {}
    for depth, result in results.items():
        (found,) = result.flags().values()
        made[depth] = set(found.assessed)
    assert made["probe"] < made["quick"] < made["thorough"]
    assert "F3" in made["quick"] and {"F1", "F2", "F10", "F12"} <= made["thorough"]
    assert attacks_of(results["quick"].evidence) == ["fgsm", "probe", "square(queries=100)"]
    numbers = [result.records[0].ok.tolist() for result in results.values()]
    assert numbers[0] == numbers[1] == numbers[2]


def test_what_was_asked_for_is_no_evidence_beside_it(network):
    result = quick(network, attack=["pgd(steps=2)", "fgsm"], audit="quick")
    assert attacks_of(result.evidence) == ["probe", "square(queries=100)"]
    assert attacks_of(result.records) == ["fgsm", "pgd(steps=2)"]


def test_of_several_budgets_the_smallest_one_has_the_evidence(network):
    result = quick(network, attack="pgd(steps=2)", eps=["0.1", "0.05"], audit="quick")
    (step,) = (record for record in result.evidence if record.cell.attack == "fgsm")
    assert float(step.cell.threat.eps) == 0.05


def test_an_attack_that_was_transferred_needs_no_evidence(network, opponent):
    result = quick(network, setting="transfer", oracle=opponent, audit="quick")
    assert result.evidence == []


def test_evidence_that_fails_is_no_error(network, monkeypatch):
    def broken(*rest, **settings):
        raise RuntimeError("no more")

    entry = replace(find("random-search"), run=broken)
    monkeypatch.setitem(registry.attacks._entries, "random-search", entry)
    result = quick(network, attack="pgd(steps=2)", n=4, audit="thorough")
    assert {record.status for record in result.records} == {"ok"}
    assert [r.cell.attack for r in result.evidence if r.status == "failed"] == ["random-search"]


def test_evidence_is_kept_under_out_and_read_again(network, tmp_path, monkeypatch):
    first = quick(network, attack="pgd(steps=2)", audit="quick", out=tmp_path)
    assert len(list(Store(tmp_path).all())) == 4
    monkeypatch.setattr("robbench.evaluation.measure", lambda missing, *rest, **options: missing)
    second = quick(network, attack="pgd(steps=2)", audit="quick", out=tmp_path)
    assert second.flags() == first.flags()


def test_a_table_and_a_frame_carry_the_badge(network):
    result = quick(network, attack="pgd(steps=2)")
    (word,) = result.frame().badge
    (found,) = result.flags().values()
    assert word == badge(found) and word in str(result)


def test_an_unknown_depth_is_refused(network):
    with pytest.raises(robbench.InputError, match="unknown audit 'thorogh'; did you mean 'thoro"):
        quick(network, audit="thorogh")
