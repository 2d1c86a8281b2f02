"""Specs read and written, near names, clashes and plugins that cannot be loaded."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench import registry
from robbench.errors import InputError
from robbench.registry import Registry, Spec, split_list

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,8}", fullmatch=True)
QUOTABLE = st.text(st.characters(codec="utf-8", exclude_characters="'")) | st.just("it's")
SCALARS = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.fractions(0, 10, max_denominator=255).map(lambda f: f"{f.numerator}/{f.denominator}"),
    NAMES,
    QUOTABLE,
)
SETTINGS = st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=3), max_size=4)
SPECS = st.builds(lambda name, given: Spec(name=name).with_settings(given), NAMES, SETTINGS)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(SPECS)
def test_a_spec_is_read_as_it_was_written(spec):
    again = Spec.parse(str(spec))
    assert again == spec
    assert [type(value) for _, value in again.settings] == [type(v) for _, v in spec.settings]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(SPECS, min_size=2, max_size=3))
def test_joined_specs_are_read_as_they_were_written(specs):
    text = " & ".join(map(str, specs))
    joined = Spec.parse(text)
    assert joined.parts == tuple(specs) and str(joined) == text


@settings(derandomize=True, deadline=None, max_examples=60)
@given(SPECS, NAMES, NAMES)
def test_a_spec_within_a_spec_is_a_value(inner, outer, key):
    spec = Spec(name=outer).with_settings({key: str(inner)})
    again = Spec.parse(str(spec))
    assert Spec.parse(dict(again.settings)[key]) == inner


@pytest.mark.parametrize(
    ("text", "name", "given"),
    [
        ("ito", "ito", {}),
        ("ito()", "ito", {}),
        ("  ito ( omega = 0.4 , members=3, ) ", "ito", {"omega": 0.4, "members": 3}),
        ("pgd(step=8/255)", "pgd", {"step": "8/255"}),
        ("pgd(step=-1.5e-3)", "pgd", {"step": -1.5e-3}),
        ("a(x=true, y=False, z=none)", "a", {"x": True, "y": False, "z": None}),
        ("a(x='true', y=\"it's\")", "a", {"x": "true", "y": "it's"}),
        ("a(x=[1, b, [2.0]])", "a", {"x": [1, "b", [2.0]]}),
        ("art:ElasticNet(max_iter=50)", "art:ElasticNet", {"max_iter": 50}),
        ("pgd:as-published", "pgd:as-published", {}),
        ("folder:a/b.c", "folder:a/b.c", {}),
        ("a(network=resnet8(width=4))", "a", {"network": "resnet8(width=4)"}),
    ],
)
def test_specs_as_people_write_them(text, name, given):
    spec = Spec.parse(text)
    assert spec.name == name and dict(spec.settings) == given
    assert Spec.parse(spec) is spec


@pytest.mark.parametrize(
    ("text", "at", "problem"),
    [
        ("", 1, "expected a name"),
        ("3", 1, "expected a name"),
        ("a b", 3, "expected the end"),
        ("a)", 2, "expected the end"),
        ("a(", 3, "expected a setting name or ')'"),
        ("a(x", 4, "expected '=' after x"),
        ("a(x=)", 5, "expected a name"),
        ("a(x=1", 6, "expected ',' or ')'"),
        ("a(x=1 y=2)", 7, "expected ',' or ')'"),
        ("a(x=[1 2])", 8, "expected ',' or ']'"),
        ("a(x=1, x=2)", 9, "x is set twice"),
        ("a & ", 5, "expected a name"),
        ("a(x='b)", 5, "expected a name"),
        ("a(x=3b)", 5, "expected a name"),
        ("a[]", 3, "expected the number of a member"),
        ("a[1", 4, "expected ']'"),
    ],
)
def test_an_error_points_at_its_place(text, at, problem):
    with pytest.raises(InputError) as error:
        Spec.parse(text)
    assert str(error.value) == (
        f"cannot read the spec {text!r} at character {at}: {problem};"
        " write name or name(key=value, key=value)"
    )


@pytest.mark.parametrize("text", ["adp[0]", "a(x=1)[12]", "a[1] & b(y=2)[0]", "a(x=b(y=1)[2])"])
def test_one_member_of_an_ensemble_is_written_with_its_index(text):
    assert str(Spec.parse(text)) == text


def test_an_index_is_that_of_its_part():
    assert [part.member for part in Spec.parse("a[1] & b").parts] == [1, None]


def test_settings_are_replaced_and_added_in_order():
    spec = Spec.parse("a(z=1, b=2)").with_settings({"z": 3, "c": "8/255"})
    assert str(spec) == "a(b=2, c=8/255, z=3)"


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("a", ["a"]),
        ("a, b,", ["a", "b"]),
        ("a(x=1, y=2),b", ["a(x=1, y=2)", "b"]),
        ("a(x=[1, 2], y=b(c=3, d=4)), 8/255", ["a(x=[1, 2], y=b(c=3, d=4))", "8/255"]),
        ("a(x=1) & b(y=2, z=3), c", ["a(x=1) & b(y=2, z=3)", "c"]),
        ("a(x='p,q'), b", ["a(x='p,q')", "b"]),
        ("a(x='(,'), b", ["a(x='(,')", "b"]),
    ],
)
def test_a_list_is_split_outside_of_brackets_and_quotes(text, items):
    assert split_list(text) == items


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(SPECS, max_size=3))
def test_a_list_of_specs_is_split_into_them(specs):
    assert [Spec.parse(item) for item in split_list(", ".join(map(str, specs)))] == specs


def function_from(path):
    """The function `entry` of a file, as an imported module would have it."""
    path.write_text("def entry():\n    pass\n")
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["entry"]


def test_a_clash_names_both_files(tmp_path, monkeypatch):
    mine, yours = (function_from(tmp_path / f"{name}.py") for name in ("one", "two"))
    entries = Registry("defense", None)
    entries.add("ito", mine)
    entries.add("ito", mine)  # the same file again is no clash
    with pytest.raises(InputError) as error:
        entries.add("ito", yours)
    assert str(error.value) == (
        f"two defenses are called 'ito': {tmp_path / 'one.py'} and {tmp_path / 'two.py'};"
        " rename one"
    )
    assert entries.get("ito") is mine


def test_look_up_iteration_and_near_names():
    entries = Registry("thing", None)
    entries.add("zeta", 1)
    entries.add("alpha", 2)
    assert list(entries) == ["alpha", "zeta"]
    assert "zeta" in entries and "beta" not in entries
    assert entries.get("alpha") == 2
    with pytest.raises(InputError, match=r"^unknown thing 'alfa'; did you mean 'alpha'\?$"):
        entries.get("alfa")
    with pytest.raises(InputError, match=r"^unknown thing 'q'; known: alpha, zeta$"):
        entries.get("q")


def install(monkeypatch, *points):
    """Pretend that packages with these entry points are installed."""
    asked = []

    def entry_points(group):
        asked.append(group)
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return asked


def test_a_plugin_is_loaded_when_a_look_up_needs_it(tmp_path, monkeypatch):
    (tmp_path / "robbench_plugin_a.py").write_text("def attack():\n    return 'x'\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "robbench_plugin_a:attack", "robbench.attacks")
    asked = install(monkeypatch, point)
    entries = Registry("attack", None)
    entries.add("pgd", print)
    assert asked == [] and "robbench_plugin_a" not in sys.modules
    assert entries.get("mine")() == "x"
    assert list(entries) == ["mine", "pgd"]
    assert asked == ["robbench.attacks"]


DECORATED = """
from robbench.attacks import attack

@attack("mine", norms=("l2",), aliases=("ours",))
def entry(access, x, y, threat, rng, *, steps: int = 3):
    return x
"""


@pytest.mark.parametrize("name", ["mine", "other"])
def test_a_plugin_that_uses_our_decorator_keeps_its_traits(name, tmp_path, monkeypatch):
    (tmp_path / f"robbench_decorated_{name}.py").write_text(DECORATED)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name, f"robbench_decorated_{name}:entry", "robbench.attacks")
    install(monkeypatch, point)
    entries = Registry("attack", None)
    monkeypatch.setattr(registry, "attacks", entries)
    assert list(entries) == ["mine", "ours"]
    assert entries.get("mine").norms == {"l2"}


def test_a_clash_of_decorated_attacks_names_both_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    points = []
    for number in "12":
        (tmp_path / f"robbench_clash_{number}.py").write_text(DECORATED)
        points.append(EntryPoint(number, f"robbench_clash_{number}:entry", "robbench.attacks"))
    install(monkeypatch, *points)
    entries = Registry("attack", None)
    monkeypatch.setattr(registry, "attacks", entries)
    with pytest.raises(InputError) as error:
        entries.get("mine")
    both = " and ".join(str(tmp_path / f"robbench_clash_{number}.py") for number in "12")
    assert f"two attacks are called 'mine': {both}; rename one" in str(error.value)


def test_a_plugin_of_a_known_name_is_a_clash(tmp_path, monkeypatch):
    (tmp_path / "robbench_plugin_b.py").write_text("def attack():\n    return 'x'\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, EntryPoint("pgd", "robbench_plugin_b:attack", "robbench.attacks"))
    entries = Registry("attack", None)
    entries.add("pgd", settings)
    with pytest.raises(InputError, match=r"two attacks are called 'pgd': .*robbench_plugin_b.py"):
        entries.get("pgd")


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        (None, "robbench_plugin_missing:x", "ModuleNotFoundError: No module named"),
        ("", "robbench_plugin_c:absent", "AttributeError: module 'robbench_plugin_c' has no"),
        ("1 / 0", "robbench_plugin_c:x", "ZeroDivisionError: division by zero"),
    ],
    ids=["missing", "absent", "broken"],
)
def test_a_plugin_that_cannot_be_loaded_is_named(source, value, reason, tmp_path, monkeypatch):
    if source is not None:
        (tmp_path / "robbench_plugin_c.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "robbench_plugin_c", raising=False)
    install(monkeypatch, EntryPoint("mine", value, "robbench.defenses"))
    with pytest.raises(InputError) as error:
        Registry("defense", None).get("standard")
    message = str(error.value)
    assert message.startswith(f"the defense plugin 'mine' ({value}) cannot be loaded: {reason}")
    assert message.endswith("; repair or uninstall that package") and "\n" not in message


def test_a_second_look_up_says_it_again(monkeypatch):
    install(monkeypatch, EntryPoint("mine", "robbench_plugin_missing:x", "robbench.defenses"))
    entries = Registry("defense", None)
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be loaded"):
            entries.get("standard")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (registry.defenses, {"standard", "pgd-at", "ito", "enresnet"}),
        (registry.attacks, {"fgsm", "bim", "ifgsm", "pgd", "mim"}),
    ],
    ids=["defenses", "attacks"],
)
def test_our_own_packages_are_found_by_being_there(kind, names):
    assert names <= set(kind)
