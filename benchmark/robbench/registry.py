"""Names of defenses, attacks and datasets, and the specs that configure them.

A spec is written the same everywhere: `ito`, `ito(omega=0.4, members=3)`, `pgd(steps=50)`;
`A & B` joins separately trained defenses, `A[0]` is one member, and `A[*]` lists all of them.
Other packages join by entry points in the groups robbench.defenses, robbench.attacks and
robbench.datasets; they are read when a look-up needs them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict

from robbench.errors import InputError, unknown

if TYPE_CHECKING:
    from robbench.datasets import Dataset

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z_][\w.:/+-]*")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(/\d+)?(?![\w.])")
_INDEX = re.compile(r"\d+")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_SIGN = re.compile(rf"{_QUOTED.pattern}|[()\[\],]")
_WORDS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


class Spec(BaseModel):
    """A name with the settings that were given; `parts` holds what `A & B` joins, `member` the
    index of `A[0]`, one member of an ensemble."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    settings: tuple[tuple[str, object], ...] = ()
    parts: tuple[Spec, ...] = ()
    member: int | Literal["*"] | None = None

    @classmethod
    def parse(cls, text: str | Spec) -> Spec:
        """Read a spec; a malformed one raises an InputError that points at the place."""
        return text if isinstance(text, Spec) else _Reader(text).read()

    def __str__(self) -> str:
        if self.parts:
            return " & ".join(map(str, self.parts))
        inner = ", ".join(f"{key}={_write(value)}" for key, value in sorted(self.settings))
        index = "" if self.member is None else f"[{self.member}]"
        return (f"{self.name}({inner})" if inner else self.name) + index

    def with_settings(self, settings: Mapping[str, object]) -> Spec:
        """The same spec with these settings replaced or added."""
        merged = {**dict(self.settings), **settings}
        return self.model_copy(update={"settings": tuple(sorted(merged.items()))})


def split_list(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes: 'a(x=1, y=2),b' has two items."""
    items, depth, start = [], 0, 0
    for sign in _SIGN.finditer(text):
        depth += (sign[0] in "([") - (sign[0] in ")]")
        if sign[0] == "," and depth == 0:
            items.append(text[start : sign.start()])
            start = sign.end()
    return [item.strip() for item in [*items, text[start:]] if item.strip()]


def _write(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_write(item) for item in value) + "]"
    if isinstance(value, str):
        fraction = "/" in value and _NUMBER.fullmatch(value)
        plain = fraction or (_NAME.fullmatch(value) and value not in _WORDS)
        quote = '"' if "'" in value else "'"  # the reader knows no escapes
        return value if plain or _is_call(value) else f"{quote}{value}{quote}"
    return str(value) if isinstance(value, Fraction) else repr(value)


def _is_call(text: str) -> bool:
    """A value such as resnet8(width=4) is a spec itself and needs no quotes."""
    try:
        return bool(Spec.parse(text).settings)
    except InputError:
        return False


class _Reader:
    """A recursive-descent reader of `name(key=value, …) & name`."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def read(self) -> Spec:
        parts = [self.spec()]
        while self.take("&"):
            parts.append(self.spec())
        if self.at < len(self.text):
            self.fail("expected the end")
        if len(parts) == 1:
            return parts[0]
        return Spec(name="&".join(part.name for part in parts), parts=tuple(parts))

    def spec(self) -> Spec:
        name = self.match(_NAME, "a name")
        settings: dict[str, object] = {}
        if self.take("("):
            while not self.take(")"):
                key = self.match(_NAME, "a setting name or ')'")
                if key in settings:
                    self.fail(f"{key} is set twice")
                if not self.take("="):
                    self.fail(f"expected '=' after {key}")
                settings[key] = self.value()
                if not self.take(",") and self.peek() != ")":
                    self.fail("expected ',' or ')'")
        member: int | Literal["*"] | None = None
        if self.take("["):
            star = self.take("*")
            member = "*" if star else int(self.match(_INDEX, "the number of a member"))
            if not self.take("]"):
                self.fail("expected ']'")
        return Spec(name=name, settings=tuple(sorted(settings.items())), member=member)

    def value(self) -> object:
        if self.take("["):
            items: list[object] = []
            while not self.take("]"):
                items.append(self.value())
                if not self.take(",") and self.peek() != "]":
                    self.fail("expected ',' or ']'")
            return items
        self.peek()
        if quoted := _QUOTED.match(self.text, self.at):
            self.at = quoted.end()
            return quoted[1] if quoted[1] is not None else quoted[2]
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            return _number(number[0])
        spec = self.spec()
        return (
            str(spec)
            if spec.settings or spec.member is not None
            else _WORDS.get(spec.name, spec.name)
        )

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, sign: str) -> bool:
        if self.peek() != sign:
            return False
        self.at += 1
        self.peek()
        return True

    def match(self, pattern: re.Pattern[str], wanted: str) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if not found:
            self.fail(f"expected {wanted}")
        self.at = found.end()
        self.peek()
        return found[0]

    def fail(self, problem: str) -> NoReturn:
        raise InputError(
            f"cannot read the spec {self.text!r} at character {self.at + 1}: {problem};"
            " write name or name(key=value, key=value)"
        )


def _number(text: str) -> object:
    """Integers and decimals as themselves, 8/255 as the string that settings for ε parse."""
    if "/" in text:
        return text
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


class Registry(Generic[T]):
    """Entries of one kind by name: those of our own packages, and those of entry points."""

    def __init__(self, kind: str, package: str | None) -> None:
        self.kind, self.group, self.package = kind, f"robbench.{kind}s", package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, entry: T) -> None:
        """Register; the same name from another place is an error that names both files."""
        if name in self._entries and _place(self._entries[name]) != _place(entry):
            both = f"{_place(self._entries[name])} and {_place(entry)}"
            raise InputError(f"two {self.kind}s are called {name!r}: {both}; rename one")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first: the modules below register into this very object
        try:
            self._import()
        except Exception:
            self._loaded = False  # a second look-up must not take half a registry for the whole
            raise

    def _import(self) -> None:
        if self.package:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                loaded = point.load()
            except Exception as error:  # somebody else's package must not take robbench down
                raise InputError(
                    f"the {self.kind} plugin {point.name!r} ({point.value}) cannot be loaded:"
                    f" {type(error).__name__}: {error}; repair or uninstall that package"
                ) from error
            # a plugin that uses our decorator is registered by being imported
            known = self._entries.values()
            if all(loaded is not entry and loaded is not _function(entry) for entry in known):
                self.add(point.name, loaded)


def _function(entry: object) -> object:
    """The function that the attack decorator wrapped; any other entry itself."""
    return getattr(entry, "run", entry)


def _place(entry: object) -> str:
    try:
        return inspect.getsourcefile(_function(entry)) or repr(entry)  # type: ignore[arg-type]
    except TypeError:
        return repr(entry)


defenses: Registry[type] = Registry("defense", "robbench.defenses")
attacks: Registry[Any] = Registry("attack", "robbench.attacks")  # Attack, or a plugin's function
datasets: Registry[Callable[..., object]] = Registry("dataset", None)


def is_built_in(name: str) -> bool:
    """Whether a dataset is robbench's own or a folder:PATH; InputError for an unknown name."""
    from robbench import datasets as built_in

    for key, function in built_in.DATASETS.items():  # a plugin of such a name is an error
        datasets.add(key, function)
    if name in datasets and name not in built_in.DATASETS:
        return False
    built_in.check_name(name, list(datasets))
    return True


def dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset of this name: built in, folder:PATH, or a plugin's.

    A plugin is a function (data_dir: Path | None) -> Dataset, called once per process.
    """
    from robbench import datasets as built_in

    return built_in.load(name, data_dir) if is_built_in(name) else _plugin_dataset(name, data_dir)


@lru_cache(maxsize=4)
def _plugin_dataset(name: str, data_dir: Path | None) -> Dataset:
    from robbench.datasets import Dataset

    made = datasets.get(name)(data_dir)
    if not isinstance(made, Dataset):
        raise InputError(f"the dataset plugin {name!r} returned {type(made).__name__}, no Dataset")
    return made
