"""Carlini & Wagner under linf in a ball, as Wang et al. 2019 run it (EnResNet,
https://arxiv.org/abs/1811.10745, eq. 14 and section 2.4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, attacked_label, choose_targets, column
from robbench.attacks.carlini_wagner import (
    Adam,
    Margin,
    Positive,
    Problem,
    slope,
    squared,
    to_w,
    to_x,
)
from robbench.attacks.gradient import Steps, worst_of
from robbench.attacks.losses import choose
from robbench.threat import Eps, Threat, project


@attack("cw-linf", norms=("linf",))
def cw_linf(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    form: Literal["clipped", "tanh", "released"] = "clipped",
    steps: Steps = 50,
    lr: Eps | None = None,
    c: Positive = 10.0,
    confidence: Margin = 0.0,
    loss: str = "margin",
) -> Tensor:
    """Carlini & Wagner linf, Wang et al. 2019, eq. 14: Adam on ||x' - x|| + c max(-margin, -κ).

    tanh: the text's variable. clipped: x' itself. Both are kept in the ball of ε (the text names
    none), go for the true label, or the threat's target (the text is targeted), push until every
    draw is lost and return the worst iterate. lr: the text's 6e-4 at ε = 8/255, in proportion to
    ε elsewhere.
    released: the authors' code. Squared l2 for linf, x' itself, the margin from the predicted
    label (so that errors are repaired) to the runner-up on x (or the threat's target) whatever
    the loss, and the iterate of the least total, successful or not. Ours: it is clipped to box
    and ball at the end; its arrays do not share memory, which in theirs makes the distance 0 and
    the last iterate the result; and the result is not scaled by ε, which would undo it.
    """
    if threat.eps is None:
        raise ValueError("cw-linf needs an ε")
    eps = float(threat.eps)
    rate = 6e-4 * eps * 255 / 8 if lr is None else float(lr)
    released = form == "released"
    y = attacked_label(access, x, y, "predicted" if released else "truth")
    target = choose_targets(access, x, y, threat, rng)
    if released:
        target = _runner_up(access, x, y) if target is None else target
        problem = Problem(access, x, y, target, access.score_loss(_pair), confidence, steps)
        answer = project(_released(problem, rate, c), x, "linf", eps)
    else:
        problem = Problem(access, x, y, target, choose(access, loss), confidence, steps)
        answer = _bounded(problem, form == "tanh", eps, rate, c)
    access.trace = problem.trace.arrays
    return answer


def _bounded(problem: Problem, tanh: bool, eps: float, lr: float, c: float) -> Tensor:
    """The forms clipped and tanh: of each image the worst iterate in the ball."""
    access, x = problem.access, problem.x
    there, back = (to_w, to_x) if tanh else (torch.clone, torch.clone)
    low, high = there((x - eps).clamp_min(0)), there((x + eps).clamp_max(1))
    w, best = there(x), x.clone()
    worst = torch.full((2, len(x)), float("-inf"), device=x.device)  # lost and loss
    adam, images = Adam(w, lr), torch.arange(len(x), device=x.device)
    for _ in range(problem.steps):
        here = w[images]
        points = project(back(here), x[images], "linf", eps)
        value, gradient, lost = problem.gradient(points, images)
        old_lost, old = worst[:, images]
        worse = (lost > old_lost) | ((lost == old_lost) & (value > old))
        best[images[worse]] = points[worse]
        worst[:, images[worse]] = torch.stack([lost, value])[:, worse]
        reached = (lost == 1) & problem.sure(value)
        downhill = subgradient(points - x[images]) - column(c * ~reached, x) * gradient
        if tanh:
            downhill = downhill * slope(here)
        moved = here - adam.move(downhill, images)
        w[images] = moved.clamp(low[images], high[images])
        if access.exact:
            images = images[~reached]
            if not len(images):
                break
    last = best.clone()
    last[images] = project(back(w[images]), x[images], "linf", eps)
    return worst_of(access, [best, last], problem.y, problem.target, problem.loss)[0]


def _released(problem: Problem, lr: float, c: float) -> Tensor:
    """The authors' form: of each image the iterate of the least total loss, in no box or ball."""
    x, floor = problem.x, -problem.confidence
    w, best, images = x.clone(), x.clone(), torch.arange(len(x), device=x.device)
    least, adam = torch.full((len(x),), float("inf"), device=x.device), Adam(w, lr)
    for _ in range(problem.steps):
        value, gradient, _ = problem.gradient(w, images)
        total = squared(w - x) + c * (-value).clamp_min(floor)
        better = total < least
        least, best = torch.where(better, total, least), torch.where(column(better, x), w, best)
        push = c * (-value > floor)
        w = w - adam.move(2 * (w - x) - column(push, x) * gradient, images)
    return best


def _runner_up(access: Access, x: Tensor, label: Tensor) -> Tensor:
    """(N,) the best label but this one, in one evaluation."""
    with torch.no_grad():
        return access.scores(x).scatter(1, label[:, None], float("-inf")).argmax(dim=1)


def _pair(scores: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    """(N,) scores of the target above those of the label, whichever other label is better."""
    assert target is not None
    above = scores.gather(1, target[:, None]) - scores.gather(1, label[:, None])
    return above[:, 0]


def subgradient(delta: Tensor) -> Tensor:
    """A subgradient of the linf norm, the mean over the pixels of that size; 0 at 0."""
    flat = delta.flatten(1)
    top = flat.abs() == flat.abs().amax(dim=1, keepdim=True)
    return (flat.sign() * top / top.sum(dim=1, keepdim=True)).view_as(delta)
