"""One recipe at work: its nets, data and records; its settings as plain values.

A job is made before its folder: whatever can be refused (device, model, data, labels) is refused while
nothing has been written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sepress import console
from sepress.bundle import load_bundle, load_model, make_bundle, save_bundle
from sepress.calibrate import NEEDS_LABELS
from sepress.constraints import HELD, parse_constraint
from sepress.coupling import Coupling, trace
from sepress.criteria import get_criterion
from sepress.data import DataSource, DataSpec, Loader, make_loader, open_data
from sepress.defaults import BATCH_SIZE
from sepress.device import home_of, resolve_device
from sepress.digests import file_digest
from sepress.errors import CheckError, InputError, SepressError
from sepress.measure import environment
from sepress.models import build_spec, parse_reference
from sepress.modes import evaluating
from sepress.outputs import tensors_in
from sepress.pruning import first_images
from sepress.recipe import Recipe
from sepress.runfolder import RunFolder, StageRecord
from sepress.schedule import TrainConfig
from sepress.train import Accuracy, evaluate
from sepress.types import JSON, Bundle, ModelSpec, Policy

LABELS = ("base", "polarised", "folded", "pruned", "tuned")  # of the nets that stages make
SAVED_CHECK = "saved_equals_loaded"
_TRAINING = {"train": "training", "polarise": "polarising", "finetune": "fine-tuning"}  # these need labels


class Job:
    """The nets, data and records of one run; nets are read from their files only where they are needed."""

    folder: RunFolder

    def __init__(self, recipe: Recipe) -> None:
        """Load the model, or look its architecture up where it is trained here, and open the data."""
        self.recipe = recipe
        self.device = resolve_device(recipe.device)
        self.records: list[StageRecord] = []
        self.bundles: dict[str, Bundle] = {}
        self.input_label = "base"
        if recipe.stages[0].kind == "train":
            self.spec, self.source = self._untrained()
        else:
            bundle = load_base(recipe)
            bundle.net.to(self.device)
            self.input_label = _input_label(recipe, bundle)
            self.bundles[self.input_label] = bundle
            self.spec, self.source = bundle.spec, open_source(recipe, bundle)
            if self.input_label != "base" and (base := find_base(bundle, arch=self.user_arch)):
                base.net.to(self.device)
                self.bundles["base"] = base
            elif self.input_label == "polarised":  # without its base it is the base of what follows
                self.input_label = "base"
                self.bundles = {"base": bundle}
        self._check_labels()
        for note in self.source.notes:
            console.log(note)

    def _untrained(self) -> tuple[ModelSpec, DataSource]:
        """The architecture for the recipe's data: what it shows says how many classes and channels."""
        recipe, chosen = self.recipe, data_spec(self.recipe)
        kwargs = dict(recipe.model.kwargs)
        if chosen.path == "digits":
            kwargs.setdefault("in_chans", 1)  # the embedded digits are grey
        shape = build_spec(recipe.model.source, kwargs=kwargs, overrides=overrides(recipe))
        source = open_data(chosen, preprocessing=shape.preprocessing)
        if source.num_classes is None:
            raise InputError("training needs labels", remedy="Sort the images into class folders.")
        spec = build_spec(
            recipe.model.source,
            num_classes=source.num_classes,
            kwargs=kwargs,
            overrides=overrides(recipe),
            class_names=source.class_names,
        )
        known = open_data(  # again, for these classes: the order of the outputs is no assumption here
            chosen,
            preprocessing=spec.preprocessing,
            class_names=source.class_names,
            num_classes=source.num_classes,
        )
        return spec, known

    def _check_labels(self) -> None:
        if self.source.labels_reason is None:
            return
        for stage in self.recipe.stages:
            if stage.kind in _TRAINING:
                what = _TRAINING[stage.kind]
            elif stage.kind in ("rank", "prune") and get_criterion(stage.criterion).needs & NEEDS_LABELS:
                what = f"the criterion {stage.criterion}"
            elif stage.kind == "prune" and stage.within is not None:
                what = f"a search within {stage.within}"
            elif stage.kind == "prune" and stage.step_epochs:
                what = "fine-tuning between steps"
            elif stage.kind == "precision" and parse_constraint(stage.within).metric in HELD:
                what = f"a file held to {stage.within}"
            elif stage.kind == "fold" and stage.constraint is not None:
                what = f"folding gates within {stage.constraint}"
            else:
                continue
            otherwise = "; or fold all gates (--all), or those you name (--gates)"
            raise InputError(
                f"{what} needs labels: {self.source.labels_reason}",
                remedy="Pass data in class folders that the model's outputs match, or --classes FILE"
                f"{otherwise if stage.kind == 'fold' else ''}.",
            )

    @property
    def user_arch(self) -> str | None:
        """The user's own factory where the recipe names one, to rebuild this run's files with."""
        model = self.recipe.model
        if model.arch is not None:
            return model.arch if parse_reference(model.arch)[0] == "user" else None
        return model.source if self.spec.source == "user" else None

    @property
    def input_files(self) -> dict[str, Path]:
        """The files that the recipe names, by what they are."""
        files = {"model file": self.recipe.model.source}
        for stage in self.recipe.stages:
            if stage.kind == "prune" and stage.plan is not None:
                files["plan"] = stage.plan
            if stage.kind == "prune" and stage.latency_table is not None:
                files["latency table"] = stage.latency_table
        return {what: Path(path) for what, path in files.items() if Path(path).is_file()}

    @property
    def inputs(self) -> dict[str, str]:
        """What results depend on beside the recipe: digests of the files that it names and the data."""
        found = {what: file_digest(path) for what, path in self.input_files.items()}
        return found | {"data": self.source.fingerprint}

    def made_for(self, kind: str) -> dict[str, str]:
        """Digests of the files that this run made so far and a stage of that kind reads, by role."""
        reads = (*LABELS, "onnx", "base_onnx") if kind == "precision" else LABELS
        roles = [role for record in self.records for role in record.artifacts if role in reads]
        return {role: file_digest(path) for role in roles if (path := self.artifact(role)) is not None}

    def artifact(self, role: str) -> Path | None:
        """The newest file of that role, or None."""
        names = [r.artifacts[role] for r in self.records if role in r.artifacts]
        return self.folder.file(names[-1]) if names else None

    def fact(self, name: str) -> JSON | None:
        """The newest finding of that name, or None."""
        found = [r.facts[name] for r in self.records if name in r.facts]
        return found[-1] if found else None

    @property
    def labels(self) -> list[str]:
        """The labels of the nets there are, in the order in which they were made."""
        given = [label for label in ("base", self.input_label) if label in self.bundles]
        return list(dict.fromkeys((*given, *self._made)))

    @property
    def label(self) -> str:
        """The newest net's label: what this run made last, else its input."""
        return self._made[-1] if self._made else self.input_label

    @property
    def _made(self) -> list[str]:
        """The labels of the nets that the finished stages made, in their order."""
        return [role for record in self.records for role in record.artifacts if role in LABELS]

    @property
    def newest(self) -> Bundle:
        return self.bundle(self.label)

    def bundle(self, label: str) -> Bundle:
        """The net of that label, on the run's device; from its file where this run did not make it."""
        if label not in self.bundles:
            path = self.artifact(label)
            assert path is not None, f"no {label} net was made"
            bundle = load_bundle(path, arch=self.user_arch)
            bundle.net.to(self.device)
            self.bundles[label] = bundle
        return self.bundles[label]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the data and the stages noted, each once."""
        data = [note for record in self.records for note in record.facts.get("data", {}).get("notes", ())]
        stages = [note for record in self.records for note in record.facts.get("notes", ())]
        return tuple(dict.fromkeys((*data, *stages)))

    def calibration(self, images: int) -> Loader:
        """A loader of calibration images (from train, evaluation transforms), the same each time."""
        dataset = self.source.calibration(images, seed=self.recipe.seed)
        return make_loader(dataset, batch_size=batch_size(self.recipe), workers=workers(self.recipe))

    def images(self, count: int) -> Tensor:
        """The first calibration images, (count, C, H, W) on the device."""
        return first_images(self.calibration(count), count).to(self.device)

    def accuracy(self, net: nn.Module, split: str) -> Accuracy:
        """What a net does on a split of the job's data."""
        return evaluate(
            net,
            self.source,
            split=split,
            device=self.device,
            batch_size=batch_size(self.recipe),
            workers=workers(self.recipe),
        )

    def example(self) -> Tensor:
        """One blank input, (1, C, H, W) on the device: enough to count MACs."""
        return torch.zeros(1, *self.spec.preprocessing.input_size, device=self.device)

    def coupling(self, *, eca_neighbours: bool = False) -> Coupling:
        """Trace the newest net on a calibration image."""
        example = self.images(1)
        with console.working("tracing"):
            return trace(self.newest.net, example, eca_neighbours=eca_neighbours)

    def keep(
        self, label: str, net: nn.Module, *, lineage: dict[str, JSON], trained: bool
    ) -> tuple[str, dict[str, JSON]]:
        """Save a net as `LABEL.pt`, read it back, and hold it; returns the file's name and the check.

        The lineage gets this run's data, recipe and environment. Raises CheckError where the file does not
        give the same net, bit for bit.
        """
        data = self.source.spec.to_json() | {"fingerprint": self.source.fingerprint}
        for key in ("path", "root"):  # so that the file knows its data from any folder
            if self.source.spec.kind == "folder" or key == "root":
                data[key] = data[key] and str(Path(data[key]).resolve())
        facts = lineage | {
            "stage": label,
            "data": data,
            "recipe": self.recipe.model_dump(mode="json"),
            "environment": environment(),
        }
        bundle = make_bundle(net, dataclasses.replace(self.spec, trained=trained), lineage=facts)
        path = self.folder.file(f"{label}.pt")
        save_bundle(bundle, path, overwrite=True)  # a damaged one is made anew
        loaded = load_bundle(path, arch=self.user_arch)
        if not _equal(loaded.net, net):
            self.folder.reject(path.name)
            raise CheckError(
                f"{path.name} does not give the net that was saved: its file is marked rejected",
                remedy="Please report this net.",
            )
        self.bundles[label] = bundle
        return path.name, {"passed": True, "relative_error": 0.0}

    def origin(self) -> dict[str, JSON] | None:
        """Where the base of what is pruned or polarised lies, so that a later fine-tune finds its teacher."""
        if self.input_label == "polarised":
            origin: dict[str, JSON] = self.bundles["polarised"].lineage["base"]
            return origin
        path = self.artifact(self.input_label) or Path(self.recipe.model.source)
        if not path.is_file():
            return None
        native = path.parent == self.folder.path or "stage" in self.bundles[self.input_label].lineage
        return {"path": str(path.resolve()), "sha256": file_digest(path), "native": native}


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(value.cpu(), theirs[name].cpu()) for name, value in mine.items()
    )


def _input_label(recipe: Recipe, bundle: Bundle) -> str:
    """What the input is called: the base of what shapes it; elsewhere what its file says it is."""
    kinds = {stage.kind for stage in recipe.stages}
    stage = bundle.lineage.get("stage")
    if stage == "polarised" and "polarise" not in kinds:  # on the way from its base to a pruned net
        return "polarised"
    if kinds & {"polarise", "prune"} or stage not in LABELS:
        return "base"
    again = {"tuned": "finetune", "folded": "fold"}
    if again.get(str(stage)) in kinds:  # a tuned net tuned again
        return "pruned" if bundle.lineage.get("plans") else "base"
    return str(stage)


def find_base(bundle: Bundle, *, arch: str | None) -> Bundle | None:
    """The net that this one was pruned from: the file that its lineage names, if it is still the same."""
    origin = bundle.lineage.get("base")
    if not isinstance(origin, dict) or not isinstance(origin.get("path"), str):
        return None
    path, spec = Path(origin["path"]), bundle.spec
    try:
        if not path.is_file() or file_digest(path) != origin.get("sha256"):
            raise InputError("it is not there any more, or has changed")
        if origin.get("native"):
            return load_bundle(path, arch=arch)
        kwargs = {name: value for name, value in spec.kwargs.items() if name != "num_classes"}
        classes = spec.kwargs.get("num_classes")
        return load_bundle(path, arch=arch or spec.reference, num_classes=classes, kwargs=kwargs)
    except (SepressError, OSError) as error:
        console.log(f"the base model {path} can't be used: {error}")
        return None


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
    named = recipe.data is not None and recipe.data.path is not None
    if named:
        spec = data_spec(recipe)
    elif known is not None:
        spec = _known_spec(recipe, known)
    else:
        raise InputError(
            "there are no calibration images: the model does not know its data",
            remedy="Pass --data with class folders, or a flat folder of 256 to 1,024 images like yours.",
        )
    classes = bundle.spec.kwargs.get("num_classes") or _count_outputs(bundle)
    try:
        source = open_data(
            spec,
            preprocessing=bundle.spec.preprocessing,
            class_names=bundle.spec.class_names,
            num_classes=classes,
        )
    except InputError as error:
        if named:
            raise
        raise InputError(
            f"the data that the model was trained on can't be opened: {error.message}",
            remedy="Pass --data with images like those.",
        ) from error
    if not named and known and source.fingerprint != known.get("fingerprint"):
        console.log(f"the data in {spec.path} has changed since the model was trained on it")
    return source


def _known_spec(recipe: Recipe, known: dict[str, JSON]) -> DataSpec:
    """The data of the model file, with what the recipe says about reading it."""
    spec = DataSpec.from_json({key: value for key, value in known.items() if key != "fingerprint"})
    if recipe.data is None:
        return spec
    typed = recipe.data.model_fields_set & {field.name for field in dataclasses.fields(DataSpec)} - {"path"}
    return dataclasses.replace(spec, **{name: getattr(recipe.data, name) for name in typed})


def _count_outputs(bundle: Bundle) -> int | None:
    """How many classes a net of the user's own tells apart: the width of its first (N, classes) output."""
    device = home_of(bundle.net)
    with evaluating(bundle.net):
        outputs = bundle.net(torch.zeros(1, *bundle.spec.preprocessing.input_size, device=device))
    flat = [x for x in tensors_in(outputs) if x.dim() == 2]
    return flat[0].shape[1] if flat else None


def data_spec(recipe: Recipe) -> DataSpec:
    """The recipe's data section as the data module takes it."""
    if recipe.data is None or recipe.data.path is None:
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
    return BATCH_SIZE if recipe.data is None else recipe.data.batch_size


def workers(recipe: Recipe) -> int:
    return 0 if recipe.data is None else recipe.data.workers
