"""The README's figures of latency, a command each: `python tests/benchmarks_latency.py targets`, and so on.

Random weights, 224 px, batch 1, ONNX Runtime's CPU provider, one thread; speed as ratios of interleaved runs.
Nothing here is a test.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks import SEVEN, settle
from scipy.optimize import nnls
from torch import Tensor, nn

from sepress import console
from sepress.costs import coarse_table, features, predictor
from sepress.coupling import Coupling, apply_removal, trace
from sepress.coupling.groups import Layers
from sepress.export import export_onnx
from sepress.measure import count_macs
from sepress.models import build_net, build_spec
from sepress.plan import plan_pruning
from sepress.profile import profile_latency, random_removal, table_for
from sepress.profile.operators import profile_files
from sepress.pruning import rank_channels
from sepress.runtime import measure_onnx_latency
from sepress.types import Policy, Removed

FIVE = SEVEN[:5]
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def prepare(reference: str, images: int = 16) -> tuple[nn.Module, Tensor, Coupling]:
    torch.manual_seed(0)
    net = build_net(build_spec(reference, trained=False))
    batch = torch.randn(images, 3, 224, 224)
    settle(net, batch)
    return net, batch, trace(net, batch[:1])


def targets(nets: Sequence[str]) -> None:
    """Plans of the default ranking, by what was asked: latency, MACs, and the quotient of their ratios."""
    print("| net | asked | MACs kept | latency (p10 to p90) | latency / MACs |")
    print("|---|---|---:|---:|---:|", flush=True)
    for reference in nets:
        net, images, coupling = prepare(reference)
        ranking, _ = rank_channels(
            net,
            coupling,
            list(images.split(8)),
            criterion="auto",
            compensate=False,
            device=torch.device("cpu"),
        )
        by_table = Policy(target_latency=0.6)
        table, notes = table_for(net, coupling, ranking, by_table, images[:1], given=None)
        assert table is not None
        asked: dict[str, tuple[Policy, Callable[[Removed], int] | None]] = {
            "MACs 0.5": (Policy(target_macs=0.5), predictor(coupling)),
            "MACs 0.5, by MACs alone": (Policy(target_macs=0.5), None),
            "latency 0.6": (by_table, predictor(coupling, table)),
        }
        asked |= {f"ratio {ratio}": (Policy(ratio=ratio), predictor(coupling)) for ratio in RATIOS}
        made = {"base": net}
        for label, (policy, latency) in asked.items():
            plan = plan_pruning(ranking, coupling, policy=policy, latency=latency)
            made[label] = copy.deepcopy(net)
            apply_removal(made[label], coupling, plan.removed)
        try:
            made["torch-pruning, L2, round_to=8"] = peer(net, images[:1], share=0.5)
        except Exception as error:  # noqa: BLE001 - the peer raises whatever it meets, and that is the figure
            print(f"| {reference} | torch-pruning | {type(error).__name__}: {str(error)[:80]} | | |")
        report(reference, made, images[:1])
        found = table.validation
        errors = f"{found['median_error']:.1%} (median, at most {found['worst_error']:.1%})"
        unseen = len(found["measured"])
        print(
            f"\n{reference}: {notes[0]}. Predictions of {unseen} nets not seen are off by {errors}.\n",
            flush=True,
        )


def report(reference: str, made: dict[str, nn.Module], image: Tensor) -> None:
    """Export, time interleaved, and print a row for each but the first."""
    whole = count_macs(made["base"], image)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for label, net in made.items():
            paths[label] = Path(folder) / f"{len(paths)}.onnx"
            export_onnx(net.eval(), paths[label], example=image, batch=1, exporter="torchscript")
        rows = measure_onnx_latency(paths, image, time_budget_s=120)
    for label, row in list(rows.items())[1:]:
        macs = count_macs(made[label], image) / whole
        print(
            f"| {reference} | {label} | {macs:.3f} | {row['ratio']:.3f} ({row['ratio_p10']:.3f} to "
            f"{row['ratio_p90']:.3f}) | {row['ratio'] / macs:.2f} |",
            flush=True,
        )


def peer(net: nn.Module, image: Tensor, *, share: float) -> nn.Module:
    """torch-pruning used plainly, at the ratio (by bisection) that meets the share of MACs from below."""
    import torch_pruning as tp

    whole = count_macs(net, image)
    low, high, best = 0.0, 0.9, None
    for _ in range(7):
        ratio, pruned = (low + high) / 2, copy.deepcopy(net)
        heads = [m for m in pruned.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
        with console.silenced():
            pruner = tp.pruner.BasePruner(
                pruned,
                image,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=heads,
                round_to=8,
            )
            pruner.step()
        if count_macs(pruned, image) <= share * whole:
            high, best = ratio, pruned
        else:
            low = ratio
    assert best is not None, "no ratio gives so small a net"
    return best


def coarse(nets: Sequence[str]) -> None:
    """Profile the nets, and fit the prices of costs._COARSE to their tables."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for reference in nets:
        net, images, coupling = prepare(reference, images=2)
        table = profile_latency(net, coupling, images[:1])
        random = np.random.default_rng(0)
        for removed in ({}, *(random_removal(coupling, random, rounded=True) for _ in range(6))):
            layers = coupling.layers(removed)
            for kind, row in layer_rows(layers, coarse_table(coupling).block, table.layer_ns(layers)):
                rows.setdefault(kind, []).append(row)
        print(f"{reference}: {table.validation}", flush=True)
    print("| kind | ns a layer | an element | a multiply-add | an element where ragged | median error |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind, found in rows.items():
        taken, *columns = np.array(found).T
        known = np.stack([np.ones_like(taken), *columns], axis=1)
        scale, weight = np.maximum(known.max(axis=0), 1e-9), 1 / np.maximum(taken, 2e3)
        fitted = nnls(known / scale * weight[:, None], taken * weight)[0] / scale
        error = np.median(np.abs(known @ fitted / taken - 1))
        layer, element, mac, ragged = fitted
        print(f"| {kind} | {layer:.0f} | {element:.3f} | {mac:.4f} | {ragged:.2f} | {error:.0%} |")


def layer_rows(layers: Layers, block: np.ndarray, ns: np.ndarray) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Kind of each layer; its time, elements given, multiply-adds, and elements where groups are ragged."""
    seen = features(layers, block)
    widths = np.where(layers.shrinking, seen.channels, layers.lengths)
    for i, taken in enumerate(ns):
        kind = "linear" if layers.positions[i] == 1 else layers.kinds[i]
        elements = 0 if kind == "linear" else layers.positions[i] * widths[i, 0]
        macs, ragged = layers.positions[i] * widths[i].prod(), layers.positions[i] * seen.ragged[i]
        yield kind, (float(taken), float(elements), float(macs), float(ragged))


def grouped(_: Sequence[str]) -> None:
    """Grouped 3x3 convolutions between pointwise ones, by channels a group: the grouped price of _COARSE."""
    print("| groups | pixels | channels a group | microseconds | multiply-adds a nanosecond |")
    print("|---:|---:|---:|---:|---:|", flush=True)
    for groups, side in ((14, 14), (5, 28), (32, 14)):
        for width in (4, 8, 12, 15, 16, 18, 20, 24, 28, 32):
            channels = groups * width
            net = nn.Sequential(
                nn.Conv2d(64, channels, 1),
                nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
                nn.ReLU(),
                nn.Conv2d(channels, 64, 1),
            )
            image = torch.randn(1, 64, side, side)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                export_onnx(net.eval(), path, example=image, batch=1, exporter="torchscript")
                (events,) = profile_files([path], image, threads=1, rounds=12)
            ns = next(event.ns for event in events if event.weight[2:] == (3, 3))
            macs = channels * width * 9 * side * side
            print(f"| {groups} | {side} | {width} | {ns / 1e3:.0f} | {macs / ns:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for run in (targets, coarse, grouped):
        one = commands.add_parser(run.__name__, help=run.__doc__)
        one.add_argument("nets", nargs="*", default=FIVE)
        one.set_defaults(run=run)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options.nets)


if __name__ == "__main__":
    main()
