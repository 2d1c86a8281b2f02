"""Costs, distortion and Grad-CAM: a clock of our own, values by hand, SciPy and CAM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from robbench.errors import InputError
from robbench.metrics import costs
from robbench.metrics.costs import cost
from robbench.metrics.distortion import distortion
from robbench.metrics.gradcam import centre, centre_distance, grad_cam

MIB = 2**20


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is advanced."""
    times = [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: times[0])
    return times


def test_seconds_are_the_mean_of_the_calls_after_the_first(clock):
    durations = iter([100.0, 1.0, 2.0, 6.0])

    def call():
        clock[0] += next(durations)

    assert cost(call, repeats=3).seconds == 3


def test_an_epoch_is_one_call_that_nothing_precedes(clock):
    def epoch():
        clock[0] += 7.0

    assert cost(epoch, repeats=1, warmup=0).seconds == clock[0] == 7


def test_peak_memory_is_that_of_this_call_and_not_of_an_earlier_one():
    large = cost(lambda: torch.ones(64 * MIB // 4).sum(), repeats=1)
    small = cost(lambda: torch.ones(MIB // 4).sum(), repeats=1)
    assert large.peak - small.peak == pytest.approx(63 * MIB, rel=0.2)


def test_peak_memory_on_a_cpu_is_what_the_call_adds():
    held = torch.ones(64 * MIB // 4)
    assert cost(lambda: held.sum(), repeats=1).peak < 4 * MIB
    assert cost(lambda: held * 2, repeats=1).peak == pytest.approx(64 * MIB, rel=0.1)


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "CLEAR", tmp_path / "absent")
    assert math.isnan(cost(lambda: None, repeats=1).peak)


@pytest.mark.cuda
def test_peak_memory_on_cuda_is_what_torch_held_during_the_call():
    held = torch.cuda.memory_allocated()
    found = cost(lambda: torch.ones(4 * MIB, device="cuda"), device="cuda", repeats=2)
    assert found.peak - held == pytest.approx(16 * MIB, rel=0.01)


def test_distortion_leaves_failures_apart():
    found = distortion(np.array([1.0, 9.0, 2.0, 6.0]), np.array([True, False, True, True]))
    assert found == (3, 2, 1 / 4, 4)


def test_distortion_without_a_success_is_undefined():
    found = distortion(np.array([1.0, 2.0]), np.array([False, False]))
    assert math.isnan(found.mean) and math.isnan(found.median) and found.failures == 1


def test_grad_cam_of_a_pooled_linear_head_is_cam():
    """Zhou et al. 2016: there the map is the sum of feature maps, weighted by the head."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    head = nn.Linear(6, 3)
    activations = trunk(torch.rand(4, 1, 7, 5)).detach().requires_grad_()
    y = torch.tensor([0, 1, 2, 0])
    logits = head(activations.mean(dim=(2, 3)))
    (gradients,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), activations)
    cam = torch.einsum("nc,nchw->nhw", head.weight[y], activations).relu().detach()
    largest = cam.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(
        grad_cam(activations.detach(), gradients), cam / largest.clamp_min(1e-12)
    )


def test_grad_cam_is_enlarged_to_the_image():
    activations = torch.zeros(1, 1, 4, 4)
    activations[0, 0, 1, 2] = 5
    found = grad_cam(activations, torch.ones(1, 1, 4, 4), size=(16, 16))
    assert found.shape == (1, 16, 16) and found.max() == 1
    assert centre(found)[0].tolist() == [5.5, 9.5]  # of the second and third block of four


def test_evidence_against_the_label_gives_an_empty_map_without_a_centre():
    found = grad_cam(torch.ones(1, 2, 3, 3), -torch.ones(1, 2, 3, 3))
    assert found.eq(0).all() and centre(found).isnan().all()


def test_centres_are_scipys():
    maps = torch.rand(6, 9, 11, generator=torch.Generator().manual_seed(1))
    expected = [ndimage.center_of_mass(one.numpy() > 0.9) for one in maps]
    torch.testing.assert_close(centre(maps), torch.tensor(expected))


def test_centre_distance_is_the_mean_over_pairs_of_members():
    maps = torch.zeros(3, 1, 8, 8)
    maps[0, 0, 0, 0] = maps[1, 0, 0, 3] = maps[2, 0, 4, 0] = 1
    assert centre_distance(maps).tolist() == [(3 + 4 + 5) / 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost(lambda: None, repeats=0), "repeats is 0"),
        (lambda: distortion(np.ones(2), np.ones(3)), "2 distances with 3 outcomes"),
        (lambda: distortion(np.array([]), np.array([])), "0 distances"),
        (lambda: grad_cam(torch.ones(2, 3), torch.ones(2, 3)), "takes feature maps"),
        (lambda: centre_distance(torch.ones(1, 2, 4, 4)), "needs two members"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_give(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
