"""What a measured cost or a computed figure was made of, noted while it is made and held against
what is there later: where something changed, it is measured again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field

from robbench.checkpoints import Shelf, Trained, recipe_of
from robbench.datasets import Dataset
from robbench.defense import version_of
from robbench.environment import Environment, Sha256, environment
from robbench.errors import InputError
from robbench.papers.cells import Load
from robbench.papers.paper import Strict
from robbench.runner import Shared
from robbench.training import Progress


class Inputs(Strict):
    """datasets: SHA-256 by name. versions: of what each defense is made of, by its canonical spec.
    weights: SHA-256 by the key of the checkpoint. threads, environment: where it was made."""

    datasets: Mapping[str, Sha256] = {}
    versions: Mapping[str, str] = {}
    weights: Mapping[Sha256, Sha256] = {}
    threads: Annotated[int, Field(ge=1)]
    environment: Environment

    def outdated(self, load: Load, shelf: Shelf) -> str | None:
        """What has changed since; None where nothing has. Weights count where the shelf has some
        under their key."""
        try:
            for name, sha256 in self.datasets.items():
                if (there := load(name).hash) != sha256:
                    return f"{name} has other images" if there else f"no record knows {name}"
            for spec, version in self.versions.items():
                if version_of(spec) != version:
                    return f"{spec} has another version"
            for key, sha256 in self.weights.items():
                path = shelf.find(key)
                if path is not None and recipe_of(path)["sha256"] != sha256:
                    return f"the checkpoint {key[:12]} was trained again"
        except InputError as error:
            return str(error)
        return None

    def made_here(self, device: torch.device) -> bool:
        """Whether it was made on this device, by as many threads: what seconds and bytes need."""
        here = inputs_on(device)
        return (self.threads, self.environment.device) == (here.threads, here.environment.device)


def inputs_on(device: torch.device, **noted: Mapping[str, str]) -> Inputs:
    """What was noted, with where this process computes."""
    threads = torch.get_num_threads()
    where = Environment(**environment(device))
    return Inputs(threads=threads, environment=where, **noted)


@dataclass
class Noting(Shared):
    """What cells share, with a note of every dataset and defense that is asked for."""

    datasets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    @classmethod
    def over(cls, shared: Shared) -> Noting:
        """The same folders, device, data and trained defenses."""
        return cls(**vars(shared))

    def note(self, dataset: Dataset, *specs: str) -> None:
        self.datasets[dataset.name] = dataset.hash
        self.versions |= {spec: version_of(spec) for spec in specs}

    def dataset(self, name: str) -> Dataset:
        found = super().dataset(name)
        self.note(found)
        return found

    def deploy(
        self,
        spec: str,
        dataset: Dataset,
        train_seed: int,
        progress: Progress = lambda done, total: None,
    ) -> Trained:
        found = super().deploy(spec, dataset, train_seed, progress)
        self.note(dataset, spec)
        self.weights |= dict(zip(found.keys, found.weights, strict=True))
        return found

    def inputs(self) -> Inputs:
        """All that was noted so far."""
        return inputs_on(
            self.device, datasets=self.datasets, versions=self.versions, weights=self.weights
        )
