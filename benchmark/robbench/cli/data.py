"""The command that brings a dataset here: data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli import check_installation

if TYPE_CHECKING:
    from robbench.datasets import Dataset

SHOWN = 10  # label names that are written out


@click.command("data")
@click.argument("name")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    envvar="ROBBENCH_DATA",
    help="Where datasets lie.  [default: $ROBBENCH_DATA or the user's cache]",
)
def data_command(name: str, data_dir: Path | None) -> None:
    """Fetch a dataset unless it is there, check it, say where it is and what it holds.

    Checked are the files that can be read, their checksums where they are known, and the number of
    images. imagenet cannot be fetched: the command says how to lay it out.

    \b
    robbench data cifar10 --data-dir data
    """
    check_installation()
    from robbench import datasets, registry

    place = datasets.fetch(name, data_dir) if registry.is_built_in(name) else None
    click.echo(summary(registry.dataset(name, data_dir)))
    if place is not None:
        click.echo(f"read from {place}")


def summary(dataset: Dataset) -> str:
    """Images per split, shape, labels and hash, a line each."""
    counts = [
        f"{len(split.y):,} {kind}"
        for kind, split in (
            ("test images", dataset.test),
            ("of validation", dataset.validation),
            ("of training", dataset.train),
        )
    ]
    names = ", ".join(dataset.labels[:SHOWN]) + (", …" if len(dataset.labels) > SHOWN else "")
    lines = [
        f"{dataset.name}: {', '.join(counts)}",
        f"shape {' x '.join(map(str, dataset.shape))}",
        f"{len(dataset.labels)} labels: {names}",
        f"hash {dataset.hash}",
    ]
    return "\n".join(lines)
