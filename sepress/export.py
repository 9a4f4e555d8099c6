"""A net -> one checked ONNX file -> parity with ONNX Runtime, and the latency that will be deployed.

What comes out holds the weights, the preprocessing and where it comes from, and nothing about the machine
that made it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sepress import __version__
from sepress.defaults import LATENCY_ROUNDS, OPSET
from sepress.errors import InputError, SepressError
from sepress.files import replacing
from sepress.measure import (
    TIME_BUDGET_S,
    WARMUP,
    Inputs,
    cpu_model,
    measure_latency,
)
from sepress.modes import evaluating
from sepress.types import JSON, Check, ModelSpec

PARITY_TOLERANCE = 1e-4
ROUNDING_LIMIT = 1e-2  # a net whose float32 is further than this from its float64 can't be judged by it
VACUOUS_SPREAD = 1e-5  # of max|a|: below it float32 rounding hides any difference
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two packages, one import name
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
_BATCH_REMEDY = (
    "Nothing was written. Where the forward fixes the batch size, export with dynamic_batch=False."
)
_ORT_FATAL = 4  # log severity: a provider that can't load is told by get_providers(), not by noise


# ---- export ---------------------------------------------------------------------------------------
def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    example: Inputs,
    spec: ModelSpec | None = None,
    lineage: Mapping[str, JSON] | None = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
) -> None:
    """Write the net as one ONNX file that passes the checker; the net given is left as it was.

    `example` is one input (N, C, H, W; also 3- or 5-dimensional) or a tuple of them. A single input is
    called `input`, a single output `logits`; several are `input_0`, ... and `output_0`, ... or what the keys
    of a dict say. With `dynamic_batch` the first axis is `batch`, otherwise it has the example's size.
    `spec` and `lineage` go into the metadata under `sepress.*`; paths of this machine in the lineage are cut
    to their last part. Raises InputError for an example or an opset that can't be used, and SepressError
    with the exporter's first cause; then nothing is written.

    >>> import sepress, torch
    >>> net = sepress.build("sepress:se_resnet8", in_chans=1)
    >>> sepress.export_onnx(net, "net.onnx", example=torch.randn(1, 1, 28, 28))
    """
    images = _as_tuple(example)
    if not images or any(x.dim() < 2 or not len(x) for x in images):
        raise InputError(
            "the example to export with holds no image",
            remedy="Pass a batch of inputs, say (1, 3, 224, 224).",
        )
    net, images = _on_cpu(net), tuple(x.detach().cpu() for x in images)
    with evaluating(net):
        model = _exported(net, images, opset=opset, dynamic_batch=dynamic_batch)
    _strip(model)
    _set_metadata(model, images, spec=spec, lineage=lineage)
    with replacing(Path(path)) as temporary:
        onnx.save(model, temporary)
        try:
            onnx.checker.check_model(temporary, full_check=True)  # by path: models over 2 GB pass too
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise SepressError(
                f"the exported ONNX file is not valid: {_first_line(error)}",
                remedy=f"Nothing was written. Try another opset than {opset}, and please report this net.",
            ) from error


def named_outputs(value: Any, name: str = "") -> dict[str, Tensor]:
    """Name the tensors of a forward's result, in order: its keys, fields or positions joined by '_'."""
    if isinstance(value, Tensor):
        return {name or "logits": value}
    if value is None:
        return {}
    if isinstance(value, Mapping):
        children = {str(key): child for key, child in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple | list):
        named = getattr(value, "_fields", None)  # a namedtuple
        if named is None and len(value) == 1:
            return named_outputs(value[0], name)
        keys = named or [str(i) if name else f"output_{i}" for i in range(len(value))]
        children = dict(zip(keys, value, strict=True))
    else:
        raise InputError(
            f"the net's output holds a {type(value).__name__}",
            remedy="Expected tensors, or tuples, lists, dicts or dataclasses of tensors.",
        )
    outputs: dict[str, Tensor] = {}
    for key, child in children.items():
        outputs |= named_outputs(child, f"{name}_{key}" if name else key)
    return outputs


class _Flat(nn.Module):
    """The net with its outputs as a flat tuple: torch.export knows no dataclasses of the user's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.net(*inputs)).values())


def _exported(
    net: nn.Module, images: tuple[Tensor, ...], *, opset: int, dynamic_batch: bool
) -> onnx.ModelProto:
    result = net(*images)
    plain = isinstance(result, Tensor)
    names = ["input"] if len(images) == 1 else [f"input_{i}" for i in range(len(images))]
    if dynamic_batch:  # two images: an example of one would be taken for the constant 1
        images = tuple(torch.cat([x[:1], x[-1:]]) for x in images)
    shapes: tuple[Any, ...] = tuple({0: torch.export.Dim("batch")} for _ in images)
    if not plain:
        shapes = (shapes,)  # a variadic forward has one argument: the tuple
    try:
        with quiet():
            program = torch.onnx.export(
                net if plain else _Flat(net),
                images,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=list(named_outputs(result)),
                opset_version=opset,
                dynamic_shapes=shapes if dynamic_batch else None,
            )
    except Exception as error:  # the exporter raises whatever the graph capture met
        raise SepressError(
            f"torch can't export this net to ONNX: {_first_cause(error)}", remedy=_BATCH_REMEDY
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _check_promises(model, opset=opset, dynamic_batch=dynamic_batch)
    return model


def _check_promises(model: onnx.ModelProto, *, opset: int, dynamic_batch: bool) -> None:
    """Raise where the exporter, which only logs it, gave another opset or a fixed batch."""
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(
            f"this net can't be converted to ONNX opset {opset}",
            remedy=f"Nothing was written. Opset {written} works.",
        )
    fixed = [node.name for node in model.graph.input if not node.type.tensor_type.shape.dim[0].dim_param]
    if dynamic_batch and fixed:
        raise SepressError(f"the net's forward fixes the batch size of '{fixed[0]}'", remedy=_BATCH_REMEDY)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's prints, warnings and log records from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _first_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


# ---- what the file says ---------------------------------------------------------------------------
def _strip(message: Any) -> None:
    """Clear doc strings and metadata everywhere in the model: torch stores stack traces with file names."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _strip(part)


def _set_metadata(
    model: onnx.ModelProto,
    images: tuple[Tensor, ...],
    *,
    spec: ModelSpec | None,
    lineage: Mapping[str, JSON] | None,
) -> None:
    facts: dict[str, JSON] = {"input_size": list(images[0].shape[1:])}
    if spec is not None:
        preprocessing = dataclasses.asdict(spec.preprocessing)
        facts |= {key: preprocessing[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        facts |= {"class_names": spec.class_names, "trained": spec.trained}
    if lineage is not None:
        facts["lineage"] = without_paths(lineage)
    model.producer_name, model.producer_version = "sepress", __version__
    onnx.helper.set_model_props(
        model,
        {
            f"sepress.{key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in facts.items()
            if value is not None
        },
    )


def without_paths(value: JSON) -> JSON:
    """Return the JSON value with every absolute path in it cut to its last part."""
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute() or value.startswith("~"):
                return kind(value).name
        return value
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(child) for child in value]
    return value


# ---- ONNX Runtime ---------------------------------------------------------------------------------
def check_single_runtime() -> None:
    """Raise InputError where both packages of ONNX Runtime are installed: they overwrite each other."""
    found = []
    for package in RUNTIMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            found.append(package)
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(found)} are both installed, and overwrite each other's files",
            remedy=f"pip uninstall -y {' '.join(found)}, then pip install the one you need: "
            "onnxruntime-gpu runs on CPUs and NVIDIA GPUs.",
        )


def open_session(
    path: str | Path, *, providers: str | Sequence[str] = "auto", threads: int | None = None
) -> Any:
    """Open an onnxruntime.InferenceSession; ask its get_providers()[0] which provider really runs.

    `providers` is 'auto' (CUDA where it loads, else CPU), one of PROVIDERS, or ONNX Runtime's own names in
    order. `threads` limits the threads inside an operator; None leaves it to the runtime. Raises InputError
    for an unknown provider, and for one that was asked for by name and does not load.
    """
    check_single_runtime()
    import onnxruntime  # here: with two packages installed the import itself may fail

    onnxruntime.set_default_logger_severity(_ORT_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ORT_FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
        # two sessions timed in turn: the idle one's threads must not spin beside the other
        options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = _provider_names(providers)
    available = onnxruntime.get_available_providers()
    usable = [name for name in wanted if name in available] or [PROVIDERS["cpu"]]
    with quiet():  # the Python side prints when it falls back
        session = onnxruntime.InferenceSession(str(path), options, providers=usable)
    ran = session.get_providers()[0]
    if providers != "auto" and ran != wanted[0]:
        raise InputError(
            f"ONNX Runtime can't run on {wanted[0]} here, only on {ran}",
            remedy="Choose 'cpu' or 'auto', or install what the provider needs (CUDA and cuDNN for CUDA).",
        )
    return session


def _provider_names(providers: str | Sequence[str]) -> list[str]:
    if not isinstance(providers, str):
        return list(providers)
    if providers == "auto":
        return [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    if providers not in PROVIDERS:
        raise InputError(
            f"unknown provider '{providers}'", remedy=f"Choose one of: auto, {', '.join(PROVIDERS)}."
        )
    return list(dict.fromkeys([PROVIDERS[providers], PROVIDERS["cpu"]]))


def check_onnx_parity(net: nn.Module, path: str | Path, images: Inputs) -> Check:
    """Compare the file's outputs with the net's on real images (N, ...), in batches of 1, 3 and more.

    The error of an output is max|a - b| over images, by the spread max|a - mean over images|; the worst
    output counts and must stay within PARITY_TOLERANCE. `passed` is None where no output tells the images
    apart. Runs on the CPU in float32, where neither side rounds to TF32; where the two differ by more, the
    net in float64 decides whether that is an error or float32's own noise.
    """
    net, inputs = _on_cpu(net), tuple(x.detach().cpu() for x in _as_tuple(images))
    session = open_session(path, providers="cpu")
    fixed = session.get_inputs()[0].shape[0]
    pieces = _pieces(len(inputs[0]), fixed if isinstance(fixed, int) else None)
    batches = [tuple(x[start:stop] for x in inputs) for start, stop in pieces]
    if not batches:
        return Check(
            None, None, reason=f"fewer images ({len(inputs[0])}) than the file's batch size ({fixed})"
        )
    expected = _run_net(net, batches)
    found = _run_session(session, batches, list(expected))
    check = compare_outputs(expected, found)
    return judge_in_float64(net, batches, expected, found) or check if check.passed is False else check


def _run_net(net: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, np.ndarray]:
    with evaluating(net):
        outputs = [named_outputs(net(*batch)) for batch in batches]
    return {name: np.concatenate([part[name].numpy() for part in outputs]) for name in outputs[0]}


def _run_session(
    session: Any, batches: Sequence[tuple[Tensor, ...]], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    names = [node.name for node in session.get_inputs()]
    found = [
        session.run(outputs, dict(zip(names, (x.numpy() for x in batch), strict=True))) for batch in batches
    ]
    return {name: np.concatenate([part[i] for part in found]) for i, name in enumerate(outputs)}


def judge_in_float64(
    net: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
) -> Check | None:
    """Pass what is as near to the net in float64 as the net in float32 is; None where that can't help.

    Deep untrained nets reach this: their logits hardly vary over images, and summation order shows.
    """
    doubles = [tuple(x.double() if x.is_floating_point() else x for x in batch) for batch in batches]
    try:
        exact = _run_net(copy.deepcopy(net).double(), doubles)
    except RuntimeError:  # a forward that fixes its dtype
        return None
    file, torch32 = compare_outputs(exact, found), compare_outputs(exact, expected)
    if file.relative_error is None or torch32.relative_error is None:
        return None
    bound = max(PARITY_TOLERANCE, 2 * torch32.relative_error)
    if file.relative_error > bound or torch32.relative_error > ROUNDING_LIMIT:
        return None
    reason = f"against float64, from which torch's own float32 differs by {torch32.relative_error:.1e}"
    return dataclasses.replace(file, passed=True, reason=reason)


def _pieces(count: int, fixed: int | None) -> Iterator[tuple[int, int]]:
    """Cut `count` images into (start, stop): one, three, then eights; or as large as the file demands."""
    start = 0
    sizes = iter((1, 3))
    while start < count:
        stop = start + (fixed or next(sizes, 8))
        if fixed and stop > count:
            return
        yield start, min(stop, count)
        start = stop


def compare_outputs(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Check:
    """Compare outputs (N, ...) by name: relative error by DESIGN's spread over images, and the argmax.

    `argmax_agreement` is the fraction of positions where the first output's largest class, along axis 1, is
    the same.
    """
    errors: dict[str, float] = {}
    for name, a in expected.items():
        b = found[name]
        if a.shape != b.shape:
            return Check(False, None, reason=f"'{name}' has shape {b.shape}, expected {a.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return Check(False, None, reason=f"'{name}' holds values that are not finite")
        a, b = a.astype(np.float64), b.astype(np.float64)
        spread = np.abs(a - a.mean(axis=0, keepdims=True)).max(initial=0.0)
        if spread > 0 and spread >= VACUOUS_SPREAD * np.abs(a).max():
            errors[name] = float(np.abs(a - b).max() / spread)
    agreement = _argmax_agreement(expected, found)
    if not errors:
        count = len(next(iter(expected.values())))
        vacuous = f"the outputs do not tell the {count} images apart: nothing to compare"
        return Check(None, None, reason=vacuous, argmax_agreement=agreement)
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    reason = None
    if error > PARITY_TOLERANCE:
        reason = (
            f"'{worst}' differs by {error:.2e} of its spread, over the tolerance of {PARITY_TOLERANCE:.0e}"
        )
    return Check(error <= PARITY_TOLERANCE, error, reason=reason, argmax_agreement=agreement)


def _argmax_agreement(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float | None:
    name, a = next(iter(expected.items()))
    if a.ndim < 2:
        return None
    return float((a.argmax(axis=1) == found[name].argmax(axis=1)).mean())


def measure_onnx_latency(
    paths: Mapping[str, str | Path],
    example: Inputs,
    *,
    rounds: int = LATENCY_ROUNDS,
    warmup: int = WARMUP,
    threads: int | None = 1,  # as measured for the figures in the README: few servers give one request more
    providers: str | Sequence[str] = "cpu",
    time_budget_s: float = TIME_BUDGET_S,
) -> dict[str, dict[str, JSON]]:
    """Time the files interleaved on ONNX Runtime; {label: figures and the conditions they hold under}.

    The figures are those of measure.LatencyFigures, ratios to the first label; the batch is the example's.
    """
    check_single_runtime()
    import onnxruntime

    feeds = [x.detach().cpu().numpy() for x in _as_tuple(example)]
    sessions = {
        label: open_session(path, providers=providers, threads=threads) for label, path in paths.items()
    }
    runners = {label: _runner(session, feeds) for label, session in sessions.items()}
    figures = measure_latency(runners, rounds=rounds, warmup=warmup, time_budget_s=time_budget_s)
    conditions: dict[str, JSON] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": threads,
        "batch": len(feeds[0]),
        "input_shape": [list(x.shape) for x in feeds] if len(feeds) > 1 else list(feeds[0].shape),
        "cpu": cpu_model(),
    }
    return {
        label: row.to_json() | {"provider": sessions[label].get_providers()[0]} | conditions
        for label, row in figures.items()
    }


def _runner(session: Any, feeds: Sequence[np.ndarray]) -> Callable[[], object]:
    inputs = dict(zip((node.name for node in session.get_inputs()), feeds, strict=True))
    return lambda: session.run(None, inputs)


# ---- small helpers --------------------------------------------------------------------------------
def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _on_cpu(net: nn.Module) -> nn.Module:
    """Return the net itself where it lives on the CPU, else a copy there."""
    tensors = (*net.parameters(), *net.buffers())
    return net if all(t.device.type == "cpu" for t in tensors) else copy.deepcopy(net).cpu()
