"""ε, budgets, distances, projections and random starts, by property and by closed form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from scipy import stats

from robbench.errors import InputError
from robbench.threat import (
    NORM_NAMES,
    Threat,
    ascend,
    check_budget,
    distance,
    format_eps,
    parse_eps,
    parse_norm,
    project,
    random_start,
    within,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
BALLS = ["linf", "l2", "l1"]
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
DUALS = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE = (2, 2, 2, 3)
RADII = st.fractions(Fraction(1, 255), 2, max_denominator=255).map(float)


def images(low, high):
    values = st.floats(low, high, width=32, allow_subnormal=False)
    return arrays.arrays(np.float32, SHAPE, elements=values).map(torch.from_numpy)


def lengths(delta, norm):
    """(N,) by NumPy, in float64."""
    return np.linalg.norm(delta.double().flatten(1).numpy(), ORDERS[norm], axis=1)


@PROPERTY
@given(st.fractions(Fraction(1, 10**6), 300, max_denominator=10**6))
def test_eps_is_written_exactly(eps):
    assert parse_eps(format_eps(eps)) == eps


@PROPERTY
@given(st.floats(1e-9, 300))
def test_a_float_is_the_decimal_that_it_prints(eps):
    assert parse_eps(eps) == Fraction(repr(eps))
    assert float(format_eps(parse_eps(eps))) == eps


@pytest.mark.parametrize(
    ("text", "eps", "written"),
    [
        ("8/255", Fraction(8, 255), "8/255"),
        ("16/255", Fraction(16, 255), "16/255"),
        ("15/255", Fraction(1, 17), "15/255"),
        ("51/255", Fraction(1, 5), "0.2"),
        (" 0.10 ", Fraction(1, 10), "0.1"),
        (".5", Fraction(1, 2), "0.5"),
        ("1e-3", Fraction(1, 1000), "0.001"),
        ("1/3", Fraction(1, 3), "85/255"),
        ("1/7", Fraction(1, 7), "1/7"),
        ("0.5/255", Fraction(1, 510), "1/510"),
        (3, Fraction(3), "3"),
        (np.float64(0.1), Fraction(1, 10), "0.1"),
        (np.float32(0.1), Fraction(1, 10), "0.1"),
        (Fraction(2, 255), Fraction(2, 255), "2/255"),
    ],
)
def test_eps_as_people_write_it(text, eps, written):
    assert parse_eps(text) == eps
    assert format_eps(eps) == written


@pytest.mark.parametrize(
    "text", ["", "eight", "8/", "8/0", "/255", "1/2/3", "nan", "inf", "0x1", "1e999999999", None]
)
def test_what_is_no_number(text):
    with pytest.raises(InputError) as error:
        parse_eps(text)
    message = f"ε = {text} is not a number; write a fraction (8/255) or a decimal (0.1)"
    assert str(error.value) == message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), True])
def test_numbers_that_are_no_eps(number):
    with pytest.raises(InputError, match="is not a number"):
        parse_eps(number)


@pytest.mark.parametrize("text", ["0", "0/255", "-0.1", "-8/255", 0, -1.0, Fraction(0)])
def test_eps_is_positive(text):
    with pytest.raises(InputError) as error:
        parse_eps(text)
    assert str(error.value) == (
        f"ε = {text} is not positive; the clean accuracy is part of every record,"
        " so write an ε above 0, such as 8/255"
    )


def test_no_eps_is_a_dash():
    assert format_eps(None) == "-"


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", "8", "ε = 8 is more than the whole box [0, 1] under linf; write 8/255"),
        ("linf", "2.5", "ε = 2.5 is more than the whole box [0, 1] under linf; write 3/255"),
        ("l2", "256", "ε = 256 under l2 is in units of [0, 1], not of 255; write 256/255"),
        ("l1", "1000", "ε = 1000 under l1 is in units of [0, 1], not of 255; write 1000/255"),
        ("l0", "0.5", "ε = 0.5 under l0 counts pixels; write a whole number"),
        ("none", "0.5", "ε = 0.5 has no meaning for norm none; leave it out"),
    ],
)
def test_budgets_that_are_a_slip(norm, eps, message):
    with pytest.raises(InputError) as error:
        check_budget(norm, parse_eps(eps))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("linf", "1"), ("linf", "8/255"), ("l2", "255"), ("l1", "40"), ("l0", "300"), ("l2", "1/7")],
)
def test_budgets_that_are_none(norm, eps):
    check_budget(norm, parse_eps(eps))


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_no_budget_is_fine_for_every_norm(norm):
    check_budget(norm, None)


@pytest.mark.parametrize(
    ("text", "norm"),
    [("Linf", "linf"), ("inf", "linf"), ("Inf", "linf"), ("∞", "linf"), ("L2", "l2"), ("2", "l2")]
    + [("1", "l1"), ("0", "l0"), ("none", "none")],
)
def test_norms_as_people_write_them(text, norm):
    assert parse_norm(text) == norm


def test_an_unknown_norm():
    with pytest.raises(InputError, match=r"^unknown norm 'l3'; did you mean .*'l2'"):
        parse_norm("l3")


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (Threat(eps="16/255"), "linf 16/255"),
        (Threat(norm="l2"), "l2 -"),
        (Threat(norm="l2", eps=1, target=0), "l2 1 target=0"),
        (Threat(eps="0.1", target="least-likely"), "linf 0.1 target=least-likely"),
    ],
)
def test_a_threat_is_one_short_text_and_survives_json(threat, text):
    assert str(threat) == text
    assert Threat.model_validate_json(threat.model_dump_json()) == threat
    assert threat.targeted == ("target" in text)


@pytest.mark.parametrize(
    "fields", [{"norm": "l3"}, {"eps": "0"}, {"eps": "x"}, {"target": "likely"}, {"epsilon": "0.1"}]
)
def test_threats_that_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Threat(**fields)


@PROPERTY
@given(images(0, 1), images(-2, 3), RADII)
@pytest.mark.parametrize("norm", BALLS)
def test_a_projection_is_in_ball_and_box(norm, x, x_adv, eps):
    inside = project(x_adv, x, norm, eps)
    assert inside.min() >= 0 and inside.max() <= 1
    assert (lengths(inside.double() - x.double(), norm) <= eps + 1e-6).all()


@PROPERTY
@given(images(0, 1), images(-2, 3), RADII)
@pytest.mark.parametrize("norm", BALLS)
def test_projecting_twice_changes_nothing(norm, x, x_adv, eps):
    once = project(x_adv, x, norm, eps)
    torch.testing.assert_close(project(once, x, norm, eps), once, rtol=0, atol=1e-6)


@PROPERTY
@given(images(0, 1), images(-2, 3), RADII)
def test_the_linf_projection_is_the_nearest_point(x, x_adv, eps):
    nearest = x_adv.clamp((x - eps).clamp_min(0), (x + eps).clamp_max(1))
    torch.testing.assert_close(project(x_adv, x, "linf", eps), nearest, rtol=0, atol=1e-6)


@PROPERTY
@given(images(0, 1), images(0, 1), st.floats(1, 3))
@pytest.mark.parametrize("norm", BALLS)
def test_a_point_inside_stays(norm, x, x_adv, room):
    eps = float(room * lengths(x_adv - x, norm).max()) + 1e-6
    torch.testing.assert_close(project(x_adv, x, norm, eps), x_adv, rtol=0, atol=1e-6)


@PROPERTY
@given(images(0, 1), images(0, 1), RADII)
def test_the_l2_projection_is_the_nearest_point_of_the_ball(x, x_adv, eps):
    delta = x_adv.double() - x.double()
    shrink = np.minimum(1, eps / np.maximum(lengths(delta, "l2"), 1e-12))
    nearest = x + delta * torch.from_numpy(shrink).view(-1, 1, 1, 1)
    torch.testing.assert_close(project(x_adv, x, "l2", eps).double(), nearest, rtol=0, atol=1e-6)


@PROPERTY
@given(images(-4, 4))
@pytest.mark.parametrize("norm", BALLS)
def test_ascent_is_of_unit_length_and_gains_the_dual_norm(norm, gradient):
    x = torch.full(SHAPE, 0.5)
    for image, length in zip(gradient, lengths(gradient, "l2"), strict=True):
        if length < 1e-6:
            image.fill_(1.0)
    step = ascend(gradient, x, norm)
    assert lengths(step, norm) == pytest.approx(1, rel=1e-5)
    gain = (gradient.double() * step.double()).flatten(1).sum(1)
    dual = np.linalg.norm(gradient.double().flatten(1), DUALS[norm], axis=1)
    assert gain.numpy() == pytest.approx(dual, rel=1e-5)


@pytest.mark.parametrize("norm", BALLS)
def test_a_zero_gradient_goes_nowhere(norm):
    assert not ascend(torch.zeros(SHAPE), torch.rand(SHAPE), norm).any()


def test_l1_passes_over_pixels_at_the_end_of_the_box():
    x = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 2)
    outwards = torch.tensor([-3.0, 4.0, 1.0, -2.0]).view(1, 1, 2, 2)
    assert ascend(outwards, x, "l1").flatten().tolist() == [0, 0, 0, -1]
    assert ascend(-outwards, x, "l1").flatten().tolist() == [0, -1, 0, 0]


@pytest.mark.parametrize(
    ("norm", "expected"), [("linf", 0.5), ("l2", 0.75), ("l1", 1.25), ("l0", 2), ("none", 0.5)]
)
def test_distances_by_hand(norm, expected):
    x = torch.full((1, 3, 2, 2), 0.25)
    moved = x.clone()
    moved[0, :, 0, 0] += torch.tensor([0.5, 0.5, 0.0])  # l0 counts a pixel once
    moved[0, 2, 1, 1] -= 0.25
    found = distance(moved, x, norm)
    assert found.dtype == torch.float64 and found.shape == (1,)
    assert found.item() == expected


@pytest.mark.parametrize("norm", BALLS)
def test_only_rounding_is_forgiven(norm):
    threat = Threat(norm=norm, eps="8/255")
    eps = 8 / 255
    distances = torch.tensor([0, eps, eps + 1e-6, 1.01 * eps, float("nan")], dtype=torch.float64)
    assert within(distances, threat).tolist() == [True, True, True, False, False]


def test_without_a_budget_every_finite_distance_is_within():
    distances = torch.tensor([0, 1e6, float("inf"), float("nan")])
    assert within(distances, Threat(norm="none")).tolist() == [True, True, False, False]


@PROPERTY
@given(images(0, 1), RADII, st.integers(0, 2**31))
@pytest.mark.parametrize("norm", BALLS)
def test_random_starts_are_in_ball_and_box(norm, x, eps, seed):
    start = random_start(x, norm, eps, torch.Generator().manual_seed(seed))
    assert start.min() >= 0 and start.max() <= 1
    assert (lengths(start.double() - x.double(), norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", BALLS)
def test_random_starts_are_uniform_in_the_ball(norm):
    n, d, eps = 4000, 12, 0.4
    x = torch.full((n, 3, 2, 2), 0.5)  # no start is clipped
    unit = (random_start(x, norm, eps, torch.Generator().manual_seed(0)) - x).flatten(1) / eps
    # the share of the ball of radius r is r ** d, in every norm
    assert stats.kstest(lengths(unit, norm) ** d, "uniform").pvalue > 0.01
    second = unit.square().mean(0)
    expected = {"linf": 1 / 3, "l2": 1 / (d + 2), "l1": 2 / ((d + 1) * (d + 2))}[norm]
    assert unit.mean(0).abs().max() < 4 * (expected / n) ** 0.5
    assert second.numpy() == pytest.approx(expected, rel=0.15)
    covariance = (unit.T @ unit / n).fill_diagonal_(0)
    assert covariance.abs().max() < 5 * expected / n**0.5


def test_one_seed_gives_one_start():
    x = torch.full(SHAPE, 0.5)
    starts = [random_start(x, "l2", 0.3, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
