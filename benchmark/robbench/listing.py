"""What specs can name, as tables for `robbench list`."""

from __future__ import annotations

import inspect

from tabulate import tabulate

from robbench import datasets as data
from robbench import networks as nets
from robbench import registry
from robbench.attacks import find
from robbench.threat import format_eps

WRAPPED = 60


def defenses() -> str:
    """Name, preset names, settings and source of every defense."""
    lines = []
    for name in registry.defenses:
        cls = registry.defenses.get(name)
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        presets = ", ".join(getattr(cls, "presets", {}))
        lines.append([name, presets, summary, getattr(cls, "source", "")])
    return _table(lines, ["defense", "presets", "what it is", "source"], [None, 12, 30, 24])


def attacks() -> str:
    """Name, norms, needs and known faults of native attacks and of every class of the libraries."""
    from robbench.attacks import art, torchattacks

    names = [*registry.attacks]
    names += [f"torchattacks:{name}" for name in torchattacks.names()]
    names += [f"art:{name}" for name in art.names()]
    lines = []
    for name in names:
        entry = find(name)
        kind = "minimum-norm" if entry.minimal else "budget"
        fault = f"REFUSED: {entry.refusal}" if entry.refusal else entry.faults
        lines.append([name, ", ".join(sorted(entry.norms)), entry.needs, kind, fault])
    return _table(
        lines, ["attack", "norms", "needs", "kind", "known faults"], [None, 12, None, None, 40]
    )


def datasets() -> str:
    """Name and default ε lists; images of folder:PATH take those of CIFAR."""
    lines = [[name, "built in"] for name in sorted(data.DATASETS)]
    lines += [[name, "plugin"] for name in registry.datasets]
    lines.append(["folder:PATH", "an image folder or its tar.gz: train/CLASS/*, test/CLASS/*"])
    digits = data.load("digits")
    eps = "; ".join(
        f"{norm} {', '.join(format_eps(value) for value in values)}"
        for norm, values in digits.eps.items()
    )
    return _table(lines, ["dataset", "where"], [None, WRAPPED]) + f"\n\ndigits ε: {eps}"


def networks() -> str:
    """Name and settings of every network."""
    lines = []
    for name, function in nets.NETWORKS.items():
        parameters = inspect.signature(function).parameters.values()
        settings = [f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
        lines.append([name, ", ".join(settings)])
    return _table(lines, ["network", "settings"], [None, WRAPPED])


def _table(lines: list[list[str]], headers: list[str], widths: list[int | None]) -> str:
    return tabulate(lines, headers, maxcolwidths=widths, disable_numparse=True)
