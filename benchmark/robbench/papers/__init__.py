"""Published tables, figures and claims as data, each number bound to what produces it.

One YAML file per paper: what was printed, how every number comes about (a cell, something derived
from cells, a cost, a quotation, or text that no measurement answers), and the scales at which it
can be run again. Numbers are facts; the words are ours.
"""

from __future__ import annotations

from robbench.papers.paper import keys, load, select

__all__ = ["keys", "load", "select"]
