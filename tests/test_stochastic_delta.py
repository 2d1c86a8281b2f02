"""The stochastic delta rule: closed forms of paper 002, and torch's own layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from robbench import datasets
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.networks.sampled import laws
from robbench.rules import ABSTAIN, Draw
from robbench.training import train

SHAPE, LABELS = (1, 8, 8), 10
CPU = torch.device("cpu")
NETWORKS = ["mlp(hidden=[12, 8])", "resnet8(width=2)", "lstm(hidden=6)"]
OFF = ["sdr-decay(beta=0, initial=0)", "sdr-decay(distribution=binomial, p=0)"] + [
    "sdr-learnable(initial=0)"
]


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:96] for tensor in digits.train)))


def one(spec, network=NETWORKS[0], **fields):
    """The defense of a spec, on a tiny network and with a short training."""
    fields = {"network": network, "epochs": 2, "batch_size": 16, **fields}
    return replace_fields(resolve(spec)[0], fields)


def replace_fields(defense, fields):
    return type(defense)(**{**defense.model_dump(exclude_defaults=True), **fields})


def fresh(defense, seed=0):
    torch.manual_seed(seed)
    return defense.build(SHAPE, LABELS)


def trained(defense, dataset, seed=0):
    members = fresh(defense)
    train(defense, members, dataset, seed, CPU)
    return members


def means(module):
    return {k: v for k, v in module.state_dict().items() if ".laws." not in k}


def images(n, seed=1):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def deployed(defense, members):
    return Deployed(members.eval(), defense.rule(), SHAPE, LABELS, defense.draws)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", OFF)
def test_switched_off_it_trains_the_plain_network_bit_for_bit(spec, network, dataset):
    plain = trained(one("standard", network), dataset)
    off = means(trained(one(spec, network), dataset))
    assert off.keys() == plain.state_dict().keys()
    assert all(torch.equal(off[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", ["sdr-decay", "sdr-learnable(test=mean)"])
def test_by_mean_the_answer_is_that_of_the_plain_network_with_the_means(spec, network, dataset):
    members = trained(one(spec, network), dataset).eval()
    plain = fresh(one("standard", network)).eval()
    plain.load_state_dict(means(members))
    assert torch.equal(members[0](images(9)), plain[0](images(9)))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", ["sdr-decay(test=sample)", "sdr-learnable"])
def test_one_draw_of_weights_serves_the_whole_batch(spec, network):
    defense = one(spec, network, initial=9)
    assert deployed(defense, fresh(defense)).randomness == ["call"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pass_is_that_of_the_plain_network_with_the_drawn_weights(network):
    member = fresh(one("sdr-learnable", network))[0]
    plain = fresh(one("standard", network))[0]
    torch.manual_seed(3)
    sampled = member(images(5))
    torch.manual_seed(3)
    names = {id(mean): name for name, mean in member.named_parameters()}
    drawn = {names[id(mean)]: law.draw(mean).detach() for mean, law in laws(member)}
    torch.testing.assert_close(
        sampled, torch.func.functional_call(plain, drawn, images(5)), rtol=1e-6, atol=1e-6
    )
    assert len(drawn) == len([m for m in plain.parameters()]) - 2 * sum(
        isinstance(m, nn.BatchNorm2d) for m in plain.modules()
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", ["sdr-decay", "sdr-learnable"])
def test_gradients_through_a_fixed_draw_are_exact(spec, network):
    member = fresh(one(spec, network))[0].double()
    x = images(3).double().requires_grad_()

    def frozen(x, *parameters):
        torch.manual_seed(0)
        return member(x).sin().sum()

    ends = ("readout", "recurrent", "stem")
    chosen = [p for name, p in member.named_parameters() if name.startswith(ends)]
    # a probe along a random direction: the full Jacobian would take minutes
    assert torch.autograd.gradcheck(frozen, (x, *chosen), fast_mode=True)


def test_the_mean_gets_the_gradient_at_the_drawn_weights():
    member = fresh(one("sdr-learnable"))[0]
    torch.manual_seed(3)
    F.cross_entropy(member(images(5)), torch.arange(5)).backward()
    torch.manual_seed(3)
    plain = fresh(one("standard"))[0]
    torch.manual_seed(3)
    with torch.no_grad():
        drawn = [law.draw(mean) for mean, law in laws(member)]
        for parameter, weights in zip(plain.parameters(), drawn, strict=True):
            parameter.copy_(weights)
    F.cross_entropy(plain(images(5)), torch.arange(5)).backward()
    for (mean, _), parameter in zip(laws(member), plain.parameters(), strict=True):
        torch.testing.assert_close(mean.grad, parameter.grad)


@pytest.mark.parametrize("spec", ["sdr-decay", "sdr-learnable", "sdr-learnable(scale=signed)"])
def test_drawn_weights_are_normal_with_the_mean_and_deviation_that_the_law_says(spec):
    for mean, law in laws(fresh(one(spec))):
        deviation = law.deviation(mean).abs()
        drawn = torch.stack([(law.draw(mean) - mean) / deviation for _ in range(30)]).detach()
        # about 1 in 10,000 by chance, and seeded
        assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("scale", ["softplus", "signed"])
def test_learnable_deviations_start_at_the_share_of_the_fan_in_that_is_asked_for(scale):
    member = fresh(one(f"sdr-learnable(scale={scale}, initial=0.25)", "mlp(hidden=[400, 400])"))[0]
    deviations = [law.deviation(mean).detach() for mean, law in laws(member)]
    for deviation, inputs in zip(deviations, (64, 64, 400, 400, 400, 400), strict=True):
        rms = float(deviation.square().mean().sqrt())
        assert rms == pytest.approx(0.25 / inputs**0.5, rel=0.7 if deviation.numel() < 99 else 0.15)
        assert (scale == "signed") == bool((deviation < 0).any())


def test_softplus_deviations_stay_positive_in_training(dataset):
    members = trained(one("sdr-learnable", lr=0.3), dataset)
    assert all(bool((law.deviation(mean) > 0).all()) for mean, law in laws(members))


def test_theorem_1_the_expected_squared_error_is_that_of_the_mean_plus_the_trace():
    torch.manual_seed(0)
    member = fresh(one("sdr-learnable(biases=false)", "mlp(hidden=[4])"))[0]
    linear = member.layers[1].double()  # 64 inputs, 4 independent regressions
    design, y = torch.randn(50, 64).double(), torch.randn(50, 4).double()
    with torch.no_grad():
        deviation = linear.laws.weight.deviation(linear.weight)
        at_mean = y - F.linear(design, linear.weight, linear.bias)
        trace = (design.square() @ deviation.square().T).sum()  # tr(X Σ Xᵀ), Σ diagonal
        errors = torch.stack([(y - linear(design)).square().sum() for _ in range(4000)])
    standard_error = float(errors.std()) / len(errors) ** 0.5
    assert trace > 20 * standard_error  # the term is there to be seen
    assert abs(float(errors.mean() - at_mean.square().sum() - trace)) < 4 * standard_error


@given(
    beta=st.floats(0, 2), zeta=st.floats(0.1, 1), start=st.floats(0, 1), steps=st.integers(1, 12)
)
@settings(max_examples=25, deadline=None)
def test_with_a_constant_gradient_the_spread_is_a_geometric_sum(beta, zeta, start, steps):
    defense = one(f"sdr-decay(beta={beta}, zeta={zeta}, grows=every-step)")
    members = fresh(defense)
    defense.start_training(members, 2)  # tau = 0.5: a decay after every batch
    defense.start_epoch(members, 0)
    mean, law = next(laws(members))
    law.spread.fill_(start)
    for step in range(steps):
        for parameter, _ in laws(members):
            parameter.grad = torch.full_like(parameter, -0.5)
        defense.after_step(members, step)
    geometric = sum(zeta**j for j in range(1, steps + 1))
    expected = zeta**steps * start + beta * 0.5 * geometric
    torch.testing.assert_close(law.spread, torch.full_like(mean, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("grows", "expected"),
    # Algorithm 2 by hand: 5 batches, tau = 0.4 epochs = 2 batches, zeta = 1/2, beta |g| = 1
    [("every-step", [1, 1, 2, 1.5, 2.5]), ("with-decay", [0, 0.5, 0.5, 0.75, 0.75])],
)
def test_the_decay_comes_every_tau_and_its_count_restarts_with_the_epoch(grows, expected):
    defense = one(f"sdr-decay(beta=2, zeta=0.5, tau=0.4, grows={grows}, initial=0)")
    members = fresh(defense)
    defense.start_training(members, 5)
    mean, law = next(laws(members))
    for epoch in (0, 1):
        law.spread.zero_()
        defense.start_epoch(members, epoch)
        seen = []
        for step in range(5):
            mean.grad = torch.full_like(mean, 0.5)
            defense.after_step(members, 5 * epoch + step)
            seen.append(float(law.spread.amax()))
        assert seen == expected


def test_annealed_decay_has_the_rates_of_the_authors():
    defense, rates = one("sdr-decay(anneal=0.1)"), []
    members = fresh(defense)
    for epoch in range(4):
        defense.start_epoch(members, epoch)
        rates.append(next(laws(members))[1].rate)
    assert rates[:2] == [0.7, 0.7]
    ratios = [later / earlier for earlier, later in pairwise(rates[1:])]
    assert ratios == pytest.approx([0.904837418] * 2)  # exp(-0.1)


def test_a_step_of_training_adds_beta_times_the_gradient_to_the_spread(dataset):
    """One batch, and the gradient from autograd on the plain network at the drawn weights."""
    defense = one("sdr-decay(beta=0.5, grows=every-step, spread=deviation, zeta=1)", epochs=1)
    few = replace(dataset, train=Split(*(tensor[:16] for tensor in dataset.train)))
    before = [law.spread.clone() for _, law in laws(fresh(defense))]
    members = trained(defense, few)
    for start, (mean, law) in zip(before, laws(members), strict=True):
        torch.testing.assert_close(law.spread, start + 0.5 * mean.grad.abs())
        assert mean.grad.abs().sum() > 0


@pytest.mark.parametrize(("spread", "power"), [("variance", 0.5), ("deviation", 1.0)])
def test_the_spread_is_a_variance_or_a_deviation(spread, power):
    mean, law = next(laws(fresh(one(f"sdr-decay(spread={spread})"))))
    torch.testing.assert_close(law.deviation(mean), law.spread**power)
    assert float(law.deviation(mean).amax()) <= 0.5 * (2 / mean.numel()) ** 0.5


def test_spreads_and_their_schedule_survive_a_kill(dataset, tmp_path):
    defense, snapshot = one("sdr-decay(anneal=0.1, tau=0.4)", epochs=4), tmp_path / "state"
    whole = trained(defense, dataset)

    def killed(done, total):
        if done == 3 * total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(defense, fresh(defense), dataset, 0, CPU, killed, snapshot, saved_every=0)
    again = fresh(defense, seed=9)
    train(defense, again, dataset, 0, CPU, snapshot=snapshot, saved_every=0)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.state_dict().items())


def test_a_base_gives_the_means_and_leaves_the_spreads():
    defense, source = one("sdr-learnable(base=standard)"), fresh(one("standard"), seed=7)
    members = fresh(defense)
    spreads = [law.deviation(mean).clone() for mean, law in laws(members)]
    defense.start(members, source)
    assert all(torch.equal(means(members)[k], v) for k, v in source.state_dict().items())
    kept = [law.deviation(mean) for mean, law in laws(members)]
    assert all(torch.equal(a, b) for a, b in zip(spreads, kept, strict=True))


def test_a_base_on_another_network_is_noticed():
    defense, source = one("sdr-learnable(base=standard)"), fresh(one("standard", NETWORKS[1]))
    with pytest.raises(RuntimeError, match="Missing key"):
        defense.start(fresh(defense), source)


def test_a_binomial_rule_on_weights_is_dropconnect_bit_for_bit(dataset):
    binomial = one("sdr-decay(distribution=binomial, p=0.3, biases=false)")
    dropconnect = one("dropconnect(p=0.3)")
    rule, plain = trained(binomial, dataset), trained(dropconnect, dataset)
    assert all(
        torch.equal(a, b) for a, b in zip(rule.parameters(), plain.parameters(), strict=True)
    )


def test_a_vote_counts_labels_of_draws_and_a_tie_abstains():
    rule = one("sdr-learnable(test=vote, draws=4)").rule()
    ballots = F.one_hot(torch.tensor([[1, 2], [1, 2], [0, 0], [2, 0]]), 3)[:, None].float()
    assert rule.decide(Draw(ballots)).tolist() == [1, ABSTAIN]


def test_the_average_of_k_networks_is_the_mean_of_their_logits():
    defense = one("sdr-learnable(draws=5)")
    model = deployed(defense, fresh(defense))
    draw = model.draw(images(6), 5)
    assert model.draws == 5
    torch.testing.assert_close(model.rule.scores(draw), draw.logits[:, 0].mean(dim=0))


def test_the_average_of_k_draws_of_a_linear_model_nears_its_mean_as_one_over_root_k():
    defense = one("sdr-learnable", "mlp(hidden=[4])")
    layer = deepcopy(fresh(defense)[0].layers[1])
    x, trials = torch.rand(1, 64), 300
    with torch.no_grad():
        at_mean = F.linear(x, layer.weight, layer.bias)
        draws = torch.stack([layer(x) - at_mean for _ in range(16 * trials)]).view(trials, 16, 4)
    ratio = float(draws[:, 0].std() / draws.mean(dim=1).std())
    assert ratio == pytest.approx(4, rel=0.15)  # 1,200 numbers: three standard errors


@pytest.mark.parametrize("name", ["sdr-decay", "sdr-learnable"])
def test_a_vote_of_one_is_refused(name):
    with pytest.raises(InputError, match="write draws=50"):
        resolve(f"{name}(test=vote, draws=1)")


@pytest.mark.parametrize("name", ["sdr-decay", "sdr-learnable"])
def test_a_vote_is_one_of_fifty_and_attacked_as_a_vote(name):
    configured = resolve(f"{name}(test=vote)")[0]
    assert configured.draws == 50
    assert list(configured.losses) == ["vote"]
    assert not resolve(f"{name}(test=sample)")[0].losses


def test_adversarial_training_needs_no_code_of_its_own(dataset):
    spec = "sdr-learnable(adversarial=pgd(eps=0.1, steps=2, clean=1))"
    members = trained(one(spec, epochs=1), dataset)
    assert all(bool(p.isfinite().all()) for p in members.parameters())
