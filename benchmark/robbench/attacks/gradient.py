"""The native gradient engine: FGSM, BIM, PGD and MIM are settings of one loop.

FGSM: Goodfellow et al. 2015; BIM: Kurakin et al. 2017; PGD: Madry et al. 2018; MIM: Dong et al.
2018. Differences to their texts: any norm of threat.py, any loss, the true label always, the worst
iterate and restart kept per example. On a stochastic defense the gradient is the mean over the
access's EOT draws, candidates are compared on selection draws common to all of them, and no
example is given up for one lucky draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access, Verdict
from robbench.attacks import attack, attacked_label, choose_targets, column, picked
from robbench.attacks.losses import Towards, choose
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Eps, Norm, Threat, ascend, project, random_start

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
TRACED = 5  # steps of which the loss is kept
LARGEST = float(np.finfo(np.float16).max)  # logits of a million are a fault that the trace can say
Steps = Annotated[int, Field(ge=1)]
Keep = Literal["best", "last"]
Label = Literal["truth", "predicted"]


class Trace:
    """What the gradients of one climb were like, per image of the batch."""

    def __init__(self, n: int, steps: int) -> None:
        self.marks = np.linspace(0, steps - 1, TRACED).round().astype(int)
        self.losses = np.full((TRACED, n), np.nan, dtype=np.float32)
        self.evaluations, self.zeros, self.dead = torch.zeros(3, n)
        self.lost = torch.full((2, n), float("nan"))  # at the worst evaluation, and at the last

    def note(
        self,
        step: int,
        active: Tensor,
        value: Tensor,
        gradient: Tensor,
        lost: Tensor | None = None,
    ) -> None:
        """FloatingPointError for a loss or gradient of the images `active` that is not finite."""
        if not bool(value.isfinite().all()) or not bool(gradient.isfinite().all()):
            broken = ~(value.isfinite() & gradient.isfinite().flatten(1).all(dim=1))
            bad = int(broken.sum())
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {step} for {bad} images"
            )
        index = active.cpu()
        self.losses[np.ix_(np.flatnonzero(self.marks == step), index.numpy())] = value.cpu().numpy()
        zero = (gradient == 0).flatten(1).float().mean(dim=1).cpu()
        self.evaluations[index] += 1
        self.zeros[index] += zero
        self.dead[index] += (zero == 1).float()
        if lost is not None:
            self.lost[1, index] = lost.cpu().float()
            self.lost[0, index] = self.lost[:, index].nan_to_num(-1).amax(dim=0)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """loss (5, N) at evenly spaced steps (NaN once broken); zero_gradient (N,) mean share of
        zero pixels and dead (N,) share of all-zero gradients, over the evaluations made; lost_seen
        (2, N) share of the attack's own draws lost, at the worst evaluation and at the last."""
        made = self.evaluations.clamp_min(1)
        seen = {} if bool(self.lost.isnan().all()) else {"lost_seen": self.lost.half().numpy()}
        return {
            **seen,
            "loss": self.losses.clip(-LARGEST, LARGEST).astype(np.float16),
            "zero_gradient": (self.zeros / made).numpy().astype(np.float16),
            "dead": (self.dead / made).numpy().astype(np.float16),
        }


@dataclass(frozen=True)
class Plan:
    """How the loop moves; step is a length in units of the norm."""

    steps: int
    step: float
    decay: float = 0.0
    random: bool = True
    restarts: int = 1
    keep: Keep = "best"


@attack("fgsm", norms=NORMS, version=2)
def fgsm(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    random: bool = False,
    loss: str = "auto",
    label: Label = "truth",
) -> Tensor:
    """One step of length ε; with `random` from a random point of the ball (Wong et al. 2020)."""
    plan = Plan(1, radius(threat), random=random, keep="last")
    return run(access, x, y, threat, rng, plan, loss, label)


@attack("bim", norms=NORMS, aliases=("ifgsm",), version=2)
def bim(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 20,
    step: Eps | None = None,
    loss: str = "auto",
    keep: Keep = "best",
    label: Label = "truth",
) -> Tensor:
    """Iterated FGSM from x itself; step defaults to 2.5 ε / steps."""
    plan = Plan(steps, _step(threat, step, steps), random=False, keep=keep)
    return run(access, x, y, threat, rng, plan, loss, label)


@attack("pgd", norms=NORMS, version=2)
def pgd(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 20,
    step: Eps | None = None,
    random: bool = True,
    restarts: Steps = 1,
    loss: str = "auto",
    keep: Keep = "best",
    label: Label = "truth",
) -> Tensor:
    """BIM from random points of the ball; restarts keep the worst point per example."""
    plan = Plan(steps, _step(threat, step, steps), 0.0, random, restarts, keep)
    return run(access, x, y, threat, rng, plan, loss, label)


@attack("mim", norms=NORMS, version=2)
def mim(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 20,
    step: Eps | None = None,
    decay: Annotated[float, Field(ge=0)] = 1.0,
    loss: str = "auto",
    keep: Keep = "best",
    label: Label = "truth",
) -> Tensor:
    """BIM along an accumulated gradient, each normalised by its mean absolute value."""
    plan = Plan(steps, _step(threat, step, steps), decay, random=False, keep=keep)
    return run(access, x, y, threat, rng, plan, loss, label)


@attack("ilcm", norms=NORMS)
def ilcm(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 10,
    step: Eps | None = None,
    loss: str = "auto",
    keep: Keep = "best",
) -> Tensor:
    """Iterated steps towards the label that x is least likely to have; any error counts
    (Kurakin et al. 2017, arXiv:1607.02533)."""
    plan = Plan(steps, _step(threat, step, steps), random=False, keep=keep)
    return _steered(access, x, y, threat, rng, plan, loss, "least-likely")


@attack("step-target", norms=NORMS)
def step_target(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    towards: Literal["least-likely", "random"] = "least-likely",
    loss: str = "auto",
) -> Tensor:
    """One step of length ε towards another label; any error counts (the one-step target class
    method of Kurakin et al. 2017, arXiv:1611.01236)."""
    plan = Plan(1, radius(threat), random=False, keep="last")
    return _steered(access, x, y, threat, rng, plan, loss, towards)


def _steered(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    plan: Plan,
    loss: str,
    towards: Literal["least-likely", "random"],
) -> Tensor:
    """Towards a label by this rule, any error counting; a threat with a target keeps it."""
    if threat.targeted:
        return run(access, x, y, threat, rng, plan, loss)
    aimed = threat.model_copy(update={"target": towards})
    return run(access, x, y, aimed, rng, plan, loss, steers=True)


def radius(threat: Threat) -> float:
    """ε as a number."""
    if threat.eps is None:
        raise ValueError("a gradient attack needs an ε")
    return float(threat.eps)


def _step(threat: Threat, step: object, steps: int) -> float:
    return 2.5 * radius(threat) / steps if step is None else float(step)  # type: ignore[arg-type]


def run(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    plan: Plan,
    loss_name: str,
    label: Label = "truth",
    steers: bool = False,
) -> Tensor:
    """All restarts, the worst point of each image; leaves the trace in access.

    steers: the target gives the direction, but any error counts."""
    loss = choose(access, loss_name)
    if steers:
        loss = Towards(loss)
    y = attacked_label(access, x, y, label)
    target = choose_targets(access, x, y, threat, rng)
    starts = [
        random_start(x, threat.norm, radius(threat), rng) if plan.random else x
        for _ in range(plan.restarts)
    ]
    loop = _Loop(access, x, y, target, threat, plan, loss)
    candidates: list[Tensor] = []
    for index, start in enumerate(starts):
        candidates += loop.climb(start, index)
    if len(candidates) == 1:
        worst, winner, selected = candidates[0], torch.zeros_like(y), {}
    else:
        each: list[Tensor] = []
        worst, winner, verdict = select(access, candidates, y, target, loss, each=each)
        selected = {"selected_lost": verdict.lost.half().cpu().numpy()}
        if len(starts) > 1:
            of_start = torch.stack(each).view(len(starts), -1, len(x)).amax(dim=1)
            selected["restarts_lost"] = of_start.half().cpu().numpy()
    access.trace = {
        **loop.trace.arrays,
        **selected,
        "restart": (winner // (len(candidates) // len(starts))).cpu().numpy().astype(np.uint8),
    }
    return worst


def worst_of(
    access: Access, candidates: list[Tensor], y: Tensor, target: Tensor | None, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Per image the candidate that costs the defense most, and its index; see select."""
    if len(candidates) == 1:
        return candidates[0], torch.zeros_like(y)
    return select(access, candidates, y, target, loss)[:2]


def select(
    access: Access,
    candidates: list[Tensor],
    y: Tensor,
    target: Tensor | None,
    loss: Loss,
    calls: int = 1,
    each: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Verdict]:
    """Per image the candidate that costs the defense most (Access.judge), its index, and what it
    costs.

    All are compared on the same selection draws, which scoring never sees again; there are enough
    for so many calls of the defense, and at least 20 where the attack itself averages over draws.
    each: gets the share lost (N,) of every candidate.
    """
    state = random_state(access.device)
    winner = torch.zeros_like(y)
    per_call = access.deployed.draws
    draws = per_call * max(math.ceil(access.selection / per_call), calls)
    best, verdict = candidates[0], access.judge(candidates[0], y, loss, target, draws)
    shares = [verdict.lost]
    for index, candidate in enumerate(candidates[1:], start=1):
        set_random_state(access.device, state)
        other = access.judge(candidate, y, loss, target, draws)
        shares.append(other.lost)
        better = other.worse_than(verdict)
        best = torch.where(column(better, best), candidate, best)
        verdict = Verdict(
            *(torch.where(better, new, old) for new, old in zip(other, verdict, strict=True))
        )
        winner = winner.masked_fill(better, index)
    if each is not None:
        each += shares
    return best, winner, verdict


class _Loop:
    """One climb of the loss from a start, and the trace of the last one."""

    def __init__(
        self,
        access: Access,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        threat: Threat,
        plan: Plan,
        loss: Loss,
    ) -> None:
        self.access, self.x, self.y, self.target = access, x, y, target
        self.norm, self.eps, self.plan, self.loss = threat.norm, radius(threat), plan, loss
        self.trace = Trace(len(x), plan.steps)

    def climb(self, start: Tensor, restart: int = 0) -> list[Tensor]:
        """The candidates of one start: the best iterate, and the last where that is uncertain."""
        plan, access = self.plan, self.access
        stops = access.exact and plan.keep == "best"
        current, best = start.clone(), start.clone()
        best_loss = torch.full((len(start),), float("-inf"), device=start.device)
        best_lost = torch.zeros_like(best_loss)
        momentum = torch.zeros_like(start) if plan.decay else None
        active = torch.arange(len(start), device=start.device)
        for step in range(plan.steps):
            here = current[active]
            aim = picked(self.target, active)
            value, gradient, lost = access.gradient(here, self.y[active], self.loss, aim)
            self.trace.note(step, active, value, gradient, lost)
            access.report(restart * plan.steps + step + 1, plan.restarts * plan.steps)
            better = value > best_loss[active]
            if stops:  # no answer is nearer to an error than any loss of an answer that is right
                nearer = lost > best_lost[active]
                better = nearer | (better & (lost == best_lost[active]))
                best_lost[active[better]] = lost[better]
            best[active[better]], best_loss[active[better]] = here[better], value[better]
            if stops and bool((lost == 1).any()):
                going = lost < 1
                active, here, gradient = active[going], here[going], gradient[going]
                if not len(active):
                    break
            if momentum is not None:
                size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
                gradient = plan.decay * momentum[active] + gradient / size
                momentum[active] = gradient
            moved = here + plan.step * ascend(gradient, here, self.norm)
            current[active] = project(moved, self.x[active], self.norm, self.eps)
        if plan.keep == "last":
            return [current]
        if not stops:
            return [best, current]
        best[active] = self._better_end(current, best, best_lost, best_loss, active)
        return [best]

    def _better_end(
        self,
        current: Tensor,
        best: Tensor,
        best_lost: Tensor,
        best_loss: Tensor,
        active: Tensor,
    ) -> Tensor:
        """The last iterate was never evaluated: one more pass says whether it is the best."""
        if not len(active):
            return best[active]
        aim = picked(self.target, active)
        end = self.access.judge(current[active], self.y[active], self.loss, aim, 1)
        before = Verdict(best_lost[active], end.votes, best_loss[active])
        better = end.worse_than(before)
        return torch.where(column(better, best), current[active], best[active])
