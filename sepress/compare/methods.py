"""A method's name, `criterion[+refit][@scope]` or `scratch` -> how channels are chosen and cut."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from sepress.criteria import CRITERIA, get_criterion
from sepress.errors import InputError
from sepress.plan import SCOPES
from sepress.types import Policy, Scope

SCRATCH = "scratch"  # the net of the uniform widths, trained from random weights: no channel is chosen
REFIT = "refit"
_SCOPES = tuple(scope for scope in SCOPES if scope != "auto")  # a row says what it was made by
_FORM = re.compile(r"(?P<criterion>[^+@]+)(?P<refit>\+refit)?(?:@(?P<scope>.+))?")


@dataclass(frozen=True)
class Method:
    """One way to get a smaller net; a scope of None is the comparison's own."""

    criterion: str
    refit: bool = False  # the layers that read what goes are refitted in closed form before the cut
    scope: Scope | None = None

    @property
    def name(self) -> str:
        """As it is written."""
        scope = "" if self.scope is None else f"@{self.scope}"
        return self.criterion + (f"+{REFIT}" if self.refit else "") + scope

    @property
    def from_scratch(self) -> bool:
        return self.criterion == SCRATCH

    @property
    def needs(self) -> frozenset[str]:
        """The evidence that calibration has to collect; the gates are always measured."""
        judged = frozenset() if self.from_scratch else get_criterion(self.criterion).needs
        return judged | {"excitation"} | ({"moments"} if self.refit else frozenset())

    def policy(self, common: Policy) -> Policy:
        """The common policy with this method's scope; InputError where its criterion can't serve it."""
        policy = common if self.scope is None else replace(common, scope=self.scope)
        if policy.scope == "knapsack" and not (self.from_scratch or get_criterion(self.criterion).predicts):
            suited = ", ".join(criterion.name for criterion in CRITERIA.values() if criterion.predicts)
            raise InputError(
                f"'{self.name}': the knapsack scope needs what removal costs, and {self.criterion} does not "
                "predict it",
                remedy=f"Choose another scope, or one of the criteria that do: {suited}.",
            )
        return policy


def read_method(text: str) -> Method:
    """Read a method's name; InputError says how one is written and what is known."""
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise InputError(f"'{text}' is no method", remedy=_HOW)
    criterion, refit = form["criterion"], form["refit"] is not None
    scope: Any = form["scope"]  # held to the known ones below
    if criterion == SCRATCH:
        if refit or scope:
            raise InputError(f"'{text}': training from scratch takes no +refit and no @scope", remedy=_HOW)
    else:
        criterion = get_criterion(criterion).name  # what 'auto' stands for: a cell outlives the default
    if scope is not None and scope not in _SCOPES:
        raise InputError(f"'{text}': unknown scope '{scope}'", remedy=f"Choose one of: {', '.join(_SCOPES)}.")
    return Method(criterion, refit, scope)


_HOW = "A method is written criterion[+refit][@scope], such as l2, l2+refit or fisher@global, or 'scratch'."
