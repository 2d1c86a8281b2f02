"""What specs can name, as tables for `robbench list`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Collection

from tabulate import tabulate

from robbench import datasets as data
from robbench import networks as nets
from robbench import registry
from robbench.attacks import find
from robbench.defense import Defense
from robbench.registry import Spec
from robbench.threat import NORM_NAMES, format_eps

WRAPPED = 60
WIDTH = 100  # of every table, at most


def defenses(name: str | None = None) -> str:
    """One line for each defense; of the one that is named, what it does and its settings."""
    if name is not None:
        registry.defenses.get(name)
        shared = sorted(Defense.model_fields)
        return "\n\n".join(
            [
                _defense(name, shared),
                _indented("Settings of every defense: " + ", ".join(shared), 0),
            ]
        )
    headers = ["defense", "source", "random", "decides by", "abstains", "detector", "presets"]
    table = tabulate([_line(name) for name in registry.defenses], headers, disable_numparse=True)
    legend = (
        "source: 000 to 004 are the papers in docs/defenses.md. random: two answers to one image"
        " may differ. All as the preset quick sets it;"
        " 'robbench list defenses NAME' says more."
    )
    return f"{table}\n\n{_indented(legend, 0)}"


def _line(name: str) -> list[str]:
    cls = registry.defenses.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Defense)):
        return [name, "not a Defense"]
    quick = cls()
    rule = quick.rule()
    return [
        name,
        _brief(cls.source),
        "yes" if quick.stochastic else "no",
        str(rule),
        "yes" if rule.abstains else "no",
        quick.detector or "any",
        " ".join(key for key in cls.presets if ":" not in key),
    ]


def _brief(source: str) -> str:
    """'paper 003: Pang et al. 2019, arXiv:…' -> '003 Pang 2019'."""
    first = source.removeprefix("paper ").partition(",")[0]
    return textwrap.shorten(first.replace(":", "").replace(" et al.", ""), 20, placeholder="…")


def _defense(name: str, shared: Collection[str]) -> str:
    cls = registry.defenses.get(name)
    summary = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    lines = [name, _indented(summary)]
    if source := getattr(cls, "source", ""):
        lines.append(_indented(f"source: {source}"))
    lines.append(_indented(f"presets: {', '.join(getattr(cls, 'presets', {}))}"))
    if not issubclass(cls, Defense):
        return "\n".join(lines)
    common = Defense().model_dump(mode="json")
    own = {
        key: value
        for key, value in cls().model_dump(mode="json").items()
        if key not in shared or value != common[key]
    }
    if own:
        lines.append(_indented(f"settings: {Spec(name=name, settings=tuple(own.items()))}"))
    return "\n".join(lines)


def _indented(text: str, margin: int = 2) -> str:
    pad = " " * margin
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=pad,
        subsequent_indent=pad,
        break_on_hyphens=False,
    )


def attacks() -> str:
    """Name, norms, needs and known faults of native attacks and of every class of the libraries;
    those that are refused, with the reason, in a table of their own."""
    from robbench.attacks import art, torchattacks

    names = [*registry.attacks]
    names += [f"torchattacks:{name}" for name in torchattacks.names()]
    names += [f"art:{name}" for name in art.names()]
    lines, refused = [], []
    for name in names:
        entry = find(name)
        if entry.refusal:
            refused.append([name, entry.refusal])
            continue
        norms = " ".join(norm for norm in NORM_NAMES if norm in entry.norms)
        fault = f"is {entry.name}" if name != entry.name else entry.faults
        lines.append([name, norms, entry.needs, "min" if entry.minimal else "ε", fault])
    headers = ["attack", "norms", "needs", "size", "known faults"]
    table = _table(lines, headers, [None, None, None, None, 32])
    legend = (
        "size: ε - stays within ε and runs for each one; min - looks for the smallest perturbation,"
        " runs once and is read at every ε. Settings in brackets, as torchattacks:APGD(steps=100)"
        " or art:ElasticNet(max_iter=50)."
    )
    reasons = _table(refused, ["refused", "because it"], [None, 56])
    return "\n\n".join([table, _indented(legend, 0), reasons])


def datasets() -> str:
    """Name and origin, and the default ε lists; images of folder:PATH take those of CIFAR."""
    lines = [[name, f"'robbench data {name}'"] for name in sorted(data.DATASETS)]
    lines = [[name, "comes with robbench" if name == "digits" else how] for name, how in lines]
    lines += [[name, "plugin"] for name in registry.datasets if name not in data.DATASETS]
    lines.append(["folder:PATH", "an image folder or its tar.gz: train/CLASS/*, test/CLASS/*"])
    parts = [_table(lines, ["dataset", "where"], [None, WRAPPED])]
    for names, budgets in (
        ("digits, mnist, fashion-mnist", data.SMALL_EPS),
        ("all others", data.LARGE_EPS),
    ):
        lists = [f"{norm} {', '.join(map(format_eps, eps))}" for norm, eps in budgets.items()]
        parts.append(_indented(f"default ε of {names}: {'; '.join(lists)}", 0))
    return "\n\n".join(parts)


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
