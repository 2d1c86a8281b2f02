"""The judge against attacks that cheat, scoring on fresh draws, and what a record then says."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets, judge, registry, runner
from robbench.attacks import attack
from robbench.checkpoints import Trained
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.executors import measure
from robbench.grid import Block
from robbench.rules import MeanLogits, Vote
from robbench.runner import Shared, merge, run_shard, shards

N = 20
PLAIN, COIN, NORMALISED = "model:plain", "model:coin", "model:normalised"


class Coin(nn.Module):
    """Logits that are wrong for half of the passes, image by image."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        flipped = torch.rand(len(x), 1) < 0.5
        logits = self.network(x)
        return torch.where(flipped, logits.roll(1, dims=1), logits)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture
def shared(digits, network, tmp_path):
    """Three models of the caller: deterministic, random, and with buffers that could change."""
    torch.manual_seed(1)
    normalised = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).eval()
    models = {
        PLAIN: [network],
        COIN: [Coin(network), Coin(network)],
        NORMALISED: [normalised],
    }
    rules = {COIN: Vote()}
    deployed = {
        name: Deployed(nn.ModuleList(members), rules.get(name, MeanLogits()), digits.shape, 10)
        for name, members in models.items()
    }
    return Shared(
        tmp_path,
        None,
        torch.device("cpu"),
        given={"digits": digits},
        models={name: Trained(each, ()) for name, each in deployed.items()},
    )


@pytest.fixture
def plugin(monkeypatch):
    """Registers a function as the attack `plugin`, until the end of the test."""

    def register(run, name="plugin", **traits):
        entries = {key: entry for key, entry in registry.attacks._entries.items() if key != name}
        monkeypatch.setattr(registry.attacks, "_entries", entries)
        attack(name, norms=("linf", "l2", "l1"), **traits)(run)

    list(registry.attacks)  # the native ones are registered first
    return register


def cells(shared, **fields):
    given = {"defense": PLAIN, "attack": "plugin", "eps": "0.1", "setting": "whitebox", "n": N}
    block = Block(**(given | fields))
    return list(block.cells(shared.dataset("digits"), models=shared.models))


def run(shared, **fields):
    """The record of one cell."""
    (cell,) = cells(shared, **fields)
    pieces = range(len(shards(cell.n, shared.dataset("digits").shape)))
    return merge([run_shard([cell], shard, shared)[0] for shard in pieces], shared)


def content(record):
    """All that is written but the seconds it took."""
    data = json.loads(record.text())
    data["cost"].pop("seconds", None)
    return data


def inwards(x):
    """The direction that stays inside the box."""
    return torch.where(x < 0.5, 1.0, -1.0)


def moved(x, norm, length):
    """x moved by exactly this length, inside the box."""
    step = {"linf": length, "l2": length / 8, "l1": length / 64}[norm]  # 64 pixels
    return x + step * inwards(x)


def unmoved(access, x, y, threat, rng):
    return x


def spoiled(x, value):
    x = x.clone()
    x[3, 0, 0, 0] = value
    return x


CHEATS = {
    "NaN": (lambda x: spoiled(x, float("nan")), "values that are not finite in 1 images"),
    "infinite": (lambda x: spoiled(x, float("inf")), "values that are not finite in 1 images"),
    "below the box": (lambda x: x - 0.05, "left the box [0, 1]: values from -0.05 to 0.95"),
    "above the box": (lambda x: spoiled(x, 1.001), "left the box [0, 1]: values from 0 to 1.001"),
    "too few images": (lambda x: x[1:], "returned the shape (19, 1, 8, 8), not (20, 1, 8, 8)"),
    "flat": (lambda x: x.flatten(1), "returned the shape (20, 64), not (20, 1, 8, 8)"),
    "broadcast": (lambda x: x[:1], "returned the shape (1, 1, 8, 8), not (20, 1, 8, 8)"),
    "integers": (lambda x: x.long(), "returned torch.int64, not a floating-point type"),
    "truth values": (lambda x: x > 0, "returned torch.bool, not a floating-point type"),
    "complex": (lambda x: x + 0j, "returned torch.complex64, not a floating-point type"),
    "NumPy": (lambda x: x.numpy(), "returned ndarray, not a tensor"),
    "nothing": (lambda x: None, "returned NoneType, not a tensor"),
    "a list": (lambda x: list(x), "returned list, not a tensor"),
}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_attack_that_cheats_by_one_percent_fails(shared, plugin, norm):
    plugin(lambda access, x, y, threat, rng: moved(x, norm, 1.01 * float(threat.eps)))
    record = run(shared, norm=norm)
    assert record.status == "failed"
    assert f"left the ball: 20 images, up to 1.0100 ε ({norm} 0.1)" in record.reason
    assert record.ok is record.err is record.distance is None


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_attack_at_exactly_the_budget_is_scored(shared, plugin, norm, dtype):
    plugin(lambda access, x, y, threat, rng: moved(x.to(dtype), norm, float(threat.eps)))
    record = run(shared, norm=norm)
    assert record.status == "ok"
    assert record.distance == pytest.approx(np.full(N, 0.1), rel=1e-5)


def test_one_image_beyond_the_budget_fails_the_cell(shared, plugin):
    plugin(lambda access, x, y, threat, rng: torch.cat([x[:-1], moved(x[-1:], "linf", 0.102)]))
    assert "left the ball: 1 images, up to 1.0200 ε" in run(shared).reason


@pytest.mark.parametrize("kind", CHEATS)
def test_what_is_no_adversarial_example_fails(shared, plugin, kind):
    returned, reason = CHEATS[kind]
    plugin(lambda access, x, y, threat, rng: returned(x))
    record = run(shared)
    assert record.status == "failed"
    assert reason in record.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no\nway"), "RuntimeError: no way (test_runner.py:"),
        (KeyError("x"), "KeyError: 'x' (test_runner.py:"),
        (AssertionError(), "AssertionError: no message (test_runner.py:"),
        (MemoryError(), "MemoryError: no message"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_attack_that_raises_fails_with_its_error(shared, plugin, error, reason):
    def raising(access, x, y, threat, rng):
        raise error

    plugin(raising)
    record = run(shared)
    assert record.status == "failed"
    assert reason in record.reason


def test_bad_input_found_by_an_attack_is_the_reason_word_for_word(shared, plugin):
    def refusing(access, x, y, threat, rng):
        raise InputError("needs colours")

    plugin(refusing)
    record = run(shared)
    assert (record.status, record.reason) == ("failed", "needs colours")


def test_only_the_defenses_that_were_used_last_are_kept(shared, monkeypatch):
    loaded = []

    def deploy(self, spec, dataset, train_seed, device, progress):
        loaded.append(spec)
        return Trained(shared.models[PLAIN].deployed, (spec,))

    monkeypatch.setattr(runner.Shelf, "deploy", deploy)
    monkeypatch.setattr(runner, "KEPT", 2)
    for spec in "abacab":  # b is loaded again: c came after it, a was used in between
        assert shared.deploy(spec, shared.dataset("digits"), 0).keys == (spec,)
        assert len(shared.trained) <= 2
    assert loaded == ["a", "b", "c", "b"]


def test_an_attack_that_writes_into_the_images_is_measured_against_the_true_ones(shared, plugin):
    plugin(lambda access, x, y, threat, rng: x.add_(0.5 * inwards(x)))
    assert "left the ball: 20 images, up to 5.0000 ε" in run(shared).reason
    plugin(unmoved, "honest")
    assert run(shared, attack="honest").clean_ok.sum() > N / 2, "the data are as they were"


def test_an_attack_that_writes_into_the_labels_changes_no_score(shared, plugin):
    plugin(lambda access, x, y, threat, rng: x + 0 * y.fill_(0).sum())
    record = run(shared)
    assert (record.ok == record.clean_ok).all()
    assert record.ok.sum() > N / 2


def test_the_defense_is_as_it_was_after_an_attack(shared, plugin):
    def trains(access, x, y, threat, rng):
        for module in access.deployed.modules():
            module.training = True
        for parameter in access.deployed.parameters():
            parameter.requires_grad_()
        scores = access(x)
        scores.sum().backward()
        return x

    deployed = shared.models[NORMALISED].deployed
    before = {name: tensor.clone() for name, tensor in deployed.state_dict().items()}
    modes = [module.training for module in deployed.modules()]
    plugin(trains)
    assert run(shared, defense=NORMALISED).status == "ok"
    after = deployed.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in deployed.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in deployed.parameters())


def test_an_attack_cannot_reach_the_scoring_draws(shared, plugin):
    def honest(access, x, y, threat, rng):
        return x

    def seeds(access, x, y, threat, rng):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return x

    def exhausts(access, x, y, threat, rng):
        access.judge(x, y, lambda draw, y, target: draw.logits[0, 0, :, 0], None, 50)
        torch.rand(1000, generator=rng)
        return x

    found = []
    for body in (honest, seeds, exhausts):
        plugin(body)
        found.append(run(shared, defense=COIN))
    for other in found[1:]:
        assert (other.ok == found[0].ok).all()
        assert (other.err == found[0].err).all()


def test_the_same_images_are_scored_on_draws_of_their_own(shared, plugin):
    plugin(unmoved)
    record = run(shared, defense=COIN)
    assert record.draws == judge.SCORING_DRAWS
    assert (record.ok != record.clean_ok).any(), "the draws of x are not those of x'"
    assert record.ok.mean() == pytest.approx(record.clean_ok.mean(), abs=1.5)


def test_a_vote_that_finds_no_majority_abstains(shared, plugin):
    plugin(unmoved)
    record = run(shared, defense=COIN)
    assert (record.ok.astype(int) + record.err <= record.draws).all()
    assert (record.ok.astype(int) + record.err < record.draws).mean() > 0.9


def test_a_deterministic_defense_is_scored_once(shared, plugin, digits, network):
    plugin(lambda access, x, y, threat, rng: moved(x, "linf", 0.1))
    record = run(shared)
    subset = digits.subset(N)
    with torch.no_grad():
        clean, attacked = network(subset.x), network(moved(subset.x, "linf", 0.1))
    assert record.draws == 1
    assert (record.clean_ok == (clean.argmax(1) == subset.y).numpy()).all()
    assert (record.ok == (attacked.argmax(1) == subset.y).numpy()).all()
    assert (record.ok + record.err == 1).all()


def test_a_record_says_how_sure_the_defense_was_of_x_and_of_what_was_attacked(
    shared, plugin, digits, network
):
    plugin(lambda access, x, y, threat, rng: moved(x, "linf", 0.1))
    record, subset = run(shared), digits.subset(N)
    for x, best, right, sure in (
        (subset.x, record.clean_best, record.clean_ok, record.clean_score),
        (moved(subset.x, "linf", 0.1), record.best, record.ok, record.score),
    ):
        with torch.no_grad():
            first = network(x).double().softmax(dim=1).amax(dim=1)
        assert np.array_equal(best, right), "what always answers names its first label"
        np.testing.assert_allclose(sure, torch.logit(first), rtol=1e-3, atol=1e-3)


def test_a_record_says_what_of_the_defense_an_attack_had_changed(shared, plugin):
    def trains(access, x, y, threat, rng):
        for module in access.deployed.modules():
            module.training = True
        return x

    plugin(trains)
    changed = run(shared, defense=NORMALISED).provenance["changed"]
    assert "members.0.1" in changed, "the normalisation was told to train"
    plugin(unmoved)
    assert "changed" not in run(shared, defense=NORMALISED).provenance


def test_a_defense_that_answers_nan_fails(shared, plugin, digits):
    class Broken(nn.Linear):
        def forward(self, x):  # the background of a digit is exactly 0
            return super().forward(x.flatten(1) / x.flatten(1))

    deployed = Deployed(nn.ModuleList([Broken(64, 10).eval()]), MeanLogits(), digits.shape, 10)
    shared.models["model:nan"] = Trained(deployed, ())
    plugin(unmoved)
    assert run(shared, defense="model:nan").reason == "the defense answers with NaN logits"


def test_a_record_repeats_bit_for_bit(shared, digits):
    fields = {"defense": COIN, "attack": "pgd(steps=3)", "setting": "adaptive", "eot": 4}
    first = run(shared, **fields)
    torch.manual_seed(99)
    fresh = Shared(shared.out, None, shared.device, {"digits": digits}, shared.models)
    run(fresh, **(fields | {"eps": "0.2"}))  # another cell before it
    assert content(run(fresh, **fields)) == content(first)
    assert content(run(fresh, **(fields | {"seed": 1}))) != content(first)


def test_the_random_streams_of_the_caller_go_on(shared, plugin):
    plugin(lambda access, x, y, threat, rng: x + 0 * torch.rand(1))
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    run(shared, defense=COIN)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_clean_outcomes_are_those_of_the_defense_whatever_the_attack(shared, plugin):
    plugin(unmoved)
    records = [
        run(shared, defense=COIN, **fields)
        for fields in ({}, {"attack": "fgsm"}, {"eps": "0.2"}, {"attack": "pgd", "norm": "l2"})
    ]
    records.append(
        run(Shared(shared.out, None, shared.device, shared.given, shared.models), defense=COIN)
    )
    for record in records[1:]:
        assert (record.clean_ok == records[0].clean_ok).all()
        assert (record.clean_err == records[0].clean_err).all()


def test_a_minimum_norm_attack_counts_only_within_the_budget(shared, plugin):
    """The first half is moved by 0.05, the second by 0.3: at ε = 0.1 those count as x itself."""
    lengths = torch.where(torch.arange(N) < N // 2, 0.05, 0.3).view(-1, 1, 1, 1)
    calls = []

    def smallest(access, x, y, threat, rng):
        calls.append(threat.eps)
        return x + lengths * inwards(x)

    plugin(smallest, minimal=True)
    found = list(measure(cells(shared, eps="0.1,0.4"), None, shared))
    near, far = sorted(found, key=lambda record: record.cell.threat.eps)
    half = np.arange(N) < N // 2
    assert calls == [None], "one run answers every ε"
    assert (near.distance == far.distance).all()
    assert near.distance == pytest.approx(np.where(half, 0.05, 0.3), rel=1e-5)
    assert not near.trace["unchanged"].any(), "beyond ε is not the same as not moved"
    assert not far.trace["unchanged"].any()
    assert (near.ok[~half] == near.clean_ok[~half]).all()
    assert (near.ok[half] == far.ok[half]).all()
    assert far.ok.sum() < near.ok.sum()


def test_a_minimum_norm_attack_is_judged_too(shared, plugin):
    plugin(lambda access, x, y, threat, rng: x - 1, minimal=True)
    assert "left the box" in run(shared).reason


def test_a_transfer_attack_sees_only_its_oracle_and_is_run_once(shared, plugin):
    seen = []

    def curious(access, x, y, threat, rng):
        seen.append(access.deployed)
        return moved(x, "linf", 0.1)

    plugin(curious)
    both = cells(shared, defense=[PLAIN, NORMALISED], oracle=COIN, setting="transfer")
    records = list(measure(both, None, shared))
    assert seen == [shared.models[COIN].deployed]
    assert [record.status for record in records] == ["ok", "ok"]
    assert (records[0].distance == records[1].distance).all()
    assert (records[0].clean_ok != records[1].clean_ok).any(), "each target is scored itself"


def test_a_query_attack_gets_no_gradient(shared, plugin):
    def queries(access, x, y, threat, rng):
        scores = access(x.requires_grad_())
        assert scores.shape == (N, 10)
        assert not scores.requires_grad
        return x.detach()

    plugin(queries, needs="scores")
    record = run(shared, setting="blackbox")
    assert record.status == "ok"
    assert record.cost["queries"] == record.cost["forwards"] == 1
    assert record.cost["backwards"] == 0


def test_a_failing_attack_fails_its_own_cell_only(shared, plugin):
    def raising(access, x, y, threat, rng):
        raise RuntimeError("no gradient")

    plugin(raising)
    plugin(unmoved, "honest")
    found = list(measure(cells(shared, attack="plugin,honest,fgsm"), None, shared))
    assert {record.cell.attack: record.status for record in found} == {
        "plugin": "failed",
        "honest": "ok",
        "fgsm": "ok",
    }


def test_one_failing_shard_fails_the_cell(shared, plugin, monkeypatch):
    monkeypatch.setattr(runner, "SHARD", 8)
    sizes = []

    def raising(access, x, y, threat, rng):
        sizes.append(len(x))
        return x if len(x) == 8 else x - 1

    plugin(raising)
    record = run(shared)
    assert sizes == [8, 8, 4]
    assert "left the box" in record.reason
    assert record.ok is None


def test_shards_are_put_together_in_order(shared, plugin, monkeypatch):
    plugin(lambda access, x, y, threat, rng: moved(x, "linf", 0.1 * x.mean((1, 2, 3), True)))
    whole = run(shared)
    assert len(set(whole.distance)) > N / 2, "every image is moved by another length"
    monkeypatch.setattr(runner, "SHARD", 8)
    shared.clean.clear()
    (cell,) = cells(shared)
    parts = [run_shard([cell], shard, shared)[0] for shard in (2, 0, 1)]
    record = merge(parts, shared)
    for name in ("ok", "err", "clean_ok", "clean_err", "distance"):
        assert (getattr(record, name) == getattr(whole, name)).all()
    assert (record.trace["unchanged"] == whole.trace["unchanged"]).all()


@given(st.integers(1, 5000), st.sampled_from([(1, 8, 8), (3, 32, 32), (3, 224, 224)]))
@settings(max_examples=50)
def test_shards_cover_every_image_once(n, shape):
    pieces = shards(n, shape)
    assert [index for piece in pieces for index in piece] == list(range(n))
    assert all(len(piece) == len(pieces[0]) for piece in pieces[:-1])
    assert len(pieces[0]) <= runner.SHARD


def test_shards_of_a_larger_subset_begin_with_those_of_a_smaller():
    assert shards(1000, (1, 8, 8))[:2] == shards(500, (1, 8, 8))


def test_the_cost_of_pgd_is_its_steps(shared):
    record = run(shared, attack="pgd", eps="1/1000000")  # nobody falls: nobody leaves the batch
    right = record.clean_ok.mean()  # images that are wrong from the start are done at once
    assert record.cost["backwards"] == pytest.approx(20 * right + (1 - right))
    assert record.cost["forwards"] == pytest.approx(21 * right + (1 - right))
    assert record.cost["queries"] == record.cost["forwards"]


def test_broken_images_cost_no_more(shared):
    costs = [run(shared, attack="pgd", eps=eps).cost["backwards"] for eps in ("0.1", "0.5")]
    assert 1 <= costs[1] < costs[0] <= 20


def test_the_cost_of_expectation_counts_draws_and_members(shared):
    record = run(shared, defense=COIN, attack="pgd(steps=3)", setting="adaptive", eot=4)
    gradients, selection = (
        3 * 4 * 2,
        2 * 20 * 2,
    )  # steps, draws, members; candidates, draws, members
    assert record.cost["backwards"] == gradients
    assert record.cost["forwards"] == gradients + selection
    assert record.cost["queries"] == (gradients + selection) / 2


def test_distances_are_those_of_what_was_scored(shared, digits):
    record = run(shared, attack="pgd", norm="l2", eps="0.5")
    assert (record.distance <= 0.5 + 1e-5).all()
    assert (record.distance > 0).mean() > 0.5


def test_traces_of_the_attack_are_kept(shared):
    record = run(shared, attack="pgd(steps=9)")
    assert record.trace["loss"].shape == (5, N)
    assert {"zero_gradient", "dead", "restart", "unchanged"} <= record.trace.keys()


@pytest.mark.parametrize(
    "trace", [torch.zeros(N), np.zeros(3), np.float32(1), ["a"], np.array(["a"] * N)], ids=repr
)
def test_a_trace_that_no_record_can_hold_fails_the_cell(shared, plugin, trace):
    def careless(access, x, y, threat, rng):
        access.trace["mine"] = trace
        return x

    plugin(careless)
    assert "left a trace 'mine' that is not (..., 20) numbers" in run(shared).reason


def test_the_provenance_says_on_what_and_with_what(shared, plugin, digits):
    plugin(unmoved)
    provenance = run(shared, defense=COIN).provenance
    assert provenance["dataset_hash"] == digits.hash
    assert provenance["subset_hash"] == digits.subset(N).hash
    assert provenance["randomness"] == ["image", "image"]
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]


class Broken(nn.Module):
    """Answers until it is told to break."""

    def __init__(self, network):
        super().__init__()
        self.network, self.breaks = network, False

    def forward(self, x):
        if self.breaks:
            raise RuntimeError("this model is broken")
        return self.network(x)


def test_a_target_that_breaks_does_not_fail_the_other_targets(shared, plugin, network):
    broken = Deployed(nn.ModuleList([Broken(network)]), MeanLogits(), (1, 8, 8), 10)
    broken.members[0].breaks = True
    shared.models["model:broken"] = Trained(broken, ())
    plugin(unmoved)
    targets = [PLAIN, "model:broken"]
    made = cells(shared, defense=targets, setting="transfer", oracle=NORMALISED)
    found = {record.cell.defense: record for record in measure(made, None, shared)}
    assert found[PLAIN].status == "ok"
    assert "this model is broken" in found["model:broken"].reason


def test_traces_that_do_not_fit_together_fail_their_own_cell(shared, plugin, monkeypatch):
    monkeypatch.setattr("robbench.runner.SHARD", N // 2)

    def uneven(access, x, y, threat, rng):
        uneven.rows += 1
        access.trace = {"loss": np.zeros((uneven.rows, len(y)), dtype=np.float32)}
        return x

    uneven.rows = 0
    plugin(uneven)
    plugin(unmoved, name="still")
    made = cells(shared) + cells(shared, attack="still")
    found = {record.cell.attack: record for record in measure(made, None, shared)}
    assert found["plugin"].status == "failed" and found["still"].status == "ok"
