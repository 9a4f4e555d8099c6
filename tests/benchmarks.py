"""The README's figures that no recipe gives, a command each: `python tests/benchmarks.py taps`, and so on.

Speed is told as ratios of interleaved runs, by `scale` alone in seconds; nothing here is a test.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from peers import Comparison

SEVEN = (
    "timm:seresnet50",
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:regnety_016",
    "timm:seresnext50_32x4d",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
)
NETS = ("timm:mobilenetv3_large_100", "timm:seresnet50")
LARGE = ("timm:efficientnet_b4", "timm:legacy_seresnet152")
MEASURED = ("reconstruction", "fisher-reconstruction", "contribution", "fisher", "mean-excitation")
WHOLE = (
    "timm:senet154@224",
    "timm:tf_efficientnet_b7@224",
    "timm:regnety_160@224",
    "timm:efficientnetv2_l@224",
    "timm:tf_efficientnetv2_l@512",
)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 10_000)


def taps() -> None:
    """Tapping every gate against a plain forward: 8 images at 128 px, one thread."""
    import torch

    from sepress.coupling import trace
    from sepress.gates import Taps
    from sepress.models import build
    from sepress.timing import measure_latency

    torch.set_num_threads(1)
    for reference in NETS:
        torch.manual_seed(0)
        net, images = build(reference).eval(), torch.randn(8, 3, 128, 128)
        coupling = trace(net, images[:1])

        def plain(net: torch.nn.Module = net, images: torch.Tensor = images) -> None:
            net(images)

        taps = Taps(net, coupling, on_gate=lambda gate, s: None)

        def tapped(net: torch.nn.Module = net, images: torch.Tensor = images, taps: Taps = taps) -> None:
            with taps:
                net(images)

        with torch.no_grad():
            figures = measure_latency({"plain": plain, "tapped": tapped}, rounds=40)
        f = figures["tapped"]
        print(
            f"{reference}: {len(coupling.gates)} gates, tapped / plain {f.ratio:.3f} "
            f"(p10 {f.ratio_p10:.3f}, p90 {f.ratio_p90:.3f}), plain {figures['plain'].median_ms:.0f} ms"
        )


def memory() -> None:
    """Peak resident memory of calibration by the number of images, a process each."""
    for images in (64, 256, 1024):
        child = [sys.executable, __file__, "calibrate", str(images)]
        printed = subprocess.run(child, check=True, capture_output=True, text=True).stdout.strip()
        print(f"{images} images: {printed}")


def calibrate_some(images: int) -> None:
    import torch

    from sepress.calibrate import calibrate
    from sepress.coupling import trace
    from sepress.models import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = build("timm:mobilenetv3_small_100").eval()
    coupling = trace(net, torch.randn(1, 3, 96, 96))
    batches = (torch.randn(16, 3, 96, 96) for _ in range(images // 16))
    calibrate(net, coupling, batches, evidence=frozenset({"excitation", "contribution"}), device="cpu")
    print(f"peak {peak_mib():.0f} MiB")


def peak_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def startup() -> None:
    """`sepress --help` against importing typer and rich."""
    from sepress.timing import measure_latency

    commands = {
        "typer and rich": [sys.executable, "-c", "import typer, rich, rich.console"],
        "sepress --help": [sys.executable, "-m", "sepress", "--help"],
    }
    figures = measure_latency(
        {
            name: lambda c=command: subprocess.run(c, check=True, capture_output=True)
            for name, command in commands.items()
        },
        rounds=20,
    )
    for name, f in figures.items():
        print(f"{name}: {f.median_ms:.0f} ms, ratio {f.ratio:.2f}")


def nets() -> None:
    """Seven named nets at ratio 0.3, random weights, 224 px: what is kept, errors, relative latency."""
    import tempfile
    from pathlib import Path

    import torch

    import sepress
    from sepress.models import build_net, build_spec
    from sepress.parity import check_onnx_parity
    from sepress.runtime import measure_onnx_latency

    torch.set_num_threads(2)
    print("| net | gates | MACs kept | params kept | masked = removed | ONNX parity | latency, 1 thread |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for reference in SEVEN:
        torch.manual_seed(0)
        net = build_net(build_spec(reference, trained=False))
        images = torch.randn(8, 3, 224, 224)
        settle(net, images)
        result = sepress.prune(net, calibration=images, ratio=0.3)
        base, pruned = result.report.measurements
        with tempfile.TemporaryDirectory() as folder:
            paths = {"base": Path(folder) / "base.onnx", "pruned": Path(folder) / "pruned.onnx"}
            sepress.export_onnx(net, paths["base"], example=images[:1])
            sepress.export_onnx(result.net.eval(), paths["pruned"], example=images[:1])
            parity = check_onnx_parity(result.net, paths["pruned"], images[:4])
            latency = measure_onnx_latency(paths, images[:1])["pruned"]
        print(
            f"| {reference} | {len(sepress.find_gates(net, images[:1]))} | {pruned.macs / base.macs:.2f} "
            f"| {pruned.params / base.params:.2f} "
            f"| {result.report.checks['masked_equals_removed'].relative_error:.0e} "
            f"| {parity.relative_error:.0e} "
            f"| {latency['ratio']:.2f} ({latency['ratio_p10']:.2f} to {latency['ratio_p90']:.2f}) |",
            flush=True,
        )


def precision(nets: Sequence[str]) -> None:
    """fp16 and int8 of named nets, random weights, 224 px, one thread: size, latency, error to float32."""
    import tempfile
    from pathlib import Path

    import torch

    import sepress
    from sepress.models import build_net, build_spec
    from sepress.precision import answering, find_gate_nodes, load_named, measure_ranges, to_fp16, to_int8
    from sepress.runtime import measure_onnx_latency, open_session

    torch.set_num_threads(1)
    print("| net | file | size | latency (95 % interval) | verdict | SQNR, dB |")
    print("|---|---|---:|---:|---|---:|", flush=True)
    for reference in nets:
        torch.manual_seed(0)
        net, images = build_net(build_spec(reference, trained=False)), torch.randn(24, 3, 224, 224)
        settle(net, images[:8])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            names = ("float32", "fp16", "int8", "int8, gates float")
            paths = {name: folder / f"{i}.onnx" for i, name in enumerate(names)}
            float32, fp16, int8, mixed = paths.values()
            sepress.export_onnx(net, float32, example=images[:1])
            to_fp16(float32, fp16, calibration=images[:16])
            ranges = measure_ranges(float32, images[:16], method="minmax")
            to_int8(float32, int8, ranges=ranges)
            gates = find_gate_nodes(load_named(float32)).values()
            to_int8(float32, mixed, ranges=ranges, in_float=[node for gate in gates for node in gate])
            timed = measure_onnx_latency(paths, images[:1])
            outputs = {
                name: answering(open_session(path, providers="cpu", threads=1))(images[16:])[0]
                for name, path in paths.items()
            }
            sizes = {name: path.stat().st_size for name, path in paths.items()}
        for name in names[1:]:
            noise = (outputs[name] - outputs["float32"]).square().mean()
            sqnr = 10 * (outputs["float32"].var(dim=0).mean() / noise).log10()
            f = timed[name]
            print(
                f"| {reference} | {name} | {sizes[name] / sizes['float32']:.2f} | {f['ratio']:.2f} "
                f"({f['ratio_low']:.2f} to {f['ratio_high']:.2f}) | {f['verdict']} | {sqnr:.1f} |",
                flush=True,
            )


def settle(net: torch.nn.Module, images: torch.Tensor) -> None:
    """Give the batch norms of an untrained net the statistics of some images: outputs then vary."""
    import torch

    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        net.train()(images)
    net.eval()


def scale(nets: Sequence[str], images: int) -> None:
    """Time and peak memory of pruning large nets with reconstruction and compensation, a process each."""
    print("| net | phase | seconds | peak so far, MiB | above the traced net, MiB |")
    print("|---|---|---:|---:|---:|", flush=True)
    for reference in nets:
        subprocess.run([sys.executable, __file__, "prune-large", reference, str(images)], check=True)


def prune_large(reference: str, images: int) -> None:
    """A row for each phase: random weights, 224 px, batches of 8, half the channels, one thread."""
    import torch

    from sepress.calibrate import calibrate
    from sepress.coupling import trace
    from sepress.criteria import rank
    from sepress.models import build_net, build_spec
    from sepress.pruning import prune_channels, restore
    from sepress.types import Policy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    started, traced = time.perf_counter(), 0.0

    def row(phase: str) -> None:
        nonlocal started
        seconds, peak = time.perf_counter() - started, peak_mib()
        above = f"{peak - traced:.0f}" if traced else ""
        print(f"| {reference} | {phase} | {seconds:.0f} | {peak:.0f} | {above} |", flush=True)
        started = time.perf_counter()

    batches = torch.randn(images, 3, 224, 224).split(8)
    net = build_net(build_spec(reference, trained=False))
    settle(net, batches[0])
    coupling = trace(net, batches[0][:1])
    row("build and trace")
    traced = peak_mib()
    stats = calibrate(net, coupling, batches, evidence=frozenset({"moments"}), device=device)
    row(f"moments of {images} images")
    ranking = rank(coupling, stats, criterion="reconstruction", net=net)
    row("order of removal")
    surgery = prune_channels(net, coupling, ranking, Policy(ratio=0.5), images=batches[0][:2], moments=stats)
    row("refit, cut and check")
    restore(surgery, net, batches, compensate=True, images=images, device=device)
    row("refit to the base's features")


Scores = Mapping[str, "np.ndarray"]  # of a group's units (U,)


def stability(model: str, data: str, sizes: Sequence[int], seeds: int) -> None:
    """How far rankings agree that disjoint sets of calibration images give, by the size of the sets.

    Each seed has its own part of one stratified order, and a smaller size is the part's beginning: what was
    measured on the one adds up to the other. The largest set is another seed's, so no image is in both.
    """
    import numpy as np
    import torch

    from sepress.bundle import load_bundle
    from sepress.data import DataSpec, open_data

    torch.set_num_threads(1)
    bundle = load_bundle(model)
    spec = bundle.spec
    source = open_data(
        DataSpec(data),
        preprocessing=spec.preprocessing,
        class_names=spec.class_names,
        num_classes=spec.kwargs.get("num_classes"),
    )
    sizes = sorted(n for n in sizes if n * seeds <= source.splits["train"])
    dataset = source.calibration(sizes[-1] * seeds, seed=0)
    found: dict[tuple[str, int, int], Scores] = {}
    for seed in range(seeds):
        own = torch.utils.data.Subset(dataset, range(seed * sizes[-1], (seed + 1) * sizes[-1]))
        found |= {(*key, seed): scores for key, scores in judge_growing(bundle.net, own, sizes).items()}
    print("| criterion | groups | images | rank correlation | in common | with the largest | in common |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    pairs = list(itertools.permutations(range(seeds), 2))
    for criterion in MEASURED:
        for n in sizes:
            between = np.mean(
                [agreement(found[criterion, n, i], found[criterion, n, j]) for i, j in pairs], 0
            )
            largest = [agreement(found[criterion, n, i], found[criterion, sizes[-1], j]) for i, j in pairs]
            figures = (*between, *np.mean(largest, 0))
            row = (criterion, str(len(found[criterion, n, 0])), f"{n:,}", *(f"{x:.3f}" for x in figures))
            print(f"| {' | '.join(row)} |")
    every = [len(s) for s in found[MEASURED[0], sizes[0], 0].values()]
    chance = np.mean([units // 2 / units for units in every])
    print(
        f"\n{seeds} disjoint sets of train images for {spec.reference}; in common: of the half of each "
        f"group's channels that goes ({chance:.3f} by chance). Means over the groups that a criterion judges."
    )


def judge_growing(
    net: torch.nn.Module, images: torch.utils.data.Dataset[Any], sizes: Sequence[int]
) -> dict[tuple[str, int], Scores]:
    """The scores by each criterion from the first n images, one pass for all n: (criterion, n) -> scores.

    Groups that a criterion leaves to the weights' L2 are left out: no image bears on them.
    """
    import numpy as np
    from torch.utils.data import DataLoader, Subset

    from sepress.calibrate import calibrate
    from sepress.coupling import trace
    from sepress.criteria import CRITERIA, rank

    coupling = trace(net, images[0][0][None])
    evidence = frozenset().union(*(CRITERIA[name].needs for name in MEASURED))
    found: dict[tuple[str, int], Scores] = {}
    total = None
    for first, n in itertools.pairwise((0, *sizes)):
        started = time.perf_counter()
        batches = DataLoader(Subset(images, range(first, n)), batch_size=64)
        stats = calibrate(net, coupling, batches, evidence=evidence, device="cpu")
        total = stats if total is None else total + stats
        measured = time.perf_counter()
        for name in MEASURED:
            ranking = rank(coupling, total, criterion=name, net=net)
            found[name, n] = {
                group: np.array(scores)
                for group, scores in ranking.scores.items()
                if not ranking.evidence[group].startswith("L2")
            }
        took = f"{measured - started:.0f} s to measure, {time.perf_counter() - measured:.0f} s to rank"
        print(f"{n} images: {took}", file=sys.stderr)
    return found


def agreement(a: Scores, b: Scores) -> tuple[float, float]:
    """Spearman's correlation, and the share in common of the half that goes; means over groups."""
    import numpy as np
    from scipy.stats import spearmanr

    def half(scores: np.ndarray) -> np.ndarray:
        return scores.argsort(kind="stable")[: len(scores) // 2]

    rho = [spearmanr(a[group], b[group]).statistic for group in a]
    common = [len(np.intersect1d(half(a[group]), half(b[group]))) / (len(a[group]) // 2) for group in a]
    return float(np.mean(rho)), float(np.mean(common))


def eca(epochs: int = 8, tuned: int = 2) -> None:
    """ECA's channels left as neighbours: accuracy of a small ECA-ResNet on digits, with the flag and without.

    Masked: the base with the removed channels zero; removed: without them, nothing else changed, so that the
    two differ by ECA's neighbours alone. Pruned: refitted and recalibrated, as `sepress.prune` leaves it.
    """
    import copy

    import torch
    from timm.layers import EcaModule

    import sepress
    from sepress.coupling import apply_removal, trace
    from sepress.data import DataSpec, open_data
    from sepress.gates import masking
    from sepress.models import build_net, build_spec
    from sepress.train import TrainConfig, evaluate, train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    spec = build_spec("sepress:se_resnet8", trained=False, kwargs={"in_chans": 1, "num_classes": 10})
    net = build_net(spec)
    for stage in net.stages:  # type: ignore[union-attr]
        for block in stage:  # type: ignore[union-attr]
            block.se = EcaModule(block.conv2.out_channels)
    source = open_data(DataSpec("digits"), preprocessing=spec.preprocessing)

    def right(net: torch.nn.Module) -> float:
        return 100 * (evaluate(net, source, split="test", device=cpu).top1 or 0)

    train(net, source, config=TrainConfig(epochs=epochs), device=cpu)
    print(f"base: {right(net):.1f} % of {source.splits['test']} test images")
    images = torch.stack([image for image, _ in source.calibration(512, seed=0)])
    print("| asked | flag | MACs kept | masked | removed | pruned | tuned |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for target, value in (("ratio", 0.3), ("ratio", 0.5), ("target_macs", 0.5)):
        for flag in (False, True):
            asked: dict[str, Any] = {target: value}
            result = sepress.prune(net, calibration=images, eca_neighbours=flag, round_to=4, **asked)
            plan, coupling = result.plan, trace(net.eval(), images[:1], eca_neighbours=flag)
            with masking(net, coupling, plan.removed):
                masked = right(net)
            removed = copy.deepcopy(net)
            apply_removal(removed, coupling, plan.removed)
            figures = [masked, right(removed), right(result.net)]
            train(result.net, source, config=TrainConfig(epochs=tuned, lr=0.01), device=cpu, teacher=net)
            row = " | ".join(f"{figure:.1f}" for figure in (*figures, right(result.net)))
            kept = plan.macs_after / plan.macs_before
            print(f"| {target} {value} | {'on' if flag else 'off'} | {kept:.2f} | {row} |", flush=True)


def peers(nets: Sequence[str], seconds: int) -> None:
    """torch-pruning's groups beside ours, and what pruning at 0.3 comes to: tests/results/peers/groups.md."""
    import peers as p  # tests/peers.py

    lines = [
        "| net | channels in the same groups | in others, and what torch-pruning's cut does | "
        "0.3 by torch-pruning | clean | 0.3 by sepress | clean |",
        "|---|---:|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for reference in nets or p.NETS:
        graph = p.in_child(p.peer_finishes, reference, seconds=seconds)
        compared = p.in_child(p.compare_named, reference, seconds=4 * seconds) if graph is True else graph
        if graph is not True:
            cells = [reference, "no graph", str(graph)]
        elif isinstance(compared, str):
            cells = [reference, "not compared", compared]
        else:
            cells = [reference, *told(compared)]
        for prune in (p.prune_by_peer, p.prune_by_us):
            pruned = p.in_child(prune, reference, seconds=seconds)
            done = (
                (pruned, "no")
                if isinstance(pruned, str)
                else (pruned.outcome, "yes" if pruned.clean else "no")
            )
            cells += done
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_result("peers/groups.md", lines)


def told(comparison: Comparison) -> tuple[str, str]:
    import peers as p

    counts = p.summary(comparison)
    same = counts.pop("same")
    return f"{same:,}", "; ".join(f"{n:,} {verdict}" for verdict, n in counts.items()) or "none"


def graph(nets: Sequence[str], size: int, rounds: int) -> None:
    """Seconds and memory of graph and all groups, ours over torch-pruning's: tests/results/peers/graph.md."""
    import statistics

    import peers as p
    import torch

    torch.set_num_threads(1)
    lines = [
        f"| net, {size} px | sepress, ms | torch-pruning, ms | ratio (95 % interval) | sepress, MiB "
        "| torch-pruning, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    print(*lines, sep="\n")
    times, ratios = [], []
    for reference in nets or p.TIMED:
        memory = {name: p.in_child(p.graph_memory, reference, size, name, seconds=300) for name in p.GRAPHS}
        figures = p.in_child(p.time_graphs, reference, size, rounds, seconds=600)
        peer, ours = figures["torch-pruning"], figures["sepress"]
        times.append(ours.median_ms)
        ratios.append(ours.ratio)
        lines.append(
            f"| {reference} | {ours.median_ms:.0f} | {peer.median_ms:.0f} "
            f"| {ours.ratio:.2f} ({ours.ratio_low:.2f} to {ours.ratio_high:.2f}) "
            f"| {memory['sepress']:.0f} | {memory['torch-pruning']:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"Median {statistics.median(times):.0f} ms, median ratio {statistics.median(ratios):.2f}."]
    print(*lines[-2:], sep="\n")
    write_result("peers/graph.md", lines)


def whole(nets: Sequence[str]) -> None:
    """CPU seconds and memory of trace, plan, surgery, check of large nets: tests/results/peers/whole.md."""
    import peers as p

    lines = [
        "| net | trace, s | trace, MiB | plan, surgery and check, s | MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    print(*lines, sep="\n")
    for each in nets:
        reference, _, size = each.partition("@")
        found = p.in_child(p.whole, reference, int(size), seconds=600)
        cells = [found] if isinstance(found, str) else [f"{value:.1f}" for value in found.values()]
        lines.append(f"| {each} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_result("peers/whole.md", lines)


def write_result(name: str, lines: Sequence[str]) -> None:
    """Write a table and the versions it holds for."""
    from importlib.metadata import version
    from pathlib import Path

    from sepress.files import write_text
    from sepress.measure import cpu_model

    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "timm", "torch-pruning"))
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join([*lines, "", f"{versions}; {cpu_model()}, one thread."]) + "\n")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for plain in (taps, memory, startup, nets, eca):
        commands.add_parser(plain.__name__, help=plain.__doc__).set_defaults(run=plain)
    one = commands.add_parser("calibrate", help="the process that `memory` starts")
    one.add_argument("images", type=int)
    one.set_defaults(run=calibrate_some)
    one = commands.add_parser("scale", help=scale.__doc__)
    one.add_argument("nets", nargs="*", default=LARGE)
    one.add_argument("--images", type=int, default=64)
    one.set_defaults(run=scale)
    one = commands.add_parser("peers", help=peers.__doc__)
    one.add_argument("nets", nargs="*", help="of tests/peers.py where left out")
    one.add_argument(
        "--seconds", type=int, default=60, help="of CPU for its graph; a comparison gets four times as many"
    )
    one.set_defaults(run=peers)
    one = commands.add_parser("graph", help=graph.__doc__)
    one.add_argument("nets", nargs="*", help="twenty of tests/peers.py where left out")
    one.add_argument("--size", type=int, default=224)
    one.add_argument("--rounds", type=int, default=20)
    one.set_defaults(run=graph)
    one = commands.add_parser("whole", help=whole.__doc__)
    one.add_argument(
        "nets", nargs="*", default=WHOLE, help="architectures and sizes, such as timm:resnet50@224"
    )
    one.set_defaults(run=whole)
    one = commands.add_parser("precision", help=precision.__doc__)
    one.add_argument("nets", nargs="*", default=SEVEN[:5])
    one.set_defaults(run=precision)
    one = commands.add_parser("prune-large", help="the process that `scale` starts")
    one.add_argument("reference")
    one.add_argument("images", type=int)
    one.set_defaults(run=prune_large)
    one = commands.add_parser("stability", help="agreement of rankings by the number of calibration images")
    one.add_argument("model")
    one.add_argument("--data", required=True)
    one.add_argument("--sizes", type=numbers, default=SIZES)
    one.add_argument("--seeds", type=int, default=2, help="disjoint sets of each size, at least 2")
    one.set_defaults(run=stability)
    chosen = vars(parser.parse_args())
    del chosen["what"]
    chosen.pop("run")(**chosen)
