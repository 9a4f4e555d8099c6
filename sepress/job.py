"""One recipe at work in one folder: its nets, data and records; its settings as plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from sepress import console
from sepress.bundle import load_bundle, load_model, make_bundle, save_bundle
from sepress.coupling import Coupling, trace
from sepress.data import DataSource, DataSpec, Loader, make_loader, open_data
from sepress.device import resolve_device
from sepress.errors import InputError
from sepress.measure import environment
from sepress.pruning import first_images
from sepress.recipe import Recipe
from sepress.runfolder import RunFolder, StageRecord
from sepress.train import TrainConfig
from sepress.types import JSON, Bundle, Policy

LABELS = ("base", "pruned", "tuned")  # in the order in which a run makes them


class Job:
    """The nets, data and records of one run; nets are loaded from their files only where they are needed."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = resolve_device(recipe.device)
        self.records: list[StageRecord] = []
        self.bundles: dict[str, Bundle] = {}
        self._source: DataSource | None = None

    def artifact(self, role: str) -> Path | None:
        """The newest file of that role, or None."""
        names = [r.artifacts[role] for r in self.records if role in r.artifacts]
        return self.folder.file(names[-1]) if names else None

    def fact(self, name: str) -> JSON | None:
        """The newest finding of that name, or None."""
        found = [r.facts[name] for r in self.records if name in r.facts]
        return found[-1] if found else None

    @property
    def label(self) -> str:
        """The newest net's label."""
        return self.labels[-1]

    @property
    def labels(self) -> list[str]:
        """The labels of the nets there are, oldest first."""
        return [label for label in LABELS if label == "base" or self.artifact(label)]

    def bundle(self, label: str) -> Bundle:
        """The net of that label, on the run's device; from its file where this run did not make it."""
        if label not in self.bundles:
            path = self.artifact(label)
            bundle = (
                load_base(self.recipe) if path is None else load_bundle(path, arch=self.recipe.model.arch)
            )
            bundle.net.to(self.device)
            self.bundles[label] = bundle
        return self.bundles[label]

    def source(self) -> DataSource:
        """The data that the recipe names, or that the model was trained on."""
        if self._source is None:
            self.use(open_source(self.recipe, self.bundle("base")))
        assert self._source is not None
        return self._source

    def use(self, source: DataSource) -> None:
        """Take this data, and say what was noted while it was opened."""
        self._source = source
        for note in source.notes:
            console.log(note)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the data and the stages noted, each once."""
        source = () if self._source is None else self._source.notes
        stages = [note for record in self.records for note in record.facts.get("notes", ())]
        return tuple(dict.fromkeys((*source, *stages)))

    def calibration(self, images: int) -> Loader:
        """A loader of calibration images (from train, evaluation transforms), the same each time."""
        dataset = self.source().calibration(images, seed=self.recipe.seed)
        return make_loader(dataset, batch_size=batch_size(self.recipe), workers=workers(self.recipe))

    def images(self, count: int) -> torch.Tensor:
        """The first calibration images, (count, C, H, W) on the device."""
        return first_images(self.calibration(count), count).to(self.device)

    def example(self) -> torch.Tensor:
        """One blank input of the base's size, (1, C, H, W) on the device: enough to count MACs."""
        size = self.bundle("base").spec.preprocessing.input_size
        return torch.zeros(1, *size, device=self.device)

    def coupling(self, label: str) -> Coupling:
        """Trace the net of that label on a calibration image."""
        return trace(self.bundle(label).net, self.images(1))

    def keep(self, label: str, net: torch.nn.Module, *, parent: Bundle, **lineage: JSON) -> str:
        """Save a net as `LABEL.pt` and hold it; returns the file's name."""
        facts = dict(parent.lineage) | lineage | {"stage": label, "environment": environment()}
        bundle = make_bundle(net, parent.spec, lineage=facts)
        save_bundle(bundle, self.folder.file(f"{label}.pt"), overwrite=True)  # a damaged one is made anew
        self.bundles[label] = bundle
        return f"{label}.pt"


# ---- a recipe's settings as plain values ----------------------------------------------------------
def load_base(recipe: Recipe, *, weights: Literal["needed", "none"] = "needed") -> Bundle:
    """The net that the recipe starts from; with weights='none' its structure only."""
    model = recipe.model
    return load_model(
        model.source,
        arch=model.arch,
        random_weights=model.random_weights,
        num_classes=model.num_classes,
        kwargs=model.kwargs,
        trust_pickle=model.trust_pickle,
        overrides=overrides(recipe),
        weights=weights,
    )


def open_source(recipe: Recipe, bundle: Bundle) -> DataSource:
    """Open the recipe's data, or what the model file says it was trained on, for this net."""
    known = bundle.lineage.get("data")
    if recipe.data is not None:
        spec = data_spec(recipe)
    elif known is not None:
        spec = DataSpec.from_json({key: value for key, value in known.items() if key != "fingerprint"})
    else:
        raise InputError(
            "there are no calibration images: the model does not know its data",
            remedy="Pass --data with class folders, or a flat folder of 256 to 1,024 images like yours.",
        )
    return open_data(
        spec,
        preprocessing=bundle.spec.preprocessing,
        class_names=bundle.spec.class_names,
        num_classes=bundle.spec.kwargs.get("num_classes"),
    )


def data_spec(recipe: Recipe) -> DataSpec:
    """The recipe's data section as the data module takes it."""
    if recipe.data is None:
        raise InputError("no data is named", remedy="Pass --data: digits, torchvision:NAME or a folder.")
    names = [field.name for field in dataclasses.fields(DataSpec)]
    return DataSpec(**{name: getattr(recipe.data, name) for name in names if hasattr(recipe.data, name)})


def policy_of(settings: Any) -> Policy:
    """The planning policy in a prune stage's settings."""
    return Policy(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Policy)})


def train_config(recipe: Recipe, settings: Any) -> TrainConfig:
    """The training settings in a train or finetune stage."""
    common = {"batch_size": batch_size(recipe), "workers": workers(recipe), "seed": recipe.seed}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return TrainConfig(**common | {n: getattr(settings, n) for n in names if hasattr(settings, n)})


def overrides(recipe: Recipe) -> dict[str, JSON]:
    """The preprocessing figures that the user typed."""
    typed = {n: getattr(recipe.model, n) for n in ("input_size", "mean", "std", "interpolation")}
    return {name: value for name, value in typed.items() if value is not None}


def batch_size(recipe: Recipe) -> int:
    return 128 if recipe.data is None else recipe.data.batch_size


def workers(recipe: Recipe) -> int:
    return 0 if recipe.data is None else recipe.data.workers
