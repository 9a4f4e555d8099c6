"""A table -> its picture: top-1 against multiply-adds, a line a method, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepress.compare.table import Table

PANELS = {"recalibrated": "BN recalibrated", "tuned": "fine-tuned"}
# Okabe & Ito (2008): told apart with any colour vision; the black is the base's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vPX"


def draw_pareto(table: Table, path: Path) -> None:
    """Write the picture; the same table gives the same bytes.

    A panel for each phase that was measured: mean over seeds, bars of one sample standard deviation.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [p for p in PANELS if any(row.mean[p] is not None for row in table.rows)]
    with rc_context({"svg.hashsalt": "sepress", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(1.6 + 4.2 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, phase in zip(axes, panels, strict=True):
            _draw_panel(axis, table, phase)
        handles: dict[str, Any] = {}
        for axis in axes:  # a method may have one of the panels only
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        seeds = "seeds " if len(table.bases) > 1 else "seed "
        seeds += ", ".join(str(base.seed) for base in table.bases)
        figure.suptitle(f"{table.model}, top-1 on {table.comparison.split}, {seeds}")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "sepress"})


def _draw_panel(axis: Any, table: Table, phase: str) -> None:
    for number, method in enumerate(table.methods):
        rows = sorted(
            (row for row in table.rows if row.method == method and row.mean[phase] is not None),
            key=lambda row: row.macs_ratio,
        )
        if not rows:
            continue
        axis.errorbar(
            [row.macs_ratio for row in rows],
            [100 * (row.mean[phase] or 0) for row in rows],
            yerr=[100 * (row.std[phase] or 0) for row in rows],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # no pair comes twice in 49
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    tops = [100 * base.top1 for base in table.bases]
    axis.plot([1.0], [sum(tops) / len(tops)], "k*", markersize=9, linestyle="none", label="base")
    axis.set(title=PANELS[phase], xlabel="share of the multiply-adds kept", ylabel="top-1 (%)")
    axis.grid(alpha=0.3)
