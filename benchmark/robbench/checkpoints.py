"""Trained weights by key: looked up beside the records, then in the user's cache, else trained.

A checkpoint is KEY.safetensors and KEY.json, the recipe with the SHA-256 of the weights. Nothing
here ever unpickles code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load, save_file
from torch import nn

from robbench.attacks.losses import Scored, Spread, Votes
from robbench.datasets import Dataset
from robbench.defense import Defense, resolve
from robbench.deployed import Deployed
from robbench.detectors import Denial, Detected, Evasion, calibrate
from robbench.errors import InputError, problem_of
from robbench.frozen import Frozen
from robbench.networks import load_torchvision, torchvision_weights
from robbench.randomness import preserved_random_state
from robbench.registry import Spec
from robbench.rules import Loss, MeanProbabilities, Rule, Vote
from robbench.threat import Goal
from robbench.training import Curve, Progress, derive, train


class Trained(NamedTuple):
    """A deployed defense, the keys of the checkpoints it is made of, the losses of the attacker who
    knows it, strongest first (none: cross-entropy), and the SHA-256 of the weights of each."""

    deployed: Deployed
    keys: tuple[str, ...]
    losses: Mapping[str, Loss] = MappingProxyType({})
    weights: tuple[str, ...] = ()

    def losses_for(self, goal: Goal) -> Mapping[str, Loss]:
        """Of the attacker with this goal, strongest first."""
        rule = self.deployed.rule
        if goal == "error" or not rule.abstains:
            return self.losses
        if isinstance(rule, Detected):
            return {"denial": Denial(rule, Scored(rule.rule)), **self.losses}
        return {**self.losses, "denial": Spread()}


def cache_folder() -> Path:
    """Where checkpoints of the user's own runs lie: $ROBBENCH_CACHE or ~/.cache/robbench."""
    root = os.environ.get("ROBBENCH_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "robbench") / "checkpoints"


def key_of(defense: Defense, dataset: Dataset, train_seed: int) -> str:
    """SHA-256 of all that decides the weights."""
    below = [key_of(base, dataset, train_seed) for base in defense.bases()]
    identity = {
        "dataset": dataset.hash,
        "defense": str(defense.training_spec),
        "version": defense.version,
        "base": defense.base if not below else below[0] if len(below) == 1 else below,
        "train_seed": train_seed,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def common_rule(parts: Sequence[Defense]) -> Rule:
    """The rule of joined defenses: the one they share, else the mean softmax."""
    rules = [part.rule() for part in parts]
    first = rules[0]
    alike = all((type(rule), vars(rule)) == (type(first), vars(first)) for rule in rules)
    return first if alike else MeanProbabilities()


def attacker_losses(parts: Sequence[Defense]) -> Mapping[str, Loss]:
    """What the attacker who knows joined defenses maximises: the losses that they share, else what
    fits the rule by which they decide together. Empty: cross-entropy, for parts without a loss."""
    known = [dict(part.losses) for part in parts]
    if all(losses == known[0] for losses in known):
        return known[0]
    rule = common_rule(parts)
    return {"vote": Votes()} if isinstance(rule, Vote) else {"margin": Scored(rule)}


class Shelf:
    """Checkpoints in several folders: read from any, written to the last."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(folders)

    def find(self, key: str) -> Path | None:
        for folder in self.folders:
            if (folder / f"{key}.json").exists():
                return folder / f"{key}.safetensors"
        return None

    def deploy(
        self,
        text: str | Spec,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
        progress: Progress = lambda done, total: None,
    ) -> Trained:
        """The defense ready to be attacked; trains what no folder has."""
        spec, parts = Spec.parse(text), resolve(text)
        members, keys, weights = nn.ModuleList(), [], []
        for part, defense in zip(spec.parts or (spec,), parts, strict=True):
            own, key, sha256 = self.members(defense, dataset, train_seed, device, progress)
            if isinstance(part.member, int):
                own = own[part.member : part.member + 1]
            members.extend(own)
            keys.append(key)
            weights.append(sha256)
        rule = common_rule(parts)
        draws = max(defense.draws for defense in parts)
        deployed = Deployed(members, rule, dataset.shape, len(dataset.labels), draws)
        known = next((part.known_seed for part in parts if part.known_seed is not None), None)
        if known is not None and deployed.stochastic:
            seeds = [derive("known draws", known, index) for index in range(draws)]
            deployed = Frozen(deployed, seeds)
        if deployed.stochastic and not any(defense.stochastic for defense in parts):
            raise InputError(f"{text} is said to be deterministic, but its answers differ")
        losses = attacker_losses(parts)
        if detector := parts[0].detector:  # that of all parts
            seed = derive("detector", train_seed, *keys)
            detected = calibrate(deployed, detector, parts[0].fpr, dataset, seed)
            deployed.rule = detected
            base = next(iter(losses.values()), Votes())
            losses = {"evasion": Evasion(detected, base), **losses}
        return Trained(deployed, tuple(keys), losses, tuple(weights))

    def members(
        self,
        defense: Defense,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
        progress: Progress = lambda done, total: None,
    ) -> tuple[nn.ModuleList, str, str]:
        """Trained members in evaluation mode, their checkpoint's key, and its SHA-256."""
        key = key_of(defense, dataset, train_seed)
        with preserved_random_state():
            members = defense.build(dataset.shape, len(dataset.labels))
            path = self.find(key) or self._train(
                defense, key, dataset, train_seed, device, progress
            )
            sha256 = _load(members, path)
        return members.to(device).eval(), key, sha256

    def _train(
        self,
        configured: Defense,
        key: str,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
        progress: Progress,
    ) -> Path:
        """Train what the key says: fields of inference at their defaults, so that a sibling
        without noise does not leave its own weights under the key that both share."""
        defense = resolve(configured.training_spec)[0]
        members = self.beginning(defense, key, dataset, train_seed, device)
        snapshot = self.folders[-1] / f".{key}.partial"
        curve = train(defense, members, dataset, train_seed, device, progress, snapshot)
        defense.calibrate(members, dataset)
        return self._save(members, key, defense, dataset, train_seed, curve)

    def beginning(
        self, defense: Defense, key: str, dataset: Dataset, train_seed: int, device: torch.device
    ) -> nn.ModuleList:
        """The members of a defense, as its training_spec says it, before the first step."""
        torch.manual_seed(derive("init", train_seed, key))
        members = defense.build(dataset.shape, len(dataset.labels))
        if not defense.joint:  # a member does not depend on how many there are
            single = defense.model_copy(update={"members": 1})
            for index, member in enumerate(members):
                torch.manual_seed(derive("init", train_seed, dataset.hash, defense.name, index))
                (alone,) = single.build(dataset.shape, len(dataset.labels))
                member.load_state_dict(alone.state_dict())
        self._start(defense, members, dataset, train_seed, device)
        members.to(device)
        defense.calibrate(members, dataset)  # what is looked at while training needs it too
        return members

    def _start(
        self,
        defense: Defense,
        members: nn.ModuleList,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
    ) -> None:
        """Hand the base's members, or downloaded weights, to what is built on them."""
        if defense.base is None:
            return
        if defense.base.startswith("torchvision:"):
            architecture = Spec.parse(defense.network).name
            state = torchvision_weights(architecture, defense.base.partition(":")[2])
            for member in members:
                load_torchvision(member, state)  # type: ignore[arg-type]
            return
        sources = nn.ModuleList()
        for base in defense.bases():
            sources.extend(self.members(base, dataset, train_seed, device)[0])
        try:
            defense.start(members, sources)
        except RuntimeError:
            raise InputError(
                f"{defense.name} cannot start from {defense.base}: the networks differ, or what the"
                " defenses put into them; give both the same network, or leave the base out"
            ) from None

    def _save(
        self,
        members: nn.ModuleList,
        key: str,
        defense: Defense,
        dataset: Dataset,
        seed: int,
        curve: Curve,
    ) -> Path:
        """Weights first, recipe last, each renamed into place: a killed run leaves nothing half.

        What another process has finished meanwhile stays: its weights may be in use.
        """
        if path := self.find(key):
            return path
        folder = self.folders[-1]
        path, temporary = folder / f"{key}.safetensors", folder / f".{key}.{os.getpid()}.tmp"
        state = {name: tensor.cpu().contiguous() for name, tensor in members.state_dict().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, temporary)
            recipe: dict[str, Any] = {
                "key": key,
                "defense": str(defense.spec),
                "version": defense.version,
                "fields": defense.model_dump(mode="json"),
                "dataset": dataset.name,
                "dataset_hash": dataset.hash,
                "train_seed": seed,
                "sha256": sha256_of(temporary),
                "torch": torch.__version__,
                "curve": curve,
            }
            temporary.replace(path)
            temporary.write_text(json.dumps(recipe, indent=1, sort_keys=True) + "\n")
            temporary.replace(folder / f"{key}.json")
            return path
        except (OSError, safetensors.SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(
                f"cannot write the checkpoint to {folder}: {error};"
                " free space or set ROBBENCH_CACHE to another folder"
            ) from None


def _load(members: nn.ModuleList, path: Path) -> str:
    """Load weights after checking their SHA-256, and return it; damage is named with the remedy."""
    recipe_path = path.with_suffix(".json")
    remedy = f"delete {path} and {recipe_path.name} beside it, and it is trained again"
    try:
        recipe = json.loads(recipe_path.read_bytes())
        content = path.read_bytes()  # once: another process may replace the file meanwhile
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != recipe["sha256"]:
            raise InputError(f"checkpoint {path} is damaged: its SHA-256 differs; {remedy}")
        members.load_state_dict(load(content))
        return sha256
    except InputError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path} cannot be read ({problem}); {remedy}") from None


def recipe_of(weights: Path) -> Mapping[str, Any]:
    """The recipe beside a checkpoint: its `sha256`, and the points of its `curve` with their
    `seconds`, none in the oldest. InputError for what is none."""
    path = weights.with_suffix(".json")
    try:
        return _Recipe.model_validate_json(path.read_bytes()).model_dump()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: the checkpoint is broken ({problem_of(error)}); delete it and its weights,"
            " and it is trained again"
        ) from None


class _Point(BaseModel):
    model_config = ConfigDict(extra="allow")
    epoch: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="allow")
    key: str
    sha256: str
    curve: list[_Point] = []


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
