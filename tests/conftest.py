"""Every test runs on one thread, with a checkpoint cache of its own; `cuda` tests need a device."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the folder of their parent
        os.environ["ROBBENCH_CACHE"] = tempfile.mkdtemp(prefix="robbench-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["ROBBENCH_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device the tests of it are not selected, and pytest says how many."""
    if torch.cuda.is_available():
        return
    chosen = [item for item in items if item.get_closest_marker("cuda") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
