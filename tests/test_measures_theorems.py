"""Theorems that several defenses rest on and that concern no single measure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.01, 20))
@PROPERTY
def test_softmax_cross_entropy_is_a_case_of_g_sce(seed, labels, scale):
    """MMC (Pang et al. 2020): centres W/2, matrices I and biases b + |W|²/4 give the same loss."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(5, labels).double()
    torch.nn.init.normal_(head.weight, std=scale, generator=rng)
    torch.nn.init.normal_(head.bias, generator=rng)
    z = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    y = torch.randint(labels, (6,), generator=rng)
    apart = torch.cdist(z, head.weight / 2).square()
    logits = head.bias + head.weight.square().sum(dim=1) / 4 - apart
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, y), loss(head(z), y))


STEPS = st.lists(st.tuples(st.floats(-2, 2), st.floats(-1, 1)), min_size=1, max_size=8)
X = np.linspace(-3, 3, 1201)


def smoothed(steps, sigma):
    """u(x, 0) = E f(x + σ B_1) on the grid, for a step function f and no drift, in closed form."""
    return sum(jump * stats.norm.cdf((X - place) / sigma) for place, jump in steps)


def largest_quotient(values):
    """All pairs of grid points together are no steeper than the steepest neighbours."""
    return np.abs(np.diff(values)).max() / (X[1] - X[0])


@given(STEPS)
@PROPERTY
def test_enresnet_theorem_1_the_largest_difference_quotient_falls_with_sigma(steps):
    """EnResNet (Wang et al. 2019) theorem 1."""
    quotients = [largest_quotient(smoothed(steps, sigma)) for sigma in (0.05, 0.1, 0.3, 1.0)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(quotients))


@given(STEPS, st.floats(0.02, 1))
@PROPERTY
def test_enresnet_theorem_1_bounds_differences_by_distance_over_sigma(steps, sigma):
    """With α = 1 and C = √(2/π) times the bound of f, which holds without drift."""
    ordered = sorted(steps)
    levels = np.cumsum([0.0, *(jump for _, jump in ordered)])
    centred = np.ptp(levels) / 2  # a constant may be taken off f
    bound = math.sqrt(2 / math.pi) * centred / sigma
    assert largest_quotient(smoothed(steps, sigma)) <= bound * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_enresnet_theorem_1_the_bound_is_attained_by_a_sign(sigma):
    steep = largest_quotient(smoothed([(0.0, 2.0)], sigma))
    assert steep == pytest.approx(math.sqrt(2 / math.pi) / sigma, rel=1e-3)
