"""What a defense says in one call: the label, the label it would name, and how sure it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax
from torch import nn

from robbench.checkpoints import Trained
from robbench.deployed import Deployed
from robbench.detectors import Detected, configure
from robbench.judge import score
from robbench.rules import ABSTAIN, Draw, MeanLogits, MeanProbabilities, Vote, answer

LABELS = 4
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
BALLOTS = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, LABELS - 1), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)
VOTES = [
    Vote(nested, majority, strict)
    for nested in (False, True)
    for majority, strict in ((True, True), (True, False), (False, True))
]


def randoms(draws=3, members=2, n=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Draw(3 * torch.randn(draws, members, n, LABELS, generator=rng))


def cast(ballots):
    """Ballots (S, M) as the draw of one image: logits are largest at the label voted for."""
    return Draw(nn.functional.one_hot(torch.tensor(ballots), LABELS).float()[:, :, None])


def leaders(tally):
    """The labels of most votes, and how many these are."""
    most = max(tally.values(), default=0)
    return {label for label, count in tally.items() if count == most}, most


@pytest.mark.parametrize("rule", VOTES, ids=str)
@given(BALLOTS)
@PROPERTY
def test_a_vote_is_counted_by_hand(rule, ballots):
    """Label, best label and the share of votes; ties and short majorities are no label."""
    votes = [label for draw in ballots for label in draw]
    if rule.nested:
        own = [leaders(Counter(member))[0] for member in zip(*ballots, strict=True)]
        votes = [min(labels) if len(labels) == 1 else None for labels in own]
    first, most = leaders(Counter(vote for vote in votes if vote is not None))
    enough = not rule.majority or 2 * most >= len(votes) + rule.strict
    found = answer(rule, cast(ballots))
    wins = len(first) == 1 and enough
    assert found.label.item() == (min(first) if wins else ABSTAIN)
    assert not first or found.best.item() in first
    assert found.score.item() == pytest.approx(most / len(votes))


@pytest.mark.parametrize("rule", [MeanLogits(), MeanProbabilities(), *VOTES], ids=str)
def test_the_label_is_what_the_rule_decides_and_the_best_wherever_there_is_one(rule):
    for seed in range(20):
        draw = randoms(draws=4, members=3, seed=seed)
        found = answer(rule, draw)
        assert torch.equal(found.label, rule.decide(draw))
        given = found.label != ABSTAIN
        assert torch.equal(found.best[given], found.label[given])
        assert rule.abstains or bool(given.all())


@pytest.mark.parametrize(
    ("rule", "mean"),
    [
        (MeanLogits(), lambda logits: logits.mean(axis=(0, 1))),
        (MeanProbabilities(), lambda logits: np.log(softmax(logits, axis=-1).mean(axis=(0, 1)))),
    ],
    ids=["mean logits", "mean softmax"],
)
def test_a_mean_is_as_sure_as_the_log_odds_of_its_first_label(rule, mean):
    draw = randoms()
    log = log_softmax(mean(draw.logits.double().numpy()), axis=-1)
    first = log.argmax(axis=-1)
    others = [np.delete(row, label) for row, label in zip(log, first, strict=True)]
    expected = log.max(axis=-1) - [logsumexp(row) for row in others]
    found = answer(rule, draw)
    assert found.best.tolist() == first.tolist()
    np.testing.assert_allclose(found.score, expected, rtol=1e-4, atol=1e-5)


def test_certainty_is_ordered_where_a_softmax_is_one_for_all():
    logits = torch.zeros(1, 1, 3, LABELS)
    logits[0, 0, :, 0] = torch.tensor([30.0, 60.0, 90.0])
    assert (logits[0, 0].softmax(dim=-1)[:, 0] == 1).all()
    found = answer(MeanProbabilities(), Draw(logits)).score
    assert found[0] < found[1] < found[2] and bool(found.isfinite().all())


def test_a_rule_of_a_caller_without_an_answer_of_its_own_has_one():
    class Second:
        """Names the second label."""

        abstains = False

        def scores(self, draw):
            return draw.logits[0, 0]

        def decide(self, draw):
            return draw.logits[0, 0].topk(2, dim=-1).indices[:, 1]

    draw = randoms(1, 1)
    found = answer(Second(), draw)
    assert torch.equal(found.label, draw.logits[0, 0].topk(2, dim=-1).indices[:, 1])
    assert torch.equal(found.best, draw.logits[0, 0].argmax(dim=-1))


@pytest.mark.parametrize("rule", [MeanProbabilities(), Vote(majority=False)], ids=str)
def test_a_detector_takes_labels_away_and_leaves_the_best_one(rule):
    detector = configure("confidence")
    draw = randoms(5, 3, 40)
    free = answer(rule, draw)
    scores = detector.score(draw, rule.scores(draw))
    found = answer(Detected(rule, detector, scores.median().expand(LABELS)), draw)
    below = scores < scores.median()
    assert 0 < below.sum() < 40
    expected = free.label.masked_fill(below, ABSTAIN)
    assert torch.equal(found.label, expected)
    assert torch.equal(found.best, free.best)
    assert torch.equal(found.score < 0, below)  # how far above the threshold


# ------------------------------------------------------------------------------ what is recorded


class Coin(nn.Module):
    """Answers with the label of the first pixel, and with label 0 in a share of the passes."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        named = nn.functional.one_hot((x[:, 0, 0, 0] * (LABELS - 1)).round().long(), LABELS)
        zero = nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), LABELS)
        lucky = torch.rand(len(x), 1) < self.share
        return 5.0 * torch.where(lucky, zero, named)


def trained(rule, share=0.0, draws=1, members=1):
    coins = nn.ModuleList(Coin(share) for _ in range(members))
    return Trained(Deployed(coins, rule, (1, 1, 1), LABELS, draws), ())


@pytest.fixture(scope="module")
def images():
    """Images of labels 0 to 3 in turn, and labels that are wrong for every fifth."""
    y = torch.arange(40) % LABELS
    x = (y / (LABELS - 1)).view(-1, 1, 1, 1)
    wrong = torch.arange(40) % 5 == 0
    return x, torch.where(wrong, (y + 1) % LABELS, y)


def test_a_deterministic_outcome_is_right_wrong_and_as_sure_as_the_rule_says(images):
    x, y = images
    target = trained(MeanProbabilities())
    found = score(target, x, y, 1, seed=0)
    right = (torch.arange(40) % 5 != 0).numpy()
    assert np.array_equal(found.ok, right) and np.array_equal(found.best, right)
    assert np.array_equal(found.err, ~right)
    np.testing.assert_allclose(found.score, 5 - np.log(LABELS - 1), rtol=1e-5)
    assert [part.dtype for part in found] == [np.uint8] * 3 + [np.float32]


def test_counts_of_a_random_defense_have_the_frequencies_of_its_coin(images):
    x, y = images
    found = score(trained(MeanProbabilities(), share=0.25), x, y, 200, seed=0)
    assert np.array_equal(found.ok + found.err, np.full(40, 200))
    honest = (torch.arange(40) % 5 != 0).numpy() & (y != 0).numpy()
    error = (0.25 * 0.75 / (200 * honest.sum())) ** 0.5
    assert abs(found.ok[honest].mean() / 200 - 0.75) < 4 * error


def test_the_best_label_is_counted_whether_it_is_refused_or_not(images):
    x, y = images
    # of two members one may toss 0: one against one is a tie, and no answer
    found = score(trained(Vote(), share=0.3, members=2), x, y, 100, seed=0)
    refused = 100 - found.ok.astype(int) - found.err
    assert refused.max() > 20
    tied = ((x[:, 0, 0, 0] == 1) & (y == 0)).numpy()  # label 3 against the label of the coin
    assert (found.best[tied] > found.ok[tied]).all() and (found.best >= found.ok).all()
    assert (found.best.astype(int) <= found.ok + refused).all()


def test_the_mean_share_of_votes_is_that_of_a_binomial(images):
    x, y = images
    calls, voters, share = 200, 3, 0.3
    found = score(trained(Vote(), share=share, members=voters), x, y, calls, seed=0)
    tosses = np.arange(voters + 1)
    chances = np.array([0.343, 0.441, 0.189, 0.027])  # of so many of three at 0.3 each
    largest = np.maximum(tosses, voters - tosses) / voters
    expected = (chances * largest).sum()
    spread = np.sqrt((chances * (largest - expected) ** 2).sum())
    named = (x[:, 0, 0, 0] > 0).numpy()
    deviation = abs(found.score[named].mean() - expected)
    assert deviation < 4 * spread / np.sqrt(calls * named.sum())
    np.testing.assert_allclose(found.score[~named], 1)


def test_scoring_repeats_with_its_seed_and_leaves_the_streams_alone(images):
    target = trained(Vote(majority=False), share=0.3, draws=5)
    torch.manual_seed(0)
    first = score(target, *images, 20, seed=1)
    ahead = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(ahead, torch.rand(3))
    again, other = score(target, *images, 20, seed=1), score(target, *images, 20, seed=2)
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first.ok, other.ok)
