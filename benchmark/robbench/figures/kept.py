"""Computed data of figures, kept beside what it was made of: FIGURE.SCALE.json at the CSV."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from robbench.attacks import Configured
from robbench.checkpoints import Shelf, sha256_of
from robbench.environment import Sha256
from robbench.errors import InputError, problem_of
from robbench.figures import Rows, drawings, write
from robbench.papers.inputs import Inputs
from robbench.papers.paper import Figure, Strict
from robbench.papers.reproduction import Reproduction
from robbench.records import write_text


class Kept(Strict):
    """What a CSV was made of. csv: its SHA-256; plan: that of what was asked for; seconds: that it
    took."""

    csv: Sha256
    plan: Sha256
    inputs: Inputs
    seconds: Annotated[FiniteFloat, Field(ge=0)]


def plan_of(figure: Figure, reproduction: Reproduction) -> str:
    """SHA-256 of what is asked for: the drawing, its arguments and attacks, the scale."""
    overlay = reproduction.overlay
    asked = {
        "draw": [figure.draw, drawings.get(str(figure.draw)).version],
        "arguments": figure.arguments,
        "attacks": {text: Configured.of(text).version for text in _attacks(figure.arguments)},
        "scale": overlay.model_dump(mode="json", exclude={"strongest", "strongest_n"}),
    }
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _attacks(value: Any) -> Iterator[str]:
    """The attacks that arguments name, at any depth."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from [each] if key == "attack" and isinstance(each, str) else _attacks(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _attacks(each)


def keep(data: Path, rows: Rows, plan: str, inputs: Inputs, seconds: float) -> None:
    """Write the CSV, and then what it was made of."""
    write(data, rows)
    kept = Kept(csv=sha256_of(data), plan=plan, inputs=inputs, seconds=round(seconds, 1))
    text = json.dumps(kept.model_dump(mode="json"), indent=1, sort_keys=True)
    write_text(data.with_suffix(".json"), text + "\n")


def kept_of(data: Path) -> Kept:
    """What the CSV was made of; InputError where nothing says so."""
    file = data.with_suffix(".json")
    try:
        return Kept.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file.name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file.name} is broken ({problem_of(error)})") from None


def outdated(data: Path, figure: Figure, reproduction: Reproduction, shelf: Shelf) -> str | None:
    """Why the CSV is not what would be computed now; None where it is."""
    if not data.exists():
        return "it is missing"
    try:
        kept = kept_of(data)
        if kept.csv != sha256_of(data):
            return "it is not as it was written"
        if kept.plan != plan_of(figure, reproduction):
            return "the figure or the scale has changed"
        if unsaid := defenses_of(figure, reproduction) - kept.inputs.versions.keys():
            return f"it does not say the version of {min(unsaid)}"
    except (OSError, InputError) as error:
        return str(error)
    return kept.inputs.outdated(reproduction.load, shelf)


def defenses_of(figure: Figure, reproduction: Reproduction) -> set[str]:
    """What the data is computed with."""
    drawing = drawings.get(str(figure.draw))
    trained = drawing.trainings(reproduction, figure.arguments)
    attacked = drawing.attacks(reproduction, figure.arguments)
    used = {each.defense for each in trained} | {each.defense for each in attacked}
    return used | set(drawing.defenses)
