"""Imports go one way, and no module is a drawer for what belongs nowhere."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"robbench": ROOT / "benchmark/robbench", "robbench.defenses": ROOT / "defenses"}
STEPS = [  # each may import its own step and what stands above it
    {"errors"},
    {"threat", "statistics"},
    {"metrics"},
    {"datasets", "networks"},
    {"registry"},
    {"estimator", "deployed", "frozen", "access", "rules", "randomness"},
    {"attacks", "metered"},
    {"defense", "recipes", "training", "checkpoints", "detectors", "siblings"},
    {"defenses"},  # the registry imports them by name: nothing above may
    {"cell", "grid"},
    {"records"},
    {"audit"},
    {"runner", "judge", "environment"},
    {"tasks", "workers"},
    {"executors"},
    {
        "papers",
        "tables",
        "plots",
        "site",
        "compare",
        "ranking",
        "boards",
        "accounting",
        "findings",
        "listing",
        "evaluation",
    },
    {"figures"},
    {"reproducing", "rendering", "contributions"},
    {"cli"},
    {"__init__", "__main__"},
]
STEP = {name: step for step, names in enumerate(STEPS) for name in names}
DRAWERS = {"utils", "util", "helpers", "common", "base", "misc"}


def modules():
    """Dotted name -> file, of every module of both source roots."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()
EDGES = {}  # (module, imported module) -> whether it is imported as soon as the module is


def statements(node, lazy=False):
    """(import statement, whether inside a function) of a tree, without `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        yield from statements(child, lazy or isinstance(child, (ast.FunctionDef, ast.Lambda)))


def imported(statement):
    """The modules of ours that an import statement names."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names if alias.name in MODULES]
    assert statement.level == 0, "a relative import"
    if statement.module not in MODULES:
        return []
    inner = [f"{statement.module}.{alias.name}" for alias in statement.names]
    submodules = [name for name in inner if name in MODULES]
    whole = len(submodules) < len(inner)  # a name of the package itself
    return [*submodules, *([statement.module] if whole else [])]


for module, file in MODULES.items():
    for statement, lazy in statements(ast.parse(file.read_text(encoding="utf-8"))):
        for target in imported(statement):
            EDGES[module, target] = EDGES.get((module, target), False) or not lazy


def subject(module):
    """The part of a name that the table of steps knows: robbench.attacks.art is `attacks`."""
    return (module.split(".") + ["__init__"])[1]


def test_every_module_has_its_step():
    assert {subject(module) for module in MODULES} <= STEP.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    backwards = [
        target
        for source, target in EDGES
        if source == module and STEP[subject(target)] > STEP[subject(module)]
    ]
    assert not backwards


def test_neighbours_import_each_other_without_a_cycle():
    above = defaultdict(set)
    for (source, target), at_once in EDGES.items():
        if at_once and source != target:
            above[source].add(target)

    def reachable(start):
        seen, left = set(), [start]
        while left:
            new = above[left.pop()] - seen
            seen |= new
            left += new
        return seen

    assert not [module for module in MODULES if module in reachable(module)]


def test_steps_import_each_other_without_a_cycle():
    """Also inside functions, between the modules of one step, packages taken as one."""
    above = defaultdict(set)
    for source, target in EDGES:
        if subject(source) != subject(target):
            above[subject(source)].add(subject(target))
    settled, left = set(), set(map(subject, MODULES))
    while free := {name for name in left if above[name] <= settled}:
        settled |= free
        left -= free
    assert not left


def test_importing_a_defense_is_the_registrys_business():
    assert not [source for source, target in EDGES if subject(target) == "defenses"]


def test_no_module_is_a_drawer():
    assert not DRAWERS & {module.rpartition(".")[2] for module in MODULES}


def test_the_reader_of_imports_sees_lazy_ones_and_passes_over_types():
    code = """
from typing import TYPE_CHECKING
from robbench import errors, registry
if TYPE_CHECKING:
    from robbench.cli import main
def lazily():
    from robbench.threat import Threat
    import robbench.grid
"""
    found = [
        (target, lazy)
        for statement, lazy in statements(ast.parse(code))
        for target in imported(statement)
    ]
    assert found == [
        ("robbench.errors", False),
        ("robbench.registry", False),
        ("robbench.threat", True),
        ("robbench.grid", True),
    ]
