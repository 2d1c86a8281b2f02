"""What a record says of how it came about, and what is missing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from robbench.environment import Environment, Sha256

Keys = Annotated[list[Sha256], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Said(BaseModel):
    """A part of a note. Pages and checks read its fields as they are."""

    model_config = ConfigDict(strict=True)


class Chosen(Said):
    """What EOT auto took."""

    chosen: Count = 1


class Outputs(Said):
    kind: str
    range: FiniteFloat
    labels: Count


class Paths(Said):
    judge: FiniteFloat
    attack: FiniteFloat
    error: FiniteFloat


class Repeatability(Said):
    kinds: list[str]
    calls: FiniteFloat
    seeded: FiniteFloat
    batch: FiniteFloat


class Abstained(Said):
    clean: FiniteFloat
    noise: FiniteFloat


class Gradient(Said):
    path: Literal[True]
    dead: list[int]
    not_finite: list[int]
    zeros: FiniteFloat


class NoGradient(Said):
    path: Literal[False]
    reason: str


class Derivative(Said):
    """One of the two, or why there is none."""

    declared: list[str] = []
    error: FiniteFloat = 0.0


class Probe(Said):
    """What was seen of an estimator before it was attacked (attacks/probe.py)."""

    losses: list[str] = []
    repeatability: Repeatability
    outputs: Outputs
    paths: Paths
    optimises: bool
    abstained: Abstained
    gradients: dict[str, Gradient | NoGradient]
    noise: FiniteFloat
    agreement: FiniteFloat
    derivative: Derivative
    changed: list[str]
    reseeds: bool


class Notes(Environment):
    """What an attack may leave, of a failed cell too."""

    eot: Chosen = Chosen()
    suite: list[str] = []
    changed: list[str] = []
    probe: Probe | None = None


class Provenance(Notes):
    """What a finished record also says: what it was made of. The oldest have neither weights nor
    bpda."""

    dataset_hash: Sha256
    subset_hash: Sha256
    checkpoints: Keys
    weights: Keys | None = None
    oracle_checkpoints: Keys
    oracle_weights: Keys | None = None
    randomness: Annotated[list[str], Field(min_length=1)]
    bpda: list[str] | None = None
    chunk: Count
    threads: Count
    shard: Count
    images: Sha256 | None = None

    @model_validator(mode="after")
    def _weighed(self) -> Provenance:
        known = (self.weights, self.oracle_weights)
        if None in known and (self.bpda is not None or known != (None, None)):
            raise ValueError("weights or oracle_weights is missing")
        return self


def missing(model: type[Environment], provenance: Mapping[str, Any]) -> Iterator[str]:
    """What the provenance of a record lacks of the model, in one line."""
    try:
        model.model_validate(provenance)
    except ValidationError as error:
        said = [
            ".".join(map(str, each["loc"])) + ": " * bool(each["loc"]) + each["msg"]
            for each in error.errors()
        ]
        yield f"provenance is not complete ({'; '.join(said)})"
