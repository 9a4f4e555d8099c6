"""YAML -> Recipe: what a run does, as frozen and checked settings; every error names its file, line and key.

A recipe is untrusted input up to one point: `arch: pkg.module:factory` runs that code, because whoever runs
a recipe runs what it says. Reading one runs nothing: no tags, no aliases, no duplicate keys, bounded size.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from sepress import defaults
from sepress.constraints import parse_constraint, parse_held
from sepress.errors import InputError
from sepress.models import check_kwargs, parse_reference
from sepress.safe_yaml import Document, Fault, KeyPath, Marks, dump_yaml, read_text, read_yaml
from sepress.schedule import TrainConfig
from sepress.types import JSON, TARGETS, Policy, Scope

MAX_EXTENDS = 10  # files in one chain
HELP = "Every key is explained in recipes/README.md."


# ---- settings -----------------------------------------------------------------------------------
class Settings(BaseModel):
    """Frozen and checked; a key that is not known is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|(cpu|cuda|mps)(:\d+)?)$")]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# fmt: off
CriterionName = Literal[
    "auto", "fisher-reconstruction", "reconstruction", "contribution", "fisher", "gate-taylor",
    "mean-excitation", "class-excitation", "excitation-spread", "l1", "l2", "lamp", "bn-scale", "fpgm",
    "group-taylor", "hessian", "random",
]
# fmt: on
CRITERIA: tuple[str, ...] = get_args(CriterionName)


def _read_classes(value: object) -> object:
    """A file of class names, one a line, or the names themselves."""
    if not isinstance(value, str):
        return value
    with _as_value_error():
        lines = read_text(Path(value)).splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _check_constraint(text: str) -> str:
    with _as_value_error():
        parse_constraint(text)
    return text


def _check_held(text: str) -> str:
    with _as_value_error():
        parse_held(text)
    return text


def _check_reference(text: str) -> str:
    with _as_value_error():
        parse_reference(text)
    return text


def _check_kwargs(kwargs: dict[str, JsonValue]) -> dict[str, JsonValue]:
    with _as_value_error():
        return check_kwargs(kwargs, where="kwargs")


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Let pydantic collect what another module's check raises."""
    try:
        yield
    except InputError as error:
        raise ValueError(
            ". ".join(part.rstrip(".") for part in (error.message, error.remedy) if part)
        ) from error


def _read_size(value: object) -> object:
    """A number for a square, H W, or C H W; text as an option gives it."""
    written = value.split(",") if isinstance(value, str) else value
    parts = written if isinstance(written, list | tuple) else [written]
    sizes = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts]
    if not 1 <= len(sizes) <= 4 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"expected a number for a square, H W, or C H W, not {value!r}")
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _read_figures(value: object) -> object:
    """Figures per channel, or one for all; text as an option gives it."""
    if isinstance(value, str):
        return value.split(",")
    return [value] if isinstance(value, int | float) else value


class DataConfig(Settings):
    """Images: their source, how they are split, and how they are fed."""

    # 'digits', 'torchvision:NAME', or a folder; None: what the model file was trained on, read as set here
    path: Annotated[str, Field(min_length=1)] | None = None
    root: str | None = None  # where a torchvision data set lies
    classes: Annotated[tuple[str, ...] | None, BeforeValidator(_read_classes)] = None  # in output order
    val_fraction: Annotated[float, Field(gt=0, lt=0.9)] = 0.1  # cut from train where there is no val split
    allow_corrupt: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # of the images; one that can't be read stops a run
    )
    augment: Literal["auto", "none", "digits", "natural"] = (
        "auto"  # by what the images are: no flips for digits
    )
    download: bool = False  # nothing is fetched unasked
    batch_size: Annotated[int, Field(ge=2)] = defaults.BATCH_SIZE
    workers: Annotated[int, Field(ge=0)] = 0  # small images decode faster than processes start

    @model_serializer(mode="wrap")
    def _a_path_brings_its_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, JSON]:
        """Without one, leave the defaults out: they would hide what the model file says."""
        values: dict[str, JSON] = dump(self)
        given = self.model_fields_set if self.path is None else values
        return {name: value for name, value in values.items() if name in given}


class ModelConfig(Settings):
    """A model file, or the name of an architecture; a foreign model's preprocessing."""

    source: Annotated[
        str, Field(min_length=1)
    ]  # a path, timm:NAME, torchvision:NAME, sepress:NAME, pkg.mod:factory
    arch: Annotated[str, AfterValidator(_check_reference)] | None = None  # what builds a foreign file's net
    kwargs: Annotated[dict[str, JsonValue], AfterValidator(_check_kwargs)] = Field(default_factory=dict)
    num_classes: Count | None = None  # inferred from the weights, or the data
    random_weights: bool = False  # every table then says untrained
    trust_pickle: bool = False  # a pickle runs code when it is read
    input_size: Annotated[int | tuple[int, ...], BeforeValidator(_read_size)] | None = None
    mean: Annotated[tuple[float, ...], BeforeValidator(_read_figures)] | None = None
    std: Annotated[tuple[Positive, ...], BeforeValidator(_read_figures)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None


class _Training(Settings):
    """What a recipe may choose of `TrainConfig`, where the defaults and their reasons stand."""

    epochs: Count
    lr: Positive  # at the peak, for data.batch_size
    optimizer: Literal["sgd", "adamw"] = TrainConfig.optimizer
    momentum: Share = TrainConfig.momentum
    weight_decay: NotNegative = TrainConfig.weight_decay
    warmup_epochs: NotNegative = TrainConfig.warmup_epochs
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = TrainConfig.label_smoothing
    ema_decay: Share | None = TrainConfig.ema_decay
    clip_norm: Positive | None = TrainConfig.clip_norm
    amp: Literal["auto", "bfloat16", "off"] = TrainConfig.amp
    channels_last: Literal["auto", "off"] = TrainConfig.channels_last

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) must be fewer than epochs ({self.epochs})"
            )
        return self


class TrainStage(_Training):
    """Train from random weights; the epoch with the best validation top-1 is kept."""

    kind: Literal["train"] = "train"
    epochs: Count = TrainConfig.epochs
    lr: Positive = TrainConfig.lr


class FinetuneStage(_Training):
    """Train the newest model on, taught by the base model."""

    kind: Literal["finetune"] = "finetune"
    epochs: Count = 3  # most of what pruning lost is back after these
    lr: Positive = 0.02  # the weights are near a solution: a fraction of training's
    distill_weight: Annotated[float, Field(ge=0, le=1)] = TrainConfig.distill_weight
    temperature: Positive = TrainConfig.temperature


class PolariseStage(_Training):
    """Train the newest model on with a penalty that drives its gates apart; its last epoch is kept."""

    kind: Literal["polarise"] = "polarise"
    epochs: Count = 3  # on a small net every gate is decided by then
    lr: Positive = 0.02  # the weights are near a solution: a fraction of training's
    strength: Positive = 1.0  # of the penalty beside the loss: a third of it decides part of the channels
    open_share: Share = 0.5  # of each gate's channels, driven to 1; the others to 0


class RankStage(Settings):
    """Score every channel."""

    kind: Literal["rank"] = "rank"
    criterion: CriterionName = defaults.CRITERION
    calibration_images: Count = defaults.CALIBRATION_IMAGES


class PruneStage(Settings):
    """Rank, plan, remove, check, re-estimate batch norm."""

    kind: Literal["prune"] = "prune"
    criterion: CriterionName = defaults.CRITERION
    calibration_images: Count = defaults.CALIBRATION_IMAGES
    recalibration_images: Count = defaults.RECALIBRATION_IMAGES
    compensate: bool = True  # refit the layers that read what goes, in closed form
    ratio: Share | None = None  # of the prunable channels, removed
    target_macs: Share | None = None  # of the base's, kept
    target_params: Share | None = None  # of the base's, kept
    target_latency: Share | None = None  # of the base's, kept
    latency_table: str | None = None  # what `sepress profile` wrote; null: layers are timed on this machine
    within: Annotated[str, AfterValidator(_check_held)] | None = None  # the smallest net that holds this
    steps: Count = 1  # each on a net ranked anew, and recalibrated
    step_epochs: Annotated[int, Field(ge=0)] = 0  # of fine-tuning between steps
    scope: Scope = Policy.scope
    round_to: Count = Policy.round_to
    min_width: Count = Policy.min_width
    gated_only: bool = Policy.gated_only
    eca_neighbours: bool = Policy.eca_neighbours
    frozen: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # patterns of group names
    overrides: dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict  # pattern -> ratio
    )
    plan: str | None = None  # a plan.json, applied as it stands
    allow_vacuous: bool = False  # accept a check that can't tell

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        targets = [name for name in _TARGETS if getattr(self, name) is not None]
        if self.plan is None and len(targets) != 1:
            given = " and ".join(targets) if targets else "none"
            raise ValueError(f"exactly one of {', '.join(_TARGETS)} is needed, given: {given}")
        if self.plan is not None:
            idle = [name for name in _PLANNING if name in self.model_fields_set]
            idle = [name for name in idle if getattr(self, name) is not None]  # null takes a target back
            if idle:
                raise ValueError(f"a plan says what is removed: it takes no {', '.join(idle)}")
        if self.steps > 1 and (self.ratio or self.target_latency or self.within or self.overrides):
            raise ValueError("steps lead to target_macs or target_params, and take no other target")
        if self.steps > 1 and self.latency_table:
            raise ValueError("a latency table is of one net, and steps plan on several: leave one out")
        if self.steps == 1 and self.step_epochs:
            raise ValueError("step_epochs lie between steps: set steps to 2 or more")
        return self

    @model_serializer(mode="wrap")
    def _a_plan_stands_alone(self, dump: SerializerFunctionWrapHandler) -> dict[str, JSON]:
        """Leave out the defaults that a given plan makes void, so that what is written can be read."""
        values: dict[str, JSON] = dump(self)
        void = () if self.plan is None else _PLANNING
        return {name: value for name, value in values.items() if name not in void}


_TARGETS = (*TARGETS, "within")
# read while a plan is made only
_PLANNING = (
    "criterion",
    *(field.name for field in fields(Policy)),
    "latency_table",
    "within",
    "steps",
    "step_epochs",
)


class FoldStage(Settings):
    """Fold gates into the weights around them."""

    kind: Literal["fold"] = "fold"
    # what the most gates that hold it on validation are folded within, against the net as it came
    within: Annotated[str, AfterValidator(_check_held)] = "top1_drop<=0.001"
    gates: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # patterns of gate names: fold these
    all: bool = False  # fold every gate, whatever it costs
    calibration_images: Count = defaults.CALIBRATION_IMAGES
    allow_vacuous: bool = False  # accept a check that can't tell

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.all and (self.gates or "within" in self.model_fields_set):
            raise ValueError("all folds every gate, whatever it costs: it takes no gates, and no within")
        return self

    @property
    def constraint(self) -> str | None:
        """What must hold; None where the gates are named and no constraint is."""
        named = self.all or bool(self.gates)
        return self.within if "within" in self.model_fields_set or not named else None

    @model_serializer(mode="wrap")
    def _named_gates_have_no_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, JSON]:
        """Leave out the constraint that naming gates makes void, so that what is written reads the same."""
        values: dict[str, JSON] = dump(self)
        return {name: value for name, value in values.items() if name != "within" or self.constraint}


class EvaluateStage(Settings):
    """Measure accuracy."""

    kind: Literal["evaluate"] = "evaluate"
    split: Literal["test", "val", "train"] = "test"


class ExportStage(Settings):
    """Write ONNX, hold it to the net on real images, and time it."""

    kind: Literal["export"] = "export"
    opset: Annotated[int, Field(ge=18, le=23)] = defaults.OPSET
    exporter: Literal["dynamo", "torchscript"] = defaults.EXPORTER
    batch: Count | None = None  # images at once; null: any number
    with_preprocessing: bool = False  # a second file, from image bytes to probabilities
    latency_rounds: Count = defaults.LATENCY_ROUNDS  # interleaved with the base model
    allow_vacuous: bool = False  # accept a check that can't tell


class PrecisionStage(Settings):
    """Write the exported file in other precisions, and keep what holds a constraint on validation."""

    kind: Literal["precision"] = "precision"
    fp16: bool = True
    int8: bool = True
    within: Annotated[str, AfterValidator(_check_constraint)] = "top1_drop<=0.01"  # against the float file
    calibration: Literal["auto", "minmax", "entropy", "percentile"] = "auto"  # of int8; auto: all, the best
    range_images: Count = 128  # ranges settle with these
    latency_rounds: Count = defaults.LATENCY_ROUNDS  # interleaved with the float file

    @model_validator(mode="after")
    def _some_precision(self) -> Self:
        if not (self.fp16 or self.int8):
            raise ValueError("fp16 and int8 are both false: nothing is left to make")
        return self

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(name for name in ("fp16", "int8") if getattr(self, name))


STAGES: Mapping[str, type[Settings]] = {
    "train": TrainStage,
    "polarise": PolariseStage,
    "fold": FoldStage,
    "rank": RankStage,
    "prune": PruneStage,
    "finetune": FinetuneStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
    "precision": PrecisionStage,
}
# in a run; fold has no place of its own
_PLACES = {
    "train": 0,
    "polarise": 1,
    "rank": 2,
    "prune": 3,
    "finetune": 4,
    "evaluate": 5,
    "export": 5,
    "precision": 5,
}


def _read_stage(value: object) -> object:
    """The YAML form, `prune: {ratio: 0.3}` or a bare `evaluate` -> the stage's fields and its kind."""
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError("a stage is its name, or one key with its options, such as 'prune: {ratio: 0.3}'")
    ((kind, options),) = value.items()
    if kind not in STAGES:
        raise ValueError(f"unknown stage '{kind}'{_near(kind, STAGES)}; known: {', '.join(STAGES)}")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"the options of '{kind}' are a mapping, not {options!r}")
    if options and "kind" in options:
        raise ValueError(f"unknown key 'kind' in '{kind}'")
    return {"kind": kind, **(options or {})}


Stage = Annotated[
    TrainStage
    | PolariseStage
    | FoldStage
    | RankStage
    | PruneStage
    | FinetuneStage
    | EvaluateStage
    | ExportStage
    | PrecisionStage,
    Field(discriminator="kind"),
    BeforeValidator(_read_stage),
]


class Recipe(Settings):
    """A whole run: a model, images, and the list of stages that work on them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Seed = 0
    device: DeviceName = "auto"
    threads: Count | None = None  # torch's own choice
    out: str | None = None  # the run folder, relative to the current one; runs/NAME
    data: DataConfig | None = None  # a model file that sepress wrote knows its data
    model: ModelConfig
    stages: tuple[Stage, ...]
    require: tuple[Annotated[str, AfterValidator(_check_constraint)], ...] = ()  # 'metric op value'

    @field_validator("stages")
    @classmethod
    def _order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Each stage once, in the one order in which a net is made and then looked at."""
        if not stages:
            raise ValueError(f"a run needs a stage; known: {', '.join(STAGES)}")
        kinds: list[str] = [stage.kind for stage in stages]
        for kind in STAGES:
            if kinds.count(kind) > 1:
                raise ValueError(f"'{kind}' stands twice; a second round is a run on the first one's model")
        at = kinds.index("fold") if "fold" in kinds else len(kinds)
        ordered = kinds[:at] + kinds[at + 1 :]
        wrong = [pair for pair in pairwise(ordered) if _PLACES[pair[0]] > _PLACES[pair[1]]]
        if at < len(kinds):
            wrong += [(kind, "fold") for kind in kinds[:at] if kind in ("evaluate", "export")]
            wrong += [("fold", kind) for kind in kinds[at:] if kind in ("train", "polarise")]
        for before, after in wrong:
            raise ValueError(
                f"'{after}' can't follow '{before}'; the order is train, polarise, rank, prune, "
                "finetune, then evaluate and export, precision after export; fold stands anywhere between "
                "polarise and evaluate"
            )
        if "precision" in kinds and "export" not in kinds[: kinds.index("precision")]:
            raise ValueError("'precision' converts the file that 'export' writes: put an export before it")
        return stages

    @model_validator(mode="after")
    def _something_to_work_on(self) -> Self:
        training = self.stages[0].kind == "train"
        if training and (self.data is None or self.data.path is None):
            raise ValueError("training needs data: set data.path (--data)")
        if self.model.source.startswith("sepress:") and not (training or self.model.random_weights):
            raise ValueError(
                f"{self.model.source} has no pretrained weights: train it first, "
                "or set model.random_weights (--random-weights)"
            )
        return self

    @field_serializer("stages")
    def _yaml_form(self, stages: tuple[Stage, ...], info: SerializationInfo) -> list[JSON]:
        return [{stage.kind: stage.model_dump(mode=info.mode, exclude={"kind"})} for stage in stages]


def effective_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


# ---- values -> Recipe ---------------------------------------------------------------------------
Chosen = TypeVar("Chosen", bound=Settings)


def build_recipe(
    values: Mapping[str, JSON], marks: Marks, *, faults: Sequence[Fault] = (), remedy: str = HELP
) -> Recipe:
    """Validate plain values; InputError lists every fault, each with where it was written and its key."""
    return build_settings(Recipe, values, marks, faults=faults, remedy=remedy)


def build_settings(
    kind: type[Chosen],
    values: Mapping[str, JSON],
    marks: Marks,
    *,
    faults: Sequence[Fault] = (),
    remedy: str = HELP,
) -> Chosen:
    """As `build_recipe`, for settings of any kind."""
    found = list(faults)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        found += [_fault(e, marks, kind) for e in error.errors()]
    if not found:
        return settings
    lines = [str(fault) for fault in found]
    summary = lines if len(lines) == 1 else [f"{len(lines)} errors:", *lines]
    raise InputError("\n  ".join(summary), remedy=remedy)


def _fault(error: Mapping[str, Any], marks: Marks, settings: type[Settings]) -> Fault:
    """Where the key, or else the nearest part that holds it, was written, and what is wrong with it."""
    path: KeyPath = error["loc"]
    nearest = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in marks), None)
    mark = None if nearest is None else marks[nearest]
    named = nearest == path and not str(mark).rpartition(":")[2].isdecimal()  # an option says which key
    return Fault(mark, () if named else path, _explain(error, settings))


def _explain(error: Mapping[str, Any], settings: type[Settings]) -> str:
    kind, path, given = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        known = _known_keys(settings, path[:-1])
        return f"unknown key{_near(str(path[-1]), known)}; known: {', '.join(known)}"
    if kind == "missing":
        return "this key is required"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    message = (
        error["msg"]
        .partition(", unable to")[0]
        .replace("Input should", "should")
        .replace("valid number", "number")
        .replace("valid tuple", "list")
    )
    return message if isinstance(given, Mapping | list | tuple) else f"{message}, not {given!r}"


def _known_keys(settings: type[Settings], path: KeyPath) -> list[str]:
    """The keys that the settings at a path take."""
    found = [settings]
    for key in path:
        stage = [kind for kind in found if (f := kind.model_fields.get("kind")) and f.default == key]
        if stage:
            found = stage
        elif isinstance(key, str):
            found = [inner for kind in found for inner in _settings_in(kind.model_fields[key].annotation)]
    names = [name for kind in found for name in kind.model_fields if name != "kind"]
    return names if path or settings is not Recipe else [*names, "extends"]


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _settings_in(part)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def check_inputs(recipe: Recipe, *, images: bool = True) -> None:
    """Raise InputError where a file or folder that the recipe names is missing, or no `images` are named.

    To be called before anything is loaded or fetched.
    """
    data, source = recipe.data and recipe.data.path, recipe.model.source
    if Path(source).is_dir():
        from sepress.bundle.formats import check_folder

        check_folder(Path(source))  # of shards, or of another framework
        raise InputError(f"{source}: it is a folder", remedy="Pass the model file inside it.")
    if not Path(source).is_file():
        _check_name(source)
        if data is None and images:
            raise InputError(
                f"there are no images: {source} is a name, and only a model file can know its data",
                remedy="Pass --data (data.path in a recipe): a folder of images, digits or torchvision:NAME.",
            )
    elif recipe.stages[0].kind == "train":
        raise InputError(
            f"training starts from random weights: {source} is a model file",
            remedy="Name an architecture, such as sepress:se_resnet20. To train a file on, fine-tune it.",
        )
    if data and data.startswith("torchvision:"):
        from sepress.data import DataSpec

        DataSpec(path=data)  # knows the names
    elif data and data != "digits" and not Path(data).is_dir():
        raise InputError(f"there is no image folder {data}", remedy=_RELATIVE)
    for stage in recipe.stages:
        if isinstance(stage, PruneStage) and stage.plan and not Path(stage.plan).is_file():
            raise InputError(f"there is no plan {stage.plan}", remedy=_RELATIVE)
        if isinstance(stage, PruneStage) and stage.latency_table:
            if not Path(stage.latency_table).is_file():
                raise InputError(f"there is no latency table {stage.latency_table}", remedy=_RELATIVE)
            from sepress.costs import read_table

            read_table(Path(stage.latency_table))  # what is no table is told before a run folder is made


def _check_name(source: str) -> None:
    """Raise InputError where what is no file is no reference either; looks nothing up."""
    try:
        parse_reference(source)
    except InputError as error:
        if re.match(r"\w+:", source):  # meant as a reference
            raise
        near = ", ".join(f"{registry}:{source}" for registry in ("timm", "torchvision"))
        hint = f"A name is written {near}." if source.isidentifier() else _RELATIVE
        raise InputError(f"there is no model file {source}", remedy=hint) from error


_RELATIVE = "Paths are relative to the current folder."


# ---- files -> values ----------------------------------------------------------------------------
def load_recipe(name: str | Path, overrides: Sequence[str] = (), *, require: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a packaged one by name, and apply `key.path=value` overrides.

    The constraints of `require` are added to the recipe's own. Raises one InputError for all faults, each
    with file, line (or option) and key.
    """
    values, marks, faults = _load(find_recipe(str(name)), ())
    for text in overrides:
        override(values, marks, text)
    own = values.setdefault("require", [])
    if isinstance(own, list):  # else validation says so
        marks.update({("require", len(own) + number): "--require" for number in range(len(require))})
        own.extend(require)
    return build_recipe(values, marks, faults=faults)


def find_recipe(name: str) -> Path:
    """The file of that name, else the packaged one: 'quickstart' or 'recipes/quickstart.yaml'."""
    path = Path(name)
    if path.is_file():
        return path
    folder = packaged_recipes()
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    if stem in known:
        return folder / f"{stem}.yaml"
    raise InputError(
        f"there is no file '{name}'{_near(stem, known)}",
        remedy=f"Pass a YAML file, or a packaged one: {', '.join(known)}.",
    )


def check_kind(values: Mapping[str, JSON], path: Path, *, verb: Literal["run", "benchmark"]) -> None:
    """Raise InputError where a file's keys are those of the other kind, which another verb runs."""
    if verb == "run" and "nets" in values:
        raise InputError(f"{path} is a benchmark, no recipe", remedy=f"Run it by `sepress benchmark {path}`.")
    if verb == "benchmark" and values.keys() & {"stages", "model", "extends"}:
        raise InputError(f"{path} is a recipe, no benchmark", remedy=f"Run it by `sepress run {path}`.")


def packaged_recipes() -> Path:
    """The folder of recipes: inside an installed wheel, or the checkout's own."""
    package = Path(__file__).parent
    wheel = package / "_recipes"
    return wheel if wheel.is_dir() else package.parent / "recipes"


def _load(path: Path, chain: tuple[Path, ...]) -> Document:
    """A file's values laid over those of the file it extends."""
    chain = (*chain, path.resolve())
    document = read_yaml(read_text(path), str(path))
    values, marks, faults = document
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values", remedy=HELP)
    check_kind(values, path, verb="run")
    _spell_out(values)
    values.setdefault("name", path.stem)
    values.setdefault("out", None)  # neither is inherited: another recipe has another folder
    if "extends" not in values:
        return document
    parent, mark = values.pop("extends"), marks[("extends",)]
    if not isinstance(parent, str):
        raise InputError(f"{mark}: extends: expected the name of a recipe file, not {parent!r}", remedy=HELP)
    beside = path.parent / parent
    found = beside if beside.is_file() else find_recipe(parent)
    if found.resolve() in chain or len(chain) >= MAX_EXTENDS:
        names = " -> ".join(file.name for file in (*chain, found))
        raise InputError(f"{mark}: extends: no end to what extends what: {names}", remedy=HELP)
    base = _load(found, chain)
    _lay_over(base, document, base.values, values, ())
    return base._replace(faults=[*base.faults, *faults])


def _spell_out(values: dict[str, Any]) -> None:
    """Short forms -> long ones: `data: digits`, `model: timm:NAME`, `- evaluate`."""
    for key, field in (("data", "path"), ("model", "source")):
        if isinstance(values.get(key), str):
            values[key] = {field: values[key]}
    if isinstance(values.get("stages"), list):
        values["stages"] = [{item: {}} if isinstance(item, str) else item for item in values["stages"]]


def _lay_over(
    base: Document, top: Document, below: dict[str, Any], above: dict[str, Any], at: KeyPath
) -> None:
    """Merge mappings key by key; anything else (a list, the stages) replaces what is below as a whole."""
    for key, value in above.items():
        path = (*at, key)
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay_over(base, top, below[key], value, path)
            continue
        below[key] = value
        _forget(base.marks, path)
        base.marks.update({p: mark for p, mark in top.marks.items() if p[: len(path)] == path})


def _forget(marks: dict[KeyPath, str], path: KeyPath) -> None:
    for old in [p for p in marks if p[: len(path)] == path]:
        del marks[old]


def override(values: dict[str, Any], marks: dict[KeyPath, str], text: str) -> None:
    """Apply `key.path=value`; a stage is addressed by its kind, or by its position from 0."""
    dotted, equals, written = text.partition("=")
    keys: list[str | int] = [*dotted.strip().split(".")]
    mark = f"--set {dotted}"
    if not equals or not all(keys):
        raise InputError(
            f"--set {text}: expected key.path=value, such as stages.prune.target_macs=0.4", remedy=HELP
        )
    if keys[0] == "stages" and len(keys) > 1:
        stage = _find_stage(values.get("stages"), str(keys[1]), mark)
        keys = ["stages", *stage, *(keys[3:] if keys[2:3] == [stage[1]] else keys[2:])]
    value = read_yaml(written, mark).values
    place: Any = values
    for depth, key in enumerate(keys):
        here = ".".join(map(str, keys[:depth]))
        if isinstance(place, list):
            keys[depth] = _position(place, key, f"{mark}: {here}")
        elif not isinstance(place, dict):
            raise InputError(f"{mark}: {here} holds no keys", remedy=HELP)
        elif place.get(key) is None:
            place[key], marks[tuple(keys[: depth + 1])] = {}, mark
        parent, place = place, place[keys[depth]]
    parent[keys[-1]] = value
    _spell_out(values)
    _forget(marks, tuple(keys))
    marks[tuple(keys)] = mark


def _position(items: list[Any], key: str | int, where: str) -> int:
    """A key of a list as the position that it names."""
    if str(key).isdecimal() and int(key) < len(items):
        return int(key)
    raise InputError(f"{where} is a list of {len(items)}, and '{key}' is no position in it, counted from 0")


def _find_stage(stages: Any, name: str, mark: str) -> tuple[int, str]:
    """The position and kind of the stage that a kind or a position names."""
    listing = stages if isinstance(stages, list) else ()
    kinds = [str(next(iter(s))) if isinstance(s, dict) and s else "" for s in listing]
    listed = ", ".join(f"{number} ({kind})" for number, kind in enumerate(kinds))
    if name.isdecimal() and int(name) < len(kinds):
        return int(name), kinds[int(name)]
    if kinds.count(name) != 1:
        many = "several stages are" if name in kinds else "no stage is"
        raise InputError(f"{mark}: {many} '{name}'", remedy=f"The recipe's stages, by position: {listed}.")
    return kinds.index(name), name
