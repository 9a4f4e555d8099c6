"""ONNX Runtime: sessions on the provider that really runs, and the latency of files timed on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepress import console
from sepress.defaults import LATENCY_ROUNDS
from sepress.errors import InputError
from sepress.measure import Inputs, cpu_model
from sepress.timing import TIME_BUDGET_S, WARMUP, measure_latency
from sepress.types import JSON

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two packages, one import name
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
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
    a path that file names begin with, the session times its operators until end_profiling(). Raises InputError
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
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    wanted = _provider_names(providers)
    available = onnxruntime.get_available_providers()
    usable = [name for name in wanted if name in available] or [PROVIDERS["cpu"]]
    with console.silenced():  # the Python side prints when it falls back
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

    The figures are those of timing.LatencyFigures, ratios to the first label; the batch is the example's.
    """
    check_single_runtime()
    import onnxruntime

    feeds = [x.detach().cpu().numpy() for x in (example if isinstance(example, tuple) else (example,))]
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
