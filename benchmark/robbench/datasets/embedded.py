"""The dataset that is always there: handwritten digits, embedded in scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robbench.datasets.dataset import (
    SMALL_CONTROL,
    SMALL_EPS,
    Dataset,
    Split,
    stratified_order,
    take,
)

TEN = tuple(str(digit) for digit in range(10))


def digits(directory: Path) -> Dataset:
    """1,797 scans of 8 x 8 pixels in 17 gray levels (Alpaydin & Kaynak 1998, from scikit-learn).

    Test, validation and train are the first 500, the next 200 and the last 1,097 images of the
    stratified order. `directory` is not read.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32) / 16)[:, None]  # (1797, 1, 8, 8)
    whole = Split(x, torch.from_numpy(bunch.target.astype(np.int64)))
    order = stratified_order(bunch.target)
    return Dataset(
        "digits",
        train=take(whole, order[700:]),
        validation=take(whole, order[500:700]),
        test=take(whole, order[:500]),
        labels=TEN,
        eps=SMALL_EPS,
        control=SMALL_CONTROL,
    )
