"""What a record says of how it came about and of what it cost, and what is missing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robbench.environment import Environment, Sha256

Keys = Annotated[list[Sha256], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Provenance(Environment):
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


class Cost(BaseModel):
    """Of the attack, per image but for the seconds."""

    model_config = ConfigDict(extra="forbid")
    forwards: Amount
    backwards: Amount
    queries: Amount
    seconds: Amount


def missing(name: str, model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[str]:
    """What these values lack of the model, in one line."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        said = [
            ".".join(map(str, each["loc"])) + ": " * bool(each["loc"]) + each["msg"]
            for each in error.errors()
        ]
        yield f"{name} is not complete ({'; '.join(said)})"
