"""The one loop that every recipe is trained by, and adversarial training as a part of it."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from torch import Generator, Tensor, nn

from robbench.attacks import check_settings
from robbench.datasets import Split
from robbench.errors import InputError, unknown
from robbench.randomness import preserved_random_state, random_state, set_random_state
from robbench.registry import Spec
from robbench.threat import Eps, ascend, check_budget, project, random_start

if TYPE_CHECKING:
    from robbench.datasets import Dataset
    from robbench.defense import Defense

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Scores = Callable[[Tensor], Tensor]  # images -> (N, L) logits
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # images, y, target -> (N,)


class Batch(NamedTuple):
    """What a recipe's loss sees: x is trained on, clean is where it came from."""

    x: Tensor  # (N, C, H, W)
    y: Tensor  # (N,) labels, or (N, L) shares of labels that sum to one
    clean: Tensor  # (N, C, H, W)
    labels: int  # L


class Adversarial(BaseModel):
    """Adversarial training, written as a spec: fgsm, pgd(eps=0.2, steps=5) or trades(beta=6).

    pgd: Madry et al. 2018, arXiv:1706.06083. fgsm: with random start and a step of 1.25 ε, Wong
    et al. 2020, arXiv:2001.03994. trades: Zhang et al. 2019, arXiv:1901.08573, eq. 5. Networks
    are attacked in training mode, with the noise and the batch statistics that the step minimises
    over; the authors of TRADES switch to evaluation mode here, which has neither.

    low: ε is drawn anew for every batch, uniformly from [low, eps] (ADP: 0.01 to 0.05). reach: how
    far all steps go together, in ε, unless `step` says it (ADP, PDD: 1). targeted: towards a
    random wrong label (AT10-tar of paper 003). clean: weight of the loss on the clean images
    beside that on x' (0: x' only; ADP, PDD, paper 002: 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["fgsm", "pgd", "trades"] = "pgd"
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Eps = Fraction(8, 255)
    low: Eps | None = None
    steps: Annotated[int, Field(ge=1)] = 10
    step: Eps | None = None
    reach: Annotated[float, Field(gt=0)] = 2.5
    random: bool = True
    targeted: bool = False
    clean: Annotated[float, Field(ge=0)] = 0.0
    beta: Annotated[float, Field(ge=0)] = 6.0

    @field_validator("eps")
    @classmethod
    def _plausible(cls, eps: Fraction, given: ValidationInfo) -> Fraction:
        if "norm" in given.data:
            check_budget(given.data["norm"], eps)
        return eps

    @field_validator("low")
    @classmethod
    def _below(cls, low: Fraction | None, given: ValidationInfo) -> Fraction | None:
        if low is not None and low > given.data.get("eps", low):
            raise ValueError(f"ε is drawn from low to eps, and {low} is above it")
        return low

    @field_validator("steps", "reach", "random", "targeted", "clean", "beta")
    @classmethod
    def _used(cls, value: Any, given: ValidationInfo) -> Any:
        """A setting that changes nothing would be believed to do something."""
        users = {"steps": ("pgd", "trades"), "reach": ("pgd", "trades"), "beta": ("trades",)}
        kinds = users.get(str(given.field_name), ("pgd", "fgsm"))
        if given.data.get("kind") not in kinds:
            raise ValueError(f"only {' and '.join(kinds)} use it; leave it out")
        return value

    def step_size(self, eps: float) -> float:
        """Without `step`: 1.25 ε for fgsm, else what makes all steps reach so many ε."""
        if self.step is not None:
            return float(self.step)
        return eps * (1.25 if self.kind == "fgsm" else self.reach / self.steps)

    def perturb(self, ascended: Objective, scores: Scores, batch: Batch, rng: Generator) -> Tensor:
        """x' in the ball around the clean images that maximises `ascended`; trades: the divergence
        of `scores`."""
        eps, clean, y, target = float(self.eps), batch.clean, batch.y, None
        x = clean
        if self.low is not None:
            share = float(torch.rand((), generator=rng))
            eps = float(self.low) + share * (eps - float(self.low))
        if self.kind == "trades":
            with torch.no_grad():
                reference = F.log_softmax(scores(x), dim=1)
            x = (x + 0.001 * torch.randn(x.shape, generator=rng).to(x)).clamp(0, 1)
        elif self.random:
            x = random_start(x, self.norm, eps, rng)
        if self.targeted:
            shift = torch.randint(1, batch.labels, (len(y),), generator=rng).to(y.device)
            target = (y + shift) % batch.labels
        for _ in range(1 if self.kind == "fgsm" else self.steps):
            x = x.detach().requires_grad_()
            if self.kind == "trades":
                log = F.log_softmax(scores(x), 1)
                loss = F.kl_div(log, reference, reduction="sum", log_target=True)
            else:
                loss = ascended(x, y, target).sum()
            gradient = torch.autograd.grad(loss, x)[0]
            moved = x.detach() + self.step_size(eps) * ascend(gradient, x, self.norm)
            x = project(moved, clean, self.norm, eps)
        return x.detach()

    def loss(
        self, minimised: Callable[[Tensor, Tensor], Tensor], scores: Scores, batch: Batch
    ) -> Tensor:
        """(N,) `minimised` (images, y -> (N,)) on x', and on the clean images with their weight;
        trades: on the clean images, plus β times the divergence of the scores."""
        if self.kind == "trades":
            plain = minimised(batch.clean, batch.y)
            clean = scores(batch.clean)
            divergence = F.kl_div(
                F.log_softmax(scores(batch.x), 1),
                F.log_softmax(clean, 1),
                reduction="none",
                log_target=True,
            ).sum(dim=1)
            return plain + self.beta * divergence
        loss = minimised(batch.x, batch.y)
        return loss + self.clean * minimised(batch.clean, batch.y) if self.clean else loss


def _adversarial(value: object) -> object:
    if not isinstance(value, str):
        return value
    spec = Spec.parse(value)
    if spec.name == "none":
        return None
    if spec.name not in ("fgsm", "pgd", "trades"):
        raise unknown("adversarial training", spec.name, ["fgsm", "pgd", "trades", "none"])
    given = {"kind": spec.name, **dict(spec.settings)}
    return check_settings("adversarial training", spec.name, Adversarial, given)


def _written(value: Adversarial | None) -> str | None:
    if value is None:
        return None
    settings = value.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    return str(Spec(name=value.kind, settings=tuple(sorted(settings.items()))))


AdversarialSpec = Annotated[
    Adversarial | None, BeforeValidator(_adversarial), PlainSerializer(_written)
]


class Optimisation(BaseModel):
    """The fields of a recipe that say how it is optimised; part of every defense's spec.

    epochs: 0 keeps the weights of the base. decay_at: shares of all epochs after which
    schedule=steps divides lr by 10. lr_end: where schedule=cosine ends. crop: pixels of padding
    for random crops. select: keep the `last` weights, or those of the epoch that is `best` on the
    validation split (on x' where training is adversarial). amp: bfloat16 where CUDA computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    epochs: Annotated[int, Field(ge=0)] = 30
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 0.01
    schedule: Literal["one-cycle", "steps", "cosine", "constant"] = "one-cycle"
    decay_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.4, 0.6, 0.8)
    lr_end: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    select: Literal["last", "best"] = "last"
    amp: bool = False

    def stepper(
        self, parameters: list[nn.Parameter], total: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser of these parameters and its schedule over `total` steps."""
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, lr=self.lr, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=0.9,
                nesterov=True,
                weight_decay=self.weight_decay,
            )
        if self.schedule == "one-cycle":
            return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total)
        if self.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, self.lr_end)
            return optimizer, cosine
        milestones = [round(total * part) for part in self.decay_at]
        if self.schedule == "constant":
            milestones = []
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


# Paper 000, section 3.1: 200 epochs, lr / 10 at epochs 80, 120 and 160; batch size, weight decay
# and Nesterov momentum, on which the text is silent, are those of its code.
CIFAR_RECIPE: Mapping[str, object] = {
    "network": "resnet20",
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "schedule": "steps",
    "weight_decay": 5e-4,
    "crop": 4,
    "flip": True,
}


# What the code behind part I of paper 003 does: SGD, lr / 10 after epochs 100 and 150 of 200,
# shifts by a tenth of the image. Its L2 penalty of 1e-4 has twice the gradient of the same weight
# decay, and spares what is no convolution, which ours does not; its momentum is not Nesterov's.
CENTRES_RECIPE: Mapping[str, object] = {
    "network": "resnet32",
    "epochs": 200,
    "batch_size": 50,
    "optimizer": "sgd",
    "lr": 0.01,
    "schedule": "steps",
    "decay_at": (0.5, 0.75),
    "weight_decay": 2e-4,
    "crop": 3,
    "flip": True,
}

# What the code of ADP, part II of paper 003, does, on all weights instead of kernels alone.
ADP_RECIPE: Mapping[str, object] = {
    "network": "resnet20",
    "epochs": 200,
    "lr": 1e-3,
    "schedule": "steps",
    "decay_at": (0.5, 0.75),
    "weight_decay": 2e-4,
}
ADP_MNIST_RECIPE: Mapping[str, object] = {**ADP_RECIPE, "epochs": 40, "decay_at": (0.375, 0.75)}


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
