"""robbench.evaluate: the main job from Python, for defenses by name and for the caller's models."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from robbench import audit as audits
from robbench import registry, tables
from robbench.audit import Audited
from robbench.audit.planning import plan, probes
from robbench.cell import MODEL, Cell
from robbench.checkpoints import Trained
from robbench.datasets import Dataset, from_tensors
from robbench.deployed import Deployed
from robbench.environment import choose_device
from robbench.errors import InputError, unknown
from robbench.executors import measure
from robbench.grid import block, nothing
from robbench.records import Record, Store
from robbench.rules import Loss, MeanProbabilities, Rule
from robbench.runner import Shared

if TYPE_CHECKING:
    import pandas as pd

Evidence = Literal["probe", "quick", "thorough"]
Item = str | nn.Module | Trained  # a spec, a model, or what deploy() made of models
Data = str | Dataset | tuple[Any, Any]  # a name, folder:PATH, a Dataset, or (x, y)


@dataclass(frozen=True)
class Evaluation:
    """What was measured: records, and the tables that follow from them.

    evidence: records of what was run beside it for the audit.
    """

    records: Sequence[Record]
    evidence: Sequence[Record] = ()

    def frame(self) -> pd.DataFrame:
        """One row per cell: shares in [0, 1] with the ends of their 95 % intervals."""
        import pandas as pd

        return pd.DataFrame([tables.flat(row) for row in self._rows()])

    def __str__(self) -> str:
        """One table per attack, norm and n."""
        return tables.text(self._rows())

    def flags(self) -> dict[str, Audited]:
        """What the checks say of each record, by its id: flags, and which checks could be made."""
        wanted = [record.id for record in self.records]
        return audits.audit([*self.records, *self.evidence], wanted)

    def _rows(self) -> list[tables.Row]:
        return tables.rows(self.records, self.flags())


def deploy(
    model: nn.Module | Sequence[nn.Module],
    dataset: Data,
    *,
    rule: Rule | None = None,
    draws: int = 1,
    loss: Loss | Mapping[str, Loss] | None = None,
    device: str = "auto",
) -> Trained:
    """A caller's model, (N, C, H, W) images in [0, 1] -> (N, L) logits, as a frozen copy.

    Several models are members of one ensemble; rule says how draws and members become a decision
    (default: mean softmax), draws how many passes one decision takes, loss what the attacker who
    knows the defense maximises, or several by their names, strongest first. InputError for a model
    that cannot be attacked as it is: in training mode, with probabilities for logits, or with
    fewer outputs than there are labels.
    """
    data = _dataset(dataset, None)
    models = [model] if isinstance(model, nn.Module) else model
    if not isinstance(models, Sequence) or not models:
        raise InputError(f"{model!r} is neither a torch.nn.Module nor a list of them")
    for member in models:
        if not isinstance(member, nn.Module):
            raise InputError(f"{member!r} is no torch.nn.Module; wrap it in one")
        if member.training:
            raise InputError(
                f"{type(member).__name__} is in training mode; call model.eval() first"
                " (sub-modules that are random when deployed may stay in train())"
            )
    frozen = copy.deepcopy(nn.ModuleList(models)).to(choose_device(device))
    labels = max(_labels(member, data) for member in frozen)
    return Trained(
        Deployed(frozen, rule or MeanProbabilities(), data.shape, labels, draws),
        (),
        {"own": loss} if callable(loss) else loss or {},
    )


@torch.no_grad()
def _labels(member: nn.Module, dataset: Dataset) -> int:
    """How many labels a member scores; what it answers to two test images is checked."""
    name = type(member).__name__
    parameter = next(member.parameters(), torch.empty(0))
    x = dataset.test.x[:2].to(parameter.device)
    try:
        logits = member(x)
    except Exception as error:  # whatever a model of somebody else raises
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} cannot take images of shape {tuple(x.shape)}: {problem}"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{name} must return logits of shape (N, labels), not {shape}")
    if logits.shape[1] < len(dataset.labels):
        raise InputError(
            f"{name} scores {logits.shape[1]} labels, but {dataset.name} has {len(dataset.labels)}"
        )
    ones = torch.ones(len(x), device=logits.device)
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(dim=1).float(), ones, atol=1e-3):
        raise InputError(
            f"{name} returns probabilities, whose gradients mislead attacks; return the logits"
        )
    return int(logits.shape[1])


def evaluate(
    defense: Item | Sequence[Item] | Mapping[str, nn.Module | Trained],
    dataset: Data = "digits",
    attack: str | Sequence[str] = "pgd",
    *,
    norm: str | Sequence[str] | None = None,
    eps: str | float | Sequence[str | float] | None = None,
    setting: str | Sequence[str] | None = None,
    oracle: Item | Sequence[Item] | None = None,
    eot: int | str | None = None,
    goal: str | Sequence[str] = "error",
    max_queries: int | None = None,
    target: str | int = "none",
    n: int | None = None,
    seed: int = 0,
    train_seed: int = 0,
    preset: str = "quick",
    device: str = "auto",
    workers: int = 1,
    timeout: float | None = None,
    audit: Evidence = "probe",
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Attack defenses and return what they are worth; the arguments are those of `robbench run`.

    defense: specs, own models (see `deploy`), a list of both, or own models by the names that
    tables show, {"mine": model}. dataset: a name, `folder:PATH`,
    a Dataset, or tensors (x, y) with x (N, C, H, W) in [0, 1]. eps in units of [0, 1], as '8/255'
    or 0.1. oracle: what transfer attacks are made on: specs, own models, or words such as "twin"
    for what they are to the target. eot: a number or "auto". goal: "error" or "denial". n: how
    many test images (default 500, or all). out: a folder to keep records in and to
    read finished ones from; by default nothing is written. workers: processes, for specs only.
    timeout: seconds, for each training and each shard of images (none by default); own models are
    stopped when they come back to Python, specs run in processes that are ended. audit: what is
    run beside it so that the numbers can be judged (Evaluation.flags): a probe of every estimator;
    quick: one step too; thorough: longer, larger, rescaled, queried, random and planted, and for
    specs transferred ones.

    Bad input that is found before anything runs is an InputError. A cell that fails, or turns out
    to be bad input while others run, is a record with status 'failed' and a reason among the
    other records; an InputError is raised only where bad input left no record but such ones.
    """
    folder = None if data_dir is None else Path(data_dir)
    data = _dataset(dataset, folder)
    given = {} if isinstance(dataset, str) else {data.name: data}
    models: dict[str, Trained] = {}
    if not isinstance(defense, (nn.Module, Sequence, Mapping)):
        raise InputError(f"{defense!r} is no defense; give a spec, a torch.nn.Module or a list")
    wanted: list[tuple[Item, str | None]]
    if isinstance(defense, Mapping):
        wanted = [(model, _label(name)) for name, model in defense.items()]
    elif isinstance(defense, (str, nn.Module, Trained)):
        wanted = [(defense, None)]
    else:
        wanted = [(item, None) for item in defense]
    if oracle is None:
        oracles: list[Item] = []
    elif isinstance(oracle, (str, nn.Module, Trained)):
        oracles = [oracle]
    else:
        oracles = list(oracle)
    fields: Mapping[str, object] = {
        "dataset": data.name,
        "n": n,
        "defense": [_name(item, data, models, device, label) for item, label in wanted],
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "setting": setting,
        "oracle": [_name(item, data, models, device) for item in oracles],
        "eot": eot,
        "goal": goal,
        "max_queries": max_queries,
        "target": str(target),
        "seed": seed,
        "train_seed": train_seed,
    }
    asked = block(**fields)
    cells = list(dict.fromkeys(asked.cells(data, preset, models)))
    if not cells:
        raise nothing([asked])
    beside = list(dict.fromkeys(_evidence(cells, audit, data, preset, models)))
    beside = [cell for cell in beside if cell not in cells]
    store = None if out is None else Store(Path(out))
    if store:
        store.check_writable()
    shared = Shared(
        Path(out) if out else Path("leaderboards"), folder, choose_device(device), given, models
    )
    found = _measured(cells, store, shared, workers, timeout, strict=True)
    return Evaluation(found, _measured(beside, store, shared, workers, timeout, strict=False))


def _evidence(
    cells: Sequence[Cell],
    depth: Evidence,
    dataset: Dataset,
    preset: str,
    models: dict[str, Trained],
) -> Iterator[Cell]:
    """The cells that an audit of these needs; of several ε the smallest one's."""
    if depth not in get_args(Evidence):
        raise unknown("audit", str(depth), get_args(Evidence))
    yield from probes(cells, lambda name: len(dataset.test.y))
    seen = set()
    ascending = sorted(cells, key=lambda cell: cell.threat.eps or 0)
    for cell in ascending if depth != "probe" else ():
        subject = cell.defense, cell.attack, cell.threat.norm, cell.train_seed
        if cell.setting.kind in ("whitebox", "adaptive") and subject not in seen:
            seen.add(subject)
            yield from plan(
                cell.defense,
                dataset,
                attack=cell.attack,
                norm=cell.threat.norm,
                eps=cell.threat.eps,
                n=cell.n,
                depth="thorough" if depth == "thorough" else "quick",
                preset=preset,
                train_seed=cell.train_seed,
                models=models,
            )


def _dataset(dataset: Data, folder: Path | None) -> Dataset:
    if isinstance(dataset, str):
        return registry.dataset(dataset, folder)
    if isinstance(dataset, Dataset):
        return dataset
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        raise InputError(
            f"dataset is {type(dataset).__name__}; give a name, 'folder:PATH', a Dataset or (x, y)"
        )
    return from_tensors(*dataset)


def _label(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise InputError(f"{name!r} cannot name a model; write letters, digits, '_', '-' and '.'")
    return name


def _name(
    item: Item,
    data: Dataset,
    models: dict[str, Trained],
    device: str,
    label: str | None = None,
) -> str:
    """The spec, or a name for a model of the caller (its label, else its class) that changes with
    all that decides its answers and can be read off: weights, layers, modes, rule, draws, loss."""
    if isinstance(item, str):
        return item
    if isinstance(item, Trained):
        trained = _placed(item, choose_device(device))
    else:
        trained = deploy(item, data, device=device)
    members = trained.deployed.members
    rule, losses = trained.deployed.rule, trained.losses
    modes = [module.training for module in members.modules()]
    parts = (
        _called(rule),
        vars(rule),
        trained.deployed.draws,
        [(name, _called(loss), _state(loss)) for name, loss in losses.items()],
        members,
        modes,
        [(_called(module), _state(module)) for module in members.modules()],
    )
    digest = hashlib.sha256(" ".join(map(str, parts)).encode())
    for key, tensor in members.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    kinds = "+".join(dict.fromkeys(type(member).__name__ for member in members))
    name = f"{MODEL}{label or kinds}:{digest.hexdigest()[:12]}"
    models[name] = trained
    return name


def _placed(trained: Trained, device: torch.device) -> Trained:
    """The defense on the device where it is attacked: a copy, where that is another one."""
    if trained.deployed.device.type == device.type:
        return trained
    return trained._replace(deployed=copy.deepcopy(trained.deployed).to(device))


def _state(thing: object) -> list[object]:
    """What a layer or a loss holds beside its weights: plain attributes; a function's code and
    what it encloses."""
    code = getattr(thing, "__code__", None)
    if code is not None:
        enclosed = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        return [code.co_code.hex(), code.co_consts, enclosed, getattr(thing, "__defaults__", None)]
    plain = (bool, int, float, str, tuple)
    held = sorted(vars(thing).items()) if hasattr(thing, "__dict__") else []
    return [(key, value) for key, value in held if key[0] != "_" and isinstance(value, plain)]


def _called(thing: object) -> str:
    """The full name of a function, or of an object's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _measured(
    cells: Iterable[Cell],
    store: Store | None,
    shared: Shared,
    workers: int,
    timeout: float | None,
    strict: bool,
) -> list[Record]:
    known = {cell: store.get(cell) if store else None for cell in cells}
    missing = [cell for cell, record in known.items() if record is None]
    strict = strict and len(missing) == len(known)
    for record in measure(missing, store, shared, workers, timeout=timeout, strict=strict):
        known[record.cell] = record
    return [record for record in known.values() if record is not None]
