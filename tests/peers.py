"""Our groups beside torch-pruning's, channel by channel, and what each difference does to the net when cut.

A difference is judged by pruning: our unit by our own check, theirs by its own pruner on a copy, whose
outputs must be those of the net with the removed channels zero where layers read them (hooks on modules,
nothing of sepress). All in float64.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
import zoo
import zoo_checks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepress.baselines import PeerGroup, SecondOpinion, Slot, coupled_channels
from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.criteria import rank
from sepress.pruning import prune_channels
from sepress.timing import LatencyFigures, measure_latency
from sepress.types import CouplingGroup, Policy

TOLERANCE = 1e-4  # of the outputs' spread over images, as in the engine's own check
OUTPUT = "network output"
MOST_CUT = 8  # units of torch-pruning's that one difference is judged by


def named(source: str, names: str) -> tuple[str, ...]:
    return tuple(f"{source}:{name}" for name in names.split())


# Every family of SE networks, by its small members.
NETS = (
    *named(
        "timm",
        """
        test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
        test_nfnet test_byobnet test_coatnet test_maxvit mobilenetv3_small_050
        tf_mobilenetv3_small_075 mobilenetv3_large_100 mobilenetv3_rw lcnet_035 lcnetv2_small
        mnasnet_small semnasnet_050 tinynet_e hardcorenas_a fbnetv3_b ghostnet_050 ghostnetv2_100
        ghostnetv3_050 repghostnet_050 mixnet_s rexnet_100 rexnetr_100 efficientnet_b0
        tf_efficientnet_b0 efficientnet_blur_b0 efficientnet_b0_gn efficientnet_b0_g8_gn
        efficientnet_b1_pruned efficientnet_x_b3 efficientnet_cc_b0_4e efficientnetv2_rw_t
        tf_efficientnetv2_b0 regnety_002 regnety_004 regnety_008_tv regnetv_040 regnety_040_sgn
        regnetz_005 regnetz_b16 regnetz_c16_evos regnetz_d8 nf_regnet_b0 nf_seresnet26 nfnet_l0
        seresnet18 legacy_seresnet18 seresnet34 seresnet50 seresnetaa50d resnetrs50 seresnet33ts
        seresnext26ts legacy_seresnext26_32x4d seresnext26d_32x4d seresnext50_32x4d
        ese_vovnet19b_slim ese_vovnet19b_slim_dw ese_vovnet39b cspnext_tiny cspnext_s cs3sedarknet_l
        cs3sedarknet_xdw sedarknet21 hgnet_tiny mobileone_s4 tresnet_m rdnet_tiny repvit_m0_9
        fastvit_t8 efficientvit_m0 efficientvim_m1 shvit_s1 haloregnetz_b sehalonet33ts
        sebotnet33ts_256 gcvit_xxtiny coatnet_pico_rw_224 maxvit_pico_rw_256
        """,
    ),
    *named(
        "torchvision",
        """
        mobilenet_v3_small efficientnet_b0 efficientnet_v2_s regnet_y_400mf regnet_y_1_6gf
        lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large
        """,
    ),
)
# Twenty that torch-pruning does, of every family that it does.
TIMED = named(
    "timm",
    """
    mobilenetv3_small_100 mobilenetv3_large_100 lcnet_100 semnasnet_100 tinynet_a fbnetv3_b ghostnet_100
    efficientnet_b0 efficientnet_b3 tf_efficientnetv2_b0 regnety_016 regnetz_b16 repvit_m1_0
    ese_vovnet39b seresnet18 seresnet50 seresnext50_32x4d legacy_seresnet101 cspnext_s senet154
    """,
)
RATIO = 0.3
HANGS = 60

Unit = frozenset[Slot]


@dataclass(frozen=True)
class Difference:
    """Units that overlap and are not the same, told by the first of many alike."""

    times: int
    ours: tuple[Unit, ...]
    theirs: tuple[Unit, ...]
    we_say: str  # 'exact', 'frozen: why', 'none', or what failed
    they_say: str  # 'exact', 'none', what failed, or 'undecided: ' and the difference
    verdict: str


@dataclass(frozen=True)
class Comparison:
    same: int  # units
    differences: tuple[Difference, ...]

    @property
    def ours_to_answer(self) -> tuple[Difference, ...]:
        """What torch-pruning has right and we have not, or nobody has shown wrong."""
        return tuple(d for d in self.differences if d.verdict.startswith("ours"))


def compare(net: nn.Module, images: Tensor) -> Comparison:
    """Compare the groups of a net in eval mode; raises what torch-pruning raises where it can't trace."""
    net, images = copy.deepcopy(net).double().eval(), images.double()
    coupling = trace(net, images[:1])
    kept = outputs_of(coupling)
    opinion = SecondOpinion(net, images[:1], kept=kept)
    theirs = {unit: (group, outputs) for group in opinion.groups() for outputs, unit in group.units.items()}
    ours = {
        unit: (group, number)
        for group in coupling.groups
        if group.frozen_because != OUTPUT
        for number, unit in enumerate(coupled_channels(net, group))
        if unit
    }
    alike = {unit for unit in ours.keys() & theirs.keys() if ours[unit][0].role != "frozen"}
    same = len(alike)
    judge = _Judge(net, images, coupling, kept)
    differences = []
    for mine, other, times in _alike(ours.keys() - alike, theirs.keys() - alike):
        asked = {opinion.goes_with(theirs[unit][0].root, theirs[unit][1]): theirs[unit] for unit in other}
        if (
            asked.keys() == set(mine) and ours[mine[0]][0].role != "frozen"
        ):  # the full group told only some of it
            same += times * len(mine)
            continue
        we_say = judge.ours(*ours[mine[0]]) if mine else "none"
        they_say = "exact" if asked else "none"
        for group, unit in itertools.islice(asked.values(), MOST_CUT):
            if they_say == "exact":
                they_say = judge.theirs(group, unit)
        verdict = _verdict(mine, tuple(asked), we_say, they_say)
        differences.append(Difference(times, mine, tuple(asked), we_say, they_say, verdict))
    return Comparison(same, tuple(differences))


def outputs_of(coupling: Coupling) -> tuple[str, ...]:
    """The layers that make the outputs."""
    return tuple(
        name
        for group in coupling.groups
        if OUTPUT in (group.frozen_because or "")
        for name in group.producers
    )


def _verdict(mine: Sequence[Unit], other: Sequence[Unit], we_say: str, they_say: str) -> str:
    if they_say.startswith("undecided"):
        return "ours to answer: nobody has shown it wrong"
    if they_say not in ("exact", "none"):
        return f"torch-pruning: {re.split('[:0-9]', they_say)[0].strip()}"
    if we_say == "exact" and they_say == "none":
        return "torch-pruning: leaves out what can go"
    if we_say == "exact" and any(mine[0] < unit for unit in other):
        return "torch-pruning: takes more than must go"
    if we_say == "exact" and not any(unit < mine[0] for unit in other):
        return "both: another cut of the same channels"
    return "ours to answer"


def _alike(
    mine: Iterable[Unit], other: Iterable[Unit]
) -> Iterator[tuple[tuple[Unit, ...], tuple[Unit, ...], int]]:
    """Units that overlap, if through others: of the sets on the same layers the first, and how many."""
    members: dict[Slot, list[tuple[bool, Unit]]] = {}
    for theirs, units in ((False, mine), (True, other)):
        for unit in units:
            for slot in unit:
                members.setdefault(slot, []).append((theirs, unit))
    seen: set[tuple[bool, Unit]] = set()
    found: dict[object, list[tuple[tuple[Unit, ...], tuple[Unit, ...]]]] = {}
    for slot in sorted(members):
        stack = [node for node in members[slot] if node not in seen]
        cluster = []
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            cluster.append(node)
            stack.extend(near for part in node[1] for near in members[part] if near not in seen)
        if cluster:
            sides = tuple(
                tuple(sorted((unit for theirs, unit in cluster if theirs is side), key=sorted))
                for side in (False, True)
            )
            found.setdefault(tuple(frozenset(_layers(units)) for units in sides), []).append(sides)
    for sets in found.values():
        yield *sets[0], len(sets)


def _layers(units: Iterable[Unit]) -> set[tuple[str, str]]:
    return {(name, side) for unit in units for name, side, _ in unit}


class _Judge:
    """Prunes one unit at a time, by either side, and says what came of it."""

    def __init__(self, net: nn.Module, images: Tensor, coupling: Coupling, kept: Sequence[str]) -> None:
        self.net, self.images, self.coupling, self.kept = net, images, coupling, kept

    def ours(self, group: CouplingGroup, unit: int) -> str:
        if group.role == "frozen":
            return f"frozen: {group.frozen_because}"
        if group.units < 2:
            return "the last unit"
        removed = {group.name: (unit,)}
        pruned = copy.deepcopy(self.net)
        apply_removal(pruned, self.coupling, removed)
        check, _ = check_removal(self.net, pruned, self.coupling, removed, self.images)
        return "exact" if check.passed else f"check failed: {check.reason or check.relative_error}"

    def theirs(self, group: PeerGroup, outputs: Sequence[int]) -> str:
        opinion = SecondOpinion(self.net, self.images[:1], kept=self.kept)
        try:
            gone = opinion.cut(group.root, outputs)
        except Exception as error:  # noqa: BLE001  (what it raises is its answer)
            return f"its pruner fails: {brief(error)}"
        said = judge(self.net, opinion.net, gone, self.images)
        by_design = any(operation.statistics for operation in self.coupling._operations)
        # Where statistics run over channels they change with removal, so a difference alone is no error.
        return f"undecided: {said}" if by_design and said.startswith("differs") else said


def judge(net: nn.Module, pruned: nn.Module, gone: Iterable[Slot], images: Tensor) -> str:
    """'exact', or how the pruned net fails, or by how much it differs from the masked one."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            removed = outputs(pruned(images))
        except Exception as error:  # noqa: BLE001  (what it raises is the answer)
            return f"the forward fails: {brief(error)}"
        with masked(net, gone):
            wanted = outputs(net(images))
    if [x.shape for x in wanted] != [x.shape for x in removed]:
        return "the outputs' shape changed"
    error = max(
        float((a - b).abs().max() / (a - a.mean(0)).abs().max()) for a, b in zip(wanted, removed, strict=True)
    )
    return "exact" if error <= TOLERANCE else f"differs from the masked net by {error:.1g} of its spread"


def outputs(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def masked(net: nn.Module, gone: Iterable[Slot]) -> ExitStack:
    """A net whose convolutions and linear layers read zeros where channels are gone."""
    inputs: dict[str, list[int]] = {}
    for name, side, index in gone:
        if side == "in":
            inputs.setdefault(name, []).append(index)
    hooks = ExitStack()
    for name, channels in inputs.items():
        module = net.get_submodule(name)
        axis = -1 if isinstance(module, nn.Linear) else 1

        def zero(
            _module: nn.Module, args: tuple[Any, ...], axis: int = axis, channels: list[int] = channels
        ) -> Any:
            return (args[0].index_fill(axis, torch.tensor(channels), 0), *args[1:])

        hooks.callback(module.register_forward_pre_hook(zero).remove)
    return hooks


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:120]


def summary(comparison: Comparison) -> Counter[str]:
    """How many units, by verdict."""
    counts: Counter[str] = Counter({"same": comparison.same})
    for difference in comparison.differences:
        counts[difference.verdict] += difference.times
    return counts


# ---- networks ------------------------------------------------------------------------------------------
def build(reference: str, size: int | None = None) -> tuple[nn.Module, Tensor]:
    """An untrained net whose channels all count, and four images of a size, or of the least that it takes."""
    torch.manual_seed(0)
    net = zoo_checks.build(reference)
    pixels = size or zoo.architecture(reference).size
    images = torch.randn(4, 3, pixels, pixels)
    zoo_checks.make_lively(net, images)
    return net.eval(), images


def compare_named(reference: str) -> Comparison:
    return compare(*build(reference))


@dataclass(frozen=True)
class Pruned:
    """What removing RATIO at random came to: 'exact', or what went wrong; and whether shapes are clean."""

    outcome: str
    clean: bool  # every parameter and buffer as removing whole channels leaves it


def prune_by_us(reference: str) -> Pruned:
    net, images = (x.double() for x in build(reference))
    coupling = trace(net, images[:1])
    generator = np.random.default_rng(0)
    removed = {
        group.name: tuple(sorted(generator.permutation(group.units)[: int(RATIO * group.units)].tolist()))
        for group in coupling.prunable()
    }
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, _ = check_removal(net, pruned, coupling, removed, images)
    return Pruned("exact" if check.passed else str(check.reason or check.relative_error), clean=True)


def prune_by_peer(reference: str) -> Pruned:
    net, images = (x.double() for x in build(reference))
    coupling = trace(net, images[:1])
    try:
        opinion = SecondOpinion(net, images[:1], kept=outputs_of(coupling), ratio=RATIO)
        gone = opinion.prune()
    except Exception as error:  # noqa: BLE001  (what it raises is its answer)
        return Pruned(f"its pruner fails: {brief(error)}", clean=False)
    removed = {
        group.name: tuple(n for n, unit in enumerate(coupled_channels(net, group)) if unit and unit <= gone)
        for group in coupling.prunable()
    }
    ours = copy.deepcopy(net)
    apply_removal(ours, coupling, removed)
    shapes = [{name: x.shape for name, x in each.state_dict().items()} for each in (ours, opinion.net)]
    return Pruned(judge(net, opinion.net, gone, images), clean=shapes[0] == shapes[1])


# ---- a process each ------------------------------------------------------------------------------------
def in_child(work: Callable[..., Any], *arguments: Any, seconds: int) -> Any:
    """Return what a function gives in a forked process; a text where it fails, or isn't done in time.

    `seconds` are of its own CPU, so that what else the machine does decides nothing; asleep, it gets HANGS
    times as many.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments, seconds))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(HANGS * seconds) else f"hangs: no end in {HANGS * seconds} s"
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        return (
            f"not done in {seconds} s of CPU" if late else f"the process died (exit code {process.exitcode})"
        )
    finally:
        process.kill()
        process.join()


def _send(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        result = work(*arguments)
    except Exception as error:  # noqa: BLE001  (told to the parent)
        result = brief(error)
    sender.send(result)
    os._exit(0)


def peer_finishes(reference: str) -> bool:
    """Let torch-pruning alone build its graph and all groups; whatever it raises is raised."""
    net, images = build(reference)
    graph_by_peer(net, images[:1])
    return True


def graph_by_us(net: nn.Module, image: Tensor) -> None:
    trace(net, image)


def graph_by_peer(net: nn.Module, image: Tensor) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        graph = tp.DependencyGraph().build_dependency(net, example_inputs=image, verbose=False)
        list(graph.get_all_groups())


GRAPHS = {"torch-pruning": graph_by_peer, "sepress": graph_by_us}


def time_graphs(reference: str, size: int, rounds: int) -> dict[str, LatencyFigures]:
    """Time graph and all groups of both, interleaved."""
    net, images = build(reference, size)
    runners = {name: partial(graph, net, images[:1]) for name, graph in GRAPHS.items()}
    return measure_latency(runners, rounds=rounds, warmup=1)


def graph_memory(reference: str, size: int, name: str) -> float:
    """Return by how many MiB graph and groups raise the peak; for a process that did nothing yet."""
    net, images = build(reference)
    image = images[:1].new_zeros(1, 3, size, size)
    before = peak_mib()
    GRAPHS[name](net, image)
    return peak_mib() - before


def whole(reference: str, size: int) -> dict[str, float]:
    """Return the CPU seconds of tracing and of pruning at RATIO, and by how many MiB they raise the peak."""
    net, images = build(reference)
    if images.shape[-1] != size:
        images = torch.randn(2, 3, size, size)
    figures, before = {}, peak_mib()
    started = time.process_time()

    def done(what: str) -> None:
        nonlocal started
        figures[f"{what} s"] = time.process_time() - started
        figures[f"{what} MiB"] = peak_mib() - before
        started = time.process_time()

    coupling = trace(net, images[:1])
    done("trace")
    ranking = rank(coupling, None, criterion="l2", net=net)
    prune_channels(net, coupling, ranking, Policy(ratio=RATIO), images=images[:2])
    done("plan, surgery and check")
    return figures


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
