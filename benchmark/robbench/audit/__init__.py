"""Red flags: what says that a number cannot be trusted, from records and their traces alone.

Each check looks at one record, beside the other records of the same estimator and of its
relatives, and says nothing (not assessed), nothing wrong, or raises flags. It runs nothing. The
checks are those of Carlini et al. 2019 (arXiv:1902.06705), Athalye et al. 2018 (1802.00420),
Croce & Hein 2020 (2003.01690), Pintor et al. 2022 (2106.09947) and Zimmermann et al. 2022, and
ours for stochastic and abstaining defenses; docs/flags.md has a section on each.
"""

from robbench.audit import alone, beside, estimators, relatives  # noqa: F401  (they register their checks)
from robbench.audit.case import Case, cases, is_diagnostic
from robbench.audit.flags import CHECKS, Check, Flag, Verdict
from robbench.audit.verdicts import Audited, audit, badge, is_adaptive

__all__ = [
    "CHECKS", "Audited", "Case", "Check", "Flag", "Verdict", "audit", "badge", "cases",
    "is_adaptive", "is_diagnostic",
]  # fmt: skip
