"""A trained defense as attacks and ART see it: Draw, Rule, Deployed, Access, Estimator.

Draws, EOT, counting of passes and memory are solved here once, for every defense and attack.
Symbols: S draws, M members, N images, L labels, D features.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

ABSTAIN = -1
Randomness = Literal["none", "image", "call"]


class Draw(NamedTuple):
    """What a defense computes before it decides."""

    logits: Tensor  # (S, M, N, L)
    features: Tensor | None = None  # (S, M, N, D), last hidden activations


Loss = Callable[[Draw, Tensor, Tensor | None], Tensor]
"""(draw, y (N,), target (N,) or None) -> (N,), larger = worse for the defense."""


class Rule(Protocol):
    """From draws to scores that attacks differentiate, and to the labels that count."""

    def scores(self, draw: Draw) -> Tensor:
        """(N, L) logits, differentiable; with S = M = 1 the network's logits bit for bit."""
        ...

    def decide(self, draw: Draw) -> Tensor:
        """(N,) int64 labels, ABSTAIN for no answer."""
        ...


class MeanLogits:
    """The mean of the logits over draws and members."""

    def scores(self, draw: Draw) -> Tensor:
        if draw.logits.shape[:2] == (1, 1):
            return draw.logits[0, 0]
        return draw.logits.mean(dim=(0, 1))

    def decide(self, draw: Draw) -> Tensor:
        return self.scores(draw).argmax(dim=1)


class MeanProbabilities:
    """The mean of the softmax over draws and members, as its logarithm."""

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
    Ties abstain either way. The vote has no gradient: scores are those of the mean softmax.
    """

    nested: bool = False
    majority: bool = True
    strict: bool = True

    def decide(self, draw: Draw) -> Tensor:
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
        return winner


def _winner(counts: Tensor) -> Tensor:
    """(..., L) counts -> (...,) the label of most votes, ABSTAIN on a tie."""
    top = counts.topk(2, dim=-1)
    tied = top.values[..., 0] == top.values[..., 1]
    return top.indices[..., 0].masked_fill(tied, ABSTAIN)


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
        """Two passes over four copies of one image: do passes differ, do copies differ?"""
        with preserved_random_state():
            torch.manual_seed(0)
            x = torch.rand(1, *self.shape).expand(4, *self.shape).contiguous().to(self.device)
            first, second = member(x), member(x)
        slack = 1e-4 * float(first.abs().max().clamp_min(1e-6))
        if torch.allclose(first, second, rtol=0, atol=slack):
            return "none"
        if any(getattr(module, "per_batch", False) for module in member.modules()):
            return "call"  # images of a batch depend on each other: draws must not be batched too
        return "call" if torch.allclose(first[:1], first, rtol=0, atol=slack) else "image"

    def sample(self, x: Tensor, draws: int, features: bool = False) -> Draw:
        """S fresh draws of all members; one forward pass carries many draws where it may."""
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
                _join([self.sample(xs, s, features) for s in self.slices(len(xs), draws)], dim=0)
                for xs in x.split(self.chunk)
            ]
            return _join(parts, dim=2)

        return self.retried(run)

    def decide(self, x: Tensor, times: int) -> Tensor:
        """(times, N) labels of independent calls of the whole defense, ABSTAIN = -1."""
        # a call of a vote over many members is one entry: groups bound the logits that are held
        group = max(1, 64 // self.draws)
        decisions = []
        for start in range(0, times, group):
            count = min(group, times - start)
            logits = self.draw(x, count * self.draws).logits
            decisions += [self.rule.decide(Draw(part)) for part in logits.split(self.draws)]
        return torch.stack(decisions)

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


def _join(draws: list[Draw], dim: int) -> Draw:
    if len(draws) == 1:
        return draws[0]
    hidden = [draw.features for draw in draws if draw.features is not None]
    return Draw(
        torch.cat([draw.logits for draw in draws], dim=dim),
        torch.cat(hidden, dim=dim) if hidden else None,
    )


class Step(NamedTuple):
    """What one gradient evaluation tells, per image; from the same draws."""

    loss: Tensor  # (N,)
    gradient: Tensor  # the shape of x
    lost: Tensor  # (N,) share of draws and members, or of decisions, that the defense lost


@dataclass
class Cost:
    """Passes of single images through single networks, and queries of the whole defense."""

    forwards: int = 0
    backwards: int = 0
    queries: int = 0


class Access(nn.Module):
    """All that an attack gets of a defense, by setting; counts what it uses.

    draws: EOT draws behind every forward pass and gradient (1 = one draw of all members).
    gradients: False for query access: forward() then carries no gradient.
    loss: what the attacker maximises by default; None leaves the choice to the attack.
    own: False where the answers come from an oracle, so that a broken example says nothing yet.
    """

    def __init__(
        self,
        deployed: Deployed,
        *,
        draws: int = 1,
        gradients: bool = True,
        loss: Loss | None = None,
        own: bool = True,
    ) -> None:
        super().__init__()
        self.deployed, self.gradients, self.loss, self.own = deployed, gradients, loss, own
        self.draws = draws if deployed.stochastic else 1
        self.cost = Cost()
        self.trace: dict[str, np.ndarray] = {}
        self.report: Callable[[int, int], None] = lambda done, total: None  # progress of an attack
        self.training = False

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
                parts.append(_join([self.deployed.sample(xs, size) for size in sizes], dim=0))
            return self.deployed.rule.scores(_join(parts, dim=2))

        self.count(len(x), self.draws)
        return self.deployed.retried(run)

    def score_loss(self, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Loss:
        """A loss on scores (N, L), averaged over draws the way the decision rule averages."""
        return lambda draw, y, target: loss(self.deployed.rule.scores(draw), y, target)

    def gradient(self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None = None) -> Step:
        """The loss over fresh draws and its gradient by x, exact in the memory of one pass.

        All draws are first made without gradient, the loss is differentiated by their logits, and
        each pass is replayed from its own random state; a single pass needs no replay.
        """

        def run() -> Step:
            parts = [
                self._gradient(xs, ys, loss, ts)
                for xs, ys, ts in _batches(x, y, target, self.deployed.chunk)
            ]
            return Step(*(torch.cat(part) for part in zip(*parts, strict=True)))

        return self.deployed.retried(run)

    def _gradient(self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None) -> Step:
        x = x.detach().requires_grad_()
        needs_features = getattr(loss, "features", False)
        slices = self.deployed.slices(len(x), self.draws)
        self.count(len(x), self.draws)
        self.count(len(x), self.draws, backwards=True)
        if len(slices) == 1 or not self.deployed.stochastic:
            draw = self.deployed.sample(x, self.draws, needs_features)
            values = loss(draw, y, target)
            lost = self._lost(draw, y, target)
            return Step(values.detach(), torch.autograd.grad(values.sum(), x)[0], lost)
        if getattr(loss, "per_draw", False):
            return self._summed(x, y, loss, target, slices)
        states, draws = [], []
        with torch.no_grad():
            for size in slices:
                states.append(random_state(self.device))
                draws.append(self.deployed.sample(x, size, needs_features))
        after = random_state(self.device)
        leaf = _detached(_join(draws, dim=0))
        values = loss(leaf, y, target)
        by_draw = torch.autograd.grad(values.sum(), [t for t in leaf if t is not None])
        self.count(len(x), self.draws)
        total, start = torch.zeros_like(x), 0
        for size, state in zip(slices, states, strict=True):
            set_random_state(self.device, state)
            outputs = [t for t in self.deployed.sample(x, size, needs_features) if t is not None]
            weights = [part[start : start + size] for part in by_draw]
            total += torch.autograd.grad(outputs, x, weights)[0]
            start += size
        set_random_state(self.device, after)
        return Step(values.detach(), total, self._lost(leaf, y, target))

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
            lost = self._lost(draw, y, target)
            total = Step(
                total.loss + share * values.detach(),
                total.gradient + share * gradient,
                total.lost.to(lost) + share * lost,
            )
        return total

    @torch.no_grad()
    def _lost(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        """Share of draws and members that miss the label y (targeted: that say the target); of a
        defense that is exact, whether its decision does."""
        if self.exact:
            labels = self.deployed.rule.decide(draw)[None, None]
        else:
            labels = draw.logits.argmax(dim=-1)  # (S, M, N)
        return (labels != y if target is None else labels == target).float().mean(dim=(0, 1))

    @torch.no_grad()
    def judge(
        self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None, draws: int
    ) -> tuple[Tensor, Tensor]:
        """(share of draws lost (N,), loss (N,)) at x; a deterministic defense is asked once."""
        draws = draws if self.deployed.stochastic else 1
        self.count(len(x), draws)
        draw = self.deployed.draw(x, draws, getattr(loss, "features", False))
        return self._lost(draw, y, target), loss(draw, y, target)


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


class Estimator(PyTorchClassifier):  # type: ignore[misc]
    """The defense as an ART classifier: loss and class gradients through Access, scores of the
    deployed draws from predict(). It cannot be trained."""

    def __init__(self, access: Access) -> None:
        deployed = access.deployed
        super().__init__(
            model=access,
            loss=nn.CrossEntropyLoss(),
            input_shape=deployed.shape,
            nb_classes=deployed.labels,
            clip_values=(0.0, 1.0),
            device_type="gpu" if access.device.type == "cuda" else "cpu",
        )
        self.access = access

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """(N, L) float32 log-scores over the deployed draws: never shares of a vote."""
        access = self.access
        images = torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float32)
        draws = access.deployed.draws
        access.count(len(images), draws)
        draw = access.deployed.draw(images.to(access.device), draws)
        return access.deployed.rule.scores(draw).cpu().numpy()

    def fit(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a deployed defense cannot be trained; use 'robbench train'")

    fit_generator = fit


def random_state(device: torch.device) -> tuple[Any, ...]:
    """The state of every stream that a module on this device may draw from."""
    accelerator = None
    if device.type == "cuda":
        accelerator = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        accelerator = torch.mps.get_rng_state()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator


def set_random_state(device: torch.device, state: tuple[Any, ...]) -> None:
    python, numpy_state, cpu, accelerator = state
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    if device.type == "cuda":
        torch.cuda.set_rng_state(accelerator, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(accelerator)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's global streams: libraries draw from all three."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Global random streams are the caller's again afterwards, whatever happened inside."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@dataclass
class _Snapshot:
    """Modes, buffers and parameter gradients of every sub-module."""

    module: nn.Module
    modes: dict[str, bool] = field(init=False)
    buffers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.modes = {name: m.training for name, m in self.module.named_modules()}
        self.buffers = {name: b.clone() for name, b in self.module.named_buffers()}

    def restore(self) -> None:
        for name, module in self.module.named_modules():
            module.training = self.modes.get(name, module.training)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self.buffers[name])
        for parameter in self.module.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)


@contextlib.contextmanager
def sandboxed(module: nn.Module, seed: int) -> Iterator[None]:
    """Run foreign code: own random streams and working directory, the module as it was before."""
    snapshot, here = _Snapshot(module), Path.cwd()
    with preserved_random_state(), tempfile.TemporaryDirectory() as private:
        seed_everything(seed)
        os.chdir(private)
        try:
            yield
        finally:
            os.chdir(here)
            snapshot.restore()
