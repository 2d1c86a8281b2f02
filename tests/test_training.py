"""The training loop, and adversarial training against torchattacks and closed forms."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import nn
from torch.nn import functional as F

from robbench import datasets, recipes, registry, training
from robbench.access import Access
from robbench.attacks import Configured
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.recipes import Adversarial
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance
from robbench.training import Diverged, train

CPU = torch.device("cpu")
SHAPE, LABELS = (1, 8, 8), 10
NAMES = list(registry.defenses)
TINY = {"network": "resnet8(width=2)", "epochs": 2, "batch_size": 16}
Standard = registry.defenses.get("standard")


@pytest.fixture(scope="module")
def dataset():
    """65 scans: the last of five batches of 16 has one image."""
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:65] for tensor in digits.train)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).eval()


def tiny(name, **fields):
    return registry.defenses.get(name)(**{**TINY, **fields})


def fresh(defense, seed=0):
    torch.manual_seed(seed)
    return defense.build(SHAPE, LABELS)


def trained(defense, dataset, seed=0, members=None):
    members = fresh(defense) if members is None else members
    train(defense, members, dataset, seed, CPU)
    return members


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_training_repeats_bit_for_bit_and_depends_on_the_seed(name, dataset):
    defense = tiny(name)
    first, again, other = (trained(defense, dataset, seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert not any(module.training for module in first.modules())
    for member, start in zip(first, fresh(defense), strict=True):
        weights = zip(member.parameters(), start.parameters(), strict=True)
        assert all(new.isfinite().all() and not torch.equal(new, old) for new, old in weights)


def test_a_separately_trained_member_does_not_depend_on_the_others(dataset):
    defense = tiny("ito", members=3, epochs=1)
    three = trained(defense, dataset)
    alone = trained(defense, dataset, members=nn.ModuleList([*fresh(defense)][:1]))
    assert same(three[0], alone[0])


class Separate(Standard):
    """`standard` with members trained one by one that tells the seeds of noise and order."""

    joint: ClassVar[bool] = False
    seeds: ClassVar[list] = []

    def batch(self, members, batch, rng):
        self.seeds.append((torch.initial_seed(), rng.initial_seed()))
        return super().batch(members, batch, rng)


def test_separately_trained_members_get_noise_and_order_of_their_own(dataset, monkeypatch):
    monkeypatch.setattr(Separate, "seeds", [])
    trained(Separate(**TINY, members=3), dataset)
    noise, order = (set(seeds) for seeds in zip(*Separate.seeds, strict=True))
    assert (len(noise), len(order)) == (3, 3)


def test_jointly_trained_members_depend_on_each_other(dataset):
    defense = tiny("enresnet", members=2, epochs=1, adversarial=None)
    both = trained(defense, dataset)
    alone = trained(defense, dataset, members=nn.ModuleList([*fresh(defense)][:1]))
    assert not same(both[0], alone[0])


class Watched(Standard):
    """`standard` that keeps what every step sees."""

    seen: ClassVar[list] = []

    def batch(self, members, batch, rng):
        assert all(module.training for module in members.modules())
        self.seen.append((batch.clean, batch.y))
        return super().batch(members, batch, rng)

    def after_step(self, members, step):
        assert step == len(self.seen) - 1


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "seen", [])
    return Watched


def test_an_epoch_shows_every_image_and_no_batch_has_a_single_one(dataset, watched):
    defense = watched(**TINY)
    trained(defense, dataset, members=fresh(defense).eval())
    assert [len(y) for _, y in watched.seen] == [16, 16, 16, 16, 2] * 2
    for epoch in (watched.seen[:5], watched.seen[5:]):
        shown = {tuple(image.flatten().tolist()) for x, _ in epoch[:4] for image in x}
        assert len(shown) == 64
    assert not torch.equal(watched.seen[0][0], watched.seen[5][0])


def test_images_keep_their_labels(dataset, watched):
    trained(watched(**TINY, flip=False), dataset)
    label = {tuple(x.flatten().tolist()): int(y) for x, y in zip(*dataset.train, strict=True)}
    for x, y in watched.seen:
        assert [label[tuple(image.flatten().tolist())] for image in x] == y.tolist()


@pytest.mark.parametrize("name", ["standard", "ito"])
def test_progress_counts_the_steps_of_all_members(name, dataset):
    defense, reports = tiny(name), []
    train(defense, fresh(defense), dataset, 0, CPU, lambda *report: reports.append(report))
    total = 5 * 2 * (1 if defense.joint else defense.members)
    assert reports == [(step, total) for step in range(1, total + 1)]


def test_one_batch_is_enough_to_train(dataset):
    trained(tiny("standard", epochs=1, batch_size=128), dataset)


@pytest.mark.parametrize("n", [0, 1])
def test_a_dataset_without_training_images_is_an_input_error(n, dataset):
    few = replace(dataset, train=Split(*(tensor[:n] for tensor in dataset.train)))
    with pytest.raises(InputError, match="training images"):
        trained(tiny("standard"), few)


class NotANumber(Standard):
    """`standard` with a loss that is no number."""

    def loss(self, members, batch):
        return super().loss(members, batch) * float("nan")


def test_a_loss_that_is_not_a_number_stops_the_training(dataset):
    with pytest.raises(Diverged, match="loss of epoch 1 is not a number; lower lr"):
        trained(NotANumber(**TINY), dataset)


class Killed(Exception):
    """What a kill is to a training, as far as a test can."""


def killed_at(step):
    def progress(done, total):
        if done == step:
            raise Killed

    return progress


RECIPES = ["standard", "ito(members=2)", "enresnet(members=2)", "pgd-at(select=best)"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", [5, 6, 13])
def test_a_killed_training_goes_on_to_the_same_weights_and_curve(recipe, step, dataset, tmp_path):
    given = resolve(recipe)[0].model_dump(exclude_unset=True)
    defense = tiny(resolve(recipe)[0].name, **given | {"epochs": 3})
    whole = fresh(defense)
    curve = train(defense, whole, dataset, 0, CPU)
    snapshot = tmp_path / "snapshot"
    with pytest.raises(Killed):
        train(defense, fresh(defense), dataset, 0, CPU, killed_at(step), snapshot, saved_every=0)
    assert snapshot.exists() == (step > 5)  # a state is written after an epoch of five steps
    resumed, seen = fresh(defense, seed=9), []
    again = (
        train(defense, resumed, dataset, 0, CPU, lambda done, _: seen.append(done), snapshot, 0)
        if snapshot.exists()
        else train(defense, fresh_into(resumed, defense), dataset, 0, CPU)
    )
    assert same(resumed, whole)
    assert without_seconds(again) == without_seconds(curve)
    assert not snapshot.exists()


def fresh_into(members, defense):
    members.load_state_dict(fresh(defense).state_dict())
    return members


def without_seconds(curve):
    return [{key: value for key, value in point.items() if key != "seconds"} for point in curve]


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('the snapshot was executed')",)


@pytest.mark.parametrize("content", [b"", b"no archive", "pickle"])
def test_a_snapshot_that_cannot_be_read_is_left_out_and_never_executed(content, dataset, tmp_path):
    snapshot, defense = tmp_path / "snapshot", tiny("standard")
    if content == "pickle":
        torch.save({"members": Evil()}, snapshot)
    else:
        snapshot.write_bytes(content)
    members = fresh(defense)
    train(defense, members, dataset, 0, CPU, snapshot=snapshot)
    assert same(members, trained(defense, dataset))


def test_a_diverged_training_keeps_the_last_good_state(dataset, tmp_path):
    class Late(Standard):
        def start_epoch(self, members, epoch):
            if epoch == 2:
                members[0].readout.weight.data.fill_(float("nan"))

    snapshot = tmp_path / "snapshot"
    with pytest.raises(Diverged, match="epoch 3 is not a number; lower lr; the last"):
        train(Late(**TINY | {"epochs": 4}), fresh(tiny("standard")), dataset, 0, CPU,
              snapshot=snapshot, saved_every=0)  # fmt: skip
    state = torch.load(snapshot, weights_only=True)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["members"].values())


class Worse(Standard):
    """`standard` whose last step turns the answer around."""

    def after_step(self, members, step):
        if step == 3 * 5 - 1:
            members[0].readout.weight.data.neg_()


@pytest.mark.parametrize("adversarial", [None, Adversarial(kind="fgsm", eps="1/10")])
def test_the_best_epoch_on_the_validation_split_is_kept(adversarial, dataset):
    fields = {"epochs": 3, "lr": 0.05, "adversarial": adversarial, "select": "best"}
    defense = Worse(**TINY | fields)
    members = fresh(defense)
    values = [point["selected_by"] for point in train(defense, members, dataset, 0, CPU)]
    assert max(values) > values[-1]
    run = training._Run(defense, members, dataset, CPU, None, 0)
    assert run._accuracy(members.eval(), dataset.validation, attacked=True) == max(values)


def test_the_curve_says_loss_and_accuracies_of_every_epoch(dataset):
    defense = tiny("ito", members=2)
    curve = train(defense, fresh(defense), dataset, 0, CPU)
    assert [(point["group"], point["epoch"]) for point in curve] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for point in curve:
        assert 0 <= point["train_accuracy"] <= 1
        assert 0 <= point["validation_accuracy"] <= 1
        assert point["loss"] > 0 < point["seconds"]


def test_looking_at_the_curve_changes_no_weight(dataset):
    defense = tiny("enresnet", members=2)
    blind = replace(dataset, validation=Split(*(tensor[:0] for tensor in dataset.validation)))
    assert same(trained(defense, dataset), trained(defense, blind))


def test_the_best_epoch_needs_a_validation_split(dataset):
    blind = replace(dataset, validation=Split(*(tensor[:0] for tensor in dataset.validation)))
    with pytest.raises(InputError, match="select=best needs a validation split"):
        trained(tiny("standard", select="best"), blind)


def test_mixed_precision_is_for_cuda_only(dataset):
    assert same(trained(tiny("standard", amp=True), dataset), trained(tiny("standard"), dataset))


@pytest.mark.parametrize("name", ["standard", "pgd-at"])
def test_training_learns(name):
    digits = datasets.load("digits")
    x, y = digits.test
    few = replace(digits, train=Split(*(tensor[:400] for tensor in digits.train)))
    member = trained(tiny(name, epochs=6, network="resnet8(width=4)"), few)[0]
    with torch.no_grad():
        assert (member(x).argmax(1) == y).float().mean() > 0.6


@given(pad=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_augmented_images_are_windows_of_the_padded_image_or_its_mirror(pad, flip, seed):
    x = torch.rand(6, 2, 5, 4, generator=rng(seed))
    augmented = training._augment(x, tiny("standard", crop=pad, flip=flip), rng(seed))
    assert augmented.shape == x.shape
    for image, result in zip(F.pad(x, (pad,) * 4), augmented, strict=True):
        windows = F.unfold(image[None], x.shape[2:])[0].T  # (offsets, C h w)
        if flip:
            mirrored = windows.view(-1, *x.shape[1:]).flip(-1)
            windows = torch.cat([windows, mirrored.flatten(1)])
        assert (windows == result.flatten()).all(dim=1).any()


def test_every_window_and_both_mirror_images_are_equally_likely():
    n, pad = 9_000, 1
    x = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(n, 1, 3, 3)  # a window tells its place
    crops = training._augment(x, tiny("standard", crop=pad), rng())
    _, counts = crops.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 9
    assert float((counts - n / 9).abs().max()) < 5 * (n * 8 / 81) ** 0.5
    mirrored = training._augment(x, tiny("standard", flip=True), rng())[:, 0, 0, 0] == 3
    assert abs(int(mirrored.sum()) - n / 2) < 5 * (n / 4) ** 0.5


def test_without_crop_and_flip_images_stay_as_they_are():
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(training._augment(x, tiny("standard"), rng()), x)


def learning_rates(total, **fields):
    """The learning rate of every step."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer, schedule = tiny("standard", **fields).stepper([weight], total)
    rates = []
    for _ in range(total):
        weight.grad = torch.ones(1)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return rates


def test_steps_divide_the_rate_by_ten_at_the_given_shares():
    rates = learning_rates(200, optimizer="sgd", lr=0.1, schedule="steps")  # papers' 80, 120, 160
    np.testing.assert_allclose(rates, [0.1] * 80 + [0.01] * 40 + [0.001] * 40 + [1e-4] * 40)
    rates = learning_rates(10, optimizer="sgd", lr=1, schedule="steps", decay_at=(0.5, 0.75))
    np.testing.assert_allclose(rates, [1] * 5 + [0.1] * 3 + [0.01] * 2)


def test_a_constant_schedule_is_constant():
    assert learning_rates(10, lr=0.3, schedule="constant") == [0.3] * 10


def test_cosine_falls_by_half_a_cosine_to_its_end():
    rates = learning_rates(50, lr=0.02, schedule="cosine", lr_end=1e-4)
    expected = 1e-4 + (0.02 - 1e-4) * (1 + np.cos(np.pi * np.arange(50) / 50)) / 2
    np.testing.assert_allclose(rates, expected)


@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_one_cycle_rises_to_the_rate_and_falls_to_almost_nothing(total):
    rates = learning_rates(total, lr=0.5)
    assert max(rates) <= 0.5
    if total == 100:
        peak = int(np.argmax(rates))
        assert rates[0] == pytest.approx(0.5 / 25)
        assert (peak, rates[peak]) == (29, pytest.approx(0.5))
        assert rates[-1] == pytest.approx(0.5 / 25 / 1e4)


def batch(n=12):
    x, y = datasets.load("digits").test
    return x[:n], y[:n]


def seen(network, x, y):
    """What training hands to `perturb`: the loss that is maximised, the scores, the batch."""

    def ascended(x, y, target):
        if target is None:
            return F.cross_entropy(network(x), y, reduction="none")
        return -F.cross_entropy(network(x), target, reduction="none")

    return ascended, network, recipes.Batch(x, y, x, LABELS)


@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    kind=st.sampled_from(["fgsm", "pgd", "trades"]),
    eps=st.sampled_from([Fraction(1, 100), Fraction(1, 4), Fraction(1)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_adversarial_examples_stay_in_the_ball_and_the_box(network, norm, kind, eps, seed):
    x, y = batch()
    adversarial = Adversarial(kind=kind, norm=norm, eps=eps).perturb(
        *seen(network, x, y), rng(seed)
    )
    assert float(distance(adversarial, x, norm).max()) <= float(eps) * (1 + 1e-5) + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert not adversarial.requires_grad


def test_making_adversarial_examples_leaves_no_gradient_on_the_weights(network):
    Adversarial(kind="trades").perturb(*seen(network, *batch()), rng())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_training_pgd_is_the_attack_pgd_from_the_same_start(network, norm, random):
    x, y = batch()
    ours = Adversarial(norm=norm, eps=Fraction(1, 5), steps=5, random=random)
    access = Access(Deployed(nn.ModuleList([deepcopy(network)]), MeanLogits(), SHAPE, LABELS))
    attack = Configured.of(f"pgd(steps=5, keep=last, random={random})")
    theirs = attack(access, x, y, Threat(norm=norm, eps="1/5"), rng())
    torch.testing.assert_close(ours.perturb(*seen(network, x, y), rng()), theirs, rtol=0, atol=1e-6)


def started_at(monkeypatch, start):
    monkeypatch.setattr(recipes, "random_start", lambda *args: start)


def test_training_pgd_is_that_of_torchattacks_from_the_same_start(network, monkeypatch):
    (x, y), eps, step = batch(), Fraction(1, 5), Fraction(1, 20)
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(-float(eps), float(eps))
    started_at(monkeypatch, (x + noise).clamp(0, 1))
    torch.manual_seed(5)
    theirs = torchattacks.PGD(network, eps=0.2, alpha=0.05, steps=7)(x, y)
    ours = Adversarial(eps=eps, step=step, steps=7).perturb(*seen(network, x, y), rng())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_training_fgsm_is_that_of_wong_et_al_from_the_same_start(network, monkeypatch):
    (x, y), eps = batch(), Fraction(1, 5)
    torch.manual_seed(5)
    noise = torch.randn_like(x).uniform_(-float(eps), float(eps))
    started_at(monkeypatch, (x + noise).clamp(0, 1))
    torch.manual_seed(5)
    theirs = torchattacks.FFGSM(network, eps=0.2, alpha=1.25 * 0.2)(x, y)
    ours = Adversarial(kind="fgsm", eps=eps).perturb(*seen(network, x, y), rng())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_inner_maximisation_of_trades_is_that_of_torchattacks(network):
    x, y = batch()
    torch.manual_seed(5)
    theirs = torchattacks.TPGD(network, eps=0.2, alpha=0.05, steps=7)(x, y)
    ours = Adversarial(kind="trades", eps=Fraction(1, 5), step=Fraction(1, 20), steps=7)
    torch.testing.assert_close(
        ours.perturb(*seen(network, x, y), rng(5)), theirs, rtol=0, atol=1e-6
    )


def test_training_budgets_are_drawn_from_their_range(network):
    given, generator = Adversarial(kind="fgsm", low="1/10", eps="3/10", random=False), rng()
    x, y = batch(2)
    x = x * 0 + 0.5  # far from the box
    drawn = [
        float((given.perturb(*seen(network, x, y), generator) - x).abs().max()) for _ in range(200)
    ]
    assert 0.1 <= min(drawn) < 0.11
    assert 0.29 < max(drawn) <= 0.3
    assert np.mean(drawn) == pytest.approx(0.2, abs=3 * 0.2 / 12**0.5 / 200**0.5)


def test_targeted_training_walks_to_a_wrong_label(network):
    x, y = batch(500)
    ascended, scores, given = seen(network, x, y)
    targets = []

    def watched(x, y, target):
        targets.append(target)
        return ascended(x, y, target)

    moved = Adversarial(eps="1/5", steps=5, targeted=True).perturb(watched, scores, given, rng())
    assert all(torch.equal(target, targets[0]) for target in targets)
    assert not (targets[0] == y).any()
    assert len((targets[0] - y).remainder(10).unique()) == 9
    target = targets[0]
    assert F.cross_entropy(network(moved), target) < F.cross_entropy(network(x), target)


def test_clean_images_count_with_their_weight(network):
    x, y = batch()
    moved = (x + 0.1).clamp(0, 1)
    plain = lambda x, y: F.cross_entropy(network(x), y, reduction="none")  # noqa: E731
    loss = Adversarial(clean=0.5).loss(plain, network, recipes.Batch(moved, y, x, LABELS))
    torch.testing.assert_close(loss, plain(moved, y) + 0.5 * plain(x, y))


def test_reach_is_what_all_steps_go_together():
    assert Adversarial(steps=10, reach=1).step_size(0.02) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("pgd(low=0.2, eps=0.1)", "ε is drawn from low to eps"),
        ("trades(clean=1)", "only pgd and fgsm use it"),
        ("trades(targeted=true)", "only pgd and fgsm use it"),
        ("fgsm(reach=1)", "only pgd and trades use it"),
    ],
)
def test_adversarial_settings_that_do_nothing_are_refused(spec, problem):
    with pytest.raises(InputError, match=problem):
        resolve(f"standard(adversarial={spec})")


def test_pgd_steps_reach_two_and_a_half_radii_unless_given():
    assert Adversarial(eps=Fraction(8, 255), steps=10).step_size(8 / 255) == pytest.approx(2 / 255)
    assert Adversarial(step=Fraction(1, 255)).step_size(8 / 255) == pytest.approx(1 / 255)


@given(seed=st.integers(0, 2**32 - 1), beta=st.floats(0, 10))
@settings(max_examples=25, deadline=None)
def test_trades_loss_is_cross_entropy_plus_beta_times_the_divergence(seed, beta):
    generator = np.random.default_rng(seed)
    clean, moved = generator.normal(scale=3, size=(2, 6, 4))
    y = generator.integers(0, 4, 6)
    p, q = special.softmax(clean, 1), special.softmax(moved, 1)
    expected = -np.log(p[np.arange(6), y]) + beta * special.rel_entr(p, q).sum(1)
    logits = {0: torch.from_numpy(clean), 1: torch.from_numpy(moved)}
    given = recipes.Batch(torch.ones(()), torch.from_numpy(y), torch.zeros(()), 4)
    _, scores, _ = seen(lambda x: logits[int(x)], *given[:2])
    plain = lambda x, y: F.cross_entropy(scores(x), y, reduction="none")  # noqa: E731
    loss = Adversarial(kind="trades", beta=beta).loss(plain, scores, given)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_trades_moves_both_of_its_terms(network):
    x, y = batch()
    moved = (x + 0.1).clamp(0, 1)
    gradients = []
    for clean_is_fixed in (False, True):
        clean = network(x).detach() if clean_is_fixed else network(x)
        loss = Adversarial(kind="trades").loss(
            lambda images, y: F.cross_entropy(network(images), y, reduction="none"),
            lambda images, clean=clean: clean if images is x else network(images),
            recipes.Batch(moved, y, x, LABELS),
        )
        gradients.append(torch.autograd.grad(loss.mean(), network[1].weight)[0])
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("spec", ["pgd-at", "enresnet", "enresnet(adversarial=trades(eps=0.2))"])
def test_recipes_train_on_adversarial_examples_of_all_members_together(spec):
    defense = resolve(spec)[0]
    members, (x, y) = fresh(defense), batch()
    torch.manual_seed(1)
    made = defense.batch(members, recipes.Batch(x, y, x, 10), rng())
    assert torch.equal(made.clean, x)
    assert 0 < float(distance(made.x, x, "linf").max()) <= 0.2 + 1e-6
    defense.loss(members, made).mean().backward()
    assert all(bool(member.readout.weight.grad.any()) for member in members)


def test_unknown_adversarial_training_comes_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown adversarial training 'pgdd'; did you mean 'pgd'"):
        resolve("standard(adversarial=pgdd)")
