"""What every network here is: pixels -> normalised pixels -> hidden activations -> readout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn, no_grad, tensor, zeros_like

from robbench.errors import InputError

Shape = tuple[int, int, int]  # channels, height, width of one image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x - mean) / std per channel, with both in the state dict; mean 0 and std 1 change no bit."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", tensor(tuple(mean)))  # (C,)
        self.register_buffer("std", tensor(tuple(std)))  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class Network(nn.Module):
    """Images (N, C, H, W) in [0, 1] -> logits (N, L), always as readout(features(x))."""

    readout: nn.Linear

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normalize = Normalize((0.0,) * channels, (1.0,) * channels)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden activations (N, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))

    def torchvision_key(self, key: str) -> str | None:
        """Our name of a parameter of torchvision's network; None where there is no such network."""
        return None


def load_torchvision(network: Network, state: Mapping[str, Tensor]) -> None:
    """Fill an ImageNet-form network with torchvision's IMAGENET1K_V1 weights and normalisation."""
    loaded = {"normalize.mean": tensor(IMAGENET_MEAN), "normalize.std": tensor(IMAGENET_STD)}
    for key, value in state.items():
        ours = network.torchvision_key(key)
        if ours is None:
            raise InputError(f"torchvision has no weights for a {type(network).__name__} like this")
        loaded[ours] = value
    own = network.state_dict()
    for key, value in own.items():  # files written before torch 0.4.1 lack these
        if key.endswith("num_batches_tracked"):
            loaded.setdefault(key, zeros_like(value))
    # Compared before anything is copied, so that a refused file leaves the network as it was.
    for key in sorted(own.keys() | loaded.keys()):
        here, there = (list(d[key].shape) if key in d else "nothing" for d in (own, loaded))
        if here != there:
            raise InputError(
                f"these torchvision weights do not fit: {key} is {here} in the network and {there}"
                " in the weights; build it with form='imagenet', the default width, 3 channels and"
                " as many labels as the weights have"
            )
    network.load_state_dict(loaded)


@no_grad()
def init_convolutions(network: nn.Module) -> None:
    """He normal with fan-out for convolutions, biases 0; the other layers keep torch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def torchvision_weights(architecture: str, tag: str) -> Mapping[str, Tensor]:
    """The state dict that torchvision publishes as `tag` (IMAGENET1K_V1) for an architecture."""
    from torchvision.models import get_model_weights

    try:
        weights = get_model_weights(architecture)[tag]
    except (KeyError, ValueError):
        raise InputError(f"torchvision has no weights {tag} for {architecture}") from None
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot fetch {weights.url} ({error}); put that file into"
            " ~/.cache/torch/hub/checkpoints and run again"
        ) from None
