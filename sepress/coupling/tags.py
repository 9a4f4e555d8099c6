"""Python ints that remember where they came from, so that surgery can rewrite stored sizes.

A net that splits by `self.widths` or views by `self.heads * self.head_width` keeps sizes outside
its parameters. While it is traced, its modules' ints are tagged; a tag that arrives in a call as
the size of an axis with ids tells which number must follow which channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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


class TaggedInt(int):
    """An int that equals `factor` times its source, through products and exact quotients with plain ints."""

    source: AttributeSource | SizeSource
    factor: Fraction

    def __new__(
        cls, value: int, source: AttributeSource | SizeSource, factor: Fraction | int = 1
    ) -> TaggedInt:
        tagged = int.__new__(cls, value)
        tagged.source, tagged.factor = source, Fraction(factor)
        return tagged

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return int(self) * other
        widest = (
            other if isinstance(other, TaggedInt) and other >= self else self
        )  # heads x head width: the width
        times = self if widest is other else other
        return TaggedInt(int(self) * int(other), widest.source, widest.factor * int(times))

    def __floordiv__(self, other: Any) -> Any:
        plain = int(other) if isinstance(other, int) else 0
        if plain and int(self) % plain == 0:
            return TaggedInt(int(self) // plain, self.source, self.factor / plain)
        return int(self) // other

    __rmul__ = __mul__

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
        before.append(
            (module, held, {key: copy.copy(v) for key, v in held.items() if isinstance(v, dict | list)})
        )
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, content in contents.items():
                container = attributes[key]
                container.clear()
                container.update(content) if isinstance(container, dict) else container.extend(content)


@contextmanager
def tagged_attributes(net: nn.Module) -> Iterator[None]:
    """Tag every module's ints for a while."""
    with unchanged_attributes(net):
        for path, module in net.named_modules():
            for name, value in list(vars(module).items()):
                if not name.startswith("_") and (tagged := _tag(value, path, name)) is not value:
                    module.__dict__[name] = tagged
        yield


def _tag(value: Any, module: str, attribute: str) -> Any:
    if type(value) is int:
        return TaggedInt(value, AttributeSource(module, attribute, None))
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(
            TaggedInt(item, AttributeSource(module, attribute, index)) for index, item in enumerate(value)
        )
    return value
