"""Numbers that code takes from attributes or sizes, bound to the channels that they count.

`x.split([self.inner, self.width - self.inner])` says that `inner` counts the first channels and that the
difference counts the others, so that `width` counts both. Surgery sets each attribute to what is left of what
it counts; where a number counts several things, they must keep one count.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np

from sepress.coupling.slots import Facts
from sepress.coupling.tags import AttributeSource, SizeSource, Source, TaggedInt
from sepress.types import Reason

Counted = tuple[np.ndarray, Fraction]  # ids, and what their source is multiplied by to count them


class Claims:
    """What each attribute counts."""

    def __init__(self, facts: Facts) -> None:
        self.counted: dict[AttributeSource, Counted] = {}
        self._facts = facts
        self._sums: list[tuple[TaggedInt, np.ndarray]] = []
        self._kept: list[TaggedInt] = []
        self._held: list[tuple[TaggedInt, Reason]] = []

    def claim(self, tag: TaggedInt, ids: np.ndarray) -> None:
        """State that a number is that of some channels, one id each, whatever is removed."""
        if len(tag.terms) != 1:
            self._sums.append((tag, ids))
            return
        ((source, factor),) = tag.terms.items()
        if isinstance(source, AttributeSource):
            if factor.denominator == 1 and _in_turns(ids, factor.numerator):
                self._facts.align(ids.reshape(factor.numerator, -1))
            first, known = self.counted.setdefault(source, (ids, factor))
            factor /= known  # one number for two sizes: their channels go together
        else:
            first = source.ids
        self._facts.same_count(first, ids, parts=factor.denominator, times=factor.numerator)

    def keep(self, tag: TaggedInt) -> None:
        """State that a number stays: of a quotient (in / groups) the dividend changes as the divisor does."""
        if tag.divisor is not None and len(tag.terms) == len(tag.divisor.terms) == 1:
            self._kept.append(tag)

    def hold(self, tag: TaggedInt, why: Reason) -> None:
        """State that nothing may go of what a number counts, if it counts channels."""
        self._held.append((tag, why))

    def settle(self) -> None:
        """Bind the dividends of what stays, and the terms of sums: what the others leave of the whole."""
        for quotient in self._kept:
            self._bind_dividend(quotient)
        waiting = self._sums
        while waiting:
            left = [(tag, ids) for tag, ids in waiting if not self._resolve(tag, ids)]
            if len(left) == len(waiting):
                break
            waiting = left
        for _, ids in waiting:
            self._facts.freeze(ids, Reason("a size computed in the code"))
        for tag, why in self._held:
            for source, factor in tag.terms.items():
                if isinstance(source, SizeSource) or source in self.counted:
                    self._facts.freeze(self._part(source, factor)[0], why)

    def _bind_dividend(self, quotient: TaggedInt) -> None:
        divisor = quotient.divisor
        assert divisor is not None
        ((source, factor),), ((counter, by),) = quotient.terms.items(), divisor.terms.items()
        if not isinstance(source, AttributeSource) or not isinstance(counter, AttributeSource):
            return
        if counter in self.counted:
            ids, known = self.counted[counter]
            self.counted.setdefault(source, (ids, known * factor * int(divisor) / (int(quotient) * by)))

    def _resolve(self, tag: TaggedInt, ids: np.ndarray) -> bool:
        """Bind one sum of which at most one term counts nothing yet; False where more do, or it can't be."""
        unknown = [s for s in tag.terms if isinstance(s, AttributeSource) and s not in self.counted]
        parts = [self._part(source, factor) for source, factor in tag.terms.items() if source not in unknown]
        if len(unknown) > 1:
            return False
        scale = math.lcm(*[share.denominator for _, share in parts])
        plus = [np.repeat(part, int(share * scale)) for part, share in parts if share > 0]
        minus = [np.repeat(part, -int(share * scale)) for part, share in parts if share < 0]
        whole = np.concatenate([np.zeros(0, np.int64), *plus])
        counted = np.concatenate(
            [*minus, np.repeat(ids, scale)]
        )  # as long as `whole`, but for what is unknown
        if not unknown:
            self._facts.same_count(whole, counted)
            return True
        assert isinstance(unknown[0], AttributeSource)
        factor = tag.terms[unknown[0]]
        rest = _without(counted, whole) if factor > 0 else _without(whole, counted)
        if rest is not None:
            self.counted[unknown[0]] = rest, abs(factor) * scale
        return rest is not None

    def _part(self, source: Source, factor: Fraction) -> Counted:
        """Return ids, and how often each counts in the term."""
        if isinstance(source, SizeSource):
            return source.ids, factor
        ids, known = self.counted[source]
        return ids, factor / known


def _in_turns(ids: np.ndarray, times: int) -> bool:
    """Whether a product counts several blocks of channels, and not each channel several times."""
    return bool((np.unique(ids, return_counts=True)[1] % times).any())


def _without(whole: np.ndarray, part: np.ndarray) -> np.ndarray | None:
    """Return what is left of ids when each of a part is taken out once; None where one isn't there."""
    out = Counter(part.tolist())
    rest = []
    for value in whole.tolist():
        if out[value]:
            out[value] -= 1
        else:
            rest.append(value)
    return None if any(out.values()) else np.array(rest, dtype=np.int64)
