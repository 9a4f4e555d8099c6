"""YAML -> nets trained from several seeds -> methods compared on them: the proof, by one command.

Each net and seed is a recipe of one stage, `train`, in OUT/NET-SEED; each net's cells lie in OUT/NET. What is
finished is not made again, so an interrupted benchmark goes on, and a grown one adds what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sepress import console
from sepress.compare import Table, read_method
from sepress.defaults import METHOD
from sepress.errors import InputError
from sepress.recipe import (
    HELP,
    Count,
    DataConfig,
    DeviceName,
    FinetuneStage,
    ModelConfig,
    PruneStage,
    Recipe,
    Seed,
    Settings,
    Share,
    TrainStage,
    build_settings,
    check_kind,
    find_recipe,
    override,
)
from sepress.safe_yaml import read_text, read_yaml
from sepress.stages import compare_model, run_recipe
from sepress.types import Policy, Scope, Target

# It begins with a letter and holds no dash, so that no folder of one thing is that of another.
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=50)]


def _short(key: str) -> BeforeValidator:
    """`data: digits` for `data: {path: digits}`, and the like."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _check_method(text: str) -> str:
    try:
        return read_method(text).name
    except InputError as error:
        raise ValueError(str(error)) from error


Method = Annotated[str, BeforeValidator(_check_method)]


class Net(Settings):
    """A net, and how each seed trains it."""

    name: Name
    model: Annotated[ModelConfig, _short("source")]
    train: TrainStage


_SIZES: tuple[Target, ...] = ("target_macs", "target_params", "ratio")  # a latency is not of all bases one


class Part(Settings):
    """Methods at some points; with a fine-tune of its own it is a comparison of its own, in OUT/NET-NAME."""

    name: Name | None = None
    nets: tuple[Name, ...] | None = None  # None: all
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    target_macs: tuple[Share, ...] = ()  # of the base's, kept; the most wanted first
    target_params: tuple[Share, ...] = ()
    ratio: tuple[Share, ...] = ()
    finetune: FinetuneStage | None = None  # not given: the benchmark's

    @property
    def own_finetune(self) -> bool:
        return "finetune" in self.model_fields_set

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if sum(bool(getattr(self, name)) for name in _SIZES) != 1:
            raise ValueError(f"exactly one of {', '.join(_SIZES)} is needed")
        if self.own_finetune != (self.name is not None):
            raise ValueError("a fine-tune of its own and a name, for its folder, belong together")
        for key in ("methods", *_SIZES):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} are named once each")
        return self


class Benchmark(Settings):
    """Nets x seeds, and the comparisons made on them."""

    device: DeviceName = "auto"
    threads: Count | None = None
    out: str = "runs/benchmark"
    data: Annotated[DataConfig, _short("path")]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    nets: Annotated[tuple[Net, ...], Field(min_length=1)]
    split: Literal["test", "val"] = "test"  # choices are made on val
    calibration_images: Count = PruneStage.model_fields["calibration_images"].default
    recalibration_images: Count = PruneStage.model_fields["recalibration_images"].default
    scope: Scope = "per-group"  # of methods that name none
    round_to: Count = Policy.round_to
    min_width: Count = Policy.min_width
    finetune: FinetuneStage | None = None
    against: Method | None = None  # None: the default criterion where it is compared, else the first method
    compare: Annotated[tuple[Part, ...], Field(min_length=1)]  # the most wanted first

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if self.data.path is None:
            raise ValueError("training needs data: set data.path")
        names = [net.name for net in self.nets]
        if len(set(names)) < len(names):
            raise ValueError("two nets have one name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds are named once each")
        held: set[tuple[str, str | None]] = set()  # the folders that will have the reference
        for part in self.compare:
            if unknown := [name for name in part.nets or () if name not in names]:
                raise ValueError(f"no net is named {', '.join(unknown)}; there are: {', '.join(names)}")
            folders = {(name, part.name) for name in part.nets or names}
            held |= folders if self.reference in part.methods else set()
            if missing := folders - held:
                net, name = min(missing, key=str)
                where = net if name is None else f"{net}-{name}"
                raise ValueError(
                    f"{self.reference}, which the others are held against, is not compared first on {where}"
                )
        return self

    @property
    def reference(self) -> str:
        """The method that the others are tested against."""
        methods = [method for part in self.compare for method in part.methods]
        return self.against or (METHOD if METHOD in methods else methods[0])


def load_benchmark(name: str, overrides: Sequence[str] = ()) -> Benchmark:
    """Read a file, or a packaged one by name, and apply `key.path=value` overrides.

    Raises one InputError for all faults, each with file, line (or option) and key.
    """
    path = find_recipe(name)
    values, marks, faults = read_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a benchmark is a mapping of keys to values", remedy=HELP)
    check_kind(values, path, verb="benchmark")
    for text in overrides:
        override(values, marks, text)
    return build_settings(Benchmark, values, marks, faults=faults)


def run_benchmark(benchmark: Benchmark, *, out: Path | None = None) -> dict[str, Table]:
    """Train what is not trained, compare what is not compared; the table of each folder under `out`."""
    folder = out or Path(benchmark.out)
    bases = {
        net.name: [_train(benchmark, net, seed, folder) for seed in benchmark.seeds] for net in benchmark.nets
    }
    tables = {}
    for part in benchmark.compare:
        for net in benchmark.nets:
            if part.nets is None or net.name in part.nets:
                name = net.name if part.name is None else f"{net.name}-{part.name}"
                console.log(f"comparing on {name}")
                tables[name] = _compare(benchmark, net, part, bases[net.name], folder / name)
    return tables


def base_recipe(benchmark: Benchmark, net: Net, seed: int) -> Recipe:
    """The recipe that trains one net from one seed; what `sepress run` made of it is the same run."""
    return _recipe(benchmark, net.model, [net.train], seed=seed, name=net.name)


def _train(benchmark: Benchmark, net: Net, seed: int, folder: Path) -> Path:
    path = folder / f"{net.name}-{seed}"
    run_recipe(base_recipe(benchmark, net, seed), out=path)
    return path / "base.pt"


def _compare(benchmark: Benchmark, net: Net, part: Part, bases: Sequence[Path], out: Path) -> Table:
    target = next(name for name in _SIZES if getattr(part, name))
    values = getattr(part, target)
    shared = ("calibration_images", "recalibration_images", "scope", "round_to", "min_width")
    settings = {name: getattr(benchmark, name) for name in shared}
    stages: list[Any] = [PruneStage(**settings, **{target: values[0]})]
    finetune = part.finetune if part.own_finetune else benchmark.finetune
    if finetune is not None:
        stages.append(_as_trained(finetune, net.train))
    stages.append({"evaluate": {"split": benchmark.split}})
    first, *others = map(str, bases)
    return compare_model(
        _recipe(benchmark, ModelConfig(source=first), stages, name=net.name),
        methods=part.methods,
        seeds=benchmark.seeds,
        values=values,
        models=others,
        against=benchmark.reference,
        out=out,
    )


def _as_trained(finetune: FinetuneStage, train: TrainStage) -> FinetuneStage:
    """In the precision that suits the net, as its training chose it, where the fine-tune chooses none."""
    chosen = {n: getattr(train, n) for n in ("amp", "channels_last") if n not in finetune.model_fields_set}
    return finetune.model_copy(update=chosen)


def _recipe(
    benchmark: Benchmark, model: ModelConfig, stages: Sequence[Any], *, name: str, seed: int = 0
) -> Recipe:
    return Recipe(
        name=name,
        seed=seed,
        device=benchmark.device,
        threads=benchmark.threads,
        data=benchmark.data,
        model=model,
        stages=tuple(stages),
    )
