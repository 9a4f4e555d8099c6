"""The data's classes -> the model's outputs: by name, by the user's list, or by order where that is safe."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sepress.errors import InputError

UNLABELLED = "the training images are not sorted into class folders"


@dataclass(frozen=True)
class Labels:
    """outputs[i] is the model's output for the data's class i, -1 for all where `reason` is set."""

    outputs: tuple[int, ...]
    class_names: tuple[str, ...] | None  # of the outputs, None where unknown
    num_classes: int | None
    reason: str | None = None  # why the data's labels can't be used with this model
    note: str | None = None


def match_classes(
    found: Sequence[str],
    *,
    typed: tuple[str, ...] | None,
    class_names: tuple[str, ...] | None,
    num_classes: int | None,
) -> Labels:
    """Match the classes found in the data to outputs; a typed list must cover them (InputError)."""
    if not found:
        return Labels((), typed or class_names, num_classes, reason=UNLABELLED)
    if typed is not None:
        return _match_typed(found, typed, num_classes)
    if class_names is not None:
        outputs = _outputs(found, class_names)
        missing = [name for name, output in zip(found, outputs, strict=True) if output < 0]
        if not missing:
            return Labels(tuple(outputs), class_names, len(class_names))
        if len(missing) < len(found) or len(found) != len(class_names):
            reason = f"not among the model's {len(class_names)} classes: {_listed(missing)}"
            return _unmatched(found, class_names, len(class_names), reason)
        note = "no class name of the data is among the model's; classes are taken in the data's order"
        return Labels(tuple(range(len(found))), class_names, len(class_names), note=note)
    names = tuple(found)
    if num_classes is None or num_classes == len(names):
        known = "no classes" if num_classes else "neither classes nor their number"
        note = f"the model names {known}; outputs are taken in the data's order (folders: sorted by name)"
        return Labels(tuple(range(len(names))), names, len(names), note=note)
    reason = f"the data has {len(names)} classes, the model {num_classes} outputs and no class names"
    return _unmatched(found, None, num_classes, reason)


def _match_typed(found: Sequence[str], typed: tuple[str, ...], num_classes: int | None) -> Labels:
    if num_classes is not None and num_classes != len(typed):
        raise InputError(
            f"the list of classes has {len(typed)} names, the model {num_classes} outputs",
            remedy="Name one class for each output, in output order.",
        )
    outputs = _outputs(found, typed)
    missing = [name for name, output in zip(found, outputs, strict=True) if output < 0]
    if missing:
        raise InputError(
            f"classes of the data that the list of classes lacks: {_listed(missing)}",
            remedy="Add them to the list, or take their folders out of the data.",
        )
    return Labels(tuple(outputs), typed, len(typed))


def _outputs(found: Sequence[str], names: tuple[str, ...]) -> list[int]:
    """Positions in `names`: exact, else ignoring case (and Unicode form) where that is unambiguous."""
    exact = {name: output for output, name in enumerate(names)}
    once = Counter(map(_fold, names))
    folded = {_fold(name): output for output, name in enumerate(names) if once[_fold(name)] == 1}
    outputs = [exact.get(name, folded.get(_fold(name), -1)) for name in found]
    twice = {output for output, times in Counter(outputs).items() if times > 1}
    return [exact.get(n, -1) if o in twice else o for n, o in zip(found, outputs, strict=True)]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _unmatched(
    found: Sequence[str], class_names: tuple[str, ...] | None, num_classes: int, reason: str
) -> Labels:
    return Labels((-1,) * len(found), class_names, num_classes, reason=reason)


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
