"""Every test runs on one thread, with a checkpoint cache of its own; `cuda` tests need a device."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robbench import datasets
from robbench.cli import main


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


@pytest.fixture(scope="session")
def classifier() -> Callable[[nn.Module], nn.Module]:
    """Of an activation: a small network, trained until it errs on a few of the digits only."""

    def trained(activation: nn.Module) -> nn.Module:
        x, y = datasets.load("digits").train
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), activation, nn.Linear(32, 10))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        return network.eval()

    return trained


@pytest.fixture(scope="session")
def network(classifier: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """One of these, smooth, whose weights nothing changes any more."""
    return classifier(nn.Tanh()).requires_grad_(False)


@pytest.fixture
def robbench(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("ROBBENCH_DATA", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call
