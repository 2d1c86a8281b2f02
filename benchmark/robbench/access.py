"""All that an attack gets of a defense: scores and gradients over draws, counted.

Draws, EOT, counting of passes and memory are solved here once, for every defense and attack.
Symbols: S draws, M members, N images, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robbench.deployed import Deployed, join, split
from robbench.randomness import random_state, set_random_state
from robbench.rules import ABSTAIN, Draw, Loss
from robbench.threat import Goal


class Step(NamedTuple):
    """What one gradient evaluation tells, per image; from the same draws."""

    loss: Tensor  # (N,)
    gradient: Tensor  # the shape of x
    lost: Tensor  # (N,) mean over decisions: 1 where the attacker has his goal, 0 for the label


class Verdict(NamedTuple):
    """What a candidate costs the defense, per image (N,); an earlier entry outweighs later ones."""

    lost: Tensor  # as Step.lost
    votes: Tensor  # share of single draws and members lost
    loss: Tensor

    def worse_than(self, other: Verdict) -> Tensor:
        """(N,) bool: this costs the defense more."""
        worse = torch.zeros_like(self.lost, dtype=torch.bool)
        for mine, theirs in zip(reversed(self), reversed(other), strict=True):
            worse = (mine > theirs) | ((mine == theirs) & worse)
        return worse


@dataclass
class Cost:
    """Passes of single images through single networks, and queries of the whole defense."""

    forwards: int = 0
    backwards: int = 0
    queries: int = 0

    def add(self, other: Cost) -> None:
        """Add what another access used; itself is counted already."""
        if other is not self:
            self.forwards += other.forwards
            self.backwards += other.backwards
            self.queries += other.queries


class Access(nn.Module):
    """All that an attack gets of a defense, by setting; counts what it uses.

    draws: EOT draws behind every forward pass and gradient (1 = one draw of all members).
    gradients: False for query access: forward() then carries no gradient.
    losses: those of the attacker who knows the defense, strongest first; knows: the first of them
    is the default, else cross-entropy.
    own: False where the answers come from an oracle, so that a broken example says nothing yet.
    goal: what counts as lost - an accepted error (no answer is half of one), or any answer but
    the label. selection: draws by which candidates are compared. lucky: one draw that errs ends a
    search, as it did in paper 002. start: where earlier stages of a
    suite have come to, the shape of x; stages: those of the defense's own suite; guides: clean
    images and labels that an attack may look at beside its own. notes: what an attack has to say
    about itself, kept in the record.
    """

    def __init__(
        self,
        deployed: Deployed,
        *,
        draws: int = 1,
        gradients: bool = True,
        losses: Mapping[str, Loss] = MappingProxyType({}),
        knows: bool = True,
        own: bool = True,
        goal: Goal = "error",
    ) -> None:
        super().__init__()
        self.deployed, self.gradients, self.own, self.goal = deployed, gradients, own, goal
        self.losses, self.knows = losses, knows
        self.draws = draws if deployed.stochastic else 1
        self.cost = Cost()
        self.trace: dict[str, np.ndarray] = {}
        self.selection = 20 if self.draws > 1 else 5
        self.lucky = False
        self.start: Tensor | None = None
        self.stages: Sequence[Any] = ()
        self.guides: tuple[Tensor, Tensor] | None = None
        self.notes: dict[str, Any] = {}
        self.report: Callable[[int, int], None] = lambda done, total: None  # progress of an attack
        self.training = False

    def like(self, draws: int) -> Access:
        """The same access with another number of draws; both count together."""
        other = Access(
            self.deployed,
            draws=draws,
            gradients=self.gradients,
            losses=self.losses,
            knows=self.knows,
            own=self.own,
            goal=self.goal,
        )
        other.cost = self.cost
        return other

    @property
    def exact(self) -> bool:
        """One pass tells the truth about the defense itself: nothing is random, no oracle."""
        return self.own and not self.deployed.stochastic

    @property
    def device(self) -> torch.device:
        return self.deployed.device

    def train(self, mode: bool = True) -> Access:
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Access:
        """Stays where it is: libraries that know cpu and cuda only must not move the defense,
        neither by to() nor by the to() of a module around it."""
        return self

    def count(self, n: int, draws: int, backwards: bool = False) -> None:
        passes = n * draws * len(self.deployed.members)
        if backwards:
            self.cost.backwards += passes
        else:
            self.cost.forwards += passes
            self.cost.queries += n * draws

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of any float type -> (N, L) scores of the rule over the draws."""
        inner = x.to(self.device, torch.float32).contiguous()
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            scores = self.scores(inner)
        if scores.requires_grad:
            scores.register_hook(lambda _: self.count(len(x), self.draws, backwards=True))
        return scores.to(x.device)

    def scores(self, x: Tensor) -> Tensor:
        def run() -> Tensor:
            parts = []
            for xs in x.split(self.deployed.chunk):
                sizes = self.deployed.slices(len(xs), self.draws)
                parts.append(join([self.deployed.sample(xs, size) for size in sizes], dim=0))
            return self.deployed.rule.scores(join(parts, dim=2))

        self.count(len(x), self.draws)
        return self.deployed.retried(run)

    def score_loss(self, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Loss:
        """A loss on scores (N, L) of one call, averaged over draws the way the decision rule
        averages; then the mean over the calls that the draws make: each is one that counts."""

        def over_calls(draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
            values = [loss(self.deployed.rule.scores(call), y, target) for call in self.calls(draw)]
            return torch.stack(values).mean(dim=0) if len(values) > 1 else values[0]

        return over_calls

    def calls(self, draw: Draw) -> list[Draw]:
        """The draws by calls of the whole defense; too few for one stand for one."""
        return split(draw, self.deployed.draws)

    def gradient(
        self,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        target: Tensor | None = None,
        balanced: bool = False,
    ) -> Step:
        """The loss over fresh draws and its gradient by x, exact in the memory of one pass.

        All draws are first made without gradient, the loss is differentiated by their logits, and
        each pass is replayed from its own random state; a single pass needs no replay.
        balanced: the gradient through each member is scaled to the same mean absolute value
        before they are added, so that no member's steepness hides the others.
        RuntimeError where the setting gives no gradients.
        """
        if not self.gradients:
            raise RuntimeError("the setting blackbox gives no gradients, only answers to queries")

        def run() -> Step:
            parts = [
                self._gradient(xs, ys, loss, ts, balanced)
                for xs, ys, ts in _batches(x, y, target, self.deployed.chunk)
            ]
            return Step(*(torch.cat(part) for part in zip(*parts, strict=True)))

        return self.deployed.retried(run)

    def _gradient(
        self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None, balanced: bool
    ) -> Step:
        x = x.detach().requires_grad_()
        needs_features = getattr(loss, "features", False)
        slices = self.deployed.slices(len(x), self.draws)
        self.count(len(x), self.draws)
        self.count(len(x), self.draws, backwards=True)
        balanced = balanced and len(self.deployed.members) > 1
        if not balanced and (len(slices) == 1 or not self.deployed.stochastic):
            draw = self.deployed.sample(x, self.draws, needs_features)
            values = loss(draw, y, target)
            lost = self._lost(draw, y, _sought(loss, target))
            return Step(values.detach(), torch.autograd.grad(values.sum(), x)[0], lost)
        if not balanced and getattr(loss, "per_draw", False):
            return self._summed(x, y, loss, target, slices)
        states, draws = [], []
        with torch.no_grad():
            for size in slices:
                states.append(random_state(self.device))
                draws.append(self.deployed.sample(x, size, needs_features))
        after = random_state(self.device)
        leaf = _detached(join(draws, dim=0))
        values = loss(leaf, y, target)
        leaves = [t for t in leaf if t is not None]  # of which the loss may use one
        by_draw = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
        self.count(len(x), self.draws)
        total, start = torch.zeros_like(x), 0
        by_member = torch.zeros(len(self.deployed.members) if balanced else 0, *x.shape).to(x)
        for size, state in zip(slices, states, strict=True):
            set_random_state(self.device, state)
            outputs = [t for t in self.deployed.sample(x, size, needs_features) if t is not None]
            weights = [part[start : start + size] for part in by_draw]
            for index, gradient in enumerate(by_member):
                ends = [output[:, index] for output in outputs]
                starts = [weight[:, index] for weight in weights]
                gradient += torch.autograd.grad(ends, x, starts, retain_graph=True)[0]
            if not balanced:
                total += torch.autograd.grad(outputs, x, weights)[0]
            start += size
        set_random_state(self.device, after)
        if balanced:
            sizes = by_member.abs().mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-30)
            total = (by_member / sizes).sum(dim=0)
        return Step(values.detach(), total, self._lost(leaf, y, _sought(loss, target)))

    def _summed(
        self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None, slices: list[int]
    ) -> Step:
        """The same for a loss that is a mean over draws: pass by pass, without a replay."""
        total = Step(torch.zeros_like(x[:, 0, 0, 0]), torch.zeros_like(x), torch.zeros(()))
        for size in slices:
            draw = self.deployed.sample(x, size, getattr(loss, "features", False))
            values = loss(draw, y, target)
            share = size / self.draws
            gradient = torch.autograd.grad(values.sum(), x)[0]
            lost = self._lost(draw, y, _sought(loss, target))
            total = Step(
                total.loss + share * values.detach(),
                total.gradient + share * gradient,
                total.lost.to(lost) + share * lost,
            )
        return total

    @torch.no_grad()
    def _lost(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        """Mean over the calls: 1 for the attacker's goal, 0.5 for no answer short of it."""
        calls = self.calls(draw)
        labels = torch.stack([self.deployed.rule.decide(call) for call in calls])
        if target is not None:
            return (labels == target).float().mean(dim=0)
        missed = (labels != y).float().mean(dim=0)
        if self.goal == "denial":
            return missed
        return missed - (labels == ABSTAIN).float().mean(dim=0) / 2

    @torch.no_grad()
    def judge(self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None, draws: int) -> Verdict:
        """What x costs the defense over so many draws; a deterministic one is asked once."""
        draws = draws if self.deployed.stochastic else 1
        self.count(len(x), draws)
        draw = self.deployed.draw(x, draws, getattr(loss, "features", False))
        labels = draw.logits.argmax(dim=-1)  # (S, M, N)
        sought = _sought(loss, target)
        votes = (labels != y if sought is None else labels == sought).float().mean(dim=(0, 1))
        return Verdict(self._lost(draw, y, _sought(loss, target)), votes, loss(draw, y, target))


def _sought(loss: Loss, target: Tensor | None) -> Tensor | None:
    """The target that must be reached; None where it only steers and any error will do."""
    return None if getattr(loss, "any_error", False) else target


def _detached(draw: Draw) -> Draw:
    hidden = draw.features
    return Draw(
        draw.logits.detach().requires_grad_(),
        None if hidden is None else hidden.detach().requires_grad_(),
    )


def _batches(
    x: Tensor, y: Tensor, target: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], y[part], None if target is None else target[part]
