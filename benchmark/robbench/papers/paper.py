"""What a paper printed and what each number of it is bound to: the schema of the YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robbench.errors import InputError, unknown

Kind = Literal["cell", "derived", "cost", "quoted", "text"]
Printed = float | int | str | None  # as printed: "<=1", "~2", "O(K^2)" stay text
ALONE = "alone "  # begins the path of a number that only a claim or a figure has
CLAIMS = "claims"  # all of them, as a part of the paper
ScaleName = Literal["smoke", "cpu", "paper"]
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Binding(Strict):
    """What produces a number. The fields of a table, a column, a row and an exception are laid over
    each other, the later ones win.

    cell, derived: the fields of a grid's block, at the paper's own scale; measure: which accuracy.
    derived: function of robbench.papers.derived with its arguments. cost: function of
    robbench.papers.costs. quoted: whose number it is. text: why there is nothing to measure.
    """

    kind: Kind = "cell"
    dataset: str | None = None
    n: int | None = None  # images of the test split; None: all of it
    defense: str | None = None
    attack: str | None = None
    norm: str | None = None
    eps: str | float | int | None = None
    setting: str | None = None
    oracle: str | None = None
    eot: int | None = None
    target: str | int | None = None
    max_queries: int | None = None
    train_seed: int = 0
    seed: int = 0
    measure: str = "accuracy"
    function: str | None = None
    arguments: Mapping[str, Any] = {}
    source: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Binding:
        needed = {
            "cell": ("dataset", "defense", "attack"),
            "derived": ("function", "dataset", "defense", "attack"),
            "cost": ("function", "dataset", "defense"),
            "quoted": ("source",),
            "text": ("source",),
        }[self.kind]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"a binding of kind {self.kind} needs {', '.join(missing)}")
        return self


class Row(Strict):
    """A printed line: what it is called, its numbers by column, and what it adds to the binding."""

    labels: Annotated[tuple[Printed, ...], Field(alias="is")]
    values: tuple[Printed, ...]
    bind: Mapping[str, Any] = {}
    but: Mapping[str, Mapping[str, Any]] = {}  # exceptions by column


class Number(NamedTuple):
    """One printed number with what it is bound to."""

    path: str  # table/row/column
    labels: tuple[Printed, ...]
    column: str
    printed: Printed
    binding: Binding

    @classmethod
    def alone(cls, fields: Mapping[str, Any]) -> Number:
        """A number that no table has, by the fields of its binding."""
        binding = Binding.model_validate(fields)
        return cls(ALONE + binding.model_dump_json(exclude_defaults=True), (), "", None, binding)

    @property
    def in_table(self) -> bool:
        return not self.path.startswith(ALONE)


class Table(Strict):
    """A printed table. heads: what the labels of rows are; columns: what the numbers are."""

    title: str
    unit: str | None = "percent"
    heads: tuple[str, ...]
    columns: Mapping[str, Mapping[str, Any]]
    bind: Mapping[str, Any] = {}
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # where the print is damaged or contradicts itself

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        for row in self.rows:
            if len(row.labels) != len(self.heads) or len(row.values) != len(self.columns):
                raise ValueError(f"row {row.labels} does not fit {self.heads}, {[*self.columns]}")
            if odd := set(row.but) - set(self.columns):
                raise ValueError(f"row {row.labels} has exceptions for {odd}, which is no column")
        return self

    def numbers(self, name: str) -> Iterator[Number]:
        """Every printed number in reading order."""
        for row in self.rows:
            title = ",".join(str(label) for label in row.labels if label is not None)
            for (column, fields), printed in zip(self.columns.items(), row.values, strict=True):
                merged = {**self.bind, **fields, **row.bind, **row.but.get(column, {})}
                path = f"{name}/{title}/{column}"
                try:
                    binding = Binding(**merged)
                except ValidationError as error:
                    raise ValueError(f"{path}: {error.errors()[0]['msg']}") from None
                yield Number(path, row.labels, column, printed, binding)


Counterpart = str | Mapping[str, Any]  # the path of a number, or the fields of a binding
Side = Counterpart | tuple[Counterpart, ...]


class Curve(Strict):
    """Series of a figure's data. left: asks for the least x at which no more than this is left, of
    the first series over that of the second."""

    figure: str
    series: tuple[str, ...]
    left: float | None = None

    @model_validator(mode="after")
    def _paired(self) -> Curve:
        if not 1 <= len(self.series) <= 2 or (self.left is not None and len(self.series) != 2):
            raise ValueError(f"curve of {self.figure}: give one series or two, and two with left")
        return self


class Count(Strict):
    """How many of these numbers lie below a limit, in the unit of their table."""

    of: tuple[Counterpart, ...]
    below: float


class Claim(Strict):
    """What a paper says in words, and its measured counterpart: one of

    number: the path of a number of a table that it repeats. bind: a binding of its own. differ: one
    minus another; most, least: the largest and the smallest of such differences; order: pairs of
    which the first must be the larger, where several numbers on a side stand for the largest of
    them; count: of those below a limit - each either the path of a number or a binding. curve: of a
    figure's data (figure, series). text: why nothing measures it.

    holds: what must be true of it, in the unit of the print - `near`: the printed value lies in its
    interval; `positive`, `negative`: its interval lies on one side of 0; `zero:X`: within ± X (2);
    `below:X`, `above:X`: all of it does; of a curve `rises`, `falls`, `rises-then-falls`, `widens`
    (two series: of one minus the other), or any of the rules before of the mean over its points.
    """

    what: str
    where: str
    value: Printed = None
    unit: str | None = None
    number: str | None = None
    bind: Mapping[str, Any] = {}
    differ: tuple[Counterpart, Counterpart] | None = None
    most: tuple[tuple[Counterpart, Counterpart], ...] = ()
    least: tuple[tuple[Counterpart, Counterpart], ...] = ()
    order: tuple[tuple[Side, Side], ...] = ()
    count: Count | None = None
    curve: Curve | None = None
    holds: str = "near"
    text: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _one_counterpart(self) -> Claim:
        ways = ("number", "bind", "differ", "most", "least", "order", "count", "curve", "text")
        if sum(bool(getattr(self, way)) for way in ways) != 1:
            raise ValueError(f"claim {self.what!r}: give one of {', '.join(ways)}")
        return self


class Figure(Strict):
    """A published figure: `draw` names a function of robbench.figures with its arguments; a mere
    diagram has a reason instead."""

    shows: str
    draw: str | None = None
    arguments: Mapping[str, Any] = {}
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _drawn_or_not(self) -> Figure:
        if (self.draw is None) == (self.reason is None):
            raise ValueError(f"figure {self.shows!r}: give draw, or the reason why it is not drawn")
        return self


class Scale(Strict):
    """What is smaller than in the paper: never attack steps, losses or decision rules.

    datasets, networks: what stands for what. n: images, and n_of by the plain name of an attack.
    recipe: how everything is trained, and recipe_of by the name of the defense. members, draws: the
    published number -> the number here. strongest: budget and images of the strongest attack that
    stands beside each number with an ε; None for none.
    """

    datasets: Mapping[str, str] = {}
    networks: Mapping[str, str] = {}
    n: int | None = None
    n_of: Mapping[str, int] = {}
    recipe: Mapping[str, Any] = {}
    recipe_of: Mapping[str, Mapping[str, Any]] = {}
    members: Mapping[int, int] = {}
    draws: Mapping[int, int] = {}
    strongest: Literal["smoke", "standard", "thorough"] | None = None
    strongest_n: int | None = None

    def dataset(self, name: str) -> str:
        """What stands for one of the paper's datasets."""
        return self.datasets.get(name, name)


class Paper(Strict):
    """A publication with all that is to be reproduced of it."""

    key: str
    number: str  # how the defenses' sources call it: 000 to 004
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int | None = None
    code: str | None = None
    bibtex: Mapping[str, str]  # of the entry `key`, with the entry's type under ENTRYTYPE
    tables: Mapping[str, Table]
    claims: tuple[Claim, ...] = ()
    figures: Mapping[str, Figure] = {}
    scales: Mapping[ScaleName, Scale]

    def numbers(self, tables: Sequence[str] | None = None) -> list[Number]:
        """The printed numbers of these tables, all by default."""
        return [
            number
            for name, table in self.tables.items()
            if tables is None or name in tables
            for number in table.numbers(name)
        ]


@cache
def keys() -> list[str]:
    """The papers there is data of."""
    folder = resources.files("robbench.papers")
    return sorted(
        file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
    )


@cache
def load(key: str) -> Paper:
    """The paper of this key; InputError for an unknown one."""
    if key not in keys():
        raise unknown("paper", key, keys())
    text = resources.files("robbench.papers").joinpath(f"{key}.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Paper(**yaml.load(text, loader))  # noqa: S506 - a safe loader


def select(text: str) -> tuple[Paper, str | None]:
    """`enresnet:table1` as the paper and the name of a table, a figure or `claims`; `enresnet` is
    all of it, None. InputError with the nearest name."""
    key, colon, part = text.partition(":")
    paper = load(key)
    known = [*paper.tables, *paper.figures, CLAIMS]
    if colon and part not in known:
        if not part:
            raise InputError(f"{text} names no part; 'robbench reproduce' lists them")
        raise unknown(f"part of {key}", part, known)
    return paper, part or None
