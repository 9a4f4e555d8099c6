"""One architecture -> everything that must hold of it: traced, pruned, checked, trained, saved, exported.

`examine` runs in a process of its own, so that a crash, a hang or a leak is that architecture's result and
nobody else's. Weights are random and inputs are noise: what is checked is structure, not accuracy.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

import sepress
from sepress.coupling import NETWORK_OUTPUT, Coupling, trace
from sepress.criteria import rank
from sepress.errors import SepressError
from sepress.export import Exporter, export_onnx
from sepress.inspection import ChannelShares, channel_shares
from sepress.measure import count_macs, count_params
from sepress.modes import evaluating
from sepress.parity import check_onnx_parity, compare_outputs
from sepress.pruning import Surgery, prune_channels, rank_channels
from sepress.types import Policy, PruningPlan, Ranking

LIMIT_SECONDS = 60.0  # of trace + plan + surgery + verification, on one core
LIMIT_MB = 4096.0  # of memory beyond the net itself, while that runs
LEAST_FREE = 0.9  # of the output channels of a net with SE gates
PROCESS_SECONDS = 600.0  # of everything together; whatever is slower hangs, for all that anyone can tell
DETECTORS = (GeneralizedRCNN, SSD)  # of torchvision: in training they ask for boxes
IMAGES = 4  # noise: ranked by all, trained on all, verified on two
ROUND_TO = Policy.round_to


@dataclass(frozen=True)
class Architecture:
    """A row of zoo.tsv."""

    reference: str  # timm:NAME or torchvision:NAME
    section: str  # se, gates, hybrid or plain
    params: int
    size: int  # pixels a side: the smallest of a few that it takes
    other: int | None  # the next one; None where it takes no other


@dataclass(frozen=True)
class Result:
    """What `examine` found.

    Channels are output channels of convolutions and linear layers, each layer's counted, but for depthwise
    ones, which pass channels on (`sepress.inspection.ChannelShares`). Those that the net returns, such as
    class logits, have to stay and are counted as `outputs`; shares are of all others, and the free share is
    what is not frozen of these.
    """

    reference: str
    section: str
    failures: dict[str, str]  # check -> why; empty: everything holds
    gates: int = 0
    kinds: tuple[str, ...] = ()  # of gates, with what squashes them
    channels: dict[str, int] = field(default_factory=dict)  # gated, ungated, se_hidden, frozen, outputs
    frozen: dict[str, int] = field(default_factory=dict)  # why -> channels, network outputs apart
    macs: dict[str, float] = field(default_factory=dict)  # plan -> share kept
    params: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float | None] = field(
        default_factory=dict
    )  # check -> relative error, where it has one
    notes: tuple[str, ...] = ()
    seconds: float | None = None  # of one core: trace + plan, surgery and check, of the slower plan
    memory_mb: float | None = None  # peak of that beyond what the process held before the trace
    wall: float | None = None  # seconds that everything together took

    @property
    def free(self) -> float | None:
        """The share of output channels that can go; None for a net whose channels were not counted."""
        return ChannelShares(**self.channels).free if self.channels else None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        return cls(**value | {"kinds": tuple(value["kinds"]), "notes": tuple(value["notes"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(architecture: Architecture, folder: Path, *, exporter: Exporter | None = "dynamo") -> Result:
    """Run every check on one architecture in a process of its own; what goes wrong is in the result.

    Without an exporter it is every check but ONNX. Files go to `folder`. The process is forked from a server
    that has imported everything already, and is ended where it takes longer than PROCESS_SECONDS.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo_checks"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine_and_send, args=(sender, architecture, folder, exporter))
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        if receiver.poll(PROCESS_SECONDS):
            return replace(receiver.recv(), wall=round(time.monotonic() - start, 1))
        why = f"not done after {PROCESS_SECONDS:.0f} s"
    except EOFError:
        process.join()
        why = f"the process died (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()
    return Result(architecture.reference, architecture.section, {"process": why})


def _examine_and_send(
    sender: Any, architecture: Architecture, folder: Path, exporter: Exporter | None
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with (folder / "output.txt").open("w") as file:  # libraries talk on the level of file descriptors
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sender.send(Examination(architecture, folder, exporter).run())


# ---- nets -----------------------------------------------------------------------------------------
def build(reference: str, **kwargs: Any) -> nn.Module:
    """Build an architecture with random weights, in eval mode; torchvision's detectors and segmenters too."""
    source, name = reference.split(":")
    if source == "timm":
        return timm.create_model(name, **kwargs).eval()
    if not _registered(reference):  # a detector or a segmenter
        kwargs["weights_backbone"] = None
        if "rcnn" in name:
            kwargs["box_score_thresh"] = 0.0  # random weights are sure of nothing: they would find no box
    return torchvision.models.get_model(name, weights=None, **kwargs).eval()


def make_lively(net: nn.Module, images: Tensor) -> None:
    """Make every channel count, and differ from its neighbours, as training would; in place.

    Constructors fill norms, biases and gains with one value, often zero, behind which a channel could be
    exchanged for another unseen. Batch norms get the statistics of the images.
    """
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                parameter += torch.empty_like(parameter).uniform_(-0.25, 0.25)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        training_loss(net.train(), images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    net.eval()


def training_loss(net: nn.Module, images: Tensor) -> Tensor:
    """Some loss that depends on every output in train mode."""
    if isinstance(net, DETECTORS):
        box = torch.tensor([[8.0, 8.0, images.shape[-1] / 2, images.shape[-2] / 2]])
        losses: dict[str, Tensor] = net(
            list(images), [{"boxes": box, "labels": torch.tensor([1])} for _ in images]
        )
        return torch.stack(list(losses.values())).sum()
    outputs = [x for x in tree_leaves(net(images)) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.stack(
        [(x - torch.linspace(-1, 1, x.numel()).view(x.shape)).square().mean() for x in outputs]
    ).sum()


def per_image(output: Any, images: int) -> list[list[Tensor]]:
    """The tensors of an output by image: those of a detector's list of dicts, or rows of batched tensors."""
    if isinstance(output, list) and len(output) == images and isinstance(output[0], dict):
        return [list(found.values()) for found in output]
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return [[x[i] for x in leaves] for i in range(images)]


# ---- checks ---------------------------------------------------------------------------------------
class Examination:
    """The checks of one architecture, in order, and what the later ones need of the earlier."""

    net: nn.Module
    images: Tensor
    coupling: Coupling
    ranking: Ranking
    cut: Surgery
    loaded: nn.Module

    def __init__(self, architecture: Architecture, folder: Path, exporter: Exporter | None) -> None:
        self.of, self.folder, self.exporter = architecture, folder, exporter
        self.result = Result(architecture.reference, architecture.section, {})
        self.times: dict[str, float] = {}

    def run(self) -> Result:
        """Run all checks; those that build on one that failed are failures too, and say so."""
        torch.manual_seed(0)
        needed = [self.built, self.traced, self.ranked, self.pruned_by_ratio]
        for check in needed:
            if not self._holds(check):
                return self.result
        for check in (
            self.pruned_by_macs,
            self.counted,
            self.rounded,
            self.in_limits,
            self.free_enough,
            self.in_batches,
            self.at_another_size,
            self.trained,
        ):
            self._holds(check)
        if self._holds(self.saved):
            self._holds(self.pruned_again)
        if self.exporter is not None:
            self._holds(self.exported)
        return self.result

    def _holds(self, check: Callable[[], float | None]) -> bool:
        name = check.__name__
        try:
            figure = check()
        except Exception as error:  # noqa: BLE001 - whatever a net does is its result
            why = str(error).strip().split("\n")[0][:300]
            self._note(failures={**self.result.failures, name: f"{type(error).__name__}: {why}"})
            return False
        self._note(figures={**self.result.figures, name: figure})
        return True

    def _note(self, **facts: Any) -> None:
        self.result = replace(self.result, **facts)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Note the processor's seconds: one thread's work, whatever else runs beside it."""
        start = time.process_time()
        yield
        self.times[name] = time.process_time() - start

    def built(self) -> None:
        self.net = build(self.of.reference)
        self.images = torch.randn(IMAGES, 3, self.of.size, self.of.size)
        make_lively(self.net, self.images)

    def traced(self) -> None:
        self.memory = _Memory()
        with self._timed("trace"):
            self.coupling = trace(self.net, self.images[:1])
        gates = self.coupling.gates
        kinds = Counter(f"{gate.kind} {gate.activation}" for gate in gates)
        self._note(gates=len(gates), kinds=tuple(sorted(kinds)))
        self._note(channels=asdict(channel_shares(self.coupling)), frozen=frozen_by_reason(self.coupling))
        if self.of.section in ("se", "gates"):
            assert gates, "no gate was found"
        elsewhere = [gate.name for gate in gates if not gate.group or (gate.units < 0).all()]
        assert not elsewhere, f"gates of no group: {', '.join(elsewhere[:3])}"

    def ranked(self) -> None:
        """Contribution: every gate and every reader is tapped while the net runs.

        A detector prepares its images one by one, so that its calls follow the trace for one image only.
        """
        self.ranking, _ = rank_channels(
            self.net,
            self.coupling,
            list(self.images.split(1 if isinstance(self.net, DETECTORS) else IMAGES)),
            criterion="contribution",
            compensate=False,
            device=torch.device("cpu"),
        )

    def pruned_by_ratio(self) -> float | None:
        self.cut = self._pruned("ratio 0.3", Policy(ratio=0.3))
        return self.cut.check.relative_error

    def pruned_by_macs(self) -> float | None:
        surgery = self._pruned("MACs 0.5", Policy(target_macs=0.5))
        kept = surgery.plan.macs_after / surgery.plan.macs_before
        assert kept <= 0.5, f"{kept:.3f} of the MACs are left"
        return surgery.check.relative_error

    def _pruned(self, name: str, policy: Policy) -> Surgery:
        with self._timed(name):
            surgery = prune_channels(self.net, self.coupling, self.ranking, policy, images=self.images[:2])
        assert_as_planned(surgery, self.coupling)
        plan = surgery.plan
        self._note(
            macs={**self.result.macs, name: plan.macs_after / plan.macs_before},
            params={**self.result.params, name: plan.params_after / plan.params_before},
        )
        return surgery

    def counted(self) -> None:
        """Torch's own counter, run on the nets before and after, gives what the plan says."""
        plan, example = self.cut.plan, self.images[:1]
        planned = (plan.macs_before, plan.params_before, plan.macs_after, plan.params_after)
        nets = (self.net, self.cut.net)
        measured = tuple(n for net in nets for n in (count_macs(net, example), count_params(net)))
        assert measured == planned, f"MACs and parameters are {measured}, planned {planned}"

    def rounded(self) -> None:
        odd = odd_widths(self.coupling, self.cut.plan)
        assert not odd, f"not a multiple of {ROUND_TO}: {odd[0]}"

    def in_limits(self) -> None:
        slower = max(time for name, time in self.times.items() if name != "trace")
        seconds, memory = self.times["trace"] + slower, self.memory.peak_mb()
        self._note(seconds=round(seconds, 2), memory_mb=None if memory is None else round(memory))
        assert seconds <= LIMIT_SECONDS, f"{seconds:.0f} s, over {LIMIT_SECONDS:.0f}"
        assert memory is None or memory <= LIMIT_MB, f"{memory:.0f} MB, over {LIMIT_MB:.0f}"

    def free_enough(self) -> None:
        free = self.result.free
        if self.of.section == "se":
            assert free is not None
            assert free >= LEAST_FREE, f"{free:.1%} of the output channels can go, under {LEAST_FREE:.0%}"

    def in_batches(self) -> float:
        """Three images in a batch give what each gives alone; in float64, where rounding can't matter."""
        net, images = _double(self.cut.net), self.images[:3].double()
        with evaluating(net):
            alone = [per_image(net(images[i : i + 1]), 1)[0] for i in range(3)]
            together = per_image(net(images), 3)
        return _worst_difference(alone, together)

    def at_another_size(self) -> None:
        if self.of.other is None:
            self._note(notes=(*self.result.notes, "takes one input size"))
            return
        images = torch.randn(2, 3, self.of.other, self.of.other)
        with evaluating(self.net), evaluating(self.cut.net):
            before, after = (per_image(net(images), 2) for net in (self.net, self.cut.net))
        assert [[x.dim() for x in row] for row in before] == [[x.dim() for x in row] for row in after]
        assert all(bool(x.isfinite().all()) for row in after for x in row), "outputs are not finite"

    def trained(self) -> None:
        """A step: finite gradients, on every parameter of which the base has one, and a finite loss again."""
        missing = _step(self.cut.net, self.images)
        if missing and (more := missing - _step(self.net, self.images)):
            raise AssertionError(f"no gradient for {min(more)}, which has one in the base")

    def saved(self) -> None:
        path, reference = self.folder / "pruned.safetensors", self.of.reference
        arch = reference if _registered(reference) else lambda **kwargs: build(reference, **kwargs)
        sepress.save(self.cut.net, path, arch=arch, trained=False, overwrite=True)
        self.loaded = sepress.load(path, arch=arch).net
        with evaluating(self.loaded), evaluating(self.cut.net):
            ours, theirs = (per_image(net(self.images[:2]), 2) for net in (self.cut.net, self.loaded))
        same = all(
            torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert same, "the loaded net gives other outputs"

    def pruned_again(self) -> float | None:
        """The net from the file: traced anew, 30 % of what is left removed, checked against itself."""
        coupling = trace(self.loaded, self.images[:1])
        assert len(coupling.gates) == len(self.coupling.gates), f"{len(coupling.gates)} gates are left"
        ranking = rank(coupling, None, criterion="random", net=self.loaded)
        surgery = prune_channels(self.loaded, coupling, ranking, Policy(ratio=0.3), images=self.images[:2])
        assert_as_planned(surgery, coupling)
        return surgery.check.relative_error

    def exported(self) -> float | None:
        """The file takes any batch; one image where a forward fixes it or, as detectors, gives a list."""
        path, fixed = self.folder / "pruned.onnx", isinstance(self.net, DETECTORS)
        try:
            self._export(path, batch=1 if fixed else None)
        except SepressError as error:
            if fixed or "batch" not in str(error):
                raise
            fixed = True
            self._export(path, batch=1)
        if fixed:
            self._note(notes=(*self.result.notes, "ONNX of one image at a time"))
        check = check_onnx_parity(self.cut.net, path, self.images)
        assert check.passed, f"{check.reason}"
        return check.relative_error

    def _export(self, path: Path, *, batch: int | None) -> None:
        """By the exporter asked for; the default one takes what that can't."""
        assert self.exporter is not None
        net, example = self.cut.net, self.images[:1]
        try:
            export_onnx(net, path, example=example, exporter=self.exporter, batch=batch)
        except SepressError:
            if self.exporter == "dynamo":
                raise
            export_onnx(net, path, example=example, exporter="dynamo", batch=batch)
            self._note(notes=(*self.result.notes, "ONNX by the default exporter"))


def assert_as_planned(surgery: Surgery, coupling: Coupling) -> None:
    """The first plan held: a group frozen after a failed check would hide what the trace got wrong."""
    before = {group.name for group in coupling.groups if group.role == "frozen"}
    for group in surgery.coupling.groups:
        assert group.role != "frozen" or group.name in before, f"{group.name}: {group.frozen_because}"
    assert surgery.check.passed, f"{surgery.check.reason}"


def odd_widths(coupling: Coupling, plan: PruningPlan) -> list[str]:
    """The pruned groups whose width is no multiple of ROUND_TO and could be one."""
    return [
        f"{group.name} {group.width} -> {plan.widths_after[group.name]}"
        for group in coupling.prunable()
        if group.name in plan.removed
        and group.width >= 4 * ROUND_TO
        and group.width % ROUND_TO == 0
        and lcm(ROUND_TO, group.unit_width) < group.width
        and plan.widths_after[group.name] % ROUND_TO
    ]


def frozen_by_reason(coupling: Coupling) -> dict[str, int]:
    """Frozen output channels by the first reason given for them, most first; network outputs apart."""
    counts: Counter[str] = Counter()
    for producer in coupling.producers:
        for number, channels in zip(*np.unique(producer.group, return_counts=True), strict=True):
            reasons = (producer.reason,) if number < 0 else coupling.groups[number].reasons
            if reasons and reasons[0] is not None and all(why.what != NETWORK_OUTPUT for why in reasons):
                counts[reasons[0].what] += int(channels)
    return dict(counts.most_common())


def _registered(reference: str) -> bool:
    """Whether a file may name this architecture: timm's, and torchvision's classifiers."""
    source, name = reference.split(":")
    return source == "timm" or name in torchvision.models.list_models(module=torchvision.models)


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def _worst_difference(alone: Sequence[list[Tensor]], together: Sequence[list[Tensor]]) -> float:
    worst = 0.0
    for position in range(len(alone[0])):
        a, b = (torch.stack([row[position] for row in rows]).numpy() for rows in (alone, together))
        check = compare_outputs({"output": a}, {"output": b})
        assert check.passed is not False, check.reason
        worst = max(worst, check.relative_error or 0.0)
    return worst


def _step(net: nn.Module, images: Tensor) -> set[str]:
    """Train a net by one step in place; return the parameters that got no gradient."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    training_loss(net, images).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), (
            f"the gradient of {name} is not finite"
        )
    optimizer.step()
    assert bool(training_loss(net, images).isfinite()), "the loss is not finite after a step"
    missing = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    optimizer.zero_grad()
    net.eval()
    return missing


class _Memory:
    """The peak of this process's memory from now on, beyond what it holds now; Linux only."""

    def __init__(self) -> None:
        self.before = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
            self.before = self._peak()
        except OSError:
            pass

    def peak_mb(self) -> float | None:
        return None if self.before is None else self._peak() - self.before

    def _peak(self) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024  # kB
