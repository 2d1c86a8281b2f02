"""What an estimator is like before anybody attacks it: the measurements behind its flags.

x' is x itself; what was seen is in the record's provenance, under `probe`. The checks are those of
Carlini et al. 2019, arXiv:1902.06705, of AutoAttack's flags and of Pintor et al. 2022,
arXiv:2106.09947.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack
from robbench.attacks.losses import SCORE_LOSSES, choose
from robbench.networks.bpda import declared_backwards
from robbench.randomness import Snapshot, preserved_random_state, seed_everything
from robbench.rules import ABSTAIN, Answer, Draw
from robbench.threat import Threat

REPEATS = 5  # predictions of the same batch
ALONE = 4  # images that are also asked alone
CALLS = 20  # of the defense, for shares of answers
START = 8 / 255  # from x to the corner at which gradients are looked at a second time
NEAR = 1 / 510  # half a grey level
DIRECTIONS = 8
COUPLED = 1e-4  # of the spread of an image's logits, by the images beside it
STEP = 1e-6  # of a finite difference in float64
Figures = dict[str, Any]


@attack("probe", norms=("none",), targeted=False, diagnostic=True)
def probe(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    draws: Annotated[int, Field(ge=2)] = 20,
) -> Tensor:
    """Randomness, modes, paths, outputs and gradients of the estimator; x' is x.

    draws: EOT draws behind a gradient of a stochastic defense.
    """
    averaged = access.like(draws)
    snapshot = Snapshot(access.deployed)
    seen: Figures = {
        "losses": list(access.losses),
        "repeatability": _repeatability(access, x),
        "outputs": _outputs(access, x),
        "paths": _paths(access.like(access.deployed.draws), x, y),
        "optimises": _optimises(access, x),
        "abstained": _abstained(access, x, rng),
        "gradients": _gradients(averaged, x, y, rng),
        "noise": _landscape(averaged, x, y, rng),
        "agreement": _agreement(averaged, x, y),
    }
    alone = seen["repeatability"]["batch"] > COUPLED
    seen["derivative"] = _derivative(averaged, x, y, rng, alone)
    seen["changed"], seen["reseeds"] = snapshot.changed(), _reseeds(access, x)
    access.notes["probe"] = seen
    return x


def _draw(access: Access, x: Tensor, draws: int) -> Draw:
    draws = draws if access.deployed.stochastic else 1
    access.count(len(x), draws)
    return access.deployed.draw(x, draws)


def _answers(access: Access, x: Tensor) -> Answer:
    """Calls of the whole defense, each part (calls, N); one where it answers alike every time."""
    calls = CALLS if access.deployed.stochastic else 1
    access.count(len(x), calls * access.deployed.draws)
    return access.deployed.answers(x, calls)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits, by the spread of an image's logits."""
    spread = (a.amax(dim=-1) - a.amin(dim=-1)).clamp_min(1e-12)
    return _plain(((a - b).abs().amax(dim=-1) / spread).max())


def _plain(value: Tensor | float) -> float:
    """A number that JSON has a word for."""
    number = float(value)
    return round(number, 8) if math.isfinite(number) else -1.0


def _repeatability(access: Access, x: Tensor) -> Figures:
    """How much answers differ: from call to call, with one seed, alone, and in another order."""
    first, *others = (_draw(access, x, 1).logits for _ in range(REPEATS))
    seed_everything(0)
    seeded = _draw(access, x, 1).logits
    seed_everything(0)
    again = _draw(access, x, 1).logits
    found = {
        "kinds": list(access.deployed.randomness),
        "calls": max(_difference(first, other) for other in others),
        "seeded": _difference(seeded, again),
        "labels": _plain((first.argmax(-1) != others[0].argmax(-1)).float().mean()),
    }
    if any(getattr(module, "per_batch", False) for module in access.deployed.modules()):
        return found | {"batch": 1.0}
    if access.deployed.stochastic:
        return found | {"batch": _by_company(access, x)}
    backwards = _draw(access, x.flip(0), 1).logits.flip(2)
    alone = torch.cat([_draw(access, image[None], 1).logits for image in x[:ALONE]], dim=2)
    twice = _draw(access, torch.cat([x[:1], x[:1], x]), 1).logits[:, :, 1:3]
    pairs = ((first, backwards), (first[:, :, :ALONE], alone), (first[:, :, :1], twice[:, :, 1:]))
    return found | {"batch": max(_difference(a, b) for a, b in pairs)}


def _by_company(access: Access, x: Tensor) -> float:
    """What changes in the mean logits of some images beside others: 0 where luck explains it."""
    alone, among = (_draw(access, part, 4 * CALLS).logits[:, :, :ALONE] for part in (x[:ALONE], x))
    error = (alone.var(dim=0) / len(alone) + among.var(dim=0) / len(among)).sqrt()
    gap = (alone.mean(dim=0) - among.mean(dim=0)).abs()
    surprising = gap > 6 * error.clamp_min(1e-6 * float(alone.abs().max()))
    return _difference(alone.mean(dim=0), among.mean(dim=0)) if bool(surprising.any()) else 0.0


def _outputs(access: Access, x: Tensor) -> Figures:
    """What the members answer with."""
    logits = _draw(access, x, 1).logits
    sums, log_sums = logits.sum(dim=-1), logits.logsumexp(dim=-1)
    kind = "logits"
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        kind = "probabilities"
    elif bool((log_sums.abs() < 1e-3).all()):
        kind = "log-probabilities"
    elif bool((logits <= 0).all()):
        kind = "all-negative"
    gap = logits.amax(dim=-1) - logits.amin(dim=-1)
    return {"kind": kind, "range": _plain(gap.max()), "labels": access.deployed.labels}


@torch.no_grad()
def _paths(access: Access, x: Tensor, y: Tensor) -> Figures:
    """Right answers on clean images by the path of the attacks, with as many draws as one decision
    takes, and by that of the judge."""
    judged = (_answers(access, x).best == y).float()
    attacked = torch.stack([(access.scores(x).argmax(-1) == y).float() for _ in judged])
    gap = attacked.mean(dim=0) - judged.mean(dim=0)
    # images may share a draw: then calls are the sample, not images
    by_call = attacked.mean(dim=1).var(correction=0) + judged.mean(dim=1).var(correction=0)
    error = max(float(gap.std()) / math.sqrt(len(x)), math.sqrt(float(by_call) / len(judged)))
    return {
        "judge": _plain(judged.mean()),
        "attack": _plain(attacked.mean()),
        "error": _plain(error),
    }


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Names of the derivatives that are asked for inside."""
    asked: list[str] = []
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return function(*args, **kwargs)

        return call

    with (
        patch.object(torch.autograd, "grad", noted("grad", grad)),
        patch.object(torch.autograd, "backward", noted("backward", backward)),
    ):
        yield asked


def _optimises(access: Access, x: Tensor) -> bool:
    """Whether an answer takes derivatives of its own."""
    access.count(2, 1)
    with _counted() as asked, torch.enable_grad():
        access.deployed.sample(x[:2], 1)
    return bool(asked)


@torch.no_grad()
def _abstained(access: Access, x: Tensor, rng: Generator) -> Figures:
    """Shares without an answer, on clean images and on uniform noise."""
    noise = torch.rand(x.shape, generator=rng).to(x)
    found = {}
    for name, images in (("clean", x), ("noise", noise)):
        labels = _answers(access, images).label
        found[name] = _plain((labels == ABSTAIN).float().mean())
    return found


def _gradients(access: Access, x: Tensor, y: Tensor, rng: Generator) -> Figures:
    """For each loss, at x and at a random corner: images whose gradient is zero or no number."""
    signs = torch.randint(0, 2, x.shape, generator=rng).to(x) * 2 - 1
    corner = (x + START * signs).clamp(0, 1)
    names = [*access.losses, *SCORE_LOSSES]
    if access.deployed.labels < 3:
        names.remove("dlr")
    return {name: _gradient(access, name, (x, corner), y) for name in dict.fromkeys(names)}


def _gradient(access: Access, name: str, points: tuple[Tensor, ...], y: Tensor) -> Figures:
    dead, broken = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.bool)
    zeros = 0.0
    try:
        for point in points:
            step = access.gradient(point, y, choose(access, name))
            flat = step.gradient.flatten(1)
            going = step.lost < 1  # a loss may be content where all is lost
            dead |= (flat == 0).all(dim=1) & going
            broken |= ~(flat.isfinite().all(dim=1) & step.loss.isfinite())
            if bool(going.any()):
                zeros = max(zeros, _plain((flat[going] == 0).float().mean()))
    except RuntimeError as error:
        return {"path": False, "reason": str(error).splitlines()[0]}
    return {
        "path": True,
        "dead": dead.nonzero()[:, 0].tolist(),
        "not_finite": broken.nonzero()[:, 0].tolist(),
        "zeros": zeros,
    }


@torch.no_grad()
def _landscape(access: Access, x: Tensor, y: Tensor, rng: Generator) -> float:
    """How much the margin changes half a grey level away, with the same draws: the mean over
    random directions, by the spread of the scores, where 1 is the most that an image counts."""
    with preserved_random_state():
        seed_everything(0)
        scores = access.scores(x)
        here = SCORE_LOSSES["margin"](scores, y, None)
        changes = []
        for _ in range(DIRECTIONS):
            signs = torch.randint(0, 2, x.shape, generator=rng).to(x) * 2 - 1
            seed_everything(0)
            there = access.scores((x + NEAR * signs).clamp(0, 1))
            changes.append((SCORE_LOSSES["margin"](there, y, None) - here).abs())
    spread = scores.std(dim=-1).clamp_min(1e-12)
    return _plain((torch.stack(changes) / spread).clamp_max(1).mean())


def _agreement(access: Access, x: Tensor, y: Tensor) -> float:
    """Mean cosine of two gradients of independent draws; 1 where nothing is random."""
    if not access.deployed.stochastic:
        return 1.0
    try:
        loss = choose(access, "auto")
        first, second = (access.gradient(x, y, loss).gradient.flatten(1) for _ in range(2))
    except RuntimeError:  # what has no gradient is said elsewhere
        return -1.0
    return _plain(F.cosine_similarity(first, second, dim=1).mean())


def _derivative(access: Access, x: Tensor, y: Tensor, rng: Generator, alone: bool) -> Figures:
    """Derivatives along random directions, by autograd and by central differences in float64, of
    the mean margin over the same draws: the median relative error over images, each alone where
    the others have a part in its answer."""
    if declared := declared_backwards(access.deployed):
        return {"declared": declared}
    deployed = access.deployed
    count = min(len(x), max(1, deployed.chunk // access.draws))
    count = min(count, ALONE) if alone else count
    point, label = x[:count].double(), y[:count]
    along = torch.randn(DIRECTIONS, *point.shape, generator=rng, dtype=torch.float64).to(point)
    try:
        members = copy.deepcopy(deployed.members).double()
        size = 1 if alone else count
        parts = zip(point.split(size), label.split(size), along.split(size, dim=1), strict=True)
        error = torch.cat([_relative_error(access, members, *part) for part in parts])
    except (RuntimeError, TypeError) as problem:  # as on devices without float64
        return {"reason": str(problem).splitlines()[0]}
    return {"error": _plain(error.median()), "images": count}


def _relative_error(
    access: Access, members: torch.nn.ModuleList, x: Tensor, y: Tensor, along: Tensor
) -> Tensor:
    """(N,) of the vectors of derivatives along (D, N, C, H, W) directions. The passes are of copies
    of the members, and not counted."""

    def loss(points: Tensor) -> Tensor:
        total = torch.zeros_like(points[:, 0, 0, 0])
        seed_everything(0)
        for _ in range(access.draws):
            for member in members:
                logits = member(points)
                total = total + SCORE_LOSSES["margin"](logits, y, None)
        return total / (access.draws * len(members))

    with preserved_random_state():
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
        by_autograd = (gradient * along).flatten(2).sum(dim=2)  # (D, N)
        with torch.no_grad():
            by_steps = torch.stack(
                [(loss(x + STEP * way) - loss(x - STEP * way)) / (2 * STEP) for way in along]
            )
    size = torch.maximum(by_steps.norm(dim=0), by_autograd.norm(dim=0))
    # what is flat to both is right to both
    return (by_autograd - by_steps).norm(dim=0) / size.clamp_min(1e-9)


def _reseeds(access: Access, x: Tensor) -> bool:
    """Whether an answer sets a global random stream to a state of its own."""
    after = []
    with preserved_random_state():
        for seed in (1, 2):
            seed_everything(seed)
            _draw(access, x[:1], 1)
            after.append(torch.rand(()))
    return bool(after[0] == after[1])
