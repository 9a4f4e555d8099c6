"""Models -> how long each takes on this machine, timed beside the others: what `sepress bench` shows.

Everything of one runtime, batch size and number of threads is a cell: its models take turns in one run, so
that what slows the machine down for a while slows all of them. Models are timed as they are deployed: files
of ONNX as they stand, all else exported for ONNX Runtime, and as a module for torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sepress import console
from sepress.bundle import load_model, read_meta
from sepress.defaults import LATENCY_ROUNDS, LATENCY_WARMUP
from sepress.device import resolve_device
from sepress.errors import InputError
from sepress.export import export_onnx
from sepress.report import words
from sepress.runtime import (
    PROVIDERS,
    make_feeds,
    measure_onnx_latency,
    measure_peak_bytes,
    open_session,
    provider_names,
)
from sepress.timing import CONFIDENCE, MIN_ROUNDS, NOISY, SAME, TIME_BUDGET_S, measure_rows
from sepress.types import JSON, Bundle

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA = "sepress.bench/1"
RUNTIMES = ("onnxruntime", "torch", "torch-compile")
Rows = dict[str, dict[str, JSON]]  # label -> figures, as timing.measure_rows gives them


@dataclass(frozen=True)
class Bench:
    """What was timed: a row for each model in each cell, with the conditions it holds under.

    A row is what a report's `latency` holds (see timing.LatencyFigures), with `label`, `images_per_s` and
    `peak_bytes`; what is None has its reason in the row's `reasons`.
    """

    rows: tuple[Mapping[str, JSON], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, JSON]:
        """What `sepress bench --json` prints."""
        return {"schema": SCHEMA, "rows": [dict(row) for row in self.rows], "notes": list(self.notes)}

    def render(self) -> RenderableType:
        """A table for each cell under its conditions, for a terminal."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        for rows in _cells(self.rows):
            parts += [Text(_conditions(rows)), _Table(rows), *map(Text, _sentences(rows)), Text("")]
        return Group(*(parts if self.notes else parts[:-1]), *map(Text, self.notes))


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model to be timed: a file of ONNX, or a bundle."""

    label: str
    onnx: Path | None
    bundle: Bundle | None


def bench_models(
    *models: str | Path,
    runtimes: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),  # few servers give one request more
    rounds: int = LATENCY_ROUNDS,
    warmup: int = LATENCY_WARMUP,
    provider: str = "auto",
    device: str = "auto",
    arch: str | None = None,
    trust_pickle: bool = False,
    input_size: Sequence[int] | None = None,
    time_budget_s: float = TIME_BUDGET_S,
) -> Bench:
    """Time models beside each other on this machine; ratios are to the first.

    `models` are files (.onnx, .pt, .safetensors, or foreign weights with `arch`) and names (`timm:NAME`,
    `torchvision:NAME`, `sepress:NAME`), which are built untrained: latency needs no weights. `runtimes` are
    of RUNTIMES; `provider` is ONNX Runtime's (auto, cpu, cuda, tensorrt, coreml), `device` torch's.
    `input_size` (C, H, W) holds for what does not fix its own. A cell takes `rounds` rounds, or what fits
    into `time_budget_s`. Raises InputError for what can't be timed so.

    >>> import sepress
    >>> found = sepress.bench_models("sepress:se_resnet8", "sepress:se_mobile", batches=(1, 8))
    >>> [(row["label"], row["batch"]) for row in found.rows]
    [('sepress:se_resnet8', 1), ('sepress:se_mobile', 1), ('sepress:se_resnet8', 8), ('sepress:se_mobile', 8)]
    """
    _check(
        models,
        runtimes,
        batches=batches,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        provider=provider,
        arch=arch,
        input_size=input_size,
    )
    size = None if input_size is None else tuple(input_size)
    subjects = _load(models, arch=arch, trust_pickle=trust_pickle, input_size=size)
    in_torch = [subject for subject in subjects if subject.bundle is not None]
    on_torch = [runtime for runtime in runtimes if runtime != "onnxruntime"]
    if on_torch and len(in_torch) < len(subjects) and (len(runtimes) == len(on_torch) or not in_torch):
        raise InputError(
            "files of ONNX run on ONNX Runtime only", remedy="Pass --runtime onnxruntime, or model files."
        )
    _check_files(subjects, provider, batches=batches, input_size=size)
    place = resolve_device(device) if on_torch else torch.device("cpu")
    rows: list[dict[str, JSON]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = _export(subjects, Path(folder)) if "onnxruntime" in runtimes else {}
        for runtime in runtimes:
            for count in threads:
                for batch in batches:
                    console.log(f"timing on {runtime}, {_threads_words(count)}, batch {batch}")
                    common = {"rounds": rounds, "warmup": warmup, "time_budget_s": time_budget_s}
                    if runtime == "onnxruntime":
                        cell = _on_onnxruntime(
                            files, provider, batch=batch, threads=count, input_size=size, **common
                        )
                    else:
                        compiled = runtime == "torch-compile"
                        cell = _on_torch(in_torch, place, compiled, batch=batch, threads=count, **common)
                    rows += [_row(label, figures) for label, figures in cell.items()]
    return Bench(tuple(rows), tuple(_notes(subjects, on_torch, rows, rounds)))


# ---- what is timed --------------------------------------------------------------------------------
def _check(
    models: Sequence[str | Path],
    runtimes: Sequence[str],
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    warmup: int,
    provider: str,
    arch: str | None,
    input_size: Sequence[int] | None,
) -> None:
    if not models:
        raise InputError("there is no model to time", remedy="Pass files, or names such as timm:seresnet50.")
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise InputError(f"unknown runtime '{runtime}'", remedy=f"Choose of: {', '.join(RUNTIMES)}.")
    for what, values, least in (
        ("runtime", [len(runtimes)], 1),
        ("batch", batches, 1),
        ("threads", threads, 1),
        ("rounds", [rounds], MIN_ROUNDS),
        ("warmup", [warmup], 0),
    ):
        if not values or min(values) < least:
            raise InputError(f"--{what}: expected at least {least}")
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise InputError("--input-size: expected three numbers, C,H,W, such as 3,224,224")
    if arch is not None and not any(Path(model).is_file() for model in models):
        raise InputError("--arch goes with a file, and every model is a name", remedy="Leave --arch out.")
    provider_names(provider)


def _load(
    models: Sequence[str | Path], *, arch: str | None, trust_pickle: bool, input_size: tuple[int, ...] | None
) -> list[_Subject]:
    subjects: list[_Subject] = []
    for label, model in zip(_labels(models), map(str, models), strict=True):
        if model.endswith(".onnx"):
            if not Path(model).is_file():
                raise InputError(f"there is no file {model}")
            subjects.append(_Subject(label, Path(model), None))
            continue
        with console.working(f"loading {label}"):
            bundle = load_model(
                model,
                arch=arch if Path(model).is_file() and _needs_arch(model) else None,
                trust_pickle=trust_pickle,
                overrides={} if input_size is None else {"input_size": list(input_size)},
                weights="none",
            )
        subjects.append(_Subject(label, None, bundle))
    return subjects


def _check_files(
    subjects: Sequence[_Subject],
    provider: str,
    *,
    batches: Sequence[int],
    input_size: tuple[int, ...] | None,
) -> None:
    """Raise InputError for a file of ONNX that can't be opened or takes no such batch."""
    for subject in subjects:
        if subject.onnx is not None:
            session = open_session(subject.onnx, providers=provider)
            for batch in batches:
                make_feeds(session, batch=batch, input_size=input_size, label=subject.label)


def _needs_arch(file: str) -> bool:
    """Whether a file of weights does not say by itself what builds its net."""
    try:
        return read_meta(file).spec.source == "user"
    except InputError:  # not one of ours, or none at all: loading it says so
        return True


def _labels(models: Sequence[str | Path]) -> list[str]:
    """Call a file by as many last parts of its path as tell it apart; the same model again is '#2'."""
    parts = [Path(model).parts if Path(model).is_file() else (str(model),) for model in models]
    labels: list[str] = []
    for path in parts:
        others = [other for other in parts if other != path]
        count = next(
            (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others)), len(path)
        )
        label = str(Path(*path[-count:]))
        again = 1 + sum(path == other for other in parts[: len(labels)])
        labels.append(f"{label} #{again}" if again > 1 else label)
    return labels


def _export(subjects: Sequence[_Subject], folder: Path) -> dict[str, Path]:
    """The file of each subject, label by label; those that are none are exported."""
    files: dict[str, Path] = {}
    for number, subject in enumerate(subjects):
        if subject.bundle is None:
            assert subject.onnx is not None
            files[subject.label] = subject.onnx
            continue
        files[subject.label] = folder / f"{number}.onnx"
        with console.working(f"exporting {subject.label} to ONNX"):
            example = torch.zeros(1, *subject.bundle.spec.preprocessing.input_size)
            export_onnx(subject.bundle.net, files[subject.label], example=example, spec=subject.bundle.spec)
    return files


# ---- ONNX Runtime ---------------------------------------------------------------------------------
def _on_onnxruntime(
    files: Mapping[str, Path],
    provider: str,
    *,
    batch: int,
    threads: int,
    input_size: tuple[int, ...] | None,
    **common: Any,
) -> Rows:
    rows = measure_onnx_latency(
        files, batch=batch, threads=threads, providers=provider, input_size=input_size, **common
    )
    for label, row in rows.items():
        peak: int | None = None
        reason: str | None = "ONNX Runtime tells it on the CPU only"
        if row["provider"] == PROVIDERS["cpu"]:
            peak, reason = measure_peak_bytes(
                files[label], batch=batch, threads=threads, input_size=input_size
            )
        row |= {"peak_bytes": peak, "reasons": row["reasons"] | ({"peak_bytes": reason} if reason else {})}
    return rows


# ---- torch ----------------------------------------------------------------------------------------
def _on_torch(
    subjects: Sequence[_Subject],
    device: torch.device,
    compiled: bool,
    *,
    batch: int,
    threads: int,
    **common: Any,
) -> Rows:
    runners: dict[str, Callable[[], object]] = {}
    facts: Rows = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_torch_threads(threads))
        if compiled:
            stack.enter_context(_compiler(len(subjects)))
        for subject in subjects:
            assert subject.bundle is not None
            stack.callback(subject.bundle.net.cpu)
            shape = (batch, *subject.bundle.spec.preprocessing.input_size)
            said = f"compiling {subject.label}" if compiled else f"moving {subject.label} to {device}"
            with console.working(said):
                runners[subject.label], peak = _prepare(subject, device, shape, compiled)
            facts[subject.label] = {
                "runtime": f"{'torch.compile' if compiled else 'torch'} {torch.__version__}",
                "provider": str(device),
                "threads": threads,
                "batch": batch,
                "input_shape": list(shape),
                "peak_bytes": peak,
            }
        rows = measure_rows(runners, facts, on_gpu=device.type == "cuda", **common)
    if device.type != "cuda":
        why = f"torch does not tell it on the {device.type}, where models share one process"
        rows = {label: row | {"reasons": row["reasons"] | {"peak_bytes": why}} for label, row in rows.items()}
    return rows


def _prepare(
    subject: _Subject, device: torch.device, shape: tuple[int, ...], compiled: bool
) -> tuple[Callable[[], object], int | None]:
    """What runs the net once, waiting for the device; and on CUDA its peak bytes, weights and all."""
    assert subject.bundle is not None
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    net = subject.bundle.net.to(device).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    forward: Callable[[Tensor], Any] = torch.compile(net, dynamic=False) if compiled else net
    wait: Callable[[], object] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )

    def run() -> None:
        forward(inputs)
        wait()

    try:
        with console.silenced():
            run()  # compiles, and lets libraries choose their kernels
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            run()
    except Exception as error:  # what a forward or a compiler raises is anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise InputError(
            f"{subject.label}: torch can't run it on {list(shape)}: {type(error).__name__}: {reason[:300]}",
            remedy="torch.compile needs a C++ compiler, and Triton on a GPU." if compiled else None,
        ) from error
    return run, torch.cuda.max_memory_allocated(device) - before if on_cuda else None


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _compiler(nets: int) -> Iterator[None]:
    """A fresh compiler with room for each net: over its limit of nets of one class it runs them eagerly."""
    from torch._dynamo import config, reset

    reset()  # what was compiled for other threads
    try:
        with config.patch(cache_size_limit=max(8, 2 * nets)):
            yield
    finally:
        reset()


# ---- in words -------------------------------------------------------------------------------------
def _row(label: str, figures: dict[str, JSON]) -> dict[str, JSON]:
    return {"label": label, **figures, "images_per_s": 1e3 * figures["batch"] / figures["median_ms"]}


def _notes(
    subjects: Sequence[_Subject], on_torch: Sequence[str], rows: Sequence[dict[str, JSON]], rounds: int
) -> Iterator[str]:
    untrained = [s.label for s in subjects if s.bundle is not None and not s.bundle.spec.trained]
    if untrained:
        yield f"UNTRAINED (built with random weights, which is enough for latency): {', '.join(untrained)}."
    left_out = [s.label for s in subjects if s.bundle is None]
    if on_torch and left_out:
        yield f"On ONNX Runtime only: {', '.join(left_out)}."
    taken = min(row["rounds"] for row in rows)
    if taken < rounds:
        yield f"The time budget ended the slowest cell after {taken} of {rounds} rounds."


def _cells(rows: Sequence[Mapping[str, JSON]]) -> list[list[Mapping[str, JSON]]]:
    cells: dict[tuple[JSON, ...], list[Mapping[str, JSON]]] = {}
    for row in rows:
        cells.setdefault((row["runtime"], row["threads"], row["batch"]), []).append(row)
    return list(cells.values())


def _threads_words(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def _conditions(rows: Sequence[Mapping[str, JSON]]) -> str:
    """Say what a cell's figures hold under; what differs between its models stands in the table."""
    first = rows[0]
    line = f"{words.runtime(first)}; {first['gpu'] or first['cpu']}"
    line += f", {first['cores']} cores" if first["gpu"] is None else ""
    mhz = first["gpu_mhz"] if first["gpu"] else first["cpu_mhz"]
    if mhz is not None:
        line += f", {mhz[0]:.0f} MHz" if mhz[0] == mhz[1] else f", {mhz[0]:.0f} then {mhz[1]:.0f} MHz"
    if first["load_average"] is not None:
        line += f", load average {first['load_average'][0]:.1f}"
    return f"{line}; {first['rounds']} rounds"


@dataclass(frozen=True)
class _Table:
    """A cell's table; spreads get lines of their own where there is no room beside (rich asks for it)."""

    rows: Sequence[Mapping[str, JSON]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.made(between=" " if options.max_width >= _ROOMY else "\n")

    def made(self, *, between: str) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        compared = len(self.rows) > 1
        table = Table(box=None, pad_edge=False)
        table.add_column("model", overflow="fold")  # names are broken up, not figures
        for header in ("ms (p10-p90)", *(["ratio (p10-p90)"] if compared else [])):
            table.add_column(header.replace(" (", f"{between}("), no_wrap=True)
        for header in ("images/s", "peak MB"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            cells = [f"{_digits(row['median_ms'])} ({_digits(row['p10_ms'])}-{_digits(row['p90_ms'])})"]
            if row["verdict"] is not None:
                spread = f"({row['ratio_p10']:.2f}-{row['ratio_p90']:.2f})"
                cells.append(f"{row['ratio']:.2f}x {_VERDICTS[row['verdict']]} {spread}")
            elif compared:
                cells.append("1.00x")
            cells = [text.replace(" (", f"{between}(") for text in cells]
            peak = row["peak_bytes"]
            cells += [f"{row['images_per_s']:,.0f}", words.NOTHING if peak is None else f"{peak / 1e6:,.0f}"]
            table.add_row(Text(row["label"]), *cells)
        return table


_ROOMY = 100  # columns, of which the figures take about 65
_VERDICTS = {"faster": "faster", "slower": "slower", "same": "same", "unclear": "can't tell"}


def _digits(ms: float) -> str:
    return words.milliseconds(ms).removesuffix(" ms")


def _sentences(rows: Sequence[Mapping[str, JSON]]) -> Iterator[str]:
    """What the figures of a cell can't tell, and why there are none."""
    first = rows[0]["label"]
    again = "Run again on a quiet machine, or with more --rounds."
    if rows[0]["noisy"]:
        yield f"The machine was too noisy to tell the time of {first} within {NOISY:.0%}. {again}"
    if unclear := [row for row in rows if row["verdict"] == "unclear"]:
        ranges = [f"{row['label']} ({row['ratio_low']:.2f}x to {row['ratio_high']:.2f}x)" for row in unclear]
        yield (
            f"The machine was too noisy to tell, by more than {SAME:.0%}, whether these are faster or slower "
            f"than {first}: {', '.join(ranges)}, at {CONFIDENCE:.0%} confidence. {again}"
        )
    if rows[0]["threads"] > rows[0]["cores"]:
        yield f"{rows[0]['threads']} threads on {rows[0]['cores']} cores: they wait for each other."
    providers = {row["provider"] for row in rows}
    if len(providers) > 1:
        ran = [f"{row['label']} on {row['provider']}" for row in rows]
        yield f"They ran on different providers: {', '.join(ran)}."
    for reason in sorted({row["reasons"]["peak_bytes"] for row in rows if "peak_bytes" in row["reasons"]}):
        yield f"No peak memory: {reason}."
