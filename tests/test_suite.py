"""Suites: stages in turn on what is left, what each contributed, and the access that each has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

import robbench
from robbench import datasets, registry
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.losses import Votes
from robbench.attacks.suite import BUDGETS, Ready, Stage, compose, in_turn
from robbench.defense import canonical, resolve, suite_of, with_preset
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.frozen import Frozen
from robbench.grid import Block
from robbench.networks.bpda import BPDA, declared_backwards
from robbench.records import Record, Store
from robbench.registry import defenses
from robbench.rules import MeanLogits, Vote
from robbench.siblings import RELATIONS, members_of, siblings
from robbench.threat import Threat

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").subset(40)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


def access_to(*members, **options):
    return Access(Deployed(nn.ModuleList(members), MeanLogits(), SHAPE, 10), **options)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.4)])
def test_autoattack_breaks_the_images_that_its_authors_code_breaks(network, digits, norm, eps):
    x, y = digits.x[:24], digits.y[:24]
    reference = AutoAttack(network, norm=norm.capitalize(), eps=eps, seed=0, device="cpu")
    reference.verbose, reference.square.n_queries = False, 300
    theirs, _ = reference.run_standard_evaluation(x, y)
    attack = Configured.of("autoattack(queries=300)")
    ours = attack(access_to(network), x, y, Threat(norm=norm, eps=eps), rng())
    assert torch.equal(*(network(found).argmax(1) == y for found in (ours, theirs)))


def test_rand_draws_twenty_times(network, digits):
    access = access_to(nn.Sequential(Noise(), network))
    x, y = digits.x[:4], digits.y[:4]
    Configured.of("autoattack(version=rand)")(access, x, y, Threat(eps="0.01"), rng())
    # two climbs of 100 steps and their first points, 20 draws behind every gradient
    assert access.cost.backwards <= 2 * 101 * 20 * 4
    assert access.cost.backwards % 20 == 0


def test_autoattack_takes_the_margin_where_its_loss_is_not_defined(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    access = Access(Deployed(nn.ModuleList([model]), MeanLogits(), SHAPE, 3))
    y = model(digits.x).argmax(dim=1)
    attack = Configured.of("autoattack(steps=10, queries=20)")
    found = attack(access, digits.x, y, Threat(eps="0.3"), rng())
    assert (model(found).argmax(dim=1) != y).float().mean() > 0.9
    assert any("loss=margin" in name for name in access.notes["suite"])


def test_on_an_oracle_every_part_of_autoattack_runs(network, digits):
    access = access_to(network, own=False)
    attack = Configured.of("autoattack(steps=5, queries=20)")
    attack(access, digits.x, digits.y, Threat(eps="0.3"), rng())
    assert np.isfinite(access.trace["suite_lost"]).all()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("saa(attack=strongest)", "write one attack"),
        ("saa(attack='cw-linf')", "cw-linf has no norm l2"),
        ("strongest", "is no inner attack"),
        ("apgd(start=warm)", "there are none"),
    ],
)
def test_what_only_makes_sense_in_a_suite_is_refused_outside(spec, problem, network, digits):
    access = access_to(nn.Sequential(Noise(), network))
    with pytest.raises(InputError, match=problem):
        Configured.of(spec)(access, digits.x, digits.y, Threat(norm="l2", eps="0.5"), rng())


def test_a_search_for_the_smallest_change_stays_within_the_ball_in_a_sample_average(
    network, digits
):
    access = access_to(nn.Sequential(Noise(), network), draws=2)
    attack = Configured.of("saa(draws=4, attack='deepfool(steps=5)')")
    found = attack(access, digits.x, digits.y, Threat(eps="0.15"), rng())
    assert (found - digits.x).abs().max() <= 0.15 + 1e-6
    assert not torch.equal(found, digits.x)


def test_what_couples_a_batch_is_frozen_image_by_image(network, digits):
    class Coupled(nn.Module):
        per_batch = True

        def forward(self, x):
            return network(x) + x.std() * torch.randn(len(x), 10)

    frozen = Frozen(Deployed(nn.ModuleList([Coupled()]), MeanLogits(), SHAPE, 10), [1, 2])
    whole, part = frozen.sample(digits.x, 1).logits, frozen.sample(digits.x[3:5], 1).logits
    torch.testing.assert_close(part, whole[:, :, 3:5], rtol=1e-5, atol=1e-5)


def test_the_suite_of_an_own_model_knows_what_it_is_told(digits):
    torch.manual_seed(0)
    nets = [nn.Sequential(Noise(), nn.Flatten(), nn.Linear(64, 10)).eval() for _ in range(2)]
    data = (digits.x, digits.y)
    model = robbench.deploy(nets, data, rule=Vote(), draws=3, loss={"mine": Votes()})
    for goal in ("error", "denial"):
        result = robbench.evaluate(
            model, data, "strongest(budget=smoke)", eps="0.1", n=8, goal=goal
        )
        names = " ".join(result.records[0].provenance["suite"])
        assert all(part in names for part in ("loss=mine", "balanced=true", "arc", "saa("))
        assert ("loss=denial" in names) is (goal == "denial")


def test_the_id_of_a_suite_follows_what_it_is_made_of(monkeypatch, tmp_path):
    def cells():
        block = Block(defense="ito", attack="strongest(budget=smoke)", eps="0.1", n=8)
        return list(block.cells(datasets.load("digits")))

    (before,) = cells()
    monkeypatch.setattr("robbench.defense.compose", lambda *_, **__: [Stage("fgsm")])
    (after,) = cells()
    assert before.id != after.id
    assert before.setting.suite != after.setting.suite
    store = Store(tmp_path)
    assert store.path(before) == store.path(after)  # the newer record takes the older's place
    failed = Record(id=before.id, cell=before, status="failed", reason="…")
    store.put(failed)
    store.put(Record(id=after.id, cell=after, status="failed", reason="…"))
    assert [record.id for record in store.all()] == [after.id]


def test_versions_of_inner_attacks_count(monkeypatch):
    plain = Configured.of("autoattack").version, Configured.of("saa(attack=square)").version
    entry = registry.attacks.get("square")
    monkeypatch.setitem(registry.attacks._entries, "square", replace(entry, version=3))
    raised = Configured.of("autoattack").version, Configured.of("saa(attack=square)").version
    assert raised == (plain[0] + 2, plain[1] + 2)


def test_a_stage_sees_only_what_is_left_and_the_trace_says_who_broke_what(network, digits):
    access = access_to(network)
    asked = []

    def watched(spec):
        configured = Configured.of(spec)
        entry = configured.entry

        class Watched(Configured):
            def __call__(self, access, x, y, threat, rng):
                asked.append(len(x))
                return super().__call__(access, x, y, threat, rng)

        return Ready(spec, Watched(entry, configured.spec, configured.settings), access)

    stages = [watched(spec) for spec in ("fgsm", "pgd(steps=20)", "cw(steps=30, search=3)")]
    threat = Threat(norm="l2", eps="0.5")
    found = in_turn(access, stages, digits.x, digits.y, threat, rng())
    trace = access.trace
    broken = network(found).argmax(1) != digits.y
    clean = int((network(digits.x).argmax(1) == digits.y).sum())
    lost = [int((trace["suite_lost"][index] == 1).sum()) for index in range(3)]
    assert asked == [clean, clean - lost[0], clean - lost[0] - lost[1]]
    assert min(lost[:2]) > 0
    assert int(broken.sum()) == len(digits.y) - clean + sum(lost)
    assert set(trace["suite_winner"][trace["suite_lost"][1] == 1]) == {1}
    assert np.isnan(trace["suite_lost"][1]).sum() == len(digits.y) - asked[1]
    assert access.notes["suite"] == ["fgsm", "pgd(steps=20)", "cw(steps=30, search=3)"]
    passes = access.cost.forwards + access.cost.backwards
    assert trace["suite_passes"].sum() <= passes
    # the rest is what it took to compare the stages' points: x, then two points for each image
    np.testing.assert_allclose(
        trace["suite_passes"].sum() + len(digits.y) + 2 * sum(asked), passes, rtol=1e-5
    )


def test_the_strongest_attack_is_no_weaker_than_its_parts():
    result = robbench.evaluate(
        "adp(network=mlp, epochs=2)", "digits",
        ["strongest(budget=smoke)", "pgd(loss=ce)", "apgd(loss=margin, steps=20)"],
        eps="0.1", n=40, setting=None,
    )  # fmt: skip
    shares = {record.cell.attack: record.ok.mean() for record in result.records}
    assert shares["strongest(budget=smoke)"] <= min(shares.values())
    (suite,) = [r for r in result.records if r.cell.attack.startswith("strongest")]
    names = suite.provenance["suite"]
    assert any("from standard(" in name for name in names)
    assert any("from adp(" in name and "[0]" in name for name in names)
    assert suite.trace["suite_winner"].max() < len(names)


@pytest.mark.parametrize("name", sorted(defenses))
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_stage_of_every_suite_can_be_run(name, budget):
    for stage in suite_of(with_preset(name, "quick", "digits"), budget):
        entry = Configured.of(stage.attack).entry
        assert entry.norms & {"linf", "l2"}
        assert not entry.refusal
        assert stage.oracle is None or stage.oracle in RELATIONS


def test_a_larger_budget_has_every_kind_of_stage_of_a_smaller_one():
    def kinds(budget):
        stages = suite_of(canonical("ito"), budget)
        return {(Configured.of(stage.attack).entry.name, stage.oracle) for stage in stages}

    assert kinds("smoke") <= kinds("standard") <= kinds("thorough")


def test_a_detector_brings_its_own_attacks():
    names = {stage.attack for stage in compose((), "smoke", detector=True)}
    assert {"opgd", "joint", "feature-matching"} <= names


def test_the_own_losses_come_first():
    stages = [stage.attack for stage in compose(("vote",), "smoke")]
    assert stages[0].startswith("apgd(loss=vote")
    assert sum("loss=vote" in stage for stage in stages) == 1


@pytest.mark.parametrize(
    ("text", "relation", "found"),
    [
        ("ito", "noise-off", ["ito(noise=false)"]),
        ("dropconnect(test=vote)", "noise-off", ["dropconnect(draws=50)"]),
        ("standard", "noise-off", []),
        ("standard", "twin", []),
        ("standard(network=mlp)", "type-i", ["standard"]),
        ("mmc(network=mlp)", "type-ii", ["mmc"]),
        ("adp", "members", ["adp[0]", "adp[1]", "adp[2]"]),
        ("adp[1]", "members", []),
        ("standard & pgd-at", "members", ["standard", "pgd-at"]),
        ("adp & standard", "member", ["adp[0]"]),
        ("mixup-inference", "base", ["mixup"]),
        ("adp(adversarial=pgd)", "adversarial", ["pgd-at"]),
        ("pgd-at", "adversarial", []),
        ("standard(detector=lid, fpr=0.01)", "undetected", ["standard"]),
        ("smoothing(base=pgd-at, epochs=0)", "twin", ["standard"]),
        ("enresnet(network=resnet20)", "type-ii", ["enresnet(network=resnet32)"]),
        ("enresnet", "type-ii", ["enresnet(network=resnet20(width=8))"]),
        (
            "random-resize-pad",
            "type-ii",
            ["random-resize-pad(base=standard(network=resnet20(width=8)))"],
        ),
    ],
)
def test_siblings_stand_in_their_relation(text, relation, found):
    assert siblings(text, "digits", relation) == found


def test_a_star_lists_the_members():
    assert members_of("adp[*]", "quick", "digits") == ["adp[0]", "adp[1]", "adp[2]"]
    assert members_of("adp[1]", "quick", "digits") == ["adp[1]"]
    assert len(members_of("ito[*]", "paper", "cifar10")) == 20
    with pytest.raises(InputError, match="is a list of defenses"):
        resolve("adp[*] & standard")


def test_members_attack_each_other():
    block = Block(
        defense="adp[*]", oracle="adp[*]", attack="pgd", setting="transfer", eps="0.1", n=10
    )
    cells = list(block.cells(datasets.load("digits")))
    pairs = [(cell.defense, cell.setting.oracle) for cell in cells]
    assert len(set(pairs)) == 6
    assert all(target != oracle for target, oracle in pairs)
    assert len({cell.attack_key() for cell in cells}) == 3  # one x' for all targets of an oracle


def test_relations_serve_every_target_of_a_grid():
    block = Block(
        defense="ito, enresnet, standard", oracle="noise-off", attack="pgd", eps="0.1",
        setting="transfer", n=10,
    )  # fmt: skip
    cells = list(block.cells(datasets.load("digits")))
    assert [(resolve(c.defense)[0].name, c.setting.oracle) for c in cells] == [
        ("ito", "ito(noise=false)"), ("enresnet", "enresnet(noise=false)"),
    ]  # fmt: skip


def test_frozen_draws_are_the_same_in_any_batch(network, digits):
    frozen = Frozen(Deployed(nn.ModuleList([nn.Sequential(Noise(), network)]), MeanLogits(),
                             SHAPE, 10), [1, 2, 3])  # fmt: skip
    whole = frozen.sample(digits.x, 1).logits
    part = frozen.sample(digits.x[5:9], 1).logits
    torch.testing.assert_close(part, whole[:, :, 5:9], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])
    assert torch.equal(frozen.sample(digits.x, 1).logits, whole)


def test_frozen_noise_is_that_of_its_seed(network, digits):
    frozen = Frozen(Deployed(nn.ModuleList([nn.Sequential(Noise(), network)]), MeanLogits(),
                             SHAPE, 10), [7])  # fmt: skip
    logits = frozen.sample(digits.x[:1], 1).logits[0, 0]
    torch.manual_seed(7)
    noise = 0.2 * torch.randn(1, *SHAPE)
    torch.testing.assert_close(logits, network(digits.x[:1] + noise), rtol=1e-5, atol=1e-5)


def test_the_sample_average_says_how_much_it_overfits(network, digits):
    class Blurred(nn.Module):
        def forward(self, x):
            logits = network(x)
            return logits + 4 * torch.randn_like(logits)

    shares = []
    for draws in (1, 24):
        access = access_to(Blurred(), draws=5)
        spec = f"saa(draws={draws}, attack='apgd(loss=margin, steps=20)')"
        Configured.of(spec)(access, digits.x, digits.y, Threat(eps="0.06"), rng())
        trace = access.trace
        shares.append([trace[key].mean() for key in ("surrogate_lost", "fresh_lost")])
    gaps = [fixed - fresh for fixed, fresh in shares]
    assert gaps[0] > gaps[1] > -0.05
    assert shares[1][1] > shares[0][1] - 0.02


def test_what_cannot_be_frozen_is_refused(digits):
    class Branching(nn.Module):
        def forward(self, x):
            factor = 1 if x.sum() > 0 else 2
            return factor * x.flatten(1)[:, :10] + torch.rand(len(x), 10)

    access = access_to(Branching(), draws=2)
    attack = Configured.of("saa(draws=2, attack=fgsm)")
    with pytest.raises(InputError, match="the draws of Branching cannot be fixed"):
        attack(access, digits.x, digits.y, Threat(eps="0.1"), rng())


class Quantised(nn.Module):
    def forward(self, x):
        return (x * 4).round() / 4


def test_bpda_lends_a_derivative_and_says_so(network, digits):
    plain = nn.Sequential(Quantised(), network)
    lent = nn.Sequential(BPDA(Quantised()), network)
    torch.testing.assert_close(lent(digits.x), plain(digits.x))
    x = digits.x.clone().requires_grad_()
    (given,) = torch.autograd.grad(lent(x).sum(), x)
    at = Quantised()(digits.x).requires_grad_()
    (expected,) = torch.autograd.grad(network(at).sum(), at)
    torch.testing.assert_close(given, expected)
    assert declared_backwards(lent) == ["Quantised as Identity"]
    assert declared_backwards(plain) == []
    shares = []
    for model in (plain, lent):
        result = robbench.evaluate(model.eval(), (digits.x, digits.y), "pgd", eps="0.2")
        shares.append(result.records[0].ok.mean())
        said = result.records[0].provenance["bpda"]
        assert said == (["Quantised as Identity"] if model is lent else [])
    assert shares[1] < shares[0] - 0.3
