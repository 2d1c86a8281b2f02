"""Defensive distillation: temperatures, soft labels, and an attacker who is not held up by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.checkpoints import Shelf
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.recipes import Batch
from robbench.rules import Draw, MeanProbabilities
from robbench.training import train

CPU = torch.device("cpu")
SHAPE, LABELS = (1, 8, 8), 10
TINY = "network=resnet8(width=2), epochs=2, batch_size=16"


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:33] for tensor in digits.train)))


def fresh(spec):
    defense = resolve(spec)[0]
    torch.manual_seed(0)
    return defense, defense.build(SHAPE, LABELS)


def batch_of(n=16):
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(n) % LABELS, x, LABELS)


def rng():
    return torch.Generator().manual_seed(0)


class OneHot(nn.Module):
    """A teacher that is certain of the given labels, whatever it sees."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, x):
        return F.one_hot(self.y, LABELS) * 1e5


def draw_of(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Draw(torch.randn(1, 1, 16, LABELS, generator=generator, dtype=dtype) * 30)


def test_a_teacher_at_temperature_one_is_standard_bit_for_bit(dataset):
    plain = fresh(f"standard({TINY})")
    teacher = fresh(f"distillation({TINY}, base=none, temperature=1)")
    for defense, members in (plain, teacher):
        train(defense, members, dataset, 0, CPU)
    state = teacher[1].state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain[1].state_dict().items())


def test_a_certain_teacher_teaches_labels():
    batch = batch_of()
    student, members = fresh(f"distillation({TINY}, temperature=1)")
    student.start(members, nn.ModuleList([OneHot(batch.y)]))
    taught = student.loss(members, student.batch(members, batch, rng()))
    expected = F.cross_entropy(members[0](batch.x), batch.y, reduction="none")
    torch.testing.assert_close(taught, expected)


def test_soft_labels_are_the_mean_softmax_of_the_teachers_at_temperature():
    student, members = fresh(f"distillation({TINY}, temperature=7)")
    teachers = nn.ModuleList(fresh(f"standard({TINY}, members=2)")[1]).eval()
    student.start(members, teachers)
    batch = batch_of()
    expected = sum((teacher(batch.x) / 7).softmax(1) for teacher in teachers) / 2
    torch.testing.assert_close(student.batch(members, batch, rng()).y, expected)


def test_the_student_starts_fresh():
    student, members = fresh(f"distillation({TINY})")
    before = {key: value.clone() for key, value in members.state_dict().items()}
    student.start(members, fresh(f"standard({TINY})")[1].eval())
    assert all(torch.equal(before[key], value) for key, value in members.state_dict().items())


def test_the_loss_is_the_divergence_from_the_soft_labels_and_their_entropy():
    student, draw = resolve("distillation(temperature=5)")[0], draw_of()
    shares = torch.rand(16, LABELS, generator=rng(), dtype=torch.float64).softmax(1)
    divergence = F.kl_div((draw.logits[0, 0] / 5).log_softmax(1), shares, reduction="none").sum(1)
    entropy = torch.distributions.Categorical(shares).entropy()
    found = student.criterion(draw, shares, torch.zeros(16, *SHAPE))
    torch.testing.assert_close(found, divergence + entropy)


def test_gradients_of_the_loss_are_exact():
    student = resolve("distillation(temperature=5)")[0]
    shares = torch.rand(3, 4, generator=rng(), dtype=torch.float64).softmax(1)
    logits = torch.randn(1, 2, 3, 4, generator=rng(), dtype=torch.float64, requires_grad=True)
    x = torch.zeros(3, *SHAPE)
    assert torch.autograd.gradcheck(lambda z: student.criterion(Draw(z), shares, x), logits)


def test_the_search_for_x_has_a_gradient_where_the_deployed_softmax_has_none():
    student = resolve("distillation(temperature=50)")[0]
    z = F.one_hot(torch.arange(16) % LABELS, LABELS).float() * 200
    y = torch.arange(16) % LABELS
    logits = z.view(1, 1, 16, LABELS).requires_grad_()
    at_one = F.cross_entropy(MeanProbabilities().scores(Draw(logits)), y, reduction="sum")
    assert not torch.autograd.grad(at_one, logits)[0].any()
    at_fifty = student.objective(Draw(logits), y, None).sum()
    assert torch.autograd.grad(at_fifty, logits)[0].abs().amax() > 1e-3


def test_targets_are_approached_at_temperature_too():
    student, draw = resolve("distillation(temperature=5)")[0], draw_of()
    y, target = torch.arange(16) % LABELS, (torch.arange(16) + 3) % LABELS
    expected = -F.cross_entropy(draw.logits[0, 0] / 5, target, reduction="none")
    torch.testing.assert_close(student.objective(draw, y, target), expected)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_the_losses_of_the_attacker_do_not_fade_with_the_scale_of_the_logits(loss):
    y = torch.arange(32) % LABELS
    x = torch.rand(32, *SHAPE, generator=rng(), dtype=torch.float32)
    torch.manual_seed(0)
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, LABELS))
    large = nn.Sequential(small, Scaled(1e4))
    own = resolve("distillation")[0].losses[loss]
    signs = [
        Access(Deployed(nn.ModuleList([net]), MeanProbabilities(), SHAPE, LABELS))
        .gradient(x, y, own)
        .gradient.sign()
        for net in (small, large)
    ]
    assert (signs[0] == signs[1]).float().mean() > 0.999
    assert bool(signs[0].any())


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_the_teacher_is_at_the_temperature_of_the_student_unless_it_names_one():
    for spec, expected in {
        "distillation": "distillation(base=none)",
        "distillation(temperature=5)": "distillation(base=none, temperature=5.0)",
        "distillation(temperature=5, base=distillation(base=none, temperature=3))": (
            "distillation(base=none, temperature=3.0)"
        ),
        "distillation(temperature=5, base=standard)": "standard",
    }.items():
        assert str(resolve(spec)[0].base_spec()) == expected


def test_downloaded_weights_are_no_teacher():
    with pytest.raises(InputError, match="no teacher; write base=standard"):
        resolve("distillation(base=torchvision:IMAGENET1K_V1)")


def test_a_student_learns_from_the_trained_teacher(dataset, tmp_path):
    shelf = Shelf([tmp_path])
    student = resolve(f"distillation({TINY}, base=distillation({TINY}, base=none))")[0]
    members, key, _ = shelf.members(student, dataset, 0, CPU)
    hard = resolve(f"distillation({TINY}, base=none)")[0]
    teacher, below, _ = shelf.members(hard, dataset, 0, CPU)
    assert key != below
    weights = zip(members.parameters(), teacher.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
