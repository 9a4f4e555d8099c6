"""ONNX Runtime: sessions on the provider that really runs, and the latency of files timed on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sepress import console
from sepress.defaults import LATENCY_ROUNDS, LATENCY_WARMUP
from sepress.errors import InputError
from sepress.timing import TIME_BUDGET_S, measure_rows
from sepress.types import JSON

if TYPE_CHECKING:  # the process that measures memory does without torch
    from sepress.measure import Inputs

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two packages, one import name
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
ON_GPU = (PROVIDERS["cuda"], PROVIDERS["tensorrt"])
_ORT_FATAL = 4  # log severity: a provider that can't load is told by get_providers(), not by noise


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
    path: str | Path,
    *,
    providers: str | Sequence[str] = "auto",
    threads: int | None = None,
    profile_to: Path | None = None,
) -> Any:
    """Open an onnxruntime.InferenceSession; ask its get_providers()[0] which provider really runs.

    `providers` is 'auto' (CUDA where it loads, else CPU), one of PROVIDERS, or ONNX Runtime's own names in
    order. `threads` limits the threads inside an operator; None leaves it to the runtime. With `profile_to`,
    a path that file names begin with, the session times its operators until end_profiling(). Raises
    InputError for a file that can't be opened, for an unknown provider, and for one that was asked for by
    name and does not load.
    """
    check_single_runtime()
    import onnxruntime  # here: with two packages installed the import itself may fail

    onnxruntime.set_default_logger_severity(_ORT_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ORT_FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    # Sessions timed in turn: the idle one's threads must not spin beside the other. Within a run they do,
    # as deployed (session.intra_op.allow_spinning, on by default); this stops them when a run ends.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    wanted = provider_names(providers)
    available = onnxruntime.get_available_providers()
    usable = [name for name in wanted if name in available] or [PROVIDERS["cpu"]]
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    try:
        with console.silenced():  # the Python side prints when it falls back
            session = onnxruntime.InferenceSession(str(path), options, providers=usable)
    except Exception as error:  # the runtime's errors have no common base
        raise InputError(
            f"ONNX Runtime can't open {path}: {_reason(error)}",
            remedy="Is it a whole ONNX file, of an opset that this version of the runtime reads?",
        ) from error
    ran = session.get_providers()[0]
    if providers != "auto" and ran != wanted[0]:
        raise InputError(
            f"ONNX Runtime can't run on {wanted[0]} here, only on {ran}",
            remedy="Choose 'cpu' or 'auto', or install what the provider needs (CUDA and cuDNN for CUDA).",
        )
    return session


def provider_names(providers: str | Sequence[str]) -> list[str]:
    """ONNX Runtime's names for what the user calls a provider, in order; InputError for an unknown one."""
    if not isinstance(providers, str):
        return list(providers)
    if providers == "auto":
        return [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    if providers not in PROVIDERS:
        raise InputError(
            f"unknown provider '{providers}'", remedy=f"Choose one of: auto, {', '.join(PROVIDERS)}."
        )
    behind = [PROVIDERS["cuda"]] if providers == "tensorrt" else []  # for the operators that it lacks
    return list(dict.fromkeys([PROVIDERS[providers], *behind, PROVIDERS["cpu"]]))


# ---- latency --------------------------------------------------------------------------------------
def measure_onnx_latency(
    paths: Mapping[str, str | Path],
    example: Inputs | None = None,
    *,
    batch: int = 1,
    input_size: Sequence[int] | None = None,
    rounds: int = LATENCY_ROUNDS,
    warmup: int = LATENCY_WARMUP,
    threads: int | None = 1,  # as measured for the figures in the README: few servers give one request more
    providers: str | Sequence[str] = "cpu",
    time_budget_s: float = TIME_BUDGET_S,
) -> dict[str, dict[str, JSON]]:
    """Time the files interleaved on ONNX Runtime; {label: figures and the conditions they hold under}.

    The figures are those of timing.LatencyFigures, ratios to the first label. `example` is what every file
    reads; without one each gets noise of the inputs that it declares, for `batch` images (see `make_feeds`).
    On a GPU the inputs lie there before the clock starts, and the outputs stay there. Raises InputError for
    a file that can't be opened or run so.
    """
    check_single_runtime()
    import onnxruntime

    runners: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, JSON]] = {}
    for label, path in paths.items():
        session = open_session(path, providers=providers, threads=threads)
        if example is None:
            feeds = make_feeds(session, batch=batch, input_size=input_size, label=label)
        else:
            feeds = _feeds_of(session, example)
        runners[label] = make_runner(session, feeds, label=label)
        shapes = [list(x.shape) for x in feeds.values()]
        facts[label] = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": session.get_providers()[0],
            "threads": threads,
            "batch": batch if example is None else shapes[0][0],
            "input_shape": shapes if len(shapes) > 1 else shapes[0],
        }
    on_gpu = any(row["provider"] in ON_GPU for row in facts.values())
    return measure_rows(
        runners, facts, on_gpu=on_gpu, rounds=rounds, warmup=warmup, time_budget_s=time_budget_s
    )


def _feeds_of(session: Any, example: Inputs) -> dict[str, np.ndarray]:
    images = example if isinstance(example, tuple) else (example,)
    names = [node.name for node in session.get_inputs()]
    return dict(zip(names, (x.detach().cpu().numpy() for x in images), strict=True))


def make_runner(session: Any, feeds: Mapping[str, np.ndarray], *, label: str) -> Callable[[], object]:
    """Return what runs the session once on the feeds and comes back when it is done; it has run once here.

    On a GPU the feeds are bound there. Raises InputError, with the runtime's reason, where it can't run.
    """
    run = _bound(session, feeds) if session.get_providers()[0] in ON_GPU else None

    def on_cpu() -> object:
        return session.run(None, feeds)

    runner = run or on_cpu
    try:
        runner()
    except Exception as error:  # the runtime's errors have no common base
        shapes = ", ".join(str(list(x.shape)) for x in feeds.values())
        raise InputError(f"{label}: ONNX Runtime can't run it on {shapes}: {_reason(error)}") from error
    return runner


def _bound(session: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Inputs and outputs on the GPU: copies are the application's, and are not timed."""
    import onnxruntime

    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    for node in session.get_outputs():
        binding.bind_output(node.name, "cuda")

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


# ---- inputs as a file declares them ---------------------------------------------------------------
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def make_feeds(
    session: Any, *, batch: int = 1, input_size: Sequence[int] | None = None, label: str = "the file"
) -> dict[str, np.ndarray]:
    """Make inputs of the shapes and types that the session's file declares, the same each time.

    Floats are standard normal noise, uint8 is uniform over 0..255 (an image), other whole numbers are 0 (a
    valid index). The first axis is the batch; other free axes are those of an image of `input_size`
    (C, H, W), channels first or last, or where it is None of what the file's metadata says. Raises InputError
    for a batch that the file does not take, and for an input that can't be made so.
    """
    stated = session.get_modelmeta().custom_metadata_map.get("sepress.input_size")
    size = input_size or (json.loads(stated) if stated else None)
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise InputError(f"{label}: its input '{node.name}' is a {node.type}, which can't be made up")
        dtype = np.dtype(_DTYPES[node.type])
        shape = _shape(node, batch=batch, size=size, label=label)
        if dtype.kind == "f":
            feeds[node.name] = random.standard_normal(shape, np.float32).astype(dtype, copy=False)
        elif dtype == np.uint8:
            feeds[node.name] = random.integers(0, 256, shape, dtype=np.uint8)
        else:
            feeds[node.name] = np.zeros(shape, dtype)
    return feeds


def _shape(node: Any, *, batch: int, size: Sequence[int] | None, label: str) -> tuple[int, ...]:
    dims: list[int | str | None] = list(node.shape)  # a name, or None, where the file leaves it free
    one_image = size is not None and len(dims) == len(size) and node.type == "tensor(uint8)"
    takes: int | str | None = 1 if one_image else dims[0] if dims else batch
    if isinstance(takes, int) and takes != batch:
        raise InputError(
            f"{label}: its input '{node.name}' takes batches of {takes} only, not of {batch}",
            remedy=f"Pass --batch {takes}, or export it with a free batch size.",
        )
    image = dims if one_image else dims[1:]
    if any(not isinstance(n, int) for n in image):
        orders = [[*size], [*size[1:], size[0]]] if size is not None else []
        fitting = (
            order
            for order in orders
            if len(order) == len(image)
            and all(n == m for n, m in zip(image, order, strict=True) if isinstance(n, int))
        )
        found = next(fitting, None)
        if found is None:
            raise InputError(
                f"{label}: its input '{node.name}' leaves the size of images free ({_written(dims)})",
                remedy="Pass --input-size C,H,W.",
            )
        image = [*found]
    whole = tuple(n for n in image if isinstance(n, int))
    return whole if one_image or not dims else (batch, *whole)


def _written(dims: Sequence[int | str | None]) -> str:
    return " x ".join(str(n or "?") for n in dims)


def _reason(error: BaseException) -> str:
    """The runtime's own words, on one line, without its codes."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:300] or type(error).__name__


# ---- memory ---------------------------------------------------------------------------------------
def measure_peak_bytes(
    path: str | Path, *, batch: int, threads: int | None, input_size: Sequence[int] | None = None
) -> tuple[int | None, str | None]:
    """Return the memory that opening the file and running it on the CPU takes at its peak; or None and why.

    It is measured in a process of its own, as the peak of its resident memory over what it held with the
    runtime loaded and no file open, inputs and outputs included: where models share a process, what one
    has freed and another uses can't be told apart.
    """
    if not _STATUS.is_file():
        return None, "this system does not tell what a process held at its peak"
    arguments = {"path": str(path), "batch": batch, "threads": threads, "input_size": input_size}
    code = "import sys; from sepress import runtime; runtime.print_peak(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, f"the process that measured it failed: {done.stderr.strip()[-200:]}"
    return int(done.stdout.split()[-1]), None


_STATUS = Path("/proc/self/status")


def print_peak(arguments: str) -> None:
    """The process of `measure_peak_bytes`: takes what it passes, prints bytes."""
    import onnxruntime  # noqa: F401 - so that it counts as held before

    given = json.loads(arguments)
    before = _held("VmRSS")
    session = open_session(given["path"], providers="cpu", threads=given["threads"])
    runner = make_runner(
        session, make_feeds(session, batch=given["batch"], input_size=given["input_size"]), label="the file"
    )
    runner()  # the first run allocates, and the second by the plan that the first one left
    print(max(0, _held("VmHWM") - before))


def _held(key: str) -> int:
    """VmRSS (now) or VmHWM (at the peak) of this process, in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
