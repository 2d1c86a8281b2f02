"""Numbers that papers derive from attacks on several defenses, or from more than who is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import chi2, t

from robbench import statistics
from robbench.defense import resolve
from robbench.errors import InputError, unknown
from robbench.metrics import Measure, counts, metrics, share
from robbench.metrics.detection import auc
from robbench.metrics.diversity import entropy_measure
from robbench.metrics.uncertainty import variability
from robbench.papers.paper import Binding
from robbench.records import Record
from robbench.registry import Spec
from robbench.statistics import Interval

Bindings = Callable[[Binding, int], list[Binding]]
Value = Callable[[Sequence[Record], Mapping[str, Any]], Measure]
UNKNOWN = Interval(float("nan"), float("nan"))


class Derived(NamedTuple):
    """bindings: of the cells behind a number, given how many members its defense has at the scale;
    value: of their records, in that order."""

    bindings: Bindings
    value: Value


def outcome(record: Record, measure: str) -> np.ndarray:
    """(N,) per-image shares in [0, 1] whose mean the measure is; InputError for any other."""
    found, r = counts(record), record.draws
    parts = {
        "accuracy": found.right,
        "incorrect": found.wrong,
        "abstained": r - found.right - found.wrong,
        "correct_or_abstained": r - found.wrong,
        "clean": found.clean_right,
        "clean_incorrect": found.clean_wrong,
        "clean_abstained": r - found.clean_right - found.clean_wrong,
        "clean_correct_or_abstained": r - found.clean_wrong,
    }
    if measure not in parts:
        raise unknown("measure", measure, parts)
    return parts[measure] / r


def measured(record: Record, measure: str) -> Measure:
    """A share of one record with its interval; conditional and robust are those of `metrics`."""
    if measure in ("conditional", "robust", "robust_with_detection"):
        return getattr(metrics(record), measure)
    return share(outcome(record, measure), record.draws)


def _itself(binding: Binding, size: int) -> list[Binding]:
    return [binding.model_copy(update={"kind": "cell"})]


def _members(binding: Binding, size: int) -> list[Binding]:
    """Every member alone: who of them is right."""
    return [
        binding.model_copy(update={"kind": "cell", "defense": f"{binding.defense}[{index}]"})
        for index in range(size)
    ]


def _against(binding: Binding, size: int) -> list[Binding]:
    """The cell, and the one that differs from it by arguments.from."""
    other = {"kind": "cell", **binding.arguments["from"]}
    return [binding.model_copy(update={"kind": "cell"}), binding.model_copy(update=other)]


def _runs(binding: Binding, size: int) -> list[Binding]:
    """Several runs, arguments.runs of them: with arguments.vary train_seed the defense is trained
    anew in each, with seed (the default) only attacked anew."""
    vary = binding.arguments.get("vary", "seed")
    if vary not in ("seed", "train_seed"):
        raise unknown("what varies between runs", vary, ("seed", "train_seed"))
    return [
        binding.model_copy(update={"kind": "cell", vary: index})
        for index in range(int(binding.arguments.get("runs", 5)))
    ]


def _between_members(binding: Binding, size: int) -> list[Binding]:
    """Every member, attacked through each of the others."""
    whole = binding.defense
    return [
        binding.model_copy(
            update={
                "kind": "cell",
                "defense": f"{whole}[{target}]",
                "setting": "transfer",
                "oracle": f"{whole}[{oracle}]",
            }
        )
        for target, oracle in itertools.permutations(range(size), 2)
    ]


def _difference(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """The mean of first - second over the same images, in [-1, 1]."""
    measure, other = arguments["measure"], arguments["from"].get("measure", arguments["measure"])
    n = min(record.cell.n for record in records)
    found = statistics.paired(outcome(records[0], measure)[:n], outcome(records[1], other)[:n])
    return Measure(found.difference, found.interval)


def _entropy(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """Entropy measure E of paper 004, eq. 5: the mean over images of min(l, K - l) / (K - ⌈K/2⌉),
    l of K members right, in [0, 1]. arguments.clean: on the images themselves."""
    name = "clean" if arguments.get("clean", True) else "accuracy"
    right = torch.from_numpy(np.stack([outcome(record, name) for record in records]) > 0.5)
    each = [entropy_measure(right[:, image : image + 1]) for image in range(right.shape[1])]
    return share(np.array(each), 2)  # two draws or more: a share between 0 and 1 for each image


def _spread(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """The standard deviation of the measure over runs (ddof = 1), with the interval of that of a
    normal law (χ² with one degree of freedom less than runs)."""
    means = [float(outcome(record, arguments["measure"]).mean()) for record in records]
    spread, freedom = float(np.std(means, ddof=1)), len(records) - 1
    low, high = spread * np.sqrt(freedom / chi2.ppf((0.975, 0.025), freedom))
    return Measure(spread, Interval(float(low), float(high)))


def _mean_of_runs(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """The mean accuracy over runs, with the interval over images and runs."""
    found = variability(records, lambda record: outcome(record, arguments["measure"]))
    return Measure(found.mean, found.interval)


def _mean(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """The mean accuracy over defenses, with the interval of the per-image means."""
    right = np.mean([outcome(record, arguments["measure"]) for record in records], axis=0)
    return share(right, sum(record.draws for record in records))


def _distance(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """The mean length of x' - x in the cell's norm over all images, failures and images that are
    wrong already among them, as the code of paper 003 averages; t interval, from 0 on."""
    (record,) = records
    assert record.distance is not None
    lengths = record.distance.astype(np.float64)
    error = float(lengths.std(ddof=1) / np.sqrt(len(lengths))) if len(lengths) > 1 else 0.0
    half = float(t.ppf(0.975, max(1, len(lengths) - 1))) * error
    mean = float(lengths.mean())
    return Measure(mean, Interval(max(0.0, mean - half), mean + half))


def _auc(records: Sequence[Record], arguments: Mapping[str, Any]) -> Measure:
    """AUC in [0, 1] of the detector's score: images that are right when clean and wrong on x' are
    the adversarial class, the same images without attack the normal one (paper 003, part III).

    nan without any such image.
    """
    (record,) = records
    if record.score is None or record.clean_score is None:
        raise InputError(f"{record.cell} kept no scores; run it again")
    best, clean = record.best, record.clean_best
    assert best is not None and clean is not None
    broken = (clean == record.draws) & (best == 0)
    if not broken.any():
        return Measure(float("nan"), UNKNOWN)
    normal, adversarial = record.clean_score[broken], record.score[broken]
    above = np.array([np.mean(normal > each) + np.mean(normal == each) / 2 for each in adversarial])
    below = np.array([np.mean(each > adversarial) + np.mean(each == adversarial) / 2
                      for each in normal])  # fmt: skip
    return Measure(auc(normal, adversarial), statistics.placement(above, below))


DERIVED: Mapping[str, Derived] = {
    "difference": Derived(_against, _difference),
    "entropy": Derived(_members, _entropy),
    "spread": Derived(_runs, _spread),
    "mean-of-runs": Derived(_runs, _mean_of_runs),
    "member-transfer": Derived(_between_members, _mean),
    "mean-distance": Derived(_itself, _distance),
    "auc": Derived(_itself, _auc),
}


def bindings_of(binding: Binding, size: int) -> list[Binding]:
    """The bindings of the cells behind a number; none for what is no measurement of cells."""
    if binding.kind == "cell":
        return [binding]
    if binding.kind != "derived":
        return []
    return _look_up(binding).bindings(binding, size)


def value_of(binding: Binding, records: Sequence[Record]) -> Measure:
    """The number that the records of a binding's cells give."""
    if binding.kind == "cell":
        return measured(records[0], binding.measure)
    return _look_up(binding).value(records, {"measure": binding.measure, **binding.arguments})


def _look_up(binding: Binding) -> Derived:
    name = str(binding.function)
    if name not in DERIVED:
        raise unknown("derived number", name, DERIVED)
    return DERIVED[name]


def size_of(defense: str) -> int:
    """How many members the defense of a canonical spec has."""
    spec = Spec.parse(defense)
    whole = spec.model_copy(update={"member": None})
    return sum(part.size for part in resolve(whole))
