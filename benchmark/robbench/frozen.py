"""A stochastic defense with fixed draws: a surrogate to attack, or what is deployed itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robbench.deployed import Deployed, Randomness
from robbench.errors import InputError
from robbench.randomness import preserved_random_state, seed_everything
from robbench.rules import Draw


class Frozen(Deployed):
    """Some draws of a stochastic defense, always the same, whatever the batch: deterministic.

    They make as many calls of the defense as they are enough for: an image is lost for certain
    once every one of them is, and losses are means over them.
    Noise that images have each for themselves is made the same for all of them, so that an image
    meets the same draws alone and in any batch.
    """

    def __init__(self, deployed: Deployed, seeds: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.members, self.rule = deployed.members, deployed.rule
        self.shape, self.labels = deployed.shape, deployed.labels
        self.chunk = max(1, deployed.chunk // len(seeds))
        self.kinds, self.seeds = deployed.randomness, list(seeds)
        self.randomness: list[Randomness] = ["none"] * len(self.members)
        self.draws = deployed.draws

    def slices(self, n: int, draws: int) -> list[int]:
        """One pass has all draws that there are."""
        return [draws]

    def sample(self, x: Tensor, draws: int, features: bool = False) -> Draw:
        features = features or getattr(self.rule, "features", False)
        made: list[tuple[Tensor, Tensor | None]] = []
        with preserved_random_state():
            for seed in self.seeds:
                for index, (member, kind) in enumerate(zip(self.members, self.kinds, strict=True)):
                    seed_everything(seed + index)  # with one seed members would share their noise
                    made.append(_fixed(member, kind, x, features))
        s, m = len(self.seeds), len(self.members)
        logits = torch.stack([logits for logits, _ in made])
        hidden = torch.stack([h for _, h in made if h is not None]) if features else None
        return Draw(
            logits.view(s, m, *logits.shape[1:]),
            None if hidden is None else hidden.view(s, m, *hidden.shape[1:]),
        )


def _fixed(
    member: nn.Module, kind: Randomness, x: Tensor, features: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits (N, L) of one pass, and features (N, D), from the random streams as they are."""

    def outputs(images: Tensor) -> tuple[Tensor, ...]:
        if not features:
            return (member(images),)
        hidden = member.features(images)  # type: ignore[operator]
        return member.readout(hidden), hidden  # type: ignore[operator]

    coupled = any(getattr(module, "per_batch", False) for module in member.modules())
    if kind != "image" and not coupled:
        made = outputs(x)
    else:

        def single(image: Tensor) -> tuple[Tensor, ...]:
            return tuple(output[0] for output in outputs(image[None]))

        try:
            made = torch.func.vmap(single, randomness="same")(x)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
            raise InputError(
                f"the draws of {type(member).__name__} cannot be fixed ({problem}); attack fresh"
                " ones, by apgd in the setting adaptive"
            ) from None
    return made[0], made[1] if features else None
