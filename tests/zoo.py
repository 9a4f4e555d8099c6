"""The architectures that must work, their results, and the table of both.

    python tests/zoo.py run --section se --part 1/2   # what is not known yet; after a stop, it goes on
    python tests/zoo.py run --only 'timm:regnet*' --force
    python tests/zoo.py table                         # tests/results/zoo/, of what is known
    python tests/zoo.py list                          # zoo.tsv again, from what is installed

`pytest -m zoo` does the same, one test an architecture. Results are kept by the digest of sepress's code and
of the checks', and by the versions of torch, torchvision, timm and ONNX Runtime: a change of any starts anew.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import timm
import torch
import torchvision
from torch import nn
from zoo_checks import Architecture, Result, build, examine

from sepress.export import Exporter
from sepress.files import write_text
from sepress.inspection import ChannelShares
from sepress.types import Role

HERE = Path(__file__).parent
LIST, TABLES = HERE / "zoo.tsv", HERE / "results" / "zoo"
SECTIONS = ("se", "gates", "hybrid", "plain")
MOST_PARAMS = 120_000_000
EXPORTER: Exporter = "torchscript"  # a fourth of the default's time
SIZES = (96, 128, 160, 192, 224, 256, 288, 320, 384)  # pixels a side; a net's own beside them
# What makes a net one of a section: the class of a module of it, or its name.
SE = {"SEModule", "SqueezeExcite", "EffectiveSEModule", "EseModule", "SqueezeExcitation"}
OTHER_GATES = {
    "EcaModule",
    "CecaModule",
    "GlobalContext",
    "GatherExcite",
    "CbamModule",
    "SelectiveKernel",
    "SplitAttn",
}
HYBRID = re.compile(r"timm:(maxx?vit|coatnet|coatnext|halonet|botnet|sebotnet|gcvit|efficientvit|mobilevit)")


def references(source: str, names: str) -> set[str]:
    return {f"{source}:{name}" for name in names.split()}


PLAIN = references(
    "timm",
    """resnet18 resnet50d resnetv2_50 wide_resnet50_2 nf_resnet50 res2net50_14w_8s dpn48b regnetx_002
    convnext_atto densenet121 mobilenetv2_050 mobilenetv4_conv_small dla34 hrnet_w18_small
    cspdarknet53 inception_v3 xception41 repvgg_a0 mobileone_s0""",
) | references("torchvision", "shufflenet_v2_x0_5 squeezenet1_1 googlenet mnasnet0_5 convnext_tiny")


# ---- the list -------------------------------------------------------------------------------------
@cache
def architectures() -> tuple[Architecture, ...]:
    """The rows of zoo.tsv."""
    with LIST.open(encoding="utf-8", newline="") as file:
        return tuple(
            Architecture(
                reference=row["reference"],
                section=row["section"],
                params=int(row["params"]),
                size=int(row["size"]),
                other=int(row["other"]) if row["other"] else None,
            )
            for row in csv.DictReader(file, delimiter="\t")
        )


def architecture(reference: str) -> Architecture:
    """The row of one architecture; KeyError where there is none."""
    return {of.reference: of for of in architectures()}[reference]


def find() -> Iterator[tuple[str, str, int]]:
    """(reference, section, parameters) of all that is installed and belongs here."""
    names = [f"timm:{name}" for name in timm.list_models()]
    for module in (torchvision.models, torchvision.models.segmentation, torchvision.models.detection):
        names += [f"torchvision:{name}" for name in torchvision.models.list_models(module=module)]
    for reference in names:
        net = build_outline(reference)
        section, params = _section(reference, net), sum(p.numel() for p in net.parameters())
        if section is not None and params <= MOST_PARAMS:
            yield reference, section, params


def build_outline(reference: str) -> nn.Module:
    """Build an architecture on the meta device; torchvision's RegNets read values first, and move there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build(reference)
        except (RuntimeError, NotImplementedError):
            return build(reference).to("meta")


def _section(reference: str, net: nn.Module) -> str | None:
    classes = {type(module).__name__ for module in net.modules()}
    if classes & SE:
        return "se"
    if classes & OTHER_GATES:
        return "gates"
    if HYBRID.match(reference):
        return "hybrid"
    return "plain" if reference in PLAIN else None


def input_sizes(reference: str) -> tuple[int, int | None]:
    """The smallest of SIZES, or the net's own, that an architecture takes, and the next one."""
    net = build_outline(reference)
    with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
        warnings.simplefilter("ignore")
        config = getattr(net, "pretrained_cfg", {})
        own = config.get("input_size", (3, 224, 224))[-1]
        if "_320" in reference or "320_" in reference:  # torchvision's detectors; they run on values only
            own = 320
        taken = []
        for size in (own,) if config.get("fixed_input_size") else sorted({*SIZES, own}):
            try:
                net(torch.empty(2, 3, size, size))
            except (RuntimeError, AssertionError, NotImplementedError, ValueError):
                continue
            taken.append(size)
            if len(taken) == 2:
                break
    return (taken or [own])[0], taken[1] if len(taken) > 1 else None


def write_list() -> None:
    """Write zoo.tsv again: sections in order, in each from few parameters to many."""
    rows = sorted(find(), key=lambda row: (SECTIONS.index(row[1]), row[2], row[0]))
    lines = ["reference\tsection\tparams\tsize\tother"]
    for reference, section, params in rows:
        size, other = input_sizes(reference)
        lines.append(f"{reference}\t{section}\t{params}\t{size}\t{other or ''}")
    write_text(LIST, "\n".join(lines) + "\n")
    print(f"{len(rows)} architectures")


# ---- results --------------------------------------------------------------------------------------
def versions() -> dict[str, str]:
    """What results depend on beside this repository."""
    found = {name: version(name) for name in ("torch", "torchvision", "timm")}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found["onnxruntime"] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def results_file() -> Path:
    """Where results of this very code and these versions are kept: SEPRESS_ZOO, or .pytest_cache/zoo/."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for file in (*sorted((HERE.parent / "sepress").rglob("*.py")), HERE / "zoo_checks.py", LIST):
        digest.update(file.read_bytes())
    folder = Path(os.environ.get("SEPRESS_ZOO", HERE.parent / ".pytest_cache" / "zoo"))
    return folder / f"{digest.hexdigest()[:16]}.jsonl"


def known() -> dict[str, Result]:
    """The results that are kept, by reference; of several of one the last."""
    if not results_file().exists():
        return {}
    lines = results_file().read_text(encoding="utf-8").splitlines()
    return {result.reference: result for result in map(Result.from_json, map(json.loads, lines))}


def result_of(of: Architecture, *, force: bool = False) -> Result:
    """What is known of an architecture, or else what examining it finds, which is kept."""
    if not force and of.reference in (found := known()):
        return found[of.reference]
    with tempfile.TemporaryDirectory() as folder:
        result = examine(of, Path(folder), exporter=EXPORTER)
    results_file().parent.mkdir(parents=True, exist_ok=True)
    with results_file().open(
        "a", encoding="utf-8"
    ) as file:  # one write: several processes may share the file
        file.write(json.dumps(result.to_json()) + "\n")
    return result


def line(result: Result) -> str:
    """One line for a person."""
    verdict = "; ".join(f"{check}: {why}" for check, why in result.failures.items()) or "ok"
    free = "-" if result.free is None else f"{result.free:.1%}"
    return (
        f"{result.reference}  {result.gates} gates  free {free}  {_figure(result.seconds)} s  "
        f"{_figure(result.memory_mb)} MB  ({_figure(result.wall)} s in all)  {verdict}"
    )


# ---- the table ------------------------------------------------------------------------------------
CHECKS = (  # as the table calls them, and the checks of zoo_checks that each stands for
    ("traced", ("process", "built", "traced", "ranked")),
    ("masked = removed", ("pruned_by_ratio", "pruned_by_macs")),
    ("counts", ("counted", "rounded")),
    ("limits", ("in_limits",)),
    ("free", ("free_enough",)),
    ("runs", ("in_batches", "at_another_size")),
    ("trains", ("trained",)),
    ("saved", ("saved",)),
    ("again", ("pruned_again",)),
    ("ONNX", ("exported",)),
)
ROLES: tuple[Role, ...] = ("gated", "ungated", "se_hidden", "frozen")
WORKING = ("traced", "masked = removed", "counts", "limits", "runs", "trains", "saved", "again")


def verdicts(result: Result) -> dict[str, str]:
    """yes, no, or - (not reached), by what the table calls a check."""
    found = {}
    for name, checks in CHECKS:
        if any(check in result.failures for check in checks):
            found[name] = "no"
        else:
            found[name] = (
                "yes" if all(check in result.figures for check in checks if check != "process") else "-"
            )
    return found


def row(result: Result) -> dict[str, str]:
    """An architecture's row of the table."""
    counted = ChannelShares(**result.channels) if result.channels else None
    shares = {role: "" if counted is None else f"{counted.share(role):.3f}" for role in ROLES}
    kept = {
        f"{what} at {plan}": f"{of[plan]:.3f}" if plan in of else ""
        for plan in ("ratio 0.3", "MACs 0.5")
        for what, of in (("MACs", result.macs), ("params", result.params))
    }
    errors = [result.figures.get(name) for name in ("pruned_by_ratio", "pruned_by_macs", "pruned_again")]
    worst = max((error for error in errors if error is not None), default=None)
    onnx = result.figures.get("exported")
    return {
        "architecture": result.reference,
        "section": result.section,
        "gates": f"{result.gates}",
        "kinds": ", ".join(result.kinds),
        **shares,
        **kept,
        **verdicts(result),
        "masked error": "" if worst is None else f"{worst:.1e}",
        "ONNX error": "" if onnx is None else f"{onnx:.1e}",
        "seconds": _figure(result.seconds),
        "MB": _figure(result.memory_mb),
        "frozen because": "; ".join(f"{n} {why}" for why, n in result.frozen.items()),
        "failures": "; ".join(f"{check}: {why}" for check, why in result.failures.items()),
        "notes": "; ".join(result.notes),
    }


def totals(results: Sequence[Result]) -> list[str]:
    """What the table amounts to, a sentence a figure."""
    marks = [verdicts(result) for result in results]
    held = {
        "Working": sum(all(found[name] == "yes" for name in WORKING) for found in marks),
        "equal to masking": sum(found["masked = removed"] == found["again"] == "yes" for found in marks),
        "ONNX-exact": sum(found["ONNX"] == "yes" for found in marks),
    }
    lines = ["; ".join(f"{name}: {count} of {len(results)}" for name, count in held.items()) + "."]
    free = [(result.free, result.reference) for result in results if result.free is not None]
    timed = [(result.seconds, result.reference) for result in results if result.seconds is not None]
    heavy = [(result.memory_mb, result.reference) for result in results if result.memory_mb is not None]
    if free:
        (least, where), mean = min(free), fmean(share for share, _ in free)
        lines.append(f"Free output channels: {mean:.2%} on average, least {least:.1%} ({where}).")
    if timed:
        (slowest, where), mean = max(timed), fmean(seconds for seconds, _ in timed)
        lines.append(f"Slowest: {slowest:.1f} s ({where}), on average {mean:.1f} s.")
    if heavy:
        largest, where = max(heavy)
        lines.append(f"Largest extra memory: {largest:.0f} MB ({where}).")
    return lines


def write_tables(results: Iterable[Result]) -> None:
    """Write zoo.tsv (every column) and zoo.md (totals, and a row an architecture) from what is given."""
    order = {of.reference: number for number, of in enumerate(architectures())}
    results = sorted((r for r in results if r.reference in order), key=lambda r: order[r.reference])
    rows = [row(result) for result in results]
    header = list(rows[0])
    text = "\n".join("\t".join(cells) for cells in [header, *(list(row.values()) for row in rows)])
    write_text(TABLES / "zoo.tsv", text + "\n")
    write_text(TABLES / "zoo.md", _markdown(results))


def _markdown(results: Sequence[Result]) -> str:
    said = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [
        "# Every architecture",
        f"{date.today():%Y-%m-%d}; {said}; one core an architecture, random weights, noise for images. "
        f"{len(results)} of {len(architectures())} architectures; `pytest -m zoo` makes this table.",
        "Each is pruned twice (30 % of the channels; half the MACs), compared with its masked self, counted, "
        "run with 1 and 3 images and at another size, trained by a step, saved and loaded, pruned again, "
        f"exported ({EXPORTER}, or where a note says so the default exporter). Shares are of output "
        "channels of convolutions and linear layers, network outputs apart; seconds and MB of trace, plan, "
        "surgery and verification.",
    ]
    for section in SECTIONS:
        chosen = [result for result in results if result.section == section]
        if chosen:
            title = {
                "se": "SE and ESE gates",
                "gates": "Other gates",
                "hybrid": "Convolution and attention, no SE",
            }
            parts += [f"## {title.get(section, 'No gates')}", *totals(chosen), _rows(chosen)]
    return "\n\n".join(parts) + "\n"


def _rows(results: Sequence[Result]) -> str:
    shown = (
        "gates",
        "gated",
        "ungated",
        "se_hidden",
        "frozen",
        "MACs at ratio 0.3",
        "params at ratio 0.3",
        "MACs at MACs 0.5",
    )
    header = ["architecture", *shown, "checks", "seconds", "MB"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        cells, found = row(result), verdicts(result)
        bad = [name for name, verdict in found.items() if verdict != "yes"]
        checks = "all" if not bad else "all but " + ", ".join(bad)
        lines.append(
            "| "
            + " | ".join(
                [result.reference, *(cells[name] for name in shown), checks, cells["seconds"], cells["MB"]]
            )
            + " |"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


# ---- the command line -----------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="examine what is not known yet, a line each")
    run.add_argument("--section", choices=SECTIONS)
    run.add_argument("--only", metavar="PATTERN", default="*", help="of references, such as 'timm:regnet*'")
    run.add_argument("--part", metavar="I/N", default="1/1", help="every N-th, from the I-th: share the work")
    run.add_argument("--force", action="store_true", help="examine again what is known")
    verbs.add_parser("table", help="write the tables of what is known")
    verbs.add_parser("list", help="write zoo.tsv again")
    given = parser.parse_args(arguments)
    if given.verb == "list":
        write_list()
        return 0
    if given.verb == "table":
        if not known():
            print("nothing is known yet of this code: run first", file=sys.stderr)
            return 2
        write_tables(known().values())
        print("\n".join(totals(list(known().values()))))
        return 0
    first, parts = map(int, given.part.split("/"))
    chosen = [
        of
        for of in architectures()
        if fnmatchcase(of.reference, given.only) and given.section in (None, of.section)
    ][first - 1 :: parts]
    failed = 0
    for number, of in enumerate(chosen, start=1):
        result = result_of(of, force=given.force)
        failed += bool(result.failures)
        print(f"{number}/{len(chosen)}  {line(result)}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} pass everything")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
