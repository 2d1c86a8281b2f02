"""Which cells an audit needs: a probe for every estimator, and around one attack the evidence for
and against it. Nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from robbench.attacks import Configured
from robbench.audit.alone import PROBED
from robbench.audit.case import attack_of, estimator_of, settings_in
from robbench.cell import MODEL, Cell
from robbench.checkpoints import Trained
from robbench.datasets import Dataset
from robbench.deployed import gives_activations
from robbench.grid import block
from robbench.registry import Spec
from robbench.siblings import siblings
from robbench.threat import Norm, Threat, format_eps, parse_eps

FEW = 20  # images of a decision-based attack
Depth = Literal["quick", "thorough", "binarization", "backdoor"]
Models = Mapping[str, Trained]
SOME = 100  # queries of a quick look
NEAREST = ("noise-off", "base", "undetected")
RELATIONS = ("twin", "noise-off", "base", "member", "adversarial", "undetected")


def probes(cells: Iterable[Cell], images: Callable[[str], int]) -> list[Cell]:
    """The probe of every estimator that these cells attack directly, each once.

    images: how many test images the dataset of this name has.
    """
    found: dict[object, Cell] = {}
    for cell in cells:
        attack = attack_of(cell.attack)
        direct = cell.setting.kind in ("whitebox", "adaptive")
        if direct and attack is not None and not attack.entry.diagnostic:
            found.setdefault(estimator_of(cell), probe_of(cell, images(cell.dataset)))
    return list(found.values())


def probe_of(cell: Cell, images: int) -> Cell:
    """The cell that looks at the estimator of another."""
    probe = Configured.of("probe")
    setting = type(cell.setting)(kind="whitebox")
    changes = {
        "n": min(PROBED, images),
        "attack": str(probe.spec),
        "attack_version": probe.version,
        "threat": Threat(norm="none"),
        "setting": setting,
        "seed": 0,
    }
    return cell.model_copy(update=changes)


def plan(
    defense: str,
    dataset: Dataset,
    *,
    attack: str = "pgd",
    norm: Norm = "linf",
    eps: Fraction | None = None,
    n: int = 128,
    depth: Depth = "quick",
    preset: str = "quick",
    train_seed: int = 0,
    models: Models = MappingProxyType({}),
) -> list[Cell]:
    """The cells that say whether this attack on this defense can be believed, the attack's own
    first. quick: besides it a probe, one step, a few queries, and transfer from the same defense
    without noise, detector or what is around its base. thorough: longer, larger, rescaled,
    transferred, queried, random, planted, other seeds. binarization, backdoor: that test alone.
    InputError as from a grid.
    """
    budgets: Sequence[Fraction] = dataset.eps.get(norm, ())
    threat_eps = eps if eps is not None else budgets[len(budgets) // 2 - 1] if budgets else None
    common: dict[str, Any] = {
        "dataset": dataset.name,
        "n": min(n, len(dataset.test.y)),
        "defense": [defense],
        "norm": norm,
        "eps": None if threat_eps is None else format_eps(threat_eps),
        "train_seed": train_seed,
    }
    blocks = [{"attack": attack}, *_around(attack, norm, threat_eps, dataset, depth)]
    if depth in ("quick", "thorough") and not defense.startswith(MODEL):
        blocks += _relatives(defense, attack, threat_eps, dataset, depth)
    cells: dict[str, Cell] = {}
    for changes in (each for each in blocks if _possible(each, dataset, models.get(defense))):
        for cell in _known(block(**{**common, **changes}).cells(dataset, preset, models)):
            cells.setdefault(cell.id, cell)
    for cell in probes(cells.values(), lambda name: len(dataset.test.y)):
        cells.setdefault(cell.id, cell)
    return list(cells.values())


def _known(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Without the white-box cells of what has adaptive ones."""
    listed = list(cells)
    adaptive = {cell.defense for cell in listed if cell.setting.kind == "adaptive"}
    for cell in listed:
        if cell.setting.kind != "whitebox" or cell.defense not in adaptive:
            yield cell


def _around(
    attack: str, norm: Norm, eps: Fraction | None, dataset: Dataset, depth: Depth
) -> list[dict[str, Any]]:
    """Changes of the attack, its threat or its seed, and other attacks on the same estimator."""
    if depth in ("binarization", "backdoor"):
        return [_planted(depth, attack)]
    found: list[dict[str, Any]] = [{"attack": "fgsm"}]
    if depth == "quick":
        found.append({"attack": f"square(queries={SOME})"})
        return [changes for changes in found if _fits(changes, norm)]
    found += [{"attack": spec} for spec in _longer(attack)]
    found += [{"attack": spec} for spec in _rescaled(attack)]
    found += [_scaled(attack, eps, each) for each in dataset.eps.get(norm, ())]
    if "linf" in Configured.of(attack).entry.norms:
        found.append({**_scaled(attack, eps, Fraction(1, 2)), "norm": "linf"})
        found.append({**_scaled(_with(attack, steps=200), eps, Fraction(1)), "norm": "linf"})
    found += [
        {"attack": attack, "eot": 40},
        {"attack": attack, "seed": [1, 2]},
        {"attack": "strongest(budget=smoke)"},
        {"attack": "square(queries=1000)"},
        {"attack": "hopskipjump", "n": min(FEW, len(dataset.test.y))},
        {"attack": "random-search"},
        _planted("binarization", attack),
        _planted("backdoor", attack),
    ]
    return [changes for changes in found if _fits(changes, norm)]


def _planted(test: str, attack: str) -> dict[str, Any]:
    return {"attack": str(Spec(name=test).with_settings({"attack": attack}))}


def _fits(changes: Mapping[str, Any], norm: Norm) -> bool:
    """Whether the attack can do the norm."""
    return changes.get("norm", norm) in Configured.of(changes["attack"]).entry.norms


def _possible(changes: Mapping[str, Any], dataset: Dataset, model: Trained | None) -> bool:
    """Whether the dataset, and a model of the caller, have what the attack needs."""
    spec = Spec.parse(changes["attack"])
    if dict(spec.settings).get("loss") == "dlr" and len(dataset.labels) < 3:
        return False
    bare = model is not None and not all(map(gives_activations, model.deployed.members))
    return spec.name != "binarization" or not bare


def _with(attack: str, **settings: object) -> str:
    """The attack with these settings, of those that it has."""
    known = Configured.of(attack).entry.settings.model_fields
    kept = {key: value for key, value in settings.items() if key in known}
    return str(Spec.parse(attack).with_settings(kept))


def _scaled(attack: str, eps: Fraction | None, other: Fraction) -> dict[str, Any]:
    """The attack at another ε; steps of a fixed length stay the share of it that they are."""
    step = settings_in(attack).get("step")
    if step is not None and eps:
        attack = _with(attack, step=format_eps(parse_eps(step) * other / eps))
    return {"attack": attack, "eps": format_eps(other)}


def _longer(attack: str) -> Iterator[str]:
    """Twice the steps, and five restarts or twice as many."""
    settings = settings_in(attack)
    if isinstance(steps := settings.get("steps"), int):
        yield _with(attack, steps=2 * steps)
    if isinstance(restarts := settings.get("restarts"), int):
        yield _with(attack, restarts=max(5, 2 * restarts))


def _rescaled(attack: str) -> Iterator[str]:
    if "loss" in Configured.of(attack).settings:
        for loss in ("dlr", "ce-t10", "ce-t100"):
            yield _with(attack, loss=loss)


def _relatives(
    defense: str, attack: str, eps: Fraction | None, dataset: Dataset, depth: Depth
) -> Iterator[dict[str, Any]]:
    """Transfer from each, the attack itself on those that lack the mechanism, and the control; for
    a quick look the transfer from what is the same without noise, or around nothing."""
    for relation in RELATIONS if depth == "thorough" else NEAREST:
        for sibling in siblings(defense, dataset.name, relation):
            yield {"attack": "mim", "setting": "transfer", "oracle": [sibling]}
            if depth == "quick":
                continue
            if relation in ("noise-off", "base", "member", "undetected"):
                yield {"attack": attack, "defense": [sibling]}
            if relation == "twin" and "linf" in Configured.of(attack).entry.norms:
                control = _scaled(attack, eps, dataset.control)
                yield {**control, "norm": "linf", "defense": [sibling]}
