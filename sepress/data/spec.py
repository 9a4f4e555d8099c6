"""What names a data set: 'digits', 'torchvision:NAME' or a folder, and the options that shape it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sepress.data.registry import TORCHVISION
from sepress.errors import InputError
from sepress.types import JSON

AUGMENTATIONS = ("auto", "none", "digits", "natural")
_STORED = ("path", "root", "classes", "val_fraction", "allow_corrupt", "augment")


@dataclass(frozen=True)
class DataSpec:
    """A data set as the user names it; every way in is checked here (InputError)."""

    path: str  # 'digits', 'torchvision:CIFAR10', or a folder ('./digits' for a folder of that name)
    root: str | None = None  # the folder in which a torchvision data set lies
    classes: tuple[str, ...] | None = None  # the model's outputs, in order, by class name
    val_fraction: float = 0.1  # cut from train where the data has no validation split
    allow_corrupt: float = 0.0  # the fraction of a split's images that may be unreadable
    augment: str = "auto"
    download: bool = False  # a permission to use the network: typed each time, never stored

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path or "\0" in self.path:
            raise InputError(f"a data set is named by a text, not {self.path!r}", remedy=_NAMES)
        if self.kind == "torchvision" and self.name not in TORCHVISION:
            raise InputError(
                f"'{self.name}' is not a classification data set of torchvision",
                remedy=f"Known: {', '.join(sorted(TORCHVISION))}. Class folders are named by their path.",
            )
        if self.root is not None and (not isinstance(self.root, str) or not self.root or "\0" in self.root):
            raise InputError(f"data root: a folder was expected, not {self.root!r}")
        self._check_classes()
        _check_fraction("val_fraction", self.val_fraction, least=0.001, below=0.9)
        _check_fraction("allow_corrupt", self.allow_corrupt, least=0.0, below=1.0)
        if self.augment not in AUGMENTATIONS:
            raise InputError(
                f"augment: unknown value {self.augment!r}",
                remedy=f"Choose one of: {', '.join(AUGMENTATIONS)}.",
            )

    def _check_classes(self) -> None:
        if self.classes is None:
            return
        if not self.classes or not all(isinstance(name, str) and name for name in self.classes):
            raise InputError("classes: a list of class names was expected, one for each output")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise InputError(f"classes: named twice: {', '.join(twice)}", remedy="Name every output once.")

    @property
    def kind(self) -> Literal["digits", "torchvision", "folder"]:
        if self.path == "digits":
            return "digits"
        return "torchvision" if self.path.startswith("torchvision:") else "folder"

    @property
    def name(self) -> str:
        """The path without the prefix of its kind."""
        return self.path.removeprefix("torchvision:")

    def to_json(self) -> dict[str, JSON]:
        """Plain values for a model file's lineage, without the permission to download."""
        values = {key: getattr(self, key) for key in _STORED}
        return values | {"classes": None if self.classes is None else list(self.classes)}

    @classmethod
    def from_json(cls, values: JSON) -> DataSpec:
        """Read what `to_json` wrote, trusting nothing: a file can name data, never code or a download."""
        if not isinstance(values, Mapping) or "path" not in values:
            raise InputError(
                f"a data record is an object with a path, not {str(values)[:80]!r}", remedy=_NAMES
            )
        unknown = sorted(str(key) for key in values if key not in _STORED)
        if unknown:
            raise InputError(
                f"data record: unknown key {', '.join(unknown)}", remedy="Name the data with --data."
            )
        classes = values.get("classes")
        if not (classes is None or isinstance(classes, list | tuple)):
            raise InputError(
                "data record: classes is not a list of names", remedy="Name the data with --data."
            )
        return cls(**{**values, "classes": None if classes is None else tuple(classes)})


_NAMES = "Pass 'digits', 'torchvision:NAME' or a folder of images."


def _check_fraction(key: str, value: object, *, least: float, below: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and least <= value < below):  # type: ignore[operator]
        raise InputError(f"{key}: a fraction from {least:g} to under {below:g} was expected, not {value!r}")
