"""What can be reproduced, for people."""

from __future__ import annotations

import textwrap

from robbench.papers.paper import CLAIMS, keys, load


def listing() -> str:
    """Every paper with its tables, figures and claims, 80 columns wide."""
    parts = []
    for key in keys():
        paper = load(key)
        lines = [textwrap.fill(f"{key}: {paper.title}", 80, subsequent_indent="  ")]
        for name, table in paper.tables.items():
            lines.append(_line(f"{key}:{name}", table.title))
        for name, figure in paper.figures.items():
            said = figure.shows if figure.reason is None else f"not drawn: {figure.reason}"
            lines.append(_line(f"{key}:{name}", said))
        lines.append(_line(f"{key}:{CLAIMS}", f"{len(paper.claims)} claims of the text"))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(name: str, text: str) -> str:
    return textwrap.fill(f"  {name:<34} {text}", 80, subsequent_indent=" " * 37)
