"""Networks: shapes for every name, published parameter counts, torchvision's logits, sites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robbench import networks
from robbench.errors import InputError

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
SMALL = {  # settings that keep a forward pass on a CPU short
    **{f"resnet{depth}": {"width": 4} for depth in (18, 20, 32, 34, 44, 50, 56, 110)},
    "wideresnet34-10": {"depth": 10, "widen": 1},
}
CIFAR, IMAGENET = ((3, 32, 32), 10), ((3, 224, 224), 1000)
COUNTS = [  # name, settings, (shape, labels), parameters as published
    ("resnet20", {}, CIFAR, 269_722),  # akamaster/pytorch_resnet_cifar10, option A
    ("resnet32", {}, CIFAR, 464_154),
    ("resnet44", {}, CIFAR, 658_586),
    ("resnet56", {}, CIFAR, 853_018),
    ("resnet110", {}, CIFAR, 1_727_962),
    ("resnet20", {"pre_activation": True}, CIFAR, 272_282),  # EnResNet's code, one member
    ("resnet110", {"pre_activation": True}, CIFAR, 1_730_522),
    ("resnet18", {}, CIFAR, 11_173_962),  # kuangliu/pytorch-cifar
    ("resnet34", {}, CIFAR, 21_282_122),
    ("resnet50", {}, CIFAR, 23_520_842),
    ("vgg16", {}, CIFAR, 14_728_266),
    ("resnet18", {}, IMAGENET, 11_689_512),  # torchvision
    ("resnet34", {}, IMAGENET, 21_797_672),
    ("resnet50", {}, IMAGENET, 25_557_032),
    ("vgg16", {}, IMAGENET, 138_357_544),
    ("wideresnet34-10", {}, CIFAR, 46_160_474),
    ("mlp", {}, ((1, 28, 28), 10), 78_500 + 10_100 + 10_100 + 1_010),
]
RESIDUAL = [
    ("resnet8", {}),
    ("resnet8", {"pre_activation": True}),
    ("resnet18", {"width": 4}),
    ("resnet50", {"width": 4}),
    ("wideresnet34-10", {"depth": 10, "widen": 1}),
    ("quick", {}),
    ("quick", {"pre_activation": True}),
]


class Recorder(nn.Module):
    """An identity that keeps what it saw and notes its name in a shared log."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.seen = x
        return x


def images(shape, number=2):
    return torch.rand(number, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_forward_is_readout_of_features(name, shape):
    network = networks.build(name, SMALL.get(name, {}), shape, labels=7).eval()
    x = images(shape)
    with torch.no_grad():
        features = network.features(x)
        assert features.shape == (2, network.readout.in_features)
        assert network(x).shape == (2, 7)
        assert torch.equal(network(x), network.readout(features))
    assert not any(isinstance(module, nn.Dropout) for module in network.modules())


@pytest.mark.parametrize("sequence", ["rows", "pixels"])
def test_lstm_reads_in_order_and_keeps_its_mode(sequence):
    network = networks.build("lstm", {"sequence": sequence, "layers": 2}, (3, 4, 5), 10).eval()
    seen = []
    network.recurrent.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = images((3, 4, 5))
    network(x)
    assert not network.recurrent.training
    if sequence == "rows":
        assert seen[0].shape == (2, 4, 15)
        assert torch.equal(seen[0][:, 1], x[:, :, 1].flatten(1))
    else:
        assert seen[0].shape == (2, 20, 3)
        assert torch.equal(seen[0][:, 6], x[:, :, 1, 1])


def test_imagenet_form_takes_small_images():
    network = networks.build("resnet18", {"form": "imagenet", "width": 4}, (1, 8, 8), 10).eval()
    assert network(images((1, 8, 8))).shape == (2, 10)
    with torch.device("meta"):
        network = networks.build("vgg16", {"form": "imagenet"}, (1, 28, 28), 10)
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "settings", "task", "expected"), COUNTS, ids=[f"{c[0]}-{c[3]}" for c in COUNTS]
)
def test_parameter_counts(name, settings, task, expected):
    with torch.device("meta"):
        network = networks.build(name, settings, *task)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_seed_fixes_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(networks.build("resnet8", {}, (1, 8, 8), 10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_normalize_is_inside_and_saved():
    network = networks.build("resnet8", {}, (3, 8, 8), 10).eval()
    x = images((3, 8, 8))
    assert torch.equal(network.normalize(x), x)
    assert {"normalize.mean", "normalize.std"} <= network.state_dict().keys()
    plain = network((x - 0.5) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    network.normalize = networks.Normalize((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert torch.equal(network(x), plain)


def torchvision_state(name):
    """A randomly initialised torchvision network, with BN statistics that are not 0 and 1."""
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, name)(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_give_torchvision_logits(name):
    theirs = torchvision_state(name)
    ours = networks.build(name, {"form": "imagenet"}, (3, 64, 64), 1000).eval()
    state = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}
    networks.load_torchvision(ours, state)
    x = images((3, 64, 64))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert torch.equal(ours(x), expected)


def test_torchvision_vgg_keys_and_shapes():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs = models.vgg16(weights=None).state_dict()
        ours = networks.build("vgg16", {}, (3, 224, 224), 1000)
    renamed = {ours.torchvision_key(key): value.shape for key, value in theirs.items()}
    own = {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("normalize")}
    assert renamed == own


def test_torchvision_weights_that_do_not_fit():
    state = torchvision_state("resnet18").state_dict()
    small = networks.build("resnet18", {"form": "cifar"}, (3, 64, 64), 1000)
    before = small.readout.weight.clone()
    with pytest.raises(InputError, match=r"do not fit: stem.0.weight is .* form='imagenet'"):
        networks.load_torchvision(small, state)
    assert torch.equal(small.readout.weight, before)
    with pytest.raises(InputError, match="torchvision has no weights for a MLP"):
        networks.load_torchvision(networks.build("mlp", {}, (3, 8, 8), 10), state)


@pytest.mark.parametrize(("name", "settings"), RESIDUAL, ids=str)
def test_sites_are_called_in_place(name, settings):
    network = networks.build(name, settings, (3, 16, 16), 10).eval()
    x = images((3, 16, 16))
    plain = network(x)
    log, shapes = [], []
    for index, block in enumerate(network.blocks):
        for site in ("branch", "sum", "out"):
            assert type(getattr(block, site)) is nn.Identity
            setattr(block, site, Recorder(f"{index}.{site}", log))
        block.register_forward_hook(lambda module, args, output: shapes.append((args[0], output)))
    assert torch.equal(network(x), plain)
    count = len(network.blocks)
    assert log == [f"{i}.{site}" for i in range(count) for site in ("branch", "sum", "out")]
    for block, (before, after) in zip(network.blocks, shapes, strict=True):
        assert block.downsamples == (before.shape != after.shape)
        post_activation = hasattr(block, "residual")
        total = block.sum.seen
        assert torch.equal(block.out.seen, F.relu(total) if post_activation else total)
        assert block.out.seen is after
        if not block.downsamples:
            assert torch.equal(total, before + block.branch.seen)
    assert (total < 0).any()  # `sum` really comes before the last ReLU


def test_replaced_site_changes_the_logits():
    network = networks.build("quick", {}, (1, 8, 8), 10).eval()
    x = images((1, 8, 8))
    plain = network(x)
    network.blocks[1].branch = nn.Dropout(1.0).train()  # F(x) vanishes
    assert not torch.equal(network(x), plain)
    assert len(network.blocks) == 3


def test_pre_activation_follows_enresnet():
    network = networks.build("resnet20", {"pre_activation": True}, (3, 8, 8), 10)
    assert len(network.blocks) == 9
    assert [type(module) for module in network.stem] == [nn.Conv2d]
    block = network.blocks[3]
    seen = []
    block.shortcut.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(torch.randn(2, 16, 8, 8))
    assert (seen[0] >= 0).all()  # the shortcut sees the activated input


def test_option_a_shortcut_is_parameter_free():
    block = networks.build("resnet8", {"width": 4}, (3, 8, 8), 10).blocks[1]
    x = images((4, 7, 7))
    short = block.shortcut(x)
    assert short.shape == (2, 8, 4, 4) == block(x).shape
    assert torch.equal(short[:, 2:6], x[:, :, ::2, ::2])
    assert short[:, :2].eq(0).all() and short[:, 6:].eq(0).all()


def test_quick_halves_images_from_28_pixels_on():
    assert networks.build("quick", {}, (1, 28, 28), 10).stem[0].stride == (2, 2)
    assert networks.build("quick", {}, (1, 27, 27), 10).stem[0].stride == (1, 1)


def test_settings_reach_the_network():
    assert networks.build("mlp", {"hidden": [5]}, (1, 8, 8), 10).readout.in_features == 5
    wide = networks.build("wideresnet34-10", {"depth": 10, "widen": 1, "dropout": 0.3}, *CIFAR)
    assert [module.p for module in wide.modules() if isinstance(module, nn.Dropout)] == [0.3] * 3
    assert networks.build("resnet8", {"stem_stride": 2}, *CIFAR).stem[0].stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet21", {}, "unknown network 'resnet21'; did you mean"),
        ("resnet20", {"widht": 8}, "setting of network 'resnet20': 'widht'; did you mean 'width'"),
        ("resnet20", {"width": "8"}, "'width' of network 'resnet20' must be a positive whole"),
        ("resnet20", {"width": True}, "must be a positive whole number, not True"),
        ("resnet20", {"width": 0}, "must be a positive whole number, not 0"),
        ("resnet20", {"pre_activation": 1}, "must be true or false, not 1"),
        ("resnet18", {"form": "cifr"}, "'form' of network 'resnet18': 'cifr'; did you mean 'cifar"),
        ("lstm", {"sequence": 3}, "'sequence' of network 'lstm': '3'; known: pixels, rows"),
        ("mlp", {"hidden": 100}, "must be a list of positive whole numbers, not 100"),
        ("wideresnet34-10", {"dropout": 1.0}, "must be a number from 0 to below 1, not 1.0"),
        ("wideresnet34-10", {"depth": 35}, "depth of a wide ResNet must be 6n \\+ 4"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(InputError, match=message):
        networks.build(name, settings, (3, 32, 32), 10)
