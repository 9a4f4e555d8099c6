"""The classification data sets of torchvision: how each names its splits, and how it may be augmented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sepress.types import JSON

Arguments = Mapping[str, JSON]


@dataclass(frozen=True)
class TorchvisionEntry:
    splits: Mapping[str, Arguments]  # our split -> constructor arguments; 'all' where there is only one
    augment: str = "natural"


def _flag(augment: str = "natural", **fixed: JSON) -> TorchvisionEntry:
    return TorchvisionEntry({"train": {"train": True, **fixed}, "test": {"train": False, **fixed}}, augment)


def _split(*, augment: str = "natural", **names: str) -> TorchvisionEntry:
    return TorchvisionEntry({ours: {"split": theirs} for ours, theirs in names.items()}, augment)


_WHOLE = TorchvisionEntry({"all": {}})

# 'digits' augmentation (no flips) wherever mirroring changes what an image says. Where a data set
# publishes no labelled test split, its validation split is the test and ours is cut from train.
TORCHVISION: Mapping[str, TorchvisionEntry] = {
    "CIFAR10": _flag(),
    "CIFAR100": _flag(),
    "CLEVRClassification": _split(train="train", test="val"),
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": _split(train="train", val="valid", test="test"),
    "DTD": _split(train="train", val="val", test="test"),
    "EMNIST": _flag("digits", split="balanced"),
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _split(train="train", val="val", test="test"),
    "FakeData": _WHOLE,
    "FashionMNIST": _flag(),
    "Flowers102": _split(train="train", val="val", test="test"),
    "Food101": _split(train="train", test="test"),
    "GTSRB": _split(train="train", test="test", augment="digits"),
    "ImageNet": _split(train="train", test="val"),
    "Imagenette": _split(train="train", test="val"),
    "KMNIST": _flag("digits"),
    "MNIST": _flag("digits"),
    "OxfordIIITPet": _split(train="trainval", test="test"),
    "PCAM": _split(train="train", val="val", test="test"),
    "Places365": _split(train="train-standard", test="val"),
    "QMNIST": _flag("digits"),
    "RenderedSST2": _split(train="train", val="val", test="test", augment="digits"),
    "SEMEION": TorchvisionEntry({"all": {}}, "digits"),
    "STL10": _split(train="train", test="test"),
    "SUN397": _WHOLE,
    "SVHN": _split(train="train", test="test", augment="digits"),
    "StanfordCars": _split(train="train", test="test"),
    "USPS": _flag("digits"),
}
