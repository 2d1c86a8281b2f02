"""Several attacks in turn, the worst point of each image: AutoAttack, and a defense's own suite.

A stage attacks only the images that those before it left standing, and may start from the worst
points that they found. What each stage contributed is in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import Configured, attack, column
from robbench.attacks.apgd import CALLS, enough, remaining
from robbench.attacks.gradient import Steps, select
from robbench.attacks.losses import choose
from robbench.errors import InputError
from robbench.registry import Spec
from robbench.threat import Threat, distance, format_eps, within

Budget = Literal["smoke", "standard", "thorough"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)


@dataclass(frozen=True)
class Means:
    """What a budget buys: steps and restarts of a climb, EOT draws, targets, frozen draws, and
    queries of the search without gradients."""

    steps: int
    restarts: int
    eot: int
    targets: int
    frozen: int
    queries: int


MEANS: dict[Budget, Means] = {
    "smoke": Means(steps=20, restarts=1, eot=5, targets=0, frozen=8, queries=100),
    "standard": Means(steps=100, restarts=1, eot=20, targets=9, frozen=32, queries=1000),
    "thorough": Means(steps=300, restarts=5, eot=40, targets=9, frozen=64, queries=5000),
}


@dataclass(frozen=True)
class Stage:
    """An attack of a suite: its spec, and the oracle that it is made on (None: the defense
    itself)."""

    attack: str
    oracle: str | None = None

    def __str__(self) -> str:
        return self.attack + (f" from {self.oracle}" if self.oracle else "")


class Ready(NamedTuple):
    """A stage with the access it has."""

    name: str
    attack: Configured
    access: Access


# FAB without its final search and Square without its last row, as the authors' code has them
FAB, SQUARE = "fab(search=0, targets=9)", "square(edges=false, rescale=false)"
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd(loss=ce)", "apgd(loss=dlr, targets=9)", FAB, SQUARE),
    "plus": (
        "apgd(loss=ce, restarts=5)", "apgd(loss=dlr, restarts=5)", "fab(search=0, restarts=5)",
        SQUARE, "apgd(loss=dlr, targets=9)", FAB,
    ),
    "rand": ("apgd(loss=ce)", "apgd(loss=dlr)"),
}  # fmt: skip
L1_STANDARD = ("apgd(loss=ce, restarts=5)", "apgd(loss=dlr, targets=5)", FAB, SQUARE)
RAND_DRAWS = 20


def _parts(settings: Mapping[str, object]) -> Sequence[str]:
    return VERSIONS[str(settings["version"])]


@attack("autoattack", norms=("linf", "l2", "l1"), aliases=("aa",), targeted=False, inner=_parts)
def autoattack(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    version: Literal["standard", "plus", "rand"] = "standard",
    steps: Steps = 100,
    queries: Steps = 5000,
) -> Tensor:
    """AutoAttack as its authors define it: APGD-CE, APGD-T, FAB-T and Square.

    With fewer than four labels, where DLR is not defined, it is the margin in its place.
    rand: APGD-CE and APGD-DLR with 20 EOT draws. On a stochastic defense our APGD keeps what
    costs most over selection draws, where the authors' stops at the first lucky one.
    """
    specs = VERSIONS[version]
    if version == "standard" and threat.norm == "l1":
        specs = L1_STANDARD
    if access.deployed.labels < 4:
        specs = tuple(spec.replace("loss=dlr", "loss=margin") for spec in specs)
    source = access.like(draws=RAND_DRAWS) if version == "rand" else access
    stages = []
    for spec in map(Spec.parse, specs):
        cost: dict[str, object] = {"steps": steps}
        if spec.name == "square":
            cost = {"queries": queries}
        elif "restarts" in dict(spec.settings) and spec.name == "fab":
            cost["eps"] = format_eps(threat.eps)  # random starts within half of it
        stages.append(Ready(str(spec), Configured.of(spec.with_settings(cost)), source))
    return in_turn(access, stages, x, y, threat, rng)


@attack("strongest", norms=("linf", "l2", "l1"), targeted=False, suite=True)
def strongest(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    budget: Budget = "standard",
) -> Tensor:
    """The worst point per image over the defense's own suite of attacks, at this budget."""
    stages = [stage for stage in access.stages if threat.norm in stage.attack.entry.norms]
    if not stages:
        raise InputError(
            "strongest takes its stages from the cell's defense; it is no inner attack"
        )
    return in_turn(access, stages, x, y, threat, rng)


def in_turn(
    access: Access,
    stages: Sequence[Ready],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
) -> Tensor:
    """Every stage on what is left; per image the point that costs `access`'s defense most.

    Trace: suite_lost (stages, N) the share of decisions lost after each stage, NaN where it had
    nothing to do; suite_passes (stages, N) what it took, in forward and backward passes per image;
    suite_winner (N,) the stage of the point, -1 for x itself.
    """
    loss = choose(access, "auto")
    best = x.clone()
    lost = np.full((len(stages), len(x)), np.nan, dtype=np.float16)
    passes = np.zeros((len(stages), len(x)), dtype=np.float32)
    winner = torch.full_like(y, -1)
    going = remaining(access, best, y, None, loss)
    for index, stage in enumerate(stages):
        access.report(index, len(stages))
        if not len(going):
            break
        before = _passes(stage.access)
        stage.access.guides = (x, y)
        found = one_stage(stage, x[going], y[going], best[going], threat, rng)
        place = going.cpu().numpy()
        passes[index, place] = (_passes(stage.access) - before) / len(place)
        pool = [best[going], found]
        chosen, which, verdict = select(access, pool, y[going], None, loss, CALLS)
        best[going] = chosen
        winner[going[which > 0]] = index
        lost[index, place] = verdict.lost.cpu().numpy()
        going = going[verdict.lost < enough(access)]
    for cost in {id(stage.access.cost): stage.access.cost for stage in stages}.values():
        access.cost.add(cost)
    access.report(len(stages), len(stages))
    access.trace = {
        "suite_lost": lost,
        "suite_passes": passes,
        "suite_winner": winner.cpu().numpy().astype(np.int8),
    }
    access.notes["suite"] = [stage.name for stage in stages]
    return best


def one_stage(
    stage: Ready, x: Tensor, y: Tensor, start: Tensor, threat: Threat, rng: Generator
) -> Tensor:
    """The points of one stage; x itself where it found none within ε."""
    stage.access.start = start
    try:
        found = stage.attack(stage.access, x.clone(), y.clone(), stage.attack.given(threat), rng)
    finally:
        stage.access.start = None
    inside = within(distance(found, x, threat.norm), threat)
    return torch.where(column(inside, x), found, x)


def _passes(access: Access) -> float:
    cost = access.cost
    return math.fsum((cost.forwards, cost.backwards))


def compose(
    losses: Sequence[str],
    budget: Budget,
    *,
    members: int = 1,
    stochastic: bool = False,
    detector: bool = False,
    oracles: Sequence[str] = (),
    own: Sequence[Stage] = (),
) -> list[Stage]:
    """The suite that suits a defense: transfer attacks first, whose points the others start from;
    climbs of each loss; what is its own; and last the search without gradients, which tells
    whether the gradients were any good.

    losses: names of the defense's own, strongest first.
    """
    means = MEANS[budget]
    climb = f"steps={means.steps}, restarts={means.restarts}, start=warm"
    losses = ["evasion", *losses] if detector else losses
    first = losses[0] if losses else "margin"
    stages = [Stage(f"mim(loss=margin, steps={means.steps})", oracle) for oracle in oracles]
    stages += [
        Stage(f"apgd(loss={loss}, {climb})") for loss in dict.fromkeys([*losses, "ce", "margin"])
    ]
    if means.targets:
        stages.append(Stage(f"apgd(loss={first}, steps={means.steps}, targets={means.targets})"))
    if members > 1:
        stages += [Stage(f"apgd(loss={first}, balanced=true, {climb})"), Stage("arc")]
    if detector:
        stages += [Stage("opgd"), Stage("joint"), Stage("feature-matching")]
    stages += own
    if not stochastic and not detector and budget != "smoke":
        stages.append(Stage("fab(targets=9)"))
    if stochastic and budget == "thorough":
        stages.append(frozen(budget))
    search = ", loss=evasion" if detector else ""  # the margin alone says nothing of a detector
    stages.append(Stage(f"square(queries={means.queries}{search})"))
    return distinct(stages)


def distinct(stages: Sequence[Stage]) -> list[Stage]:
    """Each stage once, however its spec is written; InputError for what is no stage."""
    for stage in stages:
        if not isinstance(stage, Stage):
            raise InputError(f"{stage!r} is no stage of a suite; write Stage({str(stage)!r})")
    written = [Stage(str(Configured.of(stage.attack).spec), stage.oracle) for stage in stages]
    return list(dict.fromkeys(written))


def frozen(budget: Budget) -> Stage:
    """Fixed draws of a stochastic defense under every attack of AutoAttack, in a smoke test under
    its first alone."""
    means = MEANS[budget]
    attack = f"autoattack(queries={means.queries})"
    if budget == "smoke":
        attack = f"apgd(loss=margin, steps={means.steps})"
    return Stage(f"saa(attack={attack}, draws={means.frozen})")
