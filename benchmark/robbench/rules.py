"""What a defense computes before it decides, and the rules by which it decides.

Symbols: S draws, M members, N images, L labels, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from robbench.metrics.detection import log_odds

ABSTAIN = -1


class Draw(NamedTuple):
    """What a defense computes before it decides."""

    logits: Tensor  # (S, M, N, L)
    features: Tensor | None = None  # (S, M, N, D), last hidden activations


class Answer(NamedTuple):
    """What a defense says in one call, per image (N,)."""

    label: Tensor  # ABSTAIN for no answer
    best: Tensor  # the label it would name if it had to
    score: Tensor  # how sure it is: what refusing by a threshold goes by


Loss = Callable[[Draw, Tensor, Tensor | None], Tensor]
"""(draw, y (N,), target (N,) or None) -> (N,), larger = worse for the defense."""


class Rule(Protocol):
    """From draws to scores that attacks differentiate, and to the labels that count; str() is how
    a table calls it."""

    @property
    def abstains(self) -> bool:
        """Whether decide() may give no answer."""
        ...

    def scores(self, draw: Draw) -> Tensor:
        """(N, L) logits, differentiable; with S = M = 1 the network's logits bit for bit."""
        ...

    def decide(self, draw: Draw) -> Tensor:
        """(N,) int64 labels, ABSTAIN for no answer."""
        ...


def answer(rule: Rule, draw: Draw) -> Answer:
    """The answer of any rule; one that says nothing of its certainty goes by the log-odds of its
    scores."""
    if own := getattr(rule, "answer", None):
        given: Answer = own(draw)
        return given
    scores = rule.scores(draw)
    return Answer(rule.decide(draw), scores.argmax(dim=1), log_odds(scores))


class MeanLogits:
    """The mean of the logits over draws and members."""

    abstains: ClassVar[bool] = False

    def __str__(self) -> str:
        return "mean logits"

    def scores(self, draw: Draw) -> Tensor:
        if draw.logits.shape[:2] == (1, 1):
            return draw.logits[0, 0]
        return draw.logits.mean(dim=(0, 1))

    def decide(self, draw: Draw) -> Tensor:
        return self.scores(draw).argmax(dim=1)


class MeanProbabilities:
    """The mean of the softmax over draws and members, as its logarithm."""

    abstains: ClassVar[bool] = False

    def __str__(self) -> str:
        return "mean softmax"

    def scores(self, draw: Draw) -> Tensor:
        if draw.logits.shape[:2] == (1, 1):
            return draw.logits[0, 0]
        log = F.log_softmax(draw.logits, dim=-1).flatten(0, 1)
        return log.logsumexp(dim=0) - math.log(len(log))

    def decide(self, draw: Draw) -> Tensor:
        return self.scores(draw).argmax(dim=1)


@dataclass(frozen=True)
class Vote(MeanProbabilities):
    """One vote per draw and member; without a winner the defense abstains.

    nested: each member first settles on the label of most of its draws (a tie is no vote), then
    members vote. majority: the winner needs more than half of all votes (strict=False: at least
    half); else just the most.
    Ties abstain either way. The vote has no gradient: scores are those of the mean softmax. How
    sure it is, is the share of the votes for the first label.
    """

    nested: bool = False
    majority: bool = True
    strict: bool = True
    abstains: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{'nested ' * self.nested}{'majority' if self.majority else 'plurality'} vote"

    def decide(self, draw: Draw) -> Tensor:
        return self.answer(draw).label

    def answer(self, draw: Draw) -> Answer:
        labels = draw.logits.shape[-1]
        ballots = F.one_hot(draw.logits.argmax(dim=-1), labels)  # (S, M, N, L)
        voters = ballots.shape[0] * ballots.shape[1]
        if self.nested:
            settled = _winner(ballots.sum(dim=0))  # (M, N)
            voters = len(settled)
            ballots = F.one_hot(settled.clamp_min(0), labels) * (settled >= 0)[..., None]
            counts = ballots.sum(dim=0)
        else:
            counts = ballots.sum(dim=(0, 1))
        winner = _winner(counts)
        if self.majority:
            short = 2 * counts.amax(dim=-1) - voters
            winner = winner.masked_fill(short <= 0 if self.strict else short < 0, ABSTAIN)
        return Answer(winner, counts.argmax(dim=-1), counts.amax(dim=-1) / voters)


def _winner(counts: Tensor) -> Tensor:
    """(..., L) counts -> (...,) the label of most votes, ABSTAIN on a tie."""
    top = counts.topk(2, dim=-1)
    tied = top.values[..., 0] == top.values[..., 1]
    return top.indices[..., 0].masked_fill(tied, ABSTAIN)
