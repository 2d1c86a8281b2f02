"""Published numbers as data: every one is bound, as printed, and can be measured at every scale."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from robbench import registry
from robbench.attacks import Configured
from robbench.datasets.described import described
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import drawings
from robbench.papers import keys, load, paper, select
from robbench.papers.cells import UNBOUNDED
from robbench.papers.claims import counterparts, paths
from robbench.papers.costs import FUNCTIONS, cost_key
from robbench.papers.reproduction import Reproduction

PUBLISHED = Path(__file__).parent / "published"
# of each paper's tables: how many numbers of each kind there are
KINDS = {
    "enresnet": {"cell": 104, "derived": 8},
    "ito": {"cell": 76, "quoted": 8, "derived": 4},
    "pang": {"cell": 322, "derived": 90},
    "pdd": {"derived": 16, "cell": 178},
    "sdr": {"cell": 28},
}
SHRINKING = {  # fields that a scale may change: size, and how what is small is trained
    "network", "members", "draws", "epochs", "batch_size", "optimizer", "lr", "schedule",
    "weight_decay", "amp", "decay_at", "lr_end", "crop", "flip", "select", "base",
}  # fmt: skip


@cache
def dataset(name):
    """digits, or what is known of a dataset that is not here."""
    if name.startswith("digits"):
        return registry.dataset(name)
    return described(name, hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("key", keys())
def test_the_numbers_are_those_of_an_independent_transcription(key):
    printed = yaml.safe_load((PUBLISHED / f"{key}.yaml").read_text())["tables"]
    ours = load(key).tables
    assert set(ours) == set(printed)
    for name, table in printed.items():
        have = [
            dict(
                zip(
                    [*ours[name].heads, *ours[name].columns],
                    [*row.labels, *row.values],
                    strict=True,
                )
            )
            for row in ours[name].rows
        ]
        want = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        as_text = [
            [{key: str(value) for key, value in row.items()} for row in rows]
            for rows in (have, want)
        ]
        assert as_text[0] == as_text[1], name


@pytest.mark.parametrize("key", keys())
def test_claims_and_figures_of_the_transcription_are_all_there(key):
    printed = yaml.safe_load((PUBLISHED / f"{key}.yaml").read_text())
    ours = Counter(str(claim.value) for claim in load(key).claims)
    values = [value for _, value in printed["claims"]]
    values += [value for listed in printed["figures"].values() for value in listed]
    assert not Counter(map(str, values)) - ours
    assert set(printed["figures"]) <= set(load(key).figures)


@pytest.mark.parametrize("key", keys())
def test_every_number_is_bound_and_each_kind_is_counted(key):
    assert Counter(number.binding.kind for number in load(key).numbers()) == KINDS[key]


@pytest.mark.parametrize("scale", paper.SCALES)
@pytest.mark.parametrize("key", keys())
def test_every_binding_makes_cells_at_every_scale(key, scale):
    made = Reproduction(load(key), scale, dataset)
    for number in (*made.paper.numbers(), *counterparts(made.paper)):
        cells = made.cells_of(number.binding)
        assert bool(cells) == (number.binding.kind in ("cell", "derived")), number.path
        if number.binding.kind == "cost":
            assert number.binding.function in FUNCTIONS
            assert cost_key(number.binding, made.overlay)
    for number in drawn(made.paper):
        assert made.cells_of(number.binding)


def drawn(made):
    """The numbers behind the figures of a paper."""
    for figure in made.figures.values():
        if figure.draw:
            bindings = drawings.get(figure.draw).bindings(figure.arguments)
            yield from map(paper.Number.alone, bindings)


def known(setting):
    """A setting without the defenses in it, which a scale makes smaller."""
    return setting.model_copy(update={"oracle": None, "suite": ""})


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("key", keys())
def test_a_scale_shrinks_and_changes_no_attack_loss_or_rule(key, scale):
    full, small = (Reproduction(load(key), name, dataset) for name in ("paper", scale))
    for number in (*load(key).numbers(), *counterparts(load(key)), *drawn(load(key))):
        for one, other in zip(
            full.cells_of(number.binding), small.cells_of(number.binding), strict=False
        ):
            assert (one.attack, known(one.setting)) == (other.attack, known(other.setting))
            whole = {"eps": None} if number.binding.eps == UNBOUNDED else {}  # of another box
            assert one.threat.model_copy(update=whole) == other.threat.model_copy(update=whole)
            assert other.n <= one.n
            for big, little in zip(resolve(one.defense), resolve(other.defense), strict=True):
                changed = {
                    name
                    for name in type(big).model_fields
                    if getattr(big, name) != getattr(little, name)
                }
                assert changed <= SHRINKING, (number.path, changed)
                assert little.members <= big.members and little.draws <= big.draws
                assert little.epochs <= big.epochs


@pytest.mark.parametrize("key", keys())
def test_what_claims_refer_to_exists(key):
    known = {number.path for number in load(key).numbers()}
    assert set(paths(load(key))) <= known
    curves = [claim.curve for claim in load(key).claims if claim.curve]
    assert {curve.figure for curve in curves} <= set(load(key).figures)


def test_published_attacks_are_the_papers_own():
    """What a paper attacked is attacked as it did, where its settings are known."""
    for key in keys():
        used = {
            Configured.of(number.binding.attack).entry.name
            for number in load(key).numbers()
            if number.binding.kind == "cell"
        }
        assert key == "ito" or any(name.endswith(":as-published") for name in used), key


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("enresnett", "unknown paper 'enresnett'; did you mean 'enresnet'"),
        ("enresnet:tabel1", "unknown part of enresnet 'tabel1'; did you mean 'table1'"),
        ("enresnet:", "enresnet: names no part; 'robbench reproduce' lists them"),
    ],
)
def test_an_unknown_part_names_the_nearest(what, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        select(what)


def test_a_described_dataset_makes_the_cells_of_the_real_one():
    real = registry.dataset("digits")
    told = described("digits", real.hash)
    number = load("enresnet").numbers(["table7"])[1]
    cells = [
        Reproduction(load("enresnet"), "smoke", lambda name, data=data: data).cells_of(
            number.binding
        )
        for data in (real, told)
    ]
    assert cells[0] == cells[1]
