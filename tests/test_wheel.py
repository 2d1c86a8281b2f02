"""The wheel holds every module and no test; it is built offline from a copy of the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"benchmark/robbench": "robbench", "defenses": "robbench/defenses"}
PROJECT = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy: setuptools leaves a folder `build` where it works."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in SOURCES:
        leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, ignore=leftovers)
    (copy / "tests").mkdir()
    (copy / "tests/test_wheel.py").write_text("")
    for name in PROJECT:
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"  # as pip calls it
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_every_module_all_data_and_nothing_else(wheel):
    tree = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in SOURCES.items()
        for kind in ("*.py", "*.yaml")
        for file in (ROOT / folder).rglob(kind)
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == tree | {"robbench/py.typed"}


def test_the_wheel_installs_the_command_and_the_licence(wheel):
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert b"robbench = robbench.cli:main" in wheel.read(names["entry_points.txt"])
    assert wheel.read(names["LICENSE"]) == (ROOT / "LICENSE").read_bytes()
