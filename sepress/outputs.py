"""What a forward returns, whatever holds it -> its tensors, in order, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sepress.errors import InputError


def parts_of(value: Any) -> dict[str, Any] | None:
    """Return what a mapping, dataclass, named tuple, list, tuple or plain object holds; None for a leaf."""
    if isinstance(value, Tensor | nn.Module | str | int | float | type) or callable(value):
        return None
    if isinstance(value, Mapping):  # also Hugging Face's ModelOutput, a dataclass that leaves its Nones out
        return {str(key): part for key, part in value.items()}
    if dataclasses.is_dataclass(value):
        return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        keys = getattr(value, "_fields", None) or map(str, range(len(value)))
        return dict(zip(keys, value, strict=True))
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def tensors_in(value: Any, _inside: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """Yield every tensor of a forward's result, however deep it lies; what else it holds is passed over."""
    if isinstance(value, Tensor):
        yield value
    elif not any(value is outer for outer in _inside):  # an object may refer back to what holds it
        for part in (parts_of(value) or {}).values():
            yield from tensors_in(part, (*_inside, value))


def named_outputs(value: Any, name: str = "") -> dict[str, Tensor]:
    """Name the tensors of a forward's result, in order: its keys, fields or positions joined by '_'.

    A single one without a key is 'logits', the positions of the outermost tuple are 'output_0', ... Raises
    InputError for what is no tensor and holds none, and where two would have one name.
    """
    if isinstance(value, Tensor):
        return {name or "logits": value}
    if value is None:
        return {}
    parts = parts_of(value)
    if parts is None:
        raise InputError(
            f"the net's output holds a {type(value).__name__}",
            remedy="Expected tensors, or tuples, lists, dicts or dataclasses of tensors.",
        )
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        if len(value) == 1:
            return named_outputs(value[0], name)
        parts = parts if name else {f"output_{key}": part for key, part in parts.items()}
    outputs: dict[str, Tensor] = {}
    for key, part in parts.items():
        found = named_outputs(part, f"{name}_{key}" if name else key)
        if twice := outputs.keys() & found.keys():
            raise InputError(
                f"two of the net's outputs would be called '{min(twice)}'",
                remedy="Give the keys of its nested outputs other names.",
            )
        outputs |= found
    return outputs
