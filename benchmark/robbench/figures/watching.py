"""A training that is looked at after every epoch, and what can be seen of a defense then."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from robbench.access import Access
from robbench.attacks import Configured
from robbench.checkpoints import Shelf, Trained, attacker_losses, key_of
from robbench.datasets import Dataset
from robbench.defense import Defense, resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.judge import SCORING_DRAWS, check, score
from robbench.metrics import Measure, share
from robbench.networks.sampled import laws
from robbench.papers.paper import Strict
from robbench.randomness import preserved_random_state, sandboxed
from robbench.threat import Eps, Norm, Threat
from robbench.training import LOOKED_AT, derive

Look = Callable[[int, nn.ModuleList], None]  # epochs done, members as deployed


class _Watching(Shelf):
    """A shelf that trains the defense of one key in a folder of its own, whatever the others hold,
    and keeps hold of what is being trained."""

    def __init__(self, folders: Iterable[Path], own: Path, key: str) -> None:
        super().__init__([*folders, own])
        self.own, self.key = own, key
        self.members_in_training = nn.ModuleList()
        self.begun: Callable[[], None] = lambda: None

    def find(self, key: str) -> Path | None:
        return Shelf([self.own]).find(key) if key == self.key else super().find(key)

    def _start(
        self,
        defense: Defense,
        members: nn.ModuleList,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
    ) -> None:
        super()._start(defense, members, dataset, train_seed, device)
        if key_of(defense, dataset, train_seed) == self.key:  # bases are trained within
            self.members_in_training = members
            self.begun()


def watch(
    spec: str,
    dataset: Dataset,
    train_seed: int,
    device: torch.device,
    folders: Iterable[Path],
    look: Look,
) -> nn.ModuleList:
    """Train a defense as any run does, to the same weights, and look at it before the first epoch
    and after each. `look` sees copies in evaluation mode, under random streams of its own.

    What is trained is not kept. InputError for members that are trained one after the other: there
    is no ensemble before the last of them.
    """
    (defense,) = resolve(spec)
    if not defense.joint and defense.members > 1:
        raise InputError(f"{spec}: its members are trained one by one; watch one of them")

    def seen(epoch: int) -> None:
        with preserved_random_state(), torch.no_grad():
            copies = defense.build(dataset.shape, len(dataset.labels))
            copies.load_state_dict(shelf.members_in_training.state_dict())
            copies.to(device).eval()
            defense.calibrate(copies, dataset)
            with torch.enable_grad():
                look(epoch, copies)

    def progress(done: int, total: int) -> None:
        if done % (total // defense.epochs) == 0:
            seen(done * defense.epochs // total)

    with tempfile.TemporaryDirectory() as own:
        key = key_of(defense, dataset, train_seed)
        shelf = _Watching(folders, Path(own), key)
        shelf.begun = lambda: seen(0)
        members, _, _ = shelf.members(defense, dataset, train_seed, device, progress)
    return members


def variance(members: nn.ModuleList) -> float:
    """The sum of the variances of all random weights."""
    with torch.no_grad():
        return sum(
            float(law.deviation(mean).double().square().sum()) for mean, law in laws(members)
        )


class Attacked(Strict):
    """An attack on the first n validation images. eot: draws behind a gradient of the attacker who
    knows the defense; none: the white box through one draw."""

    attack: str = "fgsm"
    norm: Norm = "linf"
    eps: Eps
    eot: int | None = None
    n: int = LOOKED_AT


def accuracies(
    defense: Defense,
    members: nn.ModuleList,
    dataset: Dataset,
    attacked: Attacked | None,
    seed: int,
    answers: int = SCORING_DRAWS,
) -> tuple[Measure, Measure | None]:
    """Of members as they would be deployed, on validation images: clean, and on x'. answers: of a
    random defense to each image."""
    deployed = Deployed(members, defense.rule(), dataset.shape, len(dataset.labels), defense.draws)
    losses = attacker_losses((defense,))
    trained = Trained(deployed, (), losses)
    x, y = (part[: attacked.n if attacked else LOOKED_AT] for part in dataset.validation)
    x, y = x.to(deployed.device), y.to(deployed.device)
    draws = answers if deployed.stochastic else 1

    def measured(images: Tensor, role: str) -> Measure:
        right = score(trained, images, y, draws, derive(seed, role)).ok
        return share(right / draws, draws)

    clean = measured(x, "clean")
    if attacked is None:
        return clean, None
    attack = Configured.of(attacked.attack)
    if attack.entry.minimal or attack.entry.suite:
        raise InputError(f"{attacked.attack} has no one ε; watch with an attack such as fgsm")
    threat = Threat(norm=attacked.norm, eps=attacked.eps)
    access = Access(deployed, losses=losses, knows=False)
    if attacked.eot:
        access = Access(deployed, losses=losses, draws=attacked.eot)
    role = derive(seed, "attack")
    with sandboxed(deployed, role):
        rng = torch.Generator().manual_seed(role)
        found = attack(access, x.clone(), y.clone(), threat, rng)
    check(found, x, threat)
    return clean, measured(found, "attacked")
