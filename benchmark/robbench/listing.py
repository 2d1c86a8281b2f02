"""What specs can name, as tables for `robbench list`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection
from typing import get_args

from tabulate import tabulate

from robbench import datasets as data
from robbench import networks as nets
from robbench import registry
from robbench.attacks import Attack, find
from robbench.defense import Defense
from robbench.errors import InputError
from robbench.registry import Spec
from robbench.threat import NORM_NAMES, format_eps

PUBLISHED = ":as-published"
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
    if losses := list(cls().losses):
        lines.append(_indented(f"losses of the attacker who knows it: {', '.join(losses)}"))
    stages = [str(stage) for stage in cls().suite("standard")]
    lines.append(_indented("--attack strongest --budget standard: " + "; ".join(stages)))
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


def attacks(name: str | None = None) -> str:
    """Native attacks, the papers' variants of them, and every class of the libraries, those that
    are refused with the reason; of the one that is named, what it does and its settings."""
    from robbench.attacks import art, torchattacks

    if name is not None:
        return _attack(find(name))
    lines, variants, others, refused, tests = [], [], [], [], []
    for key in registry.attacks:
        entry = find(key)
        if key.endswith(PUBLISHED):
            papers = entry.settings.model_fields["paper"].annotation
            variants.append([key, ", ".join(get_args(papers))])
        else:
            text = f"is {entry.name}" if key != entry.name else entry.faults or _summary(entry)
            if entry.diagnostic:
                tests.append([key, text])
            else:
                lines.append([key, *_traits(entry), text])
    names = [f"torchattacks:{inner}" for inner in torchattacks.names()]
    for key in [*names, *(f"art:{inner}" for inner in art.names())]:
        entry = find(key)
        if entry.refusal:
            refused.append([key, entry.refusal])
        else:
            others.append([key, *_traits(entry), entry.faults])
    headers = ["attack", "norms", "needs", "size"]
    legend = (
        "size: ε - stays within ε and runs for each one; min - looks for the smallest perturbation,"
        " runs once and is read at every ε. Settings stand in brackets, as pgd(steps=50) or"
        " torchattacks:APGD(steps=100); 'robbench list attacks NAME' says what they are."
    )
    return "\n\n".join(
        [
            _table(lines, [*headers, "what it does"], [None, None, None, None, 42]),
            _indented(legend, 0),
            _table(tests, ["'robbench audit' runs", "what it says"], [None, 56]),
            _table(variants, ["as a paper ran it", "paper="], [None, 56]),
            _table(others, [*headers, "known faults"], [None, None, None, None, 32]),
            _table(refused, ["refused", "because it"], [None, 56]),
        ]
    )


def _traits(entry: Attack) -> list[str]:
    norms = " ".join(norm for norm in NORM_NAMES if norm in entry.norms)
    return [norms, entry.needs, "min" if entry.minimal else "ε"]


def _summary(entry: Attack) -> str:
    """The first sentence of the docstring."""
    text = " ".join((inspect.getdoc(entry.run) or "").split())
    return re.split(r"(?<! al)(?<! eq)\. ", text, maxsplit=1)[0].rstrip(".")


def _attack(entry: Attack) -> str:
    if entry.refusal:
        raise InputError(f"attack {entry.name} is refused: it {entry.refusal}")
    norms, needs, size = _traits(entry)
    target = "targeted too" if entry.targeted else "untargeted only"
    reads = "read at every ε" if size == "min" else "runs for each ε"
    lines = [entry.name]
    doc = inspect.getdoc(entry.run) or ""
    lines += [_indented(part) for part in doc.split("\n\n") if part]
    lines.append(_indented(f"norms {norms}; needs {needs}; {target}; {reads}"))
    if entry.faults:
        lines.append(_indented(f"known faults: {entry.faults}"))
    fields = entry.settings.model_fields
    given = {key: field.default for key, field in fields.items() if field.default is not None}
    left = [key for key in fields if key not in given]
    if given:
        lines.append(_indented(f"settings: {Spec(name=entry.name, settings=tuple(given.items()))}"))
    for key, field in fields.items():
        if choices := [str(c) for c in get_args(field.annotation) if isinstance(c, str)]:
            lines.append(_indented(f"{key}: {', '.join(choices)}"))
    if left:
        lines.append(_indented(f"and, with defaults that depend on others: {', '.join(left)}"))
    return "\n".join(lines)


def datasets() -> str:
    """Name and origin, and the default ε lists; images of folder:PATH take those of CIFAR."""
    own = {"digits": "comes with robbench", "cifar10-jpeg": "cifar10-jpeg.tar.gz in --data-dir"}
    lines = [[name, own.get(name, f"'robbench data {name}'")] for name in sorted(data.DATASETS)]
    lines.append(["NAME@5000", "any of these, with the first 5,000 training images alone"])
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
