"""LocSearchAdv and its random baseline against brute force, closed forms and hand counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, choose_targets, local_search
from robbench.deployed import Deployed
from robbench.rules import MeanLogits, Vote
from robbench.threat import Threat, distance

SHAPE = (1, 8, 8)
L0 = Threat(norm="l0")


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def network(classifier):
    return classifier(nn.ReLU())


def access_to(*members, rule=None, shape=SHAPE, labels=10, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), shape, labels)
    return Access(deployed, gradients=False, **options)


def craft(spec, access, x, y, threat=L0, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def succeeded(access, x, y, target=None):
    answer = access.deployed.decide(x, 1)[0]
    return answer != y if target is None else answer == target


class OnePixel(nn.Module):
    """Label 1 where the pixel in row 2, column 5 is bright, else 0."""

    def forward(self, x):
        value = x[:, :, 2, 5].mean(dim=1) - 0.5
        return torch.stack([-value, value], dim=1)


class Recorder(nn.Module):
    """Keeps every image that it was asked about."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.inner(x)


def unbreakable(seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(64, 10)
    linear.bias.data[0] = 1e4
    return nn.Sequential(nn.Flatten(), linear)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spec", ["local-search", "local-search(p=10)", "single-pixel"])
def test_the_one_pixel_that_a_model_reads_is_found(spec, channels):
    x, y = torch.full((4, channels, 8, 8), 0.1), torch.zeros(4, dtype=torch.int64)
    access = access_to(OnePixel(), shape=(channels, 8, 8), labels=2)
    answer = craft(spec, access, x, y)
    assert succeeded(access, answer, y).all()
    changed = (answer != x).any(dim=1).nonzero()
    assert changed.tolist() == [[image, 2, 5] for image in range(4)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.floats(0, 1, width=32), st.floats(0, 2))
def test_the_cyclic_change_is_that_of_algorithm_2(value, r):
    centred = r * (value - 0.5)
    if centred < -0.5:
        centred += 1
    elif centred > 0.5:
        centred -= 1
    answer = float(local_search.cyclic(torch.tensor(value), r))
    assert 0 <= answer <= 1
    # at the very ends of the box rounding decides on which of them a value comes out
    assert abs(answer - (centred + 0.5)) % 1 == pytest.approx(0, abs=1e-6) or abs(
        abs(answer - (centred + 0.5)) - 1
    ) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("t", [1, 5])
def test_the_pixels_whose_change_costs_a_linear_model_most_are_picked(t, digits):
    x, y = digits
    access = access_to(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), labels=2)
    weight = access.deployed.members[0][1].weight
    label = torch.zeros_like(y)
    everywhere = torch.arange(64).expand(len(x), 64)
    drawn = everywhere, torch.ones_like(everywhere, dtype=torch.bool)
    plan = local_search.Plan(1.5, t=t)
    picked = local_search.pick(access, plan, x, label, None, drawn)
    gain = (local_search.cyclic(x, 1.5) - x).flatten(1) * (weight[1] - weight[0])
    expected = torch.zeros_like(picked).scatter(1, gain.topk(t, dim=1).indices, True)
    assert torch.equal(picked, expected)


def test_the_papers_probe_ranks_by_the_push_and_takes_the_surest():
    """p against brute force: every pixel pushed to the far end, the label's probability by hand."""
    torch.manual_seed(3)
    x, y = torch.rand(4, *SHAPE), torch.tensor([0, 1, 1, 0])
    access = access_to(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), labels=2)
    member = access.deployed.members[0]
    everywhere = torch.arange(64).expand(4, 64)
    drawn = everywhere, torch.ones_like(everywhere, dtype=torch.bool)
    picked = local_search.pick(access, local_search.Plan(1.5, p=2.0, t=3), x, y, None, drawn)
    for image, label, choice in zip(x, y, picked, strict=True):
        sure = torch.empty(64)
        for pixel in range(64):
            pushed = image.clone().flatten()
            pushed[pixel] = 2.5 if pushed[pixel] > 0.5 else -1.5
            sure[pixel] = member(pushed.view(1, *SHAPE)).double().softmax(dim=1)[0, label]
        assert set(choice.nonzero()[:, 0].tolist()) == set(sure.topk(3).indices.tolist())


def test_queries_by_hand(digits):
    x, y = digits[0][:3], torch.zeros(3, dtype=torch.int64)
    access = access_to(unbreakable())
    craft("local-search(rounds=4, d=8, rest=0, probes=10)", access, x, y)
    # x itself; 10 % of 64 pixels in the first round, 10 pixels in three more, an answer for each
    assert access.cost.queries == 3 * (1 + (6 + 1) + 3 * (10 + 1))


def test_queries_of_the_baseline_by_hand(digits):
    x, y = digits[0][:3], torch.zeros(3, dtype=torch.int64)
    access = access_to(unbreakable())
    craft("single-pixel(tries=7)", access, x, y)
    assert access.cost.queries == 3 * (1 + 2 * 7)


def test_the_baseline_finds_all_that_one_pixel_can_break(network, digits):
    x, y = digits
    access = access_to(network)
    answer = craft("single-pixel(tries=64)", access, x, y)
    pixels = torch.eye(64).bool().view(64, *SHAPE)
    breaks = torch.zeros(len(x), dtype=torch.bool)
    for value in (0.0, 1.0):
        for pixel in pixels:
            breaks |= succeeded(access, torch.where(pixel, value, x), y)
    assert torch.equal(succeeded(access, answer, y), breaks)
    assert 0 < breaks.sum() < len(x)
    assert distance(answer, x, "l0").max() == 1


@pytest.mark.parametrize("p", ["none", "10"])
def test_the_search_breaks_a_network_with_few_pixels(p, network, digits):
    x, y = digits
    access = access_to(network)
    answer = craft(f"local-search(p={p})", access, x, y)
    assert succeeded(access, answer, y).all()
    assert distance(answer, x, "l0").median() <= 5


def test_what_is_put_back_was_not_needed(network, digits):
    x, y = digits
    access = access_to(network)
    long, short = (
        craft(f"local-search(undo={undo}, t=8)", access, x, y) for undo in ("false", "true")
    )
    kept = short != x
    assert torch.equal(short[kept], long[kept])
    assert torch.equal(succeeded(access, short, y), succeeded(access, long, y))
    before, after = (distance(points, x, "l0") for points in (long, short))
    assert (after <= before).all() and after.median() < before.median() / 2


@pytest.mark.parametrize(
    ("spec", "rule"),
    [("local-search", "random"), ("local-search", 7), ("single-pixel(tries=64)", "random")],
)
def test_targeted_reaches_its_target_or_gives_back_the_image(spec, rule, network, digits):
    x, y = digits
    access = access_to(network)
    threat = Threat(norm="l0", target=rule)
    answer = craft(spec, access, x, y, threat)
    target = choose_targets(access, x, y, threat, torch.Generator().manual_seed(0))
    reached = succeeded(access, answer, y, target)
    same = (answer == x).flatten(1).all(dim=1)
    assert (reached | same).all() and (reached & ~same).any()


def rounds_of(spec, network, x):
    """The images after each round, of one that is never lost."""
    recorder = Recorder(network)
    access = access_to(recorder)
    recorder.seen.clear()
    craft(spec, access, x, torch.zeros(1, dtype=torch.int64))
    return torch.cat(recorder.seen[::2])  # x, then probes and the image after them by turns


def test_a_changed_pixel_rests():
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    points = rounds_of("local-search(rounds=40, t=1, d=8, rest=40)", unbreakable(), x)
    assert distance(points, x.expand_as(points), "l0").tolist() == list(range(41))


def test_a_pixel_rests_for_as_many_rounds_as_it_should():
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    points = rounds_of("local-search(rounds=80, t=1, d=8, rest=3)", unbreakable(), x)
    changes = (points[1:] != points[:-1]).flatten(1)
    rounds = [changes[:, pixel].nonzero()[:, 0] for pixel in range(64)]
    assert min(int(turns.diff().min()) for turns in rounds if len(turns) > 1) == 4


def test_without_a_rest_pixels_are_changed_again():
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    points = rounds_of("local-search(rounds=40, t=1, d=8, rest=0)", unbreakable(), x)
    assert distance(points[-1:], x, "l0") < 40


def test_where_every_pixel_rests_the_search_goes_on():
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    points = rounds_of("local-search(rounds=10, t=20, d=8, rest=40)", unbreakable(), x)
    moved = distance(points[1:], points[:-1], "l0")
    assert (moved > 0).all()


def test_a_round_stays_near_the_last_one():
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    points = rounds_of("local-search(rounds=30, t=1, d=1)", unbreakable(), x)
    places = (points[1:] != points[:-1]).nonzero()[:, 2:]
    assert len(places) == 30
    assert (places[1:] - places[:-1]).abs().max() == 1


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    st.sampled_from(["local-search(rounds=5)", "local-search(rounds=5, p=3, r=2)", "single-pixel"]),
    st.sampled_from([(1, 5, 7), (3, 6, 4)]),
    st.integers(0, 2**31),
)
def test_answers_are_in_the_box_for_any_shape(spec, shape, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(3, *shape), torch.arange(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    access = access_to(network, shape=shape, labels=3)
    answer = craft(spec, access, x, y, seed=seed)
    assert answer.min() >= 0 and answer.max() <= 1
    same = (answer == x).flatten(1).all(dim=1)
    assert (succeeded(access, answer, y) | same).all()


@pytest.mark.parametrize("chunk", [8, 100])
def test_the_chunk_does_not_matter(chunk, network, digits):
    x, y = digits
    whole, parts = access_to(network), access_to(network)
    parts.deployed.chunk = chunk
    answers = [craft("local-search", access, x, y) for access in (whole, parts)]
    assert torch.equal(*answers)


class Flips(nn.Module):
    """Answers the label 1 instead of 0 in a share of the passes, whatever the image."""

    def forward(self, x):
        flip = (torch.rand(len(x), 1) < 0.2).float()
        return torch.cat([1 - flip, flip, torch.zeros(len(x), 8)], dim=1)


@pytest.mark.parametrize("draws", [1, 20])
@pytest.mark.parametrize("spec", ["local-search(rounds=5)", "single-pixel(tries=10)"])
def test_a_lucky_draw_is_no_success(spec, draws, digits):
    x, y = digits[0], torch.zeros_like(digits[1])
    torch.manual_seed(0)
    assert torch.equal(craft(spec, access_to(Flips(), draws=draws), x, y), x)


def test_a_stochastic_defense_is_broken_on_average(network, digits):
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    x, y = digits
    torch.manual_seed(0)
    access = access_to(nn.Sequential(Noise(), network), draws=5)
    answer = craft("local-search", access, x, y)
    wrong = (access.deployed.decide(answer, 50) != y).float().mean(dim=0)
    changed = (answer != x).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.9
    assert (wrong[changed] > 0.5).float().mean() > 0.8


def test_no_answer_is_no_success():
    class Dark(nn.Module):
        def __init__(self, level):
            super().__init__()
            self.level = level

        def forward(self, x):
            grey = x.mean(dim=(1, 2, 3)) - self.level
            return torch.stack([grey, -grey], dim=1)

    x, y = torch.full((1, *SHAPE), 0.9), torch.tensor([0])
    access = access_to(Dark(0.88), Dark(0.79), rule=Vote(), labels=2)
    answer = craft("local-search(t=1)", access, x, y)
    assert access.deployed.decide(answer, 1).tolist() == [[1]]
    assert distance(answer, x, "l0") == 9  # each goes from 0.9 to 0.1, and 0.11 * 64 / 0.8 are due


def test_scores_that_are_not_numbers_are_said(digits):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), torch.nan)

    with pytest.raises(FloatingPointError, match="^the scores of the defense are not numbers$"):
        craft("local-search", access_to(Broken()), digits[0], torch.zeros_like(digits[1]))
