"""The one loop that every recipe is trained by."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from robbench.datasets import Split
from robbench.errors import InputError
from robbench.randomness import preserved_random_state, random_state, set_random_state
from robbench.recipes import Batch

if TYPE_CHECKING:
    from robbench.datasets import Dataset
    from robbench.defense import Defense

Progress = Callable[[int, int], None]  # (steps done, steps in all)


class Diverged(RuntimeError):
    """Training produced a loss that is not a number."""


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


Curve = list[dict[str, float]]
SAVED_EVERY = 5.0  # seconds between snapshots: quick recipes are not slowed down by them
LOOKED_AT = 1000  # images that a point of a curve is measured on, unless select=best needs all


def train(
    defense: Defense,
    members: nn.ModuleList,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    snapshot: Path | None = None,
    saved_every: float = SAVED_EVERY,
) -> Curve:
    """Optimise the members in place: together, or one after the other where the recipe says so.

    Every group has its own seed, so that a member does not depend on which others are trained.
    Returns the curve: per group and epoch the learning rate, the mean loss, accuracy on training
    and validation images (clean, in evaluation mode) and seconds.
    snapshot: a file that the state is written to after an epoch, at most every `saved_every`
    seconds, and read from where it exists: a killed training goes on and ends with the same
    weights, on the CPU bit for bit. It is removed at the end. Raises Diverged when a loss is not a
    number; the snapshot, which holds the last good state that was saved, is kept.
    """
    if len(dataset.train.y) < 2:
        raise InputError(
            f"dataset {dataset.name} has no training images; {defense.name} needs some"
        )
    if defense.select == "best" and not len(dataset.validation.y):
        raise InputError(f"select=best needs a validation split; {dataset.name} has none")
    groups = [members] if defense.joint else [nn.ModuleList([member]) for member in members]
    run = _Run(defense, members, dataset, device, snapshot, saved_every)
    run.resume()
    total = len(groups) * defense.epochs * run.steps
    while run.group < len(groups) and defense.epochs:
        run.train(groups[run.group], seed, lambda step: progress(run.before + step, total))
    if snapshot:
        snapshot.unlink(missing_ok=True)
    members.eval()
    return run.curve


class _Run:
    """A training in progress: what a snapshot holds, and the steps between two of them."""

    def __init__(
        self,
        defense: Defense,
        members: nn.ModuleList,
        dataset: Dataset,
        device: torch.device,
        snapshot: Path | None,
        saved_every: float,
    ) -> None:
        self.defense, self.members, self.dataset = defense, members, dataset
        self.device, self.snapshot, self.saved_every = device, snapshot, saved_every
        self.x, self.y = (tensor.to(device) for tensor in dataset.train)
        self.steps = math.ceil(len(self.y) / defense.batch_size)  # of an epoch
        self.labels = len(dataset.labels)
        self.group = 0
        self.curve: Curve = []
        self.saved = time.monotonic()
        self.state: dict[str, Any] | None = None  # of the group that goes on

    @property
    def before(self) -> int:
        """Steps of the groups that are done."""
        return self.group * self.defense.epochs * self.steps

    def resume(self) -> None:
        """Read the snapshot; one that cannot be read is left out, not believed."""
        if self.snapshot is None or not self.snapshot.exists():
            return
        try:
            state = torch.load(self.snapshot, map_location="cpu", weights_only=True)
            shapes = {key: value.shape for key, value in state["members"].items()}
            group, curve = int(state["group"]), list(state["curve"])
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            return
        if shapes == {key: value.shape for key, value in self.members.state_dict().items()}:
            self.members.load_state_dict(state["members"])
            self.group, self.curve, self.state = group, curve, state

    def train(self, group: nn.ModuleList, seed: int, progress: Callable[[int], None]) -> None:
        """All epochs of one group that are left."""
        defense = self.defense
        self.rng = Generator().manual_seed(derive("train", seed, self.group))
        torch.manual_seed(derive("noise", seed, self.group))
        total = defense.epochs * self.steps
        self.optimizer, self.schedule = defense.stepper(list(group.parameters()), total)
        first, self.best = self._restore()
        defense.start_training(group, self.steps)
        for epoch in range(first, defense.epochs):
            self._epoch(group, epoch, progress)
            self._save(epoch)
        if self.best:
            group.load_state_dict(self.best["weights"])
        self.group, self.state = self.group + 1, None

    def _epoch(self, group: nn.ModuleList, epoch: int, progress: Callable[[int], None]) -> None:
        defense, started = self.defense, time.monotonic()
        group.train()
        defense.start_epoch(group, epoch)
        sums, step = torch.zeros((), device=self.device), epoch * self.steps
        for x, y in _batches(self.x, self.y, defense, self.rng):
            with self._autocast():
                batch = defense.batch(group, Batch(x, y, x, self.labels), self.rng)
                loss = defense.loss(group, batch).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            rate = float(self.optimizer.param_groups[0]["lr"])
            self.schedule.step()
            defense.after_step(group, step)
            sums += loss.detach()
            step += 1
            progress(step)
        if not math.isfinite(float(sums)):
            there = self.snapshot is not None and self.snapshot.exists()
            kept = f"; the last state that was saved is kept in {self.snapshot}" if there else ""
            raise Diverged(
                f"training of {defense.name} diverged: the loss of epoch {epoch + 1} is not a"
                f" number; lower lr{kept}"
            )
        point = {"group": self.group, "epoch": epoch, "lr": rate, "loss": float(sums) / self.steps}
        seconds = time.monotonic() - started
        self.curve.append({**point, **self._looked_at(group, epoch), "seconds": round(seconds, 3)})

    def _autocast(self) -> torch.autocast:
        enabled = self.defense.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _looked_at(self, group: nn.ModuleList, epoch: int) -> dict[str, float]:
        """Accuracies after an epoch; leaves weights and random streams as they were."""
        seen = {}
        group.eval()
        with preserved_random_state():
            torch.manual_seed(derive("look", epoch))
            for name in ("train", "validation"):
                part = Split(*(tensor[:LOOKED_AT] for tensor in getattr(self.dataset, name)))
                if len(part.y):
                    seen[f"{name}_accuracy"] = self._accuracy(group, part, attacked=False)
            if self.defense.select == "best":
                value = self._accuracy(group, self.dataset.validation, attacked=True)
                seen["selected_by"] = value
                if not self.best or value > self.best["value"]:
                    weights = {k: v.detach().clone() for k, v in group.state_dict().items()}
                    self.best = {"value": value, "weights": weights}
        return seen

    def _accuracy(self, group: nn.ModuleList, split: Split, attacked: bool) -> float:
        """Share of right answers; `attacked` by what the recipe trains against, if anything."""
        defense, rng, right = self.defense, Generator().manual_seed(0), 0
        for x, y in zip(split.x.split(500), split.y.split(500), strict=True):
            x, y = x.to(self.device), y.to(self.device)
            if attacked and defense.adversarial:
                x = defense.batch(group, Batch(x, y, x, self.labels), rng).x
            with torch.no_grad():
                right += int((defense.scores(group, x).argmax(dim=1) == y).sum())
        return right / len(split.y)

    def _save(self, epoch: int) -> None:
        if self.snapshot is None or time.monotonic() - self.saved < self.saved_every:
            return
        state = {
            "members": self.members.state_dict(),
            "group": self.group,
            "epoch": epoch,
            "curve": self.curve,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.get_state(),
            "noise": _plain(random_state(self.device)),
        }
        temporary = self.snapshot.with_name(f"{self.snapshot.name}.{os.getpid()}.tmp")
        self.snapshot.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(self.snapshot)
        self.saved = time.monotonic()

    def _restore(self) -> tuple[int, dict[str, Any] | None]:
        """(first epoch, best so far): from the snapshot where the group had begun."""
        if self.state is None:
            return 0, None
        self.optimizer.load_state_dict(self.state["optimizer"])
        self.schedule.load_state_dict(self.state["schedule"])
        self.rng.set_state(self.state["rng"])
        set_random_state(self.device, self.state["noise"])
        return self.state["epoch"] + 1, self.state["best"]


def _plain(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random states without NumPy arrays, which a safe reader refuses."""
    python, (kind, keys, *rest), *others = state
    return python, (kind, keys.tolist(), *rest), *others


def _batches(
    x: Tensor, y: Tensor, defense: Defense, rng: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a fresh order."""
    order = torch.randperm(len(y), generator=rng).to(x.device)
    for picked in order.split(defense.batch_size):
        if len(picked) == 1:  # batch normalisation cannot learn from one image
            picked = order[:2]
        yield _augment(x[picked], defense, rng), y[picked]


def _augment(x: Tensor, defense: Defense, rng: Generator) -> Tensor:
    """Random crops after zero padding and horizontal flips, one choice per image."""
    if defense.crop:
        pad, (height, width) = defense.crop, x.shape[2:]
        padded = F.pad(x, (pad,) * 4)
        offsets = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=rng).to(x.device)
        rows = offsets[0][:, None] + torch.arange(height, device=x.device)
        columns = offsets[1][:, None] + torch.arange(width, device=x.device)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        x = x.permute(0, 3, 1, 2).contiguous()
    if defense.flip:
        mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x
