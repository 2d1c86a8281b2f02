"""DropConnect and dropout, against binomial moments and torch's own dropout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from robbench import datasets, networks
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.networks.sampled import laws
from robbench.training import train

SHAPE, LABELS = (1, 8, 8), 10
CPU = torch.device("cpu")
NETWORKS = ["mlp(hidden=[12, 8])", "resnet8(width=2)", "lstm(hidden=6)"]
NAMES = ["dropconnect", "dropout"]


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:96] for tensor in digits.train)))


def one(name, network=NETWORKS[0], **fields):
    fields = {"network": network, "epochs": 2, "batch_size": 16, **fields}
    return type(resolve(name)[0])(**fields)


def fresh(defense, seed=0):
    torch.manual_seed(seed)
    return defense.build(SHAPE, LABELS)


def trained(defense, dataset):
    members = fresh(defense)
    train(defense, members, dataset, 0, CPU)
    return members


def images(n):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def deployed(defense, members):
    return Deployed(members.eval(), defense.rule(), SHAPE, LABELS, defense.draws)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("test", ["mean", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_with_p_0_it_trains_the_plain_network_bit_for_bit(name, test, network, dataset):
    plain = trained(one("standard", network), dataset)
    off = trained(one(name, network, p=0, test=test), dataset)
    assert torch.equal(off[0](images(9)), plain[0](images(9)))
    assert off.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_by_mean_the_answer_is_that_of_the_plain_network(name, network, dataset):
    members = trained(one(name, network), dataset)
    plain = fresh(one("standard", network)).eval()
    plain.load_state_dict(members.state_dict())
    assert torch.equal(members.eval()[0](images(9)), plain[0](images(9)))
    assert deployed(one(name, network), members).randomness == ["none"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("name", "kind"), [("dropconnect", "call"), ("dropout", "image")])
def test_left_on_masks_are_drawn_per_call_and_dropout_per_image(name, kind, network):
    defense = one(name, network, test="sample")
    assert deployed(defense, fresh(defense)).randomness == [kind]


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_kept_weights_follow_the_binomial_law(p):
    mean, law = next(laws(fresh(one("dropconnect", "mlp(hidden=[50])", p=p))))
    drawn = law.draw(mean).detach()
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], mean.detach()[kept] / (1 - p))
    assert stats.binomtest(int(kept.sum()), kept.numel(), 1 - p).pvalue > 1e-4
    # scale D = mean / (1 - p): the moments of D · Binomial(1, 1 - p)
    scale, binomial = mean.detach().numpy() / (1 - p), stats.binom(1, 1 - p)
    np.testing.assert_allclose(mean.detach(), scale * binomial.mean(), rtol=1e-5)
    deviation = law.deviation(mean).detach()
    np.testing.assert_allclose(deviation, np.abs(scale) * binomial.std(), rtol=1e-5)


def test_masks_leave_the_expected_output_of_a_layer_as_it_is():
    layer = fresh(one("dropconnect", "mlp(hidden=[20])"))[0].layers[1]
    x = images(1).flatten(1)
    with torch.no_grad():
        draws = torch.stack([layer(x)[0] for _ in range(2000)])
        expected = nn.functional.linear(x, layer.weight, layer.bias)[0]
        errors = (draws.mean(dim=0) - expected).abs() / draws.std(dim=0) * 2000**0.5
    assert float(errors.max()) < 4


@pytest.mark.parametrize(
    ("readout", "network", "masked"),
    [(True, "mlp", 4), (False, "mlp", 3), (True, "resnet8", 1), (True, "lstm", 1)],
)
def test_the_weights_of_fully_connected_layers_are_masked_and_nothing_else(
    readout, network, masked
):
    member = fresh(one("dropconnect", network, readout=readout))[0]
    linear = [m.weight for m in member.modules() if isinstance(m, nn.Linear)]
    assert [id(mean) for mean, _ in laws(member)] == [id(weight) for weight in linear[:masked]]


def test_a_network_without_hidden_fully_connected_layers_is_refused_without_the_readout():
    with pytest.raises(InputError, match="resnet8.* write readout=true"):
        fresh(one("dropconnect", "resnet8", readout=False))


def test_dropout_is_that_of_a_network_with_torchs_own_dropout_layers():
    member = fresh(one("dropout", p=0.4))[0].train()
    plain = networks.build("mlp", {"hidden": [12, 8]}, SHAPE, LABELS)
    plain.load_state_dict(member.state_dict())
    layers = list(plain.layers)  # flatten, linear, relu, linear, relu
    twin = nn.Sequential(*layers[:3], nn.Dropout(0.4), *layers[3:], nn.Dropout(0.4), plain.readout)
    torch.manual_seed(3)
    expected = twin(images(7))
    torch.manual_seed(3)
    assert torch.equal(member(images(7)), expected)


def test_randomness_only_at_test_is_a_base_without_further_training(dataset):
    for name in NAMES:
        defense = one(name, base="standard", epochs=0, test="sample")
        source, members = fresh(one("standard"), seed=5), fresh(defense)
        defense.start(members, source)
        state = source.state_dict()
        assert all(torch.equal(state[key], value) for key, value in members.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_of_several_draws_are_their_mean_softmax(name):
    defense = one(name, test="sample", draws=5)
    model = deployed(defense, fresh(defense))
    draw = model.draw(images(6), 5)
    expected = draw.logits[:, 0].softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(model.rule.scores(draw).exp(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_vote_of_one_is_refused(name):
    with pytest.raises(InputError, match="write draws=50"):
        resolve(f"{name}(test=vote, draws=1)")


@pytest.mark.parametrize("name", NAMES)
def test_a_vote_is_one_of_fifty_and_attacked_as_a_vote(name):
    configured = resolve(f"{name}(test=vote)")[0]
    assert configured.draws == 50
    assert list(configured.losses) == ["vote"]
    assert not resolve(f"{name}(test=sample)")[0].losses


@pytest.mark.parametrize("name", NAMES)
def test_dropping_everything_is_refused(name):
    with pytest.raises(InputError, match="p"):
        resolve(f"{name}(p=1)")
