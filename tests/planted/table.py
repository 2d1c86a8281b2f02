"""The table planted x flags of docs/flags.md, from a real run of all of them.

python -m tests.planted.table    # from the root of the repository, under a minute
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tests.planted import PLANTED, SOUND
from tests.planted.trial import ROOT, accused, cleared, trial

from robbench.audit import Audited
from robbench.audit.verdicts import number

PAGE = ROOT / "docs" / "flags.md"
START, END = "<!-- planted x flags: python -m tests.planted.table -->", "<!-- end -->"
SIGNS = {"INVALID": "I", "OVERESTIMATE": "O", "WARN": "W", "INFO": "·"}


def table(found: Mapping[str, Audited]) -> str:
    """One row per defense, a column per flag that any of them raises; bold what must be there."""
    raised = {
        name: {flag.id: flag.verdict for flag in reversed(audited.flags)}  # the worst stands
        for name, audited in found.items()
    }
    columns = sorted({each for flags in raised.values() for each in flags}, key=number)
    lines = [["planted", *columns], ["---", *[":-:" for _ in columns]]]
    for name, flags in raised.items():
        expected = PLANTED[name].expected if name in PLANTED else {}
        signs = [SIGNS[flags[each]] if each in flags else "" for each in columns]
        marked = [
            f"**{sign}**" if each in expected else sign
            for each, sign in zip(columns, signs, strict=True)
        ]
        lines.append([name if name in PLANTED else f"*{name}*", *marked])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def committed() -> str:
    """The table that the page has."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].strip()


def main() -> None:
    torch.set_num_threads(1)
    shared = trial()
    found = {name: accused(name, shared) for name in PLANTED}
    found |= {name: cleared(name, shared) for name in SOUND}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
