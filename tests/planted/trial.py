"""Runs planted and sound defenses through the cells of their audits, on the boards' weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.planted import PLANTED, SOUND, UNDEFENDED, Planted
from torch import nn

from robbench import attack, registry
from robbench.audit import Audited, audit
from robbench.audit.planning import plan
from robbench.cell import MODEL, Cell
from robbench.checkpoints import Trained
from robbench.deployed import Deployed
from robbench.executors import measure
from robbench.grid import Block
from robbench.runner import Shared

ROOT = Path(__file__).parents[2]
IMAGES = 64
FEW = 32  # of a defense that votes over draws


def trial() -> Shared:
    """What all defenses on trial have in common."""
    return Shared(ROOT / "leaderboards", None, torch.device("cpu"))


def accused(name: str, shared: Shared) -> Audited:
    """What the audit says of the number of a planted defense."""
    planted, text = PLANTED[name], f"{MODEL}{name}"
    shared.models[text] = _deployed(planted, shared)
    eps, models, dataset = Fraction(planted.eps), shared.models, shared.dataset("digits")
    own = {"attack": planted.attack, "setting": planted.setting}
    with _registered():
        cells = _cells([own, *planted.beside], text, planted.eps, IMAGES, shared)
        cells += plan(text, dataset, attack=planted.attack, eps=eps, n=IMAGES, models=models)
        return _audited(cells, shared)


def cleared(name: str, shared: Shared) -> Audited:
    """What the audit says of the number of a sound defense, by what is cheap of a thorough plan."""
    vote = name == "smoothing"
    n = FEW if vote else IMAGES
    own, *others = plan(name, shared.dataset("digits"), attack=SOUND[name], n=n, depth="thorough")
    wanted = [cell for cell in others if _quick(cell, name) or (not vote and _cheap(cell, own))]
    return _audited([own, *wanted], shared)


def _quick(cell: Cell, name: str) -> bool:
    """One step, a probe, what is transferred, and where the attacker may do anything."""
    known = cell.attack in ("fgsm", "probe") or cell.setting.kind == "transfer"
    return cell.defense == name and (known or cell.threat.eps == 1)


def _cheap(cell: Cell, own: Cell) -> bool:
    """Random points, and the same attack at a smaller ε and where every image can become grey."""
    if cell.attack == own.attack and cell.seed == own.seed:
        return cell.threat.eps in (Fraction("0.05"), Fraction("0.5"))
    return cell.attack == "random-search"


def _cells(
    blocks: Iterable[Mapping[str, Any]], text: str, eps: str, n: int, shared: Shared
) -> list[Cell]:
    common = {"dataset": "digits", "n": n, "defense": text, "eps": eps}
    fields = [{**common, **block} for block in blocks]
    return [
        cell
        for block in fields
        for cell in Block(**{key: value for key, value in block.items() if value}).cells(
            shared.dataset("digits"), models=shared.models
        )
    ]


def _audited(cells: list[Cell], shared: Shared) -> Audited:
    """Of the first cell, beside the others."""
    records = list(measure(list(dict.fromkeys(cells)), None, shared))
    return audit(records)[cells[0].id]


def _deployed(planted: Planted, shared: Shared) -> Trained:
    dataset = shared.dataset("digits")
    network = shared.deploy(UNDEFENDED, dataset, 0).deployed.members[0]
    members = nn.ModuleList([planted.defend(network)])
    return Trained(Deployed(members, planted.rule(), dataset.shape, len(dataset.labels)), ())


@contextmanager
def _registered() -> Iterator[None]:
    """The planted attacks are known inside."""
    list(registry.attacks)  # the native ones are registered first
    with patch.object(registry.attacks, "_entries", dict(registry.attacks._entries)):
        for planted in PLANTED.values():
            if planted.run:
                attack(planted.attack, norms=("linf",), targeted=False)(planted.run)
        yield
