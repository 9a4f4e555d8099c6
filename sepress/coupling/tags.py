"""Python ints that remember where they came from, so that surgery can rewrite stored sizes.

A net that splits by `self.widths` or views by `self.heads * self.head_width` keeps sizes outside
its parameters. While it is traced, its modules' ints are tagged; a tag that arrives in a call as
the size of an axis with ids tells which number must follow which channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn


@dataclass(frozen=True)
class AttributeSource:
    """The int `module.attribute`, or `module.attribute[index]`."""

    module: str
    attribute: str
    index: int | None


@dataclass(frozen=True, eq=False)
class SizeSource:
    """The size of an axis of a traced tensor, read in the forward; it follows the pruned tensor itself."""

    ids: np.ndarray  # along the axis


Source = AttributeSource | SizeSource


_FLOATS: list[Callable[[TaggedInt], None]] = []  # who is told that a float was made of a tagged int


class TaggedInt(int):
    """A sum of sources, each times a factor; + - * and // keep that where the result is one."""

    terms: dict[Source, Fraction]
    divisor: TaggedInt | None = None  # what it was divided by, where that has sources as well

    def __new__(cls, value: int, terms: Mapping[Source, Fraction | int]) -> TaggedInt:
        tagged = int.__new__(cls, value)
        tagged.terms = {source: Fraction(factor) for source, factor in terms.items() if factor}
        return tagged

    def _scaled(self, value: int, factor: Fraction) -> TaggedInt:
        return TaggedInt(value, {source: own * factor for source, own in self.terms.items()})

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, TaggedInt):
            return self if type(other) is int and other == 0 else int(self) + other
        terms = {
            source: self.terms.get(source, Fraction()) + other.terms.get(source, Fraction())
            for source in (*self.terms, *other.terms)
        }
        total = int(self) + int(other)
        return TaggedInt(total, terms) if any(terms.values()) else total

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, TaggedInt):
            return self if type(other) is int and other == 0 else int(self) - other
        return self + other._scaled(-int(other), Fraction(-1))

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return int(self) * other
        # Heads x head width is a number of widths: the wider of the two is what a cut shortens.
        widest = other if isinstance(other, TaggedInt) and other >= self else self
        times = self if widest is other else other
        return widest._scaled(int(self) * int(other), Fraction(int(times)))

    def __floordiv__(self, other: Any) -> Any:
        plain = int(other) if isinstance(other, int) else 0
        if plain and int(self) % plain == 0:
            quotient = self._scaled(int(self) // plain, Fraction(1, plain))
            quotient.divisor = other if isinstance(other, TaggedInt) else None
            return quotient
        return int(self) // other

    __rmul__, __radd__ = __mul__, __add__

    def __float__(self) -> float:
        for told in _FLOATS:
            told(self)
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        return float(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / float(self)

    def __pow__(self, other: Any, modulus: int | None = None) -> Any:
        return (
            pow(int(self), other, modulus) if isinstance(other, int) and other > 0 else float(self) ** other
        )

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


@contextmanager
def unchanged_attributes(net: nn.Module) -> Iterator[None]:
    """Give every module back exactly the attributes it had, the contents of its dicts and lists included.

    Caches that a forward fills are empty again, so that every run takes the path of the first.
    """
    before = []
    for module in net.modules():
        held = dict(module.__dict__)
        containers = [(v, copy.copy(v) if v else ()) for v in held.values() if isinstance(v, (dict, list))]
        before.append((module, held, containers))
    try:
        yield
    finally:
        for module, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                if container or content:
                    container.clear()
                    container.update(content) if isinstance(container, dict) else container.extend(content)


@contextmanager
def tagged_attributes(net: nn.Module, on_float: Callable[[TaggedInt], None]) -> Iterator[None]:
    """Tag every module's ints for a while; `on_float` is told which of them become floats."""
    with ExitStack() as stack:
        stack.enter_context(unchanged_attributes(net))
        _FLOATS.append(on_float)
        stack.callback(_FLOATS.remove, on_float)
        for path, module in net.named_modules():
            for name, value in list(vars(module).items()):
                if not name.startswith("_") and (tagged := _tag(value, path, name)) is not value:
                    module.__dict__[name] = tagged
        yield


def _tag(value: Any, module: str, attribute: str) -> Any:
    if type(value) is int:
        return TaggedInt(value, {AttributeSource(module, attribute, None): 1})
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(
            TaggedInt(item, {AttributeSource(module, attribute, index): 1})
            for index, item in enumerate(value)
        )
    return value
