"""What is known of a dataset without its files: enough to make cells, and to read their records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from robbench.datasets.dataset import (
    LARGE_CONTROL,
    LARGE_EPS,
    SMALL_CONTROL,
    SMALL_EPS,
    Dataset,
    Split,
    Subset,
)
from robbench.datasets.fetching import COUNTS


class Facts(NamedTuple):
    shape: tuple[int, int, int]
    labels: int
    eps: Mapping[str, tuple[Fraction, ...]] = LARGE_EPS
    control: Fraction = LARGE_CONTROL


FACTS = {
    "digits": Facts((1, 8, 8), 10, SMALL_EPS, SMALL_CONTROL),
    "mnist": Facts((1, 28, 28), 10, SMALL_EPS, SMALL_CONTROL),
    "fashion-mnist": Facts((1, 28, 28), 10, SMALL_EPS, SMALL_CONTROL),
    "cifar10": Facts((3, 32, 32), 10),
    "cifar10-jpeg": Facts((3, 32, 32), 10),
    "cifar100": Facts((3, 32, 32), 100),
    "tiny-imagenet": Facts((3, 64, 64), 200),
    "imagenet": Facts((3, 224, 224), 1000),
}


class Described(Dataset):
    """A dataset that says how many test images there are and has no pixel of them."""

    def subset(self, n: int) -> Subset:
        """Refuses the same n as the dataset itself; empty, without a hash."""
        self.check_count(n)
        return Subset(np.zeros(0, dtype=np.int64), *self.train, "")


def described(name: str, digest: str) -> Dataset:
    """A built-in dataset, or its view NAME@COUNT, by its name and hash; KeyError for others."""
    kind = name.partition("@")[0]
    facts = FACTS[kind]
    none, test = _blank(0, facts), _blank(COUNTS[kind][1], facts)
    labels = tuple(str(label) for label in range(facts.labels))
    return _hashed(Described(name, none, none, test, labels, facts.eps, facts.control), digest)


def blank(name: str) -> Dataset:
    """As many black images as a built-in dataset or its view NAME@COUNT has, to learn from too, on
    which it can be tried how long something takes. KeyError for other names."""
    kind, _, count = name.partition("@")
    facts, held = FACTS[kind], COUNTS[kind][0] // 10
    learning = COUNTS[kind][0] - held
    if count:
        learning, held = int(count), int(count) // 10
    train, validation = _blank(learning, facts), _blank(held, facts)
    made = replace(described(name, ""), train=train, validation=validation)
    return _hashed(made, f"{name}, blank")


def _blank(count: int, facts: Facts) -> Split:
    """One number, seen as all pixels."""
    x = torch.zeros(()).expand(count, *facts.shape)
    return Split(x, torch.arange(count) % facts.labels)


def _hashed(dataset: Dataset, digest: str) -> Dataset:
    vars(dataset)["hash"] = digest  # a cached property of pixels that are not here
    return dataset
