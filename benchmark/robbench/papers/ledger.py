"""The costs of a paper at a scale as they are kept: looked up, measured, doubted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch

from robbench.checkpoints import Shelf
from robbench.defense import resolve
from robbench.metrics import Measure
from robbench.papers.claims import counterparts
from robbench.papers.costs import (
    DEPLOYED,
    cost_key,
    counted,
    deployed,
    measure_cost,
    read_costs,
    timed,
    write_costs,
)
from robbench.papers.paper import Binding, Number
from robbench.papers.reproduction import Reproduction
from robbench.runner import FAILURES, Shared, Training, explained


class Ledger:
    """What is known of a paper's costs goes to its reproduction. shelf: of the weights that lie
    beside the file. stale: cost key -> why what is kept does not count."""

    def __init__(self, reproduction: Reproduction, file: Path, shelf: Shelf) -> None:
        self.reproduction, self.file, self.shelf = reproduction, file, shelf
        self.known: dict[str, Measure] = reproduction.costs
        self.stale: dict[str, str] = {}
        self.look_up()

    def of(self, numbers: Iterable[Number]) -> dict[str, Binding]:
        """The costs among these numbers, by their key."""
        overlay, bindings = self.reproduction.overlay, [number.binding for number in numbers]
        return {cost_key(each, overlay): each for each in bindings if each.kind == "cost"}

    @cached_property
    def every(self) -> dict[str, Binding]:
        """All costs of the paper, by their key."""
        paper = self.reproduction.paper
        return self.of((*paper.numbers(), *counterparts(paper)))

    def look_up(self, device: torch.device | None = None, shelf: Shelf | None = None) -> None:
        """The costs that are kept, and those of them that something else was measured for: other
        images, versions or weights; where a device is given, another device or number of threads.
        shelf: of the weights, by default those beside the records."""
        self.known.clear()
        self.stale.clear()
        for key, kept in read_costs(self.file).items():
            why = kept.inputs.outdated(self.reproduction.load, shelf or self.shelf)
            if key not in self.every:
                why = "the paper has no such cost"
            elif device and timed(self.every[key]) and not kept.inputs.made_here(device):
                made = kept.inputs
                why = f"it was measured on {made.environment.device} by {made.threads} threads"
            if why:
                self.stale[key] = why
            else:
                self.known[key] = kept.measure

    def trainings(self, asked: Mapping[str, Binding]) -> list[Training]:
        """What those of these costs that are to be measured need trained; of an epoch that is timed
        what it starts from."""
        found = []
        for key, binding in asked.items():
            if key in self.known:
                continue
            for made in deployed(binding, self.reproduction.overlay):
                if binding.function in DEPLOYED:
                    found.append(made)
                elif binding.function == "epoch-seconds":
                    bases = [part.base_spec() for part in resolve(made.defense)]
                    found += [made._replace(defense=str(base)) for base in bases if base]
        return found

    def measure(self, asked: Mapping[str, Binding], shared: Shared) -> list[str]:
        """Those of these costs that nobody has measured yet as things are here, kept one by one;
        why one could not be measured."""
        failed = []
        for key, binding in asked.items():
            self.look_up(shared.device, shared.shelf)  # others may have measured it meanwhile
            if key in self.known:
                continue
            overlay, load = self.reproduction.overlay, self.reproduction.load
            try:
                found = measure_cost(binding, overlay, load, shared)
            except FAILURES as error:
                failed.append(f"not measured: {key} ({explained(error)})")
                continue
            kept = {**read_costs(self.file), key: found}
            write_costs(self.file, {k: v for k, v in kept.items() if k in self.every})
        self.look_up(shared.device, shared.shelf)
        return failed

    def doubts(self, asked: Mapping[str, Binding], whole: bool) -> list[str]:
        """A line for every cost that is not what would be measured now: of these, or of all in the
        file where the whole paper is asked for."""
        stale = {key: why for key, why in self.stale.items() if whole or key in asked}
        for key in asked.keys() & self.known.keys():
            there = self._counted(asked[key])
            if there is not None and there != self.known[key].value:
                stale[key] = f"there are {there:g}"
        return [f"{self.file}: {key} is stale, {why}" for key, why in stale.items()]

    def _counted(self, binding: Binding) -> float | None:
        """A cost that can be counted without measuring anything."""
        if timed(binding):
            return None
        return counted(binding, self.reproduction.overlay, self.reproduction.load)
