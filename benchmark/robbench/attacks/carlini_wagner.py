"""Carlini & Wagner 2017, l2 (https://arxiv.org/abs/1608.04644), and its search over c.

Differences to the text: the hinge ends where the decision is the attacker's (with margin κ), which
is the text's f6 on one plain network and also an end where a defense votes or abstains. The
variable w has x' = (tanh(w) / S + 1) / 2 with S < 1 and stays where x' is in the box, so that
pixels of exactly 0 and 1 have a finite w and a slope: with the text's S = 1 they cannot move. A
success on a stochastic defense has to hold in draws that the descent did not see. The distance of
a point is the true one, to x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access, Step
from robbench.attacks import attack, attacked_label, choose_targets, column, picked
from robbench.attacks.gradient import Label, Steps, Trace
from robbench.attacks.losses import choose
from robbench.rules import Loss
from robbench.threat import Threat

STRETCH = 0.9  # S: the slope at the ends of the box is a fifth of that in its middle
EDGE = math.atanh(STRETCH)  # w of a pixel that is 1
CONFIRMING = 50  # fresh draws, at least, in which a success on a stochastic defense must hold
LARGEST = 1e10  # c that is tried
Positive = Annotated[float, Field(gt=0)]
Margin = Annotated[float, Field(ge=0)]
Size = Callable[[Tensor], Tensor]  # delta (n, C, H, W) -> (n,)


@attack("cw", norms=("l2", "none"), minimal=True)
def cw(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 200,
    search: Steps = 6,
    c: Positive = 0.01,
    lr: Positive = 0.01,
    confidence: Margin = 0.0,
    abort: bool = True,
    label: Label = "truth",
    loss: str = "margin",
) -> Tensor:
    """Carlini & Wagner l2: Adam on ||x' - x||² + c max(κ - margin, 0), c searched per image.

    The text has steps=1000, search=9 and starts at c=0.001; search=1 is a fixed c; confidence is
    κ, in units of the loss. abort: an image is done with a c once a tenth of the steps gains
    nothing.
    Returns the smallest x' found that has the goal; x where none has it, or x itself does.
    """
    y = attacked_label(access, x, y, label)
    target = choose_targets(access, x, y, threat, rng)
    objective = choose(access, loss)
    problem = Problem(access, x, y, target, objective, confidence, search * steps)

    def descend(weight: Tensor, images: Tensor, found: Found) -> None:
        w, patience = to_w(x), Patience(problem, steps, abort)
        adam = Adam(w, lr)
        for step in range(steps):
            here = w[images]
            points = to_x(here)
            delta = points - x[images]
            value, gradient, lost = problem.gradient(points, images)
            reached = problem.reached(lost, value)
            found.offer(points, images, reached)
            push = weight[images].masked_fill(reached, 0)
            downhill = (2 * delta - column(push, x) * gradient) * slope(here)
            w[images] = (here - adam.move(downhill, images)).clamp(-EDGE, EDGE)
            total = squared(delta) + push * (confidence - value)
            images = images[patience.gains(step, images, total)]
            if not len(images):
                return

    return find_smallest(problem, squared, descend, c, search)


class Problem:
    """What is wanted of each image, and what a point of it is worth; counts and traces the steps.

    images (n,): the indices of the images that points (n, C, H, W) belong to.
    """

    def __init__(
        self,
        access: Access,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        loss: Loss,
        confidence: float,
        steps: int,
    ) -> None:
        self.access, self.x, self.y, self.target = access, x, y, target
        self.loss, self.confidence = loss, confidence
        self.step, self.steps, self.trace = 0, steps, Trace(len(x), steps)

    def gradient(self, points: Tensor, images: Tensor) -> Step:
        """Access.gradient of the loss; a FloatingPointError where it is not finite."""
        step = self.access.gradient(points, self.y[images], self.loss, self._aim(images))
        self.trace.note(self.step, images, step.loss, step.gradient, step.lost)
        self.step += 1
        self.access.report(self.step, self.steps)
        return step

    def judge(self, points: Tensor, images: Tensor, draws: int) -> Tensor:
        """(n,) bool: reached, in whole calls of the defense that make at least so many draws.

        FloatingPointError where the loss is not finite: what is no number is no error either.
        """
        per_call = self.access.deployed.draws
        draws = per_call * math.ceil(draws / per_call)
        aim = self._aim(images)
        verdict = self.access.judge(points, self.y[images], self.loss, aim, draws)
        if bad := int((~verdict.loss.isfinite()).sum()):
            raise FloatingPointError(f"the loss is not finite for {bad} images")
        return self.reached(verdict.lost, verdict.loss)

    def reached(self, lost: Tensor, value: Tensor) -> Tensor:
        """(n,) bool: the goal in more than half of the calls, with the confidence asked for."""
        return (lost > 0.5) & self.sure(value)

    def sure(self, value: Tensor) -> Tensor:
        """(n,) bool: without κ the decision alone counts, whatever unit the loss has."""
        return (value >= self.confidence) | (self.confidence == 0)

    def _aim(self, images: Tensor) -> Tensor | None:
        return picked(self.target, images)


class Found:
    """The smallest points that reach the goal: points (N, C, H, W), sizes (N,), inf for none."""

    def __init__(self, problem: Problem, size: Size) -> None:
        self.problem, self.size = problem, size
        self.points = problem.x.clone()
        self.sizes = torch.full((len(problem.x),), float("inf"), device=problem.x.device)

    def offer(self, points: Tensor, images: Tensor, reached: Tensor) -> None:
        """Take what is smaller and reached; on a stochastic defense it has to be so once more."""
        sizes = self.size(points - self.problem.x[images])
        better = (reached & (sizes < self.sizes[images])).nonzero()[:, 0]
        if self.problem.access.deployed.stochastic and len(better):
            better = better[self.problem.judge(points[better], images[better], CONFIRMING)]
        self.points[images[better]] = points[better]
        self.sizes[images[better]] = sizes[better]

    def merge(self, other: Found) -> None:
        better = other.sizes < self.sizes
        self.points = torch.where(column(better, self.points), other.points, self.points)
        self.sizes = torch.where(better, other.sizes, self.sizes)


def find_smallest(
    problem: Problem,
    size: Size,
    descend: Callable[[Tensor, Tensor, Found], None],
    c: float,
    search: int,
) -> Tensor:
    """The smallest point over all c: tenfold until one is found, then halving, per image.

    descend(c (N,), images, found) offers points to found. The trace also has c (N,), the least one
    with which a point was found, NaN for none.
    """
    x, best = problem.x, Found(problem, size)
    everything = torch.arange(len(x), device=x.device)
    best.sizes[problem.judge(x, everything, CONFIRMING)] = 0
    images = best.sizes.nonzero()[:, 0]
    weight = torch.full((len(x),), c, device=x.device)
    low, high = torch.zeros_like(weight), torch.full_like(weight, float("inf"))
    for index in range(search if len(images) else 0):
        problem.step = index * problem.steps // search
        found = Found(problem, size)
        descend(weight, images, found)
        best.merge(found)
        success = found.sizes.isfinite()
        high, low = torch.where(success, weight, high), torch.where(success, low, weight)
        weight = torch.where(high.isinf(), weight * 10, (low + high) / 2).clamp_max(LARGEST)
    least = torch.where(high.isinf(), torch.nan, high)
    problem.access.trace = problem.trace.arrays | {"c": least.cpu().numpy()}
    return best.points


class Adam:
    """Kingma & Ba 2015 with the usual constants, for batches that images leave for good."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.step = lr, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def move(self, gradient: Tensor, images: Tensor) -> Tensor:
        """What to subtract from the variables of these images."""
        self.step += 1
        self.mean[images] = mean = torch.lerp(gradient, self.mean[images], 0.9)
        self.square[images] = square = torch.lerp(gradient**2, self.square[images], 0.999)
        root = (square / (1 - 0.999**self.step)).sqrt()
        return self.lr * mean / (1 - 0.9**self.step) / (root + 1e-8)


class Patience:
    """Tells which images still gain: looked at ten times, each time by a ten-thousandth."""

    def __init__(self, problem: Problem, steps: int, abort: bool) -> None:
        self.tenth, self.abort = math.ceil(steps / 10), abort and problem.access.exact
        self.last = torch.full((len(problem.x),), float("inf"), device=problem.x.device)

    def gains(self, step: int, images: Tensor, total: Tensor) -> Tensor:
        """(n,) bool."""
        if not self.abort or step % self.tenth:
            return torch.ones_like(total, dtype=torch.bool)
        last = self.last[images]
        self.last[images] = total
        return total <= last - 1e-4 * last.abs().nan_to_num(posinf=0)


def to_w(x: Tensor) -> Tensor:
    """The variable of pixels in [0, 1]."""
    return torch.atanh((2 * x - 1) * STRETCH)


def to_x(w: Tensor) -> Tensor:
    """The pixels of the variable, in [0, 1]."""
    return ((w.tanh() / STRETCH + 1) / 2).clamp(0, 1)


def slope(w: Tensor) -> Tensor:
    """dx / dw."""
    return (1 - w.tanh() ** 2) / (2 * STRETCH)


def squared(delta: Tensor) -> Tensor:
    """(n,) squared l2 norms."""
    return delta.flatten(1).square().sum(dim=1)
