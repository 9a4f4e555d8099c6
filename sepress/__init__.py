"""Make Squeeze-and-Excitation networks smaller and faster: prune by excitation, fine-tune, export.

The public names load on first use, so that `import sepress` and `sepress --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepress.bench import Bench, bench_models
    from sepress.bundle import load_bundle as load
    from sepress.bundle import save_net as save
    from sepress.coupling import find_gates, find_groups
    from sepress.export import export_onnx
    from sepress.folding import FoldResult, fold
    from sepress.models import build
    from sepress.pruning import PruneResult, prune

__version__ = "0.1.0"
__all__ = [
    "prune",
    "fold",
    "load",
    "save",
    "build",
    "find_gates",
    "find_groups",
    "export_onnx",
    "bench_models",
    "PruneResult",
    "Bench",
    "FoldResult",
    "__version__",
]

_WHERE = {
    "prune": ("sepress.pruning", "prune"),
    "PruneResult": ("sepress.pruning", "PruneResult"),
    "fold": ("sepress.folding", "fold"),
    "FoldResult": ("sepress.folding", "FoldResult"),
    "load": ("sepress.bundle", "load_bundle"),
    "save": ("sepress.bundle", "save_net"),
    "build": ("sepress.models", "build"),
    "find_gates": ("sepress.coupling", "find_gates"),
    "find_groups": ("sepress.coupling", "find_groups"),
    "export_onnx": ("sepress.export", "export_onnx"),
    "bench_models": ("sepress.bench", "bench_models"),
    "Bench": ("sepress.bench", "Bench"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sepress' has no attribute '{name}'")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)
