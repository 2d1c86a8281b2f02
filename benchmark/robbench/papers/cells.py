"""From a binding to the cells that it is measured by, at one of the paper's scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from robbench.attacks import Configured
from robbench.cell import Cell
from robbench.datasets import Dataset
from robbench.defense import canonical, resolve, with_preset
from robbench.errors import InputError
from robbench.grid import block, nothing
from robbench.papers.paper import Binding, Scale
from robbench.registry import Spec
from robbench.runner import Training

UNBOUNDED = "any"  # ε of a minimum-norm attack whose length the paper did not count
Load = Callable[[str], Dataset]


def shrunk(defense: str, dataset: str, scale: Scale) -> str:
    """The canonical spec of a defense, written for the paper's own dataset, at a scale.

    Its preset is `paper`; the scale replaces network, members, draws and how it is trained, here
    and in what it is built on.
    """
    return str(canonical(_shrunk(with_preset(defense, "paper", dataset), scale)))


def training_of(
    defense: str, dataset: str, scale: Scale, train_seed: int = 0, watched: bool = False
) -> Training:
    """What is deployed of a defense of the paper at a scale."""
    there = scale.dataset(dataset)
    return Training(there, shrunk(defense, dataset, scale), train_seed, watched)


def _shrunk(spec: Spec, scale: Scale) -> Spec:
    if spec.parts:
        parts = tuple(_shrunk(part, scale) for part in spec.parts)
        return spec.model_copy(update={"parts": parts})
    configured = resolve(spec.model_copy(update={"member": None}))[0]
    fields: dict[str, Any] = dict(spec.settings)
    if "network" in fields:
        fields["network"] = _network(str(fields["network"]), scale.networks)
    for name, smaller in (("members", scale.members), ("draws", scale.draws)):
        if (value := getattr(configured, name)) in smaller:
            fields[name] = smaller[value]
    if configured.epochs:
        fields |= {**scale.recipe, **scale.recipe_of.get(spec.name, {})}
    base = fields.get("base", configured.base)
    if isinstance(base, str):
        if base.startswith("torchvision:") and scale.recipe:
            base = "standard"  # weights for other images than those of the scale
        if not base.startswith("torchvision:"):
            fields["base"] = str(_shrunk(Spec.parse(base), scale))
    return spec.model_copy(update={"settings": tuple(sorted(fields.items()))})


def _network(text: str, smaller: Mapping[str, str]) -> str:
    """What stands for a network: by its whole spec, else by its name."""
    return smaller.get(text, smaller.get(Spec.parse(text).name, text))


def cell_of(binding: Binding, scale: Scale, load: Load) -> Cell:
    """The one cell of a binding; InputError for what makes none, or more than one.

    The adaptive setting of a defense that has none is its white box.
    """
    assert binding.dataset and binding.defense and binding.attack
    dataset = load(scale.dataset(binding.dataset))
    attack = Configured.of(binding.attack)
    queries = attack.entry.needs != "gradients"
    setting = binding.setting or ("blackbox" if queries else "whitebox")
    fields: dict[str, Any] = {
        "dataset": dataset.name,
        "n": images(binding, scale, dataset),
        "defense": [shrunk(binding.defense, binding.dataset, scale)],
        "attack": [binding.attack],
        "norm": [binding.norm or "linf"],
        "eps": _budget(binding, dataset),
        "setting": None if attack.entry.suite else [setting],
        "eot": binding.eot,
        "target": binding.target,
        "max_queries": binding.max_queries,
        "train_seed": [binding.train_seed],
        "seed": [binding.seed],
    }
    if binding.oracle:
        fields["oracle"] = [shrunk(binding.oracle, binding.dataset, scale)]
    asked = block(**fields)
    cells = list(asked.cells(dataset, None))
    if not cells and setting == "adaptive":
        cells = list(block(**{**fields, "setting": ["whitebox"], "eot": None}).cells(dataset, None))
    if not cells:
        raise nothing([asked])
    if len(cells) > 1:
        raise InputError(f"{binding.defense}, {binding.attack}: {len(cells)} cells for one number")
    return cells[0]


def images(binding: Binding, scale: Scale, dataset: Dataset) -> int:
    """How many test images the number is measured on."""
    assert binding.attack
    whole = len(dataset.test.y)
    plain = Configured.of(binding.attack).entry.name.removesuffix(":as-published")
    return min(binding.n or whole, scale.n_of.get(plain, scale.n or whole), whole)


def _budget(binding: Binding, dataset: Dataset) -> object:
    if binding.eps != UNBOUNDED:
        return None if binding.eps is None else [str(binding.eps)]
    c, h, w = dataset.shape
    whole = {
        "linf": 1,
        "l2": math.ceil(math.sqrt(c * h * w)),
        "l1": min(c * h * w, 255),  # the most that is no slip of the unit
        "l0": h * w,
    }
    return [whole[binding.norm or "linf"]]


def strongest_of(cell: Cell, scale: Scale, load: Load) -> Cell | None:
    """The suite that stands beside a cell: the same defense and threat, on fewer images. None in
    l0, for which there is no suite, or at a scale that has none."""
    threat = cell.threat
    if scale.strongest is None or threat.norm == "l0":
        return None
    asked = block(
        dataset=cell.dataset,
        n=min(scale.strongest_n or cell.n, cell.n),
        defense=[cell.defense],
        attack=[f"strongest(budget={scale.strongest})"],
        norm=[threat.norm],
        eps=[str(threat.eps)],
        train_seed=[cell.train_seed],
    )
    return next(iter(asked.cells(load(cell.dataset), None)))
