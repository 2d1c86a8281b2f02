"""Layers whose weights are random: drawn once per forward pass, for the whole batch.

The layer of a network stays what it is. Its parameters are the means, under their own names, and
beside each stands the law by which it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Law(nn.Module):
    """How one tensor of weights is distributed around its mean: normal, unless draw says else.

    Weights are drawn while training, in evaluation mode only if at_test; else they are the mean.
    """

    def __init__(self, at_test: bool) -> None:
        super().__init__()
        self.at_test = at_test

    def deviation(self, mean: Tensor) -> Tensor:
        """The standard deviation of every weight; the sign of an entry has no meaning."""
        raise NotImplementedError

    def draw(self, mean: Tensor) -> Tensor:
        """Weights of one pass, differentiable by the mean and by what the deviation is made of."""
        return mean + self.deviation(mean) * torch.randn_like(mean)

    def forward(self, mean: Tensor) -> Tensor:
        return self.draw(mean) if self.training or self.at_test else mean


class Masked(Law):
    """mean · b / (1 - p) with b from Binomial(1, 1 - p): a weight is dropped with probability p.

    A binomial weight of scale D = mean / (1 - p) has the mean D (1 - p) and the variance
    D² p (1 - p).
    """

    def __init__(self, p: float, at_test: bool) -> None:
        super().__init__(at_test)
        self.p = p

    def deviation(self, mean: Tensor) -> Tensor:
        return mean.abs() * (self.p / (1 - self.p)) ** 0.5

    def draw(self, mean: Tensor) -> Tensor:
        return F.dropout(mean, self.p)


class SampledLinear(nn.Linear):
    """A linear layer with random weights, (N, in) -> (N, out)."""

    laws: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _drawn(self, "weight"), _drawn(self, "bias"))


class SampledConv2d(nn.Conv2d):
    """A convolution with random weights, (N, C, H, W) -> (N, C', H', W')."""

    laws: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _drawn(self, "weight"), _drawn(self, "bias"))


class SampledLSTM(nn.LSTM):
    """An LSTM with random weights, alike in all steps of a sequence; starts from zeros.

    steps (N, T, D) if batch_first -> (N, T, hidden), and the last hidden and cell states.
    """

    laws: nn.ModuleDict

    def forward(  # type: ignore[override]
        self, steps: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch = steps.shape[0 if self.batch_first else 1]
        chains = self.num_layers * (2 if self.bidirectional else 1)
        start = steps.new_zeros(chains, batch, self.hidden_size)
        output, hidden, cell = torch.lstm(
            steps,
            (start, start),
            [_drawn(self, name) for name in self._flat_weights_names],
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return output, (hidden, cell)


Sampled = SampledLinear | SampledConv2d | SampledLSTM
KINDS: dict[type[nn.Module], type[Sampled]] = {
    nn.Linear: SampledLinear,
    nn.Conv2d: SampledConv2d,
    nn.LSTM: SampledLSTM,
}


def randomise(layer: nn.Module, law: Callable[[str, Tensor, int], Law | None]) -> None:
    """Turn a linear, convolution or LSTM layer into one with random weights; no other is touched.

    law: (name of a parameter, its value, inputs of a unit) -> the law of it, None to keep it fixed.
    """
    kind = KINDS.get(type(layer))
    if kind is None:
        return
    made, inputs = nn.ModuleDict(), 1
    for name, mean in layer.named_parameters(recurse=False):
        inputs = mean[0].numel() if mean.dim() > 1 else inputs  # biases follow their weights
        if (one := law(name, mean, inputs)) is not None:
            made[name] = one
    layer.laws = made
    layer.__class__ = kind  # a copy would have to repeat the arguments of the constructor


def laws(module: nn.Module) -> Iterator[tuple[nn.Parameter, Law]]:
    """Every random tensor of weights in a module: its mean and its law."""
    for layer in module.modules():
        if isinstance(layer, Sampled):
            for name, law in layer.laws.items():
                assert isinstance(law, Law)
                yield layer.get_parameter(name), law


def _drawn(layer: Sampled, name: str) -> Tensor:
    """The weights of one pass; a bias that the layer does not have stays None."""
    mean = getattr(layer, name)
    return layer.laws[name](mean) if name in layer.laws else mean
