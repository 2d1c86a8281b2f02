"""A frozen defense: its members, its rule, and draws of them in passes that fit the memory.

Symbols: S draws, M members, N images, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robbench.randomness import (
    preserved_random_state,
    random_state,
    seed_everything,
    set_random_state,
)
from robbench.rules import Answer, Draw, Rule, answer

Randomness = Literal["none", "image", "call"]
PROBES = 16  # a coin tossed in every pass goes unseen once in 30,000 times


def images_at_once(shape: tuple[int, int, int]) -> int:
    """How many images of this shape a forward pass takes at first; halved on out-of-memory."""
    return max(8, min(2048, 2**20 // math.prod(shape)))


class Deployed(nn.Module):
    """A frozen defense: members in the mode they are deployed in, a rule, a number of draws.

    train() and eval() do nothing and no parameter needs a gradient, so that no attack can change
    what is attacked. Whether two passes differ, and whether images of one batch share the
    randomness, is found out by asking the members, not assumed.
    """

    def __init__(
        self,
        members: nn.ModuleList,
        rule: Rule,
        shape: tuple[int, int, int],
        labels: int,
        draws: int = 1,
    ) -> None:
        super().__init__()
        self.members, self.rule, self.shape, self.labels = members, rule, shape, labels
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.chunk = images_at_once(shape)
        self.randomness: list[Randomness] = [self._probe(member) for member in members]
        self.draws = draws if self.stochastic else 1

    @property
    def stochastic(self) -> bool:
        return any(kind != "none" for kind in self.randomness)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> Deployed:
        return self

    @torch.no_grad()
    def _probe(self, member: nn.Module) -> Randomness:
        """Passes over four copies of one image: do passes differ, do copies differ?"""
        with preserved_random_state():
            seed_everything(0)
            x = torch.rand(1, *self.shape).expand(4, *self.shape).contiguous().to(self.device)
            first, *later = (member(x) for _ in range(PROBES))

        def same(a: Tensor, b: Tensor) -> bool:
            # logits that are not numbers are the judge's business, cell by cell
            slack = 1e-4 * float(first.nan_to_num().abs().max().clamp_min(1e-6))
            return torch.allclose(a, b, rtol=0, atol=slack, equal_nan=True)

        if all(same(first, other) for other in later):
            return "none"
        if any(getattr(module, "per_batch", False) for module in member.modules()):
            return "call"  # images of a batch depend on each other: draws must not be batched too
        alike = all(same(each[:1].expand_as(each), each) for each in (first, *later))
        return "call" if alike else "image"

    def sample(self, x: Tensor, draws: int, features: bool = False) -> Draw:
        """S fresh draws of all members; one forward pass carries many draws where it may.

        With features also where the rule looks at them.
        """
        features = features or getattr(self.rule, "features", False)
        outputs = [
            self._sample(member, kind, x, draws, features)
            for member, kind in zip(self.members, self.randomness, strict=True)
        ]
        logits = torch.stack([logit for logit, _ in outputs], dim=1)
        hidden = torch.stack([h for _, h in outputs if h is not None], dim=1) if features else None
        return Draw(logits, hidden)

    def _sample(
        self, member: nn.Module, kind: Randomness, x: Tensor, draws: int, features: bool
    ) -> tuple[Tensor, Tensor | None]:
        if kind == "none":
            logits, hidden = _pass(member, x, features)
            return (
                logits.expand(draws, *logits.shape),
                None if hidden is None else hidden.expand(draws, *hidden.shape),
            )
        if kind == "call":
            passes = [_pass(member, x, features) for _ in range(draws)]
            return (
                torch.stack([logits for logits, _ in passes]),
                torch.stack([h for _, h in passes if h is not None]) if features else None,
            )
        logits, hidden = _pass(member, x.repeat(draws, 1, 1, 1), features)
        return (
            logits.view(draws, len(x), -1),
            None if hidden is None else hidden.view(draws, len(x), -1),
        )

    def slices(self, n: int, draws: int) -> list[int]:
        """How many draws go into one pass over n images, so that a pass stays within memory."""
        per_pass = max(1, self.chunk // max(1, n))
        return [min(per_pass, draws - start) for start in range(0, draws, per_pass)]

    @torch.no_grad()
    def draw(self, x: Tensor, draws: int, features: bool = False) -> Draw:
        """Draws without gradient for any number of images, in passes that fit the memory."""

        def run() -> Draw:
            parts = [
                join([self.sample(xs, s, features) for s in self.slices(len(xs), draws)], dim=0)
                for xs in x.split(self.chunk)
            ]
            return join(parts, dim=2)

        return self.retried(run)

    def decide(self, x: Tensor, times: int) -> Tensor:
        """(times, N) labels of independent calls of the whole defense; see answers."""
        return self.answers(x, times).label

    def answers(self, x: Tensor, times: int) -> Answer:
        """Independent calls of the whole defense; each part (times, N).

        FloatingPointError where a logit is NaN or +inf: no label follows from it.
        """
        # a call of a vote over many members is one entry: groups bound the logits that are held
        group = max(1, 64 // self.draws)
        answers: list[Answer] = []
        for start in range(0, times, group):
            count = min(group, times - start)
            draw = self.draw(x, count * self.draws)
            if bool((draw.logits.isnan() | draw.logits.isposinf()).any()):
                raise FloatingPointError("the defense answers with NaN logits")
            answers += [answer(self.rule, call) for call in split(draw, self.draws)]
        return Answer(*map(torch.stack, zip(*answers, strict=True)))

    def retried(self, run: Callable[[], Any]) -> Any:
        """run(), again with half as many images at once for as long as the memory is short."""
        while True:
            state = random_state(self.device)
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.chunk <= 1:
                    raise
                self.chunk //= 2
                set_random_state(self.device, state)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


def _pass(member: nn.Module, x: Tensor, features: bool) -> tuple[Tensor, Tensor | None]:
    if not features:
        return member(x), None
    hidden = member.features(x)  # type: ignore[operator]
    return member.readout(hidden), hidden  # type: ignore[operator]


def gives_activations(member: nn.Module) -> bool:
    """Whether a member can be asked for its last hidden activations."""
    return hasattr(member, "features") and hasattr(member, "readout")


def join(draws: list[Draw], dim: int) -> Draw:
    """One draw of several: dim 0 adds draws, dim 2 adds images."""
    if len(draws) == 1:
        return draws[0]
    hidden = [draw.features for draw in draws if draw.features is not None]
    return Draw(
        torch.cat([draw.logits for draw in draws], dim=dim),
        torch.cat(hidden, dim=dim) if hidden else None,
    )


def split(draw: Draw, size: int) -> list[Draw]:
    """Draws in groups of `size`, the last one smaller where they do not fill it."""
    if len(draw.logits) <= size:
        return [draw]
    logits = draw.logits.split(size)
    hidden = [None] * len(logits) if draw.features is None else draw.features.split(size)
    return [Draw(*parts) for parts in zip(logits, hidden, strict=True)]
