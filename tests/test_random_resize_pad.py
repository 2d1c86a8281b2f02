"""Random resizing and padding against torch's own, and against the paper's count of patterns."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from robbench import datasets, registry
from robbench.checkpoints import Shelf
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanProbabilities

CPU = torch.device("cpu")
SHAPE, LABELS = (1, 8, 8), 10
TINY = "network=resnet8(width=2), epochs=1, batch_size=16"
module = inspect.getmodule(registry.defenses.get("random-resize-pad"))


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:33] for tensor in digits.train)))


def images(n, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1


def layer(scale):
    """The transformation alone."""
    return module.RandomResizePad(torch.nn.Identity(), scale)


def shelved(spec, dataset, folder):
    return Shelf([folder]).members(resolve(spec)[0], dataset, 0, CPU)[0]


def test_without_room_it_is_the_base_bit_for_bit(dataset, tmp_path):
    base = shelved(f"standard({TINY})", dataset, tmp_path)
    spec = f"random-resize-pad(base=standard({TINY}), epochs=0, scale=1)"
    around = shelved(spec, dataset, tmp_path)
    x = dataset.test.x[:50]
    assert torch.equal(around[0](x), base[0](x))
    assert torch.equal(around[0].features(x), base[0].features(x))


def test_without_training_the_weights_are_those_of_the_base(dataset, tmp_path):
    base = shelved(f"standard({TINY})", dataset, tmp_path)
    around = shelved(f"random-resize-pad(base=standard({TINY}), epochs=0)", dataset, tmp_path)
    state = around[0].network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base[0].state_dict().items())


@pytest.mark.parametrize("side", [8, 28])
def test_resizing_and_placing_are_those_of_torch(side):
    x = images(30, (3, side, side))
    size = torch.arange(30) % 5 + side
    top, left = torch.arange(30) % 3, torch.arange(30) % 2
    whole = side + 6
    placed = module.place(module.place(x, 2, size, top, whole), 3, size, left, whole)
    for image, found, s, t, at in zip(x, placed, size, top, left, strict=True):
        resized = F.interpolate(image[None], size=(int(s), int(s)), mode="nearest")[0]
        right, bottom = whole - int(s) - int(at), whole - int(s) - int(t)
        assert torch.equal(found, F.pad(resized, (int(at), right, int(t), bottom)))


def test_every_pixel_of_the_canvas_passes_its_gradient_to_one_pixel_of_the_image():
    x = images(2, (1, 4, 4)).double().requires_grad_()

    def repeated(x):
        torch.manual_seed(0)
        return layer(1.5).transformed(x)

    assert torch.autograd.gradcheck(repeated, x)


def test_the_canvas_has_the_size_of_the_paper():
    assert layer(331 / 299).transformed(torch.zeros(1, 3, 299, 299)).shape == (1, 3, 331, 331)


def patterns(side, scale, draws):
    """The different (top, left, height, width) of the image on its canvas."""
    torch.manual_seed(0)
    inside = layer(scale).transformed(torch.ones(draws, 1, side, side))[:, 0] > 0
    rows, columns = inside.any(2).int(), inside.any(1).int()
    box = [rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)]
    return torch.stack(box, dim=1).unique(dim=0)


@pytest.mark.parametrize(("side", "expected"), [(28, 29), (8, 4)])
def test_there_are_as_many_patterns_as_documented(side, expected):
    assert len(patterns(side, 331 / 299, 2000)) == expected


def test_patterns_are_counted_as_the_paper_counts_its_own():
    found = patterns(8, 1.5, 5000)
    canvas = 12
    assert len(found) == sum((canvas - size + 1) ** 2 for size in range(8, canvas)) == 54
    # section 3.2: sizes 299 to 330 on a canvas of 331
    assert sum((331 - size + 1) ** 2 for size in range(299, 331)) == 12528


def test_sizes_and_places_are_uniform():
    found = layer(1.5)
    torch.manual_seed(0)
    inside = found.transformed(torch.ones(8000, 1, 8, 8))[:, 0] > 0
    size = inside.any(2).sum(1)
    counts = torch.bincount(size, minlength=12)[8:]
    assert len(counts) == 4
    assert (counts / 8000 - 0.25).abs().amax() < 0.02
    top = inside.any(2).int().argmax(1)[size == 8]
    assert (torch.bincount(top, minlength=5) / len(top) - 0.2).abs().amax() < 0.04


def test_images_of_a_batch_have_patterns_of_their_own():
    defense = resolve("random-resize-pad(base=standard(network=resnet8(width=2)), scale=1.5)")[0]
    members = defense.build(SHAPE, LABELS).eval()
    assert Deployed(members, MeanProbabilities(), SHAPE, LABELS).randomness == ["image"]


def test_images_that_are_not_square_keep_their_form():
    torch.manual_seed(0)
    inside = layer(1.5).transformed(torch.ones(200, 1, 8, 16))[:, 0] > 0
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    assert inside.shape[1:] == (12, 24)
    assert ((width / height - 2).abs() <= 1 / 8).all()


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_a_network_of_one_size_is_refused_in_one_line(network):
    with pytest.raises(InputError, match=f"standard.network={network}. takes no images of another"):
        resolve(f"random-resize-pad(base=standard(network={network}))")[0].build(SHAPE, LABELS)


def test_it_trains_against_an_adversary_that_sees_the_patterns(dataset, tmp_path):
    fgsm = f"{TINY.partition(', ')[2]}, adversarial=fgsm(eps=0.1)"
    base = shelved(f"standard({TINY})", dataset, tmp_path)
    around = shelved(f"random-resize-pad(base=standard({TINY}), {fgsm})", dataset, tmp_path)
    weights = zip(around[0].network.parameters(), base[0].parameters(), strict=True)
    assert all(not torch.equal(a, b) and a.isfinite().all() for a, b in weights)
