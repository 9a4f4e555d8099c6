"""The command line: options -> a Recipe -> its run -> one table, or one JSON object, on stdout.

Every verb that does work builds a recipe of one or a few stages, so a verb and a recipe's stage are the same
code. An option stands once, in a group that names the part of a recipe it sets; where it is not typed, the
recipe's own default holds. Logs and progress go to stderr. Nothing heavy is imported before a verb runs,
and annotations are evaluated as they stand: reading them from text would double this module's start.
"""

import contextlib
import functools
import gc
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import typer
import typer.models
from typer.core import TyperGroup

from sepress import console
from sepress.defaults import LATENCY_ROUNDS, LATENCY_WARMUP, METHOD
from sepress.errors import InputError, SepressError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sepress.recipe import Recipe
    from sepress.types import PruningPlan, Report

INTERRUPTED = 130


# ---- exit codes -----------------------------------------------------------------------------------
class Verbs(TyperGroup):
    """Runs a verb and turns what it raises into one block on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        gc.enable()
        try:
            return super().invoke(ctx)
        except SepressError as error:
            _complain(str(error))
            code = error.exit_code
        except KeyboardInterrupt:
            _complain("interrupted; the same command with --out FOLDER goes on where a run in FOLDER stopped")
            code = INTERRUPTED
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get("SEPRESS_DEBUG") or _is_usage_error(error):
                raise
            _complain(f"{type(error).__name__}: {error}\nSEPRESS_DEBUG=1 shows where; please report it.")
            code = SepressError.exit_code
        raise typer.Exit(code)


def _is_usage_error(error: Exception) -> bool:
    """Typer's own (its click is vendored or not, by version): it explains them and exits with 2."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _complain(text: str) -> None:
    stderr = console.enable()
    stderr.print("error:", style="bold red", end=" ")
    stderr.print(text, markup=False, soft_wrap=True)


# ---- options, each declared once ------------------------------------------------------------------
class OptionGroup:
    """Options that set one part of a recipe: a field's name is the recipe's key, its value what was typed.

    Plain classes, since the time that dataclasses take to be made is felt at every start.
    """

    panel: ClassVar[str]  # of the help
    section: ClassVar[str]  # of the recipe; '' is its top level, 'stage' the stage that a verb adds

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Field -> its annotation, which holds Typer's option."""
        return {name: hint for name, hint in cls.__annotations__.items() if hasattr(hint, "__metadata__")}


Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="What builds a foreign file's net: timm:NAME, or pkg.module:factory.",
        rich_help_panel="Model",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read a pickled file, which can run any code in it.",
        rich_help_panel="Model",
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="C,H,W",
        help="Override a foreign file's input size.",
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="auto (default), cpu, cuda or mps.", rich_help_panel="Run"),
]


class ModelOptions(OptionGroup):
    panel = "Model"
    section = "model"

    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model file, or timm:NAME, torchvision:NAME, sepress:NAME."),
    ]
    arch: Arch = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take a name's net untrained; every table says so.")
    ] = False
    trust_pickle: TrustPickle = False
    input_size: InputSize = None
    mean: Annotated[
        str | None, typer.Option("--mean", metavar="R,G,B", help="Override its mean, for pixels in 0..1.")
    ] = None
    std: Annotated[
        str | None, typer.Option("--std", metavar="R,G,B", help="Override its standard deviation.")
    ] = None
    interpolation: Annotated[
        str | None,
        typer.Option("--interpolation", help="Override its resizing: bilinear, bicubic, ..."),
    ] = None


class DataOptions(OptionGroup):
    panel = "Data"
    section = "data"

    path: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Class folders, a flat folder (calibration only), digits, or torchvision:NAME. "
            "A file that sepress trained knows its own.",
        ),
    ] = None
    root: Annotated[
        str | None, typer.Option("--data-root", metavar="DIR", help="Where a torchvision data set lies.")
    ] = None
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch the data set.")] = False
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Class names, one a line, in the order of outputs."),
    ] = None
    allow_corrupt: Annotated[
        float | None,
        typer.Option("--allow-corrupt", metavar="FRACTION", help="Of the images that may be unreadable."),
    ] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step.")] = None
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that decode images.")] = None


class CriterionOptions(OptionGroup):
    panel = "Ranking"
    section = "stage"

    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="auto (the default: reconstruction), fisher-reconstruction, contribution, fisher, "
            "gate-taylor, mean-excitation, class-excitation, excitation-spread, l1, l2, lamp, bn-scale, "
            "fpgm, group-taylor, hessian or random.",
        ),
    ] = None


class CalibrationOptions(OptionGroup):
    panel = "Ranking"
    section = "stage"

    calibration_images: Annotated[
        int | None, typer.Option("--calibration-images", help="Images that excitation is measured on (512).")
    ] = None


class TargetOptions(OptionGroup):
    panel = "Plan"
    section = "stage"

    ratio: Annotated[float | None, typer.Option("--ratio", help="Fraction of channels removed.")] = None
    target_macs: Annotated[
        float | None, typer.Option("--target-macs", help="Fraction of the multiply-adds to keep.")
    ] = None
    target_params: Annotated[
        float | None, typer.Option("--target-params", help="Fraction of the parameters to keep.")
    ] = None
    target_latency: Annotated[
        float | None,
        typer.Option(
            "--target-latency", help="Fraction of the latency to keep, as timed here or in a table."
        ),
    ] = None
    latency_table: Annotated[
        str | None,
        typer.Option("--latency-table", metavar="FILE", help="Plan by this table; see `sepress profile`."),
    ] = None


class PlanOptions(OptionGroup):
    panel = "Plan"
    section = "stage"

    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            help="auto (knapsack for a size where losses are predicted; in compare per-group), per-group, "
            "global, isomorphic or knapsack.",
        ),
    ] = None
    round_to: Annotated[
        int | None,
        typer.Option("--round-to", help="Widths are multiples of this (8)."),
    ] = None
    min_width: Annotated[
        int | None,
        typer.Option("--min-width", help="No group gets narrower (8)."),
    ] = None
    gated_only: Annotated[
        bool, typer.Option("--gated-only", help="Leave groups without an SE gate as they are.")
    ] = False
    eca_neighbours: Annotated[
        bool,
        typer.Option(
            "--eca-neighbours",
            help="Let channels go that an ECA gate convolves along: those left become neighbours, so there"
            " the net is not the masked one.",
        ),
    ] = False
    frozen: Annotated[
        list[str] | None,
        typer.Option("--freeze", metavar="PATTERN", help="Groups to leave as they are, such as 'layer4.*'."),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option("--override", metavar="PATTERN=RATIO", help="A ratio of their own for these groups."),
    ] = None


class ScheduleOptions(OptionGroup):
    panel = "Plan"
    section = "stage"

    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="CONSTRAINT",
            help="Find the smallest net that holds this on validation, such as 'top1_drop<=0.01'.",
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option("--steps", help="Prune in so many steps, ranking anew before each.")
    ] = None
    step_epochs: Annotated[
        int | None, typer.Option("--step-epochs", help="Epochs of fine-tuning between steps.")
    ] = None


class SurgeryOptions(OptionGroup):
    panel = "Plan"
    section = "stage"

    plan: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="Apply this plan.json as it stands.")
    ] = None
    compensate: Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="Refit the layers that read what goes, in closed form (the default).",
            show_default=False,
        ),
    ] = None


class FoldOptions(OptionGroup):
    panel = "Gates"
    section = "stage"

    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="CONSTRAINT",
            help="Fold as many gates as hold this on validation (top1_drop<=0.001).",
        ),
    ] = None
    gates: Annotated[
        list[str] | None,
        typer.Option("--gates", metavar="PATTERN", help="Fold these, such as 'layer4.*'; needs no labels."),
    ] = None
    all: Annotated[bool, typer.Option("--all", help="Fold every gate, whatever it costs.")] = False


class CheckOptions(OptionGroup):
    panel = "Checks"
    section = "stage"

    allow_vacuous: Annotated[
        bool, typer.Option("--allow-vacuous", help="Accept a check that can't tell.")
    ] = False


class TrainingOptions(OptionGroup):
    panel = "Training"
    section = "stage"

    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training images.")] = None
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate at its peak.")] = None
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="sgd or adamw.")] = None
    weight_decay: Annotated[float | None, typer.Option("--weight-decay")] = None
    label_smoothing: Annotated[float | None, typer.Option("--label-smoothing")] = None


class PolarisationOptions(OptionGroup):
    panel = "Training"
    section = "stage"

    strength: Annotated[
        float | None, typer.Option("--strength", help="Of the penalty that drives gates apart.")
    ] = None
    open_share: Annotated[
        float | None, typer.Option("--open-share", help="Fraction of a gate's channels driven to 1.")
    ] = None


class DistillationOptions(OptionGroup):
    panel = "Training"
    section = "stage"

    distill_weight: Annotated[
        float | None, typer.Option("--distill-weight", help="Share of the base model's answers in the loss.")
    ] = None
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of distillation.")] = None


class EvaluationOptions(OptionGroup):
    panel = "Evaluation"
    section = "stage"

    split: Annotated[str | None, typer.Option("--split", help="test (default), val or train.")] = None


class ExportOptions(OptionGroup):
    panel = "ONNX"
    section = "stage"

    exporter: Annotated[
        str | None, typer.Option("--exporter", help="Of torch's: dynamo (the default) or torchscript.")
    ] = None
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set, 18 (default) to 23.")] = (
        None
    )
    batch: Annotated[
        int | None, typer.Option("--batch", help="Images at once; by default the file takes any number.")
    ] = None
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing", help="Write model.image.onnx too: from image bytes to probabilities."
        ),
    ] = False
    latency_rounds: Annotated[int | None, typer.Option("--latency-rounds", help="Timed rounds.")] = None


class PrecisionOptions(OptionGroup):
    panel = "Precision"
    section = "stage"

    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="CONSTRAINT",
            help="Keep a file only if this holds on validation, against the float one (top1_drop<=0.01).",
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", help="Of int8: auto (the default: all, the best), minmax, entropy or percentile."
        ),
    ] = None
    range_images: Annotated[
        int | None, typer.Option("--range-images", help="Images that ranges are measured on (128).")
    ] = None


class RunOptions(OptionGroup):
    panel = "Run"
    section = ""

    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random (0).")] = None
    device: Device = None
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None


Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="CONSTRAINT",
        help="Exit with 3 unless this holds, such as 'top1_drop<=0.01'.",
        rich_help_panel="Run",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run folder; by default a new one.", rich_help_panel="Run"),
]
FinetuneEpochs = Annotated[
    int, typer.Option("--finetune-epochs", min=0, help="Then train on.", rich_help_panel="Training")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: stages.prune.round_to=4.", rich_help_panel="Run"
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel="Run")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write no model.", rich_help_panel="Run")
]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Spell a function's option groups out into single parameters, which is what Typer reads."""
    hints = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    groups = {
        n: hint for n, hint in hints.items() if isinstance(hint, type) and issubclass(hint, OptionGroup)
    }
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        spelled = groups[name].options().items() if name in groups else [(name, hints[name])]
        home = vars(groups[name]) if name in groups else {name: parameter.default}
        for option, hint in spelled:
            default = home.get(option, parameter.empty)
            parameters.append(inspect.Parameter(option, _KEYWORD, default=default, annotation=hint))
            if name in groups and isinstance(hint.__metadata__[0], typer.models.OptionInfo):
                hint.__metadata__[0].rich_help_panel = groups[name].panel

    @functools.wraps(function)
    def run(**values: Any) -> None:
        made = {
            name: group(**{option: values.pop(option) for option in group.options()})
            for name, group in groups.items()
        }
        function(**values, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


# ---- options -> Recipe ----------------------------------------------------------------------------
class Draft:
    """A recipe in the making: plain values, and the option that gives each, for the errors."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"stages": []}
        self.marks: dict[tuple[str | int, ...], str] = {}

    def add(self, *groups: Any) -> Self:
        """Take what was typed of these groups."""
        for group in groups:
            path = (group.section,) if group.section else ()
            self._take(group, path)
        return self

    def stage(self, kind: str, *groups: Any, **settings: Any) -> Self:
        """Append a stage with what was typed of these groups."""
        path = ("stages", len(self.values["stages"]), kind)
        self.values["stages"].append({kind: dict(settings)})
        for group in groups:
            self._take(group, path)
        return self

    def _take(self, group: Any, path: tuple[str | int, ...]) -> None:
        for name, flag in _flags(type(group)).items():
            self.marks[*path, name] = flag
            value = getattr(group, name)
            if value in (getattr(type(group), name, None), []):
                continue  # not typed
            place: Any = self.values
            for key in path:
                place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
            place[name] = _pairs(value, flag) if name == "overrides" else value

    def set(self, overrides: list[str] | None) -> Self:
        """Override keys, `key.path=value`, as `sepress run --set` does."""
        from sepress.recipe import override

        for text in overrides or ():
            override(self.values, self.marks, text)
        return self

    def require(self, constraints: list[str] | None) -> Self:
        self.values["require"] = constraints or []
        self.marks["require",] = "--require"
        return self

    def recipe(self, purpose: str, *, images: bool = True) -> "Recipe":
        """Validate; InputError names the options. `purpose` names the run, and so its folder."""
        from sepress.recipe import build_recipe, check_inputs

        source = self.values["model"]["source"]
        name = purpose if Path(source).is_file() else f"{source.rpartition(':')[2]}-{purpose}"
        self.values["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:100] or purpose
        recipe = build_recipe(self.values, self.marks, remedy="Each option is explained by --help.")
        check_inputs(recipe, images=images)
        return recipe


def _flags(group: type[OptionGroup]) -> dict[str, str]:
    """Field -> the option as typed."""
    options = {name: hint.__metadata__[0] for name, hint in group.options().items()}
    return {
        name: str(option.metavar if isinstance(option, typer.models.ArgumentInfo) else option.default)
        for name, option in options.items()
    }


def _pairs(texts: Iterable[str], flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        pattern, equals, ratio = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"{flag} {text}: expected PATTERN=RATIO", remedy="For instance 'layer4.*=0.5'.")
        pairs[pattern] = ratio
    return pairs


# ---- running and printing -------------------------------------------------------------------------
def execute(
    recipe: "Recipe", *, out: Path | None, as_json: bool, dry_run: bool = False, ranking: bool = False
) -> None:
    """Run the recipe, print its report (its `ranking`, of a dry run its plan), hold it to its constraints."""
    with _stdout_kept():
        from sepress import stages

        outcome = stages.run_recipe(recipe, out=out, dry_run=dry_run)
    if outcome.plan is not None:
        _print_plan(outcome.plan, as_json=as_json)
    elif outcome.report is not None and ranking and not as_json:
        _print_ranking(outcome.report)
    elif outcome.report is not None:
        _print_report(outcome.report, as_json=as_json)
    console.log(f"written to {outcome.folder}")
    if outcome.report is not None:
        _require(outcome.report)


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Keep stdout for results: what a library prints meanwhile, from Python or from C, goes to stderr."""
    console.enable()
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _require(report: "Report") -> None:
    from sepress.constraints import ConstraintResult, require

    require(ConstraintResult(**row) for row in report.constraints)


def _print_report(report: "Report", *, as_json: bool) -> None:
    from sepress.report import render_report, report_to_json

    if as_json:
        _print_json(report_to_json(report, relative_to=None))
    else:
        _print(render_report(report))


def _print_ranking(report: "Report") -> None:
    from rich.console import Group
    from rich.text import Text

    from sepress.report import render_groups

    lines = [*report.notes, "", f"Every channel's score: {report.artifacts['ranking']}"]
    _print(Group(render_groups(report), *(Text(line, overflow="fold") for line in lines)))


def _print_plan(plan: "PruningPlan", *, as_json: bool) -> None:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from sepress.plan import format_plan, plan_to_json

    if as_json:
        _print_json(plan_to_json(plan))
        return
    table = Table(box=None, pad_edge=False)
    for header in ("group", "width", "planned", "removed", "judged by"):
        table.add_column(header, justify="right" if header in ("width", "planned", "removed") else "left")
    for row in format_plan(plan):
        widths = (str(row.width_before), str(row.width_after), f"{row.removed:.0%}")
        table.add_row(Text(row.group), *widths, Text(row.evidence or "-"))
    macs = f"MACs {plan.macs_before:,} -> {plan.macs_after:,} ({plan.macs_after / plan.macs_before:.1%})"
    params = f"params {plan.params_before:,} -> {plan.params_after:,}"
    predicted = f"predicted: {macs}, {params} ({plan.params_after / plan.params_before:.1%})"
    if plan.latency_ratio is not None:
        predicted += f", latency about {plan.latency_ratio:.2f}x"
    lines = [predicted, *plan.notes]
    _print(Group(table, *(Text(line) for line in lines)))


def _print_json(value: Any) -> None:
    import json

    _write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _print(renderable: "RenderableType") -> None:
    from rich.console import Console

    stdout = Console(highlight=False)
    with stdout.capture() as captured:
        stdout.print(renderable)
    _write(captured.get())


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough, as `head` does; our files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ---- verbs ----------------------------------------------------------------------------------------
app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb, with examples at the end of its help (each runs as a test)."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        epilog = "\n\n".join(["[bold]Examples[/bold]", *(text.replace("[", r"\[") for text in examples)])
        app.command(function.__name__.rstrip("_"), epilog=epilog)(verb(function))
        return function

    return register


def _show_version(wanted: bool) -> None:
    if wanted:
        from sepress import __version__

        _write(f"sepress {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Make Squeeze-and-Excitation networks smaller and faster.

    Prune by measured excitation, fine-tune, and export ONNX files that were checked against the model.
    """


@_command(
    "sepress train sepress:se_resnet8 --data digits",
    "sepress train sepress:se_resnet20 --data photos/ --epochs 60 --out runs/photos",
)
def train(
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    run: RunOptions,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train a network from random weights and keep its best epoch."""
    draft = Draft().add(model, data, run).stage("train", training).stage("evaluate")
    execute(draft.require(require).recipe("trained"), out=out, as_json=as_json)


@_command(
    "sepress polarise model.pt --epochs 3",
    "sepress polarise model.pt --data photos/ --epochs 5 --strength 0.3 --out polarised",
)
def polarise(
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    polarisation: PolarisationOptions,
    run: RunOptions,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on with its SE gates driven towards 0 and 1, so that mean excitation decides."""
    draft = Draft().add(model, data, run).stage("polarise", training, polarisation).stage("evaluate")
    execute(draft.require(require).recipe("polarised"), out=out, as_json=as_json)


@_command(
    "sepress inspect timm:seresnet50",
    "sepress inspect model.pt --full",
    "sepress inspect model.pt --json",
)
def inspect_(
    model: ModelOptions,
    full: Annotated[
        bool, typer.Option("--full", help="List every gate and every group, where one screen folds them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show on one screen what is gated, what judges the rest, what is frozen and why.

    Weights are never fetched. Channels are output channels of convolutions and linear layers; those of what
    the net returns are counted apart. --json holds every gate, group and figure.
    """
    draft = Draft().add(model).stage("evaluate")
    if not Path(model.source).is_file():
        draft.values["model"]["random_weights"] = True
    recipe = draft.recipe("inspected", images=False)
    with _stdout_kept():
        from sepress import stages

        inspection = stages.inspect_model(recipe)
    if as_json:
        _print_json(inspection.to_json())
    else:
        arch = f" --arch {model.arch}" if model.arch else ""
        _print(inspection.render(full=full, command=shlex.quote(model.source) + arch))


@_command(
    "sepress convert model_best.pth.tar",
    "sepress convert weights.pth --arch timm:seresnet50 --out seresnet50.safetensors",
    "sepress convert whole.pt --trust-pickle --json",
    "sepress convert whole.pt --trust-pickle --arch mynets:Net --out net.pt",
)
def convert(
    model: ModelOptions,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A .pt or .safetensors file (NAME-native.pt)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model file of sepress's own, which runs no code, of a checkpoint or a pickled network."""
    recipe = Draft().add(model).stage("evaluate").recipe("converted", images=False)
    with _stdout_kept():
        from sepress import stages

        conversion = stages.convert_model(recipe, out=out)
    if as_json:
        _print_json(conversion.to_json())
    else:
        _write(conversion.render())
    console.log(f"written to {conversion.path}")


@_command("sepress rank model.pt", "sepress rank timm:seresnet50 --data photos/ --criterion mean-excitation")
def rank(
    model: ModelOptions,
    data: DataOptions,
    criterion: CriterionOptions,
    calibration: CalibrationOptions,
    run: RunOptions,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Score every channel by what it does on calibration images."""
    draft = Draft().add(model, data, run).stage("rank", criterion, calibration)
    execute(draft.recipe("ranked"), out=out, as_json=as_json, ranking=True)


@_command(
    "sepress prune --ratio 0.3 model.pt",
    "sepress prune model.pt --target-macs 0.5 --finetune-epochs 3 --require 'top1_drop<=0.01'",
    "sepress prune model.pt --within 'top1_drop<=0.01' --finetune-epochs 3",
    "sepress prune model.pt --target-latency 0.6 --latency-table table.json",
    "sepress prune model.pt --target-macs 0.3 --steps 3 --step-epochs 1 --finetune-epochs 3",
    "sepress prune weights.pth --arch timm:mobilenetv3_large_100 --data photos/ --ratio 0.3 --dry-run",
    "sepress prune model.pt --plan model-pruned/plan.json --json",
)
def prune(
    model: ModelOptions,
    data: DataOptions,
    criterion: CriterionOptions,
    calibration: CalibrationOptions,
    target: TargetOptions,
    plan: PlanOptions,
    schedule: ScheduleOptions,
    surgery: SurgeryOptions,
    checks: CheckOptions,
    run: RunOptions,
    finetune_epochs: FinetuneEpochs = 0,
    require: Require = None,
    dry_run: DryRun = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Remove the channels that matter least; check, evaluate and export what is left."""
    if dry_run and surgery.plan:
        raise InputError(
            "--dry-run makes a plan, and --plan gives one", remedy="Leave out one of the two; see plan.json."
        )
    if dry_run and require:
        raise InputError(
            "--require needs a pruned model, and --dry-run makes none",
            remedy="Leave out --dry-run, or --require.",
        )
    draft = Draft().add(model, data, run)
    draft.stage("prune", criterion, calibration, target, plan, schedule, surgery, checks)
    targets = "--ratio, --target-macs, --target-params, --target-latency, --within, --plan"
    draft.marks["stages", 0, "prune"] = targets
    if finetune_epochs:
        draft.stage("finetune", epochs=finetune_epochs)
    draft.stage("evaluate").stage("export", checks)
    execute(draft.require(require).recipe("pruned"), out=out, as_json=as_json, dry_run=dry_run)


@_command(
    "sepress fold model.pt",
    "sepress fold model.pt --within 'top1_drop<=0.005' --finetune-epochs 1",
    "sepress fold timm:mobilenetv3_large_100 --data photos/ --gates 'blocks.[45].*'",
    "sepress fold model.pt --all --finetune-epochs 3 --require 'top1_drop<=0.01'",
)
def fold(
    model: ModelOptions,
    data: DataOptions,
    gates: FoldOptions,
    calibration: CalibrationOptions,
    checks: CheckOptions,
    run: RunOptions,
    finetune_epochs: FinetuneEpochs = 0,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Replace SE gates by constants in the weights around them; their blocks are gone."""
    draft = Draft().add(model, data, run).stage("fold", gates, calibration, checks)
    draft.marks["stages", 0, "fold"] = "--within, --gates, --all"
    if finetune_epochs:
        draft.stage("finetune", epochs=finetune_epochs)
    draft.stage("evaluate").stage("export", checks)
    execute(draft.require(require).recipe("folded"), out=out, as_json=as_json)


@_command("sepress finetune model-pruned/pruned.pt --epochs 3")
def finetune(
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    distillation: DistillationOptions,
    run: RunOptions,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model on, taught by the model it was pruned from."""
    draft = Draft().add(model, data, run).stage("finetune", training, distillation).stage("evaluate")
    execute(draft.require(require).recipe("tuned"), out=out, as_json=as_json)


@_command("sepress evaluate model.pt", "sepress evaluate model.pt --data photos/ --split val --json")
def evaluate(
    model: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    run: RunOptions,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy, multiply-adds and parameters."""
    draft = Draft().add(model, data, run).stage("evaluate", evaluation)
    execute(draft.require(require).recipe("evaluated"), out=out, as_json=as_json)


@_command(
    "sepress export model.pt",
    "sepress export model.pt --with-preprocessing --batch 1",
    "sepress export model.pt --fp16 --int8 --within 'top1_drop<=0.005'",
    "sepress export timm:mobilenetv3_large_100 --data photos/ --exporter torchscript --out mobile",
)
def export(
    model: ModelOptions,
    data: DataOptions,
    onnx: ExportOptions,
    checks: CheckOptions,
    precision: PrecisionOptions,
    run: RunOptions,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Write model.fp16.onnx too.", rich_help_panel="Precision")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Write model.int8.onnx too.", rich_help_panel="Precision")
    ] = False,
    require: Require = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write ONNX that agrees with the model on real images, and time it; where asked, in fp16 and int8."""
    draft = Draft().add(model, data, run).stage("export", onnx, checks)
    typed = [flag for name, flag in _flags(PrecisionOptions).items() if getattr(precision, name) is not None]
    if fp16 or int8:
        draft.stage("precision", precision, fp16=fp16, int8=int8)
    elif typed:
        raise InputError(f"{typed[0]} is about fp16 and int8 files", remedy="Add --fp16, --int8 or both.")
    execute(draft.require(require).recipe("exported"), out=out, as_json=as_json)


Format = Annotated[
    str,
    typer.Option(
        "--format", metavar="FORMAT", help="terminal, markdown, junit (XML) or github (annotations)."
    ),
]


@_command(
    "sepress report runs/quickstart",
    "sepress report runs/quickstart --format markdown",
    "sepress report runs/quickstart --format junit",
)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its report.json.")],
    format: Format = "terminal",
    as_json: AsJson = False,
) -> None:
    """Show the report of an earlier run."""
    from sepress.report import report_to_annotations, report_to_junit, report_to_markdown

    formats = {"markdown": report_to_markdown, "junit": report_to_junit, "github": report_to_annotations}
    if format not in ("terminal", *formats):
        raise InputError(
            f"--format {format}: expected terminal, {', '.join(formats)}; JSON is printed with --json"
        )
    if as_json and format != "terminal":
        raise InputError(f"--json and --format {format} exclude each other")
    found = _read_report(run / "report.json" if run.is_dir() else run)
    if format == "terminal":
        _print_report(found, as_json=as_json)
    else:
        _write(formats[format](found))


def _read_report(path: Path) -> "Report":
    """Read a report, its artifacts' paths made absolute."""
    from dataclasses import replace

    from sepress.files import read_json
    from sepress.report import report_from_json

    if not path.is_file():
        plan = " (a dry run leaves plan.json only)" if path.with_name("plan.json").is_file() else ""
        raise InputError(f"there is no report {path}{plan}", remedy="Pass a run folder, or its report.json.")
    remedy = "Pass a run folder, such as runs/quickstart."
    found = report_from_json(read_json(path, what="report", remedy=remedy))
    artifacts = {role: name and str((path.parent / name).resolve()) for role, name in found.artifacts.items()}
    return replace(found, artifacts=artifacts)


Points = Annotated[
    str | None,
    typer.Option(metavar="FRACTION,...", help="As in prune; the most wanted first.", rich_help_panel="Plan"),
]


@_command(
    "sepress compare model.pt --methods l2,contribution+refit,random --target-macs 0.5,0.25 --seeds 0,1",
    "sepress compare s0.pt s1.pt s2.pt --seeds 0,1,2 --methods l2,fisher@global,scratch --target-macs 0.5",
    "sepress compare model.pt --methods fisher --ratio 0.3 --finetune-epochs 1 --split val --out table",
)
def compare(
    model: ModelOptions,
    data: DataOptions,
    calibration: CalibrationOptions,
    plan: PlanOptions,
    evaluation: EvaluationOptions,
    run: RunOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="One more model for each further seed: its own base."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="A criterion, then +refit, @SCOPE or both: l2+refit@global; or scratch. (All.)",
            rich_help_panel="Ranking",
        ),
    ] = "",
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="The method that the others are tested against.",
            rich_help_panel="Ranking",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,...", rich_help_panel="Ranking")] = "0",
    ratio: Points = None,
    target_macs: Points = None,
    target_params: Points = None,
    finetune_epochs: FinetuneEpochs = 0,
    settings: Settings = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Prune by several methods to the same sizes and compare what is left; goes on where it stopped."""
    from sepress.recipe import CRITERIA

    typed = {"ratio": ratio, "target_macs": target_macs, "target_params": target_params}
    points = {name: text for name, text in typed.items() if text is not None}
    first = {name: text.split(",")[0] for name, text in points.items()}
    draft = Draft().add(model, data, run).stage("prune", calibration, plan, **first)
    draft.marks["stages", 0, "prune"] = "--ratio, --target-macs, --target-params"
    if finetune_epochs:
        draft.stage("finetune", epochs=finetune_epochs)
    recipe = draft.stage("evaluate", evaluation).set(settings).recipe("compared")
    expected = "fractions with commas between, such as 0.5,0.25"
    values = [v for name, text in points.items() for v in _numbers(text, _option(name), float, expected)]
    names = [name.strip() for name in methods.split(",")] if methods else [METHOD, *CRITERIA[1:]]
    held = against or (METHOD if METHOD in names else names[0])
    with _stdout_kept():
        from sepress import stages

        table = stages.compare_model(
            recipe,
            methods=names,
            seeds=_numbers(seeds, "--seeds", int, "whole numbers with commas between, such as 0,1,2"),
            values=values,  # of one target, or there was no recipe; none where --set names it
            models=models or (),
            against=held,
            out=out,
        )
    if as_json:
        _print_json(table.to_json())
    else:
        _write(table.to_markdown())


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@_command(
    "sepress benchmark recipes/benchmark.yaml --set data.path=photos/",
    "sepress benchmark benchmark --set data.path=photos/ --set 'seeds=[0]' --out runs/mine",
)
def benchmark(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or a packaged name.")],
    settings: Settings = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train nets from several seeds and compare methods on them; goes on where it stopped."""
    with _stdout_kept():
        from sepress.benchmark import load_benchmark, run_benchmark

        tables = run_benchmark(load_benchmark(file, settings or ()), out=out)
    if as_json:
        found = {name: table.to_json() for name, table in tables.items()}
        _print_json({"schema": "sepress.benchmark/1", "tables": found})
    else:
        _write("\n".join(f"## {name}\n\n{table.to_markdown()}" for name, table in tables.items()))


@_command(
    "sepress profile model.pt --out table.json",
    "sepress profile timm:mobilenetv3_large_100 --batch 1 --threads 2 --out mobile.json",
)
def profile(
    model: ModelOptions,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The table, as JSON.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time a model's layers at many widths on ONNX Runtime's CPU: what prune --latency-table plans by."""
    draft = Draft().add(model).stage("evaluate")
    if not Path(model.source).is_file():
        draft.values["model"]["random_weights"] = True
    recipe = draft.recipe("profiled", images=False)
    with _stdout_kept():
        from sepress import stages

        table = stages.profile_model(recipe, batch=batch, threads=threads, out=out)
    if as_json:
        _print_json(table.to_json())
        return
    found = table.validation
    _write(
        f"{len(table.fixed)} layers; the base takes {found['base_ms']:.3g} ms. Predicted ratios of "
        f"{len(found['measured'])} nets that the table had not seen are off by {found['median_error']:.1%} "
        f"(median; at most {found['worst_error']:.1%}).\n"
    )
    console.log(f"written to {out}")


def _timing(name: str, *, help: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel="Timing")


@_command(
    "sepress bench model.pt model-pruned/pruned.pt",
    "sepress bench base.onnx pruned.onnx --batch 1,8 --threads 1,2 --json",
    "sepress bench timm:seresnet50 timm:resnet50 --runtime onnxruntime,torch,torch-compile",
)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="ONNX files, model files, or timm:NAME, torchvision:NAME, sepress:NAME, which are built "
            "untrained. Ratios are to the first.",
        ),
    ],
    runtime: Annotated[
        str,
        _timing("--runtime", metavar="NAME,...", help="onnxruntime, torch (eager) or torch-compile."),
    ] = "onnxruntime",
    provider: Annotated[
        str, _timing("--provider", help="ONNX Runtime's: auto, cpu, cuda, tensorrt or coreml.")
    ] = "auto",
    batch: Annotated[str, _timing("--batch", metavar="N,...", help="Images at once.")] = "1",
    threads: Annotated[str, _timing("--threads", metavar="N,...", help="CPU threads.")] = "1",
    rounds: Annotated[
        int, _timing("--rounds", help="Each times every model once, in turn.")
    ] = LATENCY_ROUNDS,
    warmup: Annotated[int, _timing("--warmup", help="Rounds before those, not counted.")] = LATENCY_WARMUP,
    arch: Arch = None,
    trust_pickle: TrustPickle = False,
    input_size: InputSize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time models beside each other on this machine: latency, ratios, throughput and peak memory."""
    counts = "whole numbers with commas between, such as 1,8"
    sizes = _numbers(batch, "--batch", int, counts), _numbers(threads, "--threads", int, counts)
    image = input_size and _numbers(input_size, "--input-size", int, "C,H,W, such as 3,224,224")
    with _stdout_kept():
        from sepress.bench import bench_models

        bench = bench_models(
            *models,
            runtimes=[name.strip() for name in runtime.split(",")],
            batches=sizes[0],
            threads=sizes[1],
            rounds=rounds,
            warmup=warmup,
            provider=provider,
            device=device or "auto",
            arch=arch,
            trust_pickle=trust_pickle,
            input_size=image or None,
        )
    if as_json:
        _print_json(bench.to_json())
    else:
        _print(bench.render())


def _numbers(text: str, flag: str, kind: type[Any], expected: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} {text}: expected {expected}") from error


@_command(
    "sepress run quickstart",
    "sepress run recipes/cifar10.yaml --set data.path=photos/ --set stages.prune.target_macs=0.4",
    "sepress run recipe.yaml --dry-run",
)
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a packaged name.")],
    settings: Settings = None,
    require: Require = None,
    dry_run: DryRun = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe; a folder of the same recipe is continued."""
    from sepress.recipe import check_inputs, load_recipe

    loaded = load_recipe(recipe, settings or (), require=require or ())
    check_inputs(loaded)
    if not dry_run:
        execute(loaded, out=out, as_json=as_json)
        return
    with _stdout_kept():
        from sepress import stages

        lines = stages.describe_run(loaded, out=out)
    if as_json:
        _print_json({"schema": "sepress.dry-run/1", "recipe": loaded.model_dump(mode="json"), "steps": lines})
    else:
        _write("".join(f"{line}\n" for line in lines))


@_command("sepress schema report")
def schema(
    name: Annotated[str, typer.Argument(metavar="NAME", help="report, plan, bench, compare, ...")],
) -> None:
    """Print the JSON Schema of what --json prints, or of a file in a run folder."""
    from sepress.schemas import get_schema

    _print_json(get_schema(name))


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    gc.disable()  # nothing that the command line is built from becomes garbage; a verb switches it on again
    app(prog_name="sepress")
