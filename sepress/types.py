"""The facts that flow from stage to stage, as frozen data; no work is done here, and no heavy import.

Recipe -> Bundle(base) -> [CouplingGroup] + ExcitationStats -> Ranking -> PruningPlan
       -> Bundle(pruned) -> Bundle(tuned) -> model.onnx, and every Bundle -> Measurement -> Report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

JSON = Any  # what json.dumps takes without a default
Role = Literal["gated", "ungated", "se_hidden", "frozen"]
# Which channels compete, and by what; auto: knapsack for a size where the ranking has costs, else per-group.
Scope = Literal["auto", "per-group", "global", "isomorphic", "knapsack"]
Target = Literal["ratio", "target_macs", "target_params", "target_latency"]
TARGETS: tuple[Target, ...] = get_args(Target)
Removed = Mapping[str, "tuple[int, ...]"]  # group name -> sorted units that go
ReplacementKind = Literal["identity", "scale", "excitation"]  # see models/folded.py
# What a gate does with its signal s, and so what its values say; the first that fits is a gate's kind.
#   shift         s is only added to the map (GCNet, Cao et al. 2019, sec. 3.3): there is no excitation
#   scale-shift   one part multiplies (and is s), another part is added
#   local         one s a channel and position, computed at fewer of these and spread: GatherExcite (Hu et
#                 al. 2018b, sec. 3), DFC attention (GhostNetV2, Tang et al. 2022, sec. 3.2)
#   branch        one s a channel and branch, which weighs branches: selective kernels (Li et al. 2019,
#                 sec. 3.1), split attention (ResNeSt, Zhang et al. 2020, sec. 3.1)
#   channel-conv  s by a convolution along the channels (ECA-Net, Wang et al. 2020, sec. 3.2)
#   context       the squeeze weighs positions by a softmax (as GCNet's), and s multiplies
#   scale         one s a channel multiplies: Squeeze-and-Excitation, ESE, CBAM's channel part
GateKind = Literal["shift", "scale-shift", "local", "branch", "channel-conv", "context", "scale"]


# ---- models -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; mean and std are per channel, for pixels in 0..1."""

    input_size: tuple[int, ...]  # C H W (or C L, or C D H W), one image
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0  # the share of the resized shorter side that the centre crop keeps
    origin: str = "typed"  # where the figures come from, as the report names it


@dataclass(frozen=True)
class ModelSpec:
    """What builds the architecture again before any width is changed."""

    source: Literal["timm", "torchvision", "sepress", "user"]
    arch: str  # a registry name; for 'user' the pkg.module:factory that the user typed
    kwargs: Mapping[str, JSON]  # plain structural arguments, num_classes among them
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    trained: bool = True  # False: random weights, and every table says so

    @property
    def reference(self) -> str:
        """The `source:arch` (or `pkg.module:factory`) that `--arch` takes."""
        return self.arch if self.source == "user" else f"{self.source}:{self.arch}"


@dataclass(frozen=True)
class AttributePatch:
    """A Python number of a module that surgery rewrote: `module.attribute[index] = value`."""

    module: str  # dotted path; "" is the net itself
    attribute: str
    index: int | None  # None: the attribute itself is the number
    value: int


@dataclass(frozen=True)
class Replacement:
    """A module of the architecture that gave way to a smaller one, of a closed list of kinds."""

    module: str  # dotted path
    kind: ReplacementKind
    shape: tuple[int, ...] = ()  # of the one tensor that it holds, its `scale`; () where it holds none


@dataclass(frozen=True)
class Layout:
    """The shape of every parameter and buffer, every patched attribute and every replaced module of a net."""

    shapes: Mapping[str, tuple[int, ...]]  # state-dict name -> shape
    attributes: tuple[AttributePatch, ...] = ()
    replaced: tuple[Replacement, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """A network together with what is needed to save it, load it and trust it."""

    spec: ModelSpec
    layout: Layout = field(repr=False)
    lineage: Mapping[str, JSON] = field(
        repr=False
    )  # data, recipe, plans, environment, parent; JSON values only
    net: nn.Module = field(repr=False)


# ---- structure ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class CallSite:
    """One torch function call of a forward in eval mode, and one operand of it.

    `index` counts the outermost torch function calls from the forward's start (as a
    TorchFunctionMode sees them); `function` is checked again whenever a site is met.
    """

    index: int
    function: str
    operand: int  # position among the call's tensor arguments, flattened
    axis: int  # the channel axis of that operand
    module: str  # the innermost module running, dotted path


@dataclass(frozen=True)
class Gate:
    """A recalibration: a map multiplied by (or added to) a signal that says how much each channel counts."""

    name: str  # the innermost module that multiplies; '#2' and so on from its second gate
    channels: int
    activation: str  # what squashes it: sigmoid, hardsigmoid, clamp, relu6, ..., or 'none'
    kind: GateKind
    producer: str  # the layer whose output channels are gated (conv or linear)
    group: str  # the coupling group that the gated channels belong to
    units: np.ndarray  # (channels,) int: the group's unit of each gate channel, -1 for none
    site: CallSite  # the operand is the excitation s, after squashing; of a shift, what is added

    @property
    def silent_because(self) -> str | None:
        """Why its values tell nothing of how much a channel counts; None where they do.

        Averaged over all but image and channel, the values of every other kind are one excitation a channel.
        """
        if self.kind == "shift":
            return "is added, not multiplied"
        if self.kind == "branch" and self.activation == "softmax":
            return "shares a channel out between branches, 1 in all"
        return None


@dataclass(frozen=True)
class Member:
    """Where one group's units live on one axis of one parameter or buffer (parallel arrays)."""

    parameter: str  # state-dict name (first name where tied)
    dim: int
    unit: np.ndarray  # (n,) int
    index: np.ndarray  # (n,) int: slot `index[i]` of the axis goes when unit `unit[i]` goes


@dataclass(frozen=True)
class Reason:
    """Why channels can't be removed: what met them, and in which module."""

    what: str  # as the rule puts it: "split at sizes written in the code"
    module: str = ""  # dotted path; "" where no one module is to blame

    def __str__(self) -> str:
        return self.what + (f" in '{self.module}'" if self.module else "")


@dataclass(frozen=True)
class CouplingGroup:
    """Channels that can only go together with all their slots, one unit at a time.

    A unit is what is removed at once: one channel, or the same offset of every block of a grouped
    convolution; `width` counts channels of the first producer, `width = units * unit_width`.
    """

    name: str  # the first producer in named_modules() order
    role: Role
    width: int
    units: int
    producers: tuple[str, ...]
    gates: tuple[str, ...]  # names of the gates that judge its channels
    members: tuple[Member, ...]
    reasons: tuple[Reason, ...] = ()  # of a frozen group, in the order in which they were met

    @property
    def unit_width(self) -> int:
        return self.width // max(1, self.units)

    @property
    def frozen_because(self) -> str | None:
        """The reasons in words, three at most; None for a group that is not frozen."""
        more = f" (and {len(self.reasons) - 3} more reasons)" if len(self.reasons) > 3 else ""
        return "; ".join(map(str, self.reasons[:3])) + more if self.reasons else None


@dataclass(frozen=True)
class Producer:
    """A convolution or linear layer that ran, and the group that each of its output channels belongs to."""

    module: str  # dotted path
    group: np.ndarray  # (output channels,) int: index into Coupling.groups, -1 for none
    reason: Reason | None = None  # why its channels belong to none: nothing could follow them


@dataclass(frozen=True)
class Reader:
    """A conv or linear layer that reads a group's tensor, and so ends it: where channels count."""

    parameter: str  # the weight, state-dict name
    dim: int  # the weight's input axis; of a mixed one, one expert's
    groups: int  # of the convolution; 1 otherwise
    transposed: bool
    pooled: bool  # reads what descends only from a global pooling (an SE squeeze or its expand)
    site: CallSite  # the operand is the activation read, axis its channel axis
    group: np.ndarray  # (positions on the axis,) int: index into Coupling.groups, -1 for none
    unit: np.ndarray  # (positions on the axis,) int: unit of that group
    # (experts, out, in, ...) where the weight is mixed for each image from a bank, `parameter`, of that shape
    # but for flat axes; several images then lie folded beside the channels of the operand.
    mixed: tuple[int, ...] = ()


# ---- evidence -----------------------------------------------------------------------------------
NO_EXCITATION = "no excitation was found"  # opens the note on a net whose gates, if any, tell nothing


@dataclass(frozen=True)
class Ranking:
    """A score per unit and group (higher = keep) and the evidence that judged each group."""

    criterion: str
    scores: Mapping[str, tuple[float, ...]] = field(repr=False)
    evidence: Mapping[str, str] = field(repr=False)  # group -> what judged it, in words
    mean_excitation: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)  # gated groups
    warnings: tuple[str, ...] = ()
    # group -> the predicted loss once 0, 1, 2, ... units of its order are gone (units + 1 figures at most);
    # comparable over groups. Empty where the criterion has no such unit.
    costs: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Policy:
    """How a ranking becomes a plan; exactly one target is set."""

    ratio: float | None = None  # the fraction of prunable channels removed
    target_macs: float | None = None  # of the base
    target_params: float | None = None  # of the base
    target_latency: float | None = None  # of the base's, as a latency table predicts it
    scope: Scope = "auto"
    round_to: int = 8  # ORT's blocked layout; tensor cores
    min_width: int = 8
    gated_only: bool = False
    eca_neighbours: bool = False  # channels along which a convolution runs may go: see coupling.trace
    frozen: tuple[str, ...] = ()  # patterns (fnmatch) of group names
    overrides: Mapping[str, float] = field(default_factory=dict)  # pattern -> ratio

    @property
    def targets(self) -> dict[Target, float]:
        """Those that are set."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class PruningPlan:
    """What is removed, and what that predicts."""

    policy: Policy
    criterion: str
    removed: Removed = field(repr=False)
    widths_before: Mapping[str, int] = field(repr=False)
    widths_after: Mapping[str, int] = field(repr=False)
    evidence: Mapping[str, str] = field(repr=False)
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    latency_ratio: float | None = None  # predicted, of the base's; None where nothing predicts it
    notes: tuple[str, ...] = ()


# ---- results ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Check:
    """The outcome of a correctness check; passed is None where it was vacuous or not run."""

    passed: bool | None
    relative_error: float | None
    reason: str | None = None
    argmax_agreement: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One net on one data split; a None carries its reason under the field's name in reasons."""

    label: str  # base, pruned, tuned, ...
    split: str | None
    n: int | None
    top1: float | None
    top5: float | None
    loss: float | None
    macs: int | None
    params: int | None
    bytes: int | None  # of the ONNX file
    latency_ms: float | None
    latency: Mapping[str, JSON] | None  # conditions and quantiles
    per_class: Mapping[str, float] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One precision of the exported file; the float file itself is the first, which the others are held to.

    `validation` decided, and holds size and latency (a ratio to the float file); `final` is the accuracy on
    the split that choices did not touch, of what was kept.
    """

    precision: str  # float32, fp16 or int8; the label of its measurements
    kept: bool
    how: str  # how it was made, of the ways that were tried
    reason: str  # what decided, with its figures
    agreement: float | None  # share of validation images with the float file's top class
    validation: Measurement
    final: Measurement | None = None


@dataclass(frozen=True)
class GroupRow:
    name: str
    role: Role
    width_before: int
    width_after: int
    evidence: str
    mean_excitation: float | None  # mean over the group's channels and calibration images
    excitation: tuple[float, ...] | None = None  # per unit, of the base
    frozen_because: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything a reader is told; renderers are pure functions of it."""

    name: str
    measurements: tuple[Measurement, ...]
    groups: tuple[GroupRow, ...] = field(repr=False)
    checks: Mapping[str, Check]
    artifacts: Mapping[str, str | None]
    environment: Mapping[str, JSON] = field(repr=False)
    criterion: str
    recipe: Mapping[str, JSON] = field(default_factory=dict, repr=False)
    constraints: tuple[Mapping[str, JSON], ...] = ()
    variants: tuple[Variant, ...] = ()  # of the ONNX file, the float one first; none: no precision was asked
    notes: tuple[str, ...] = ()
    trained: bool = True  # False: random weights, and every rendering says so
    selection: Mapping[str, JSON] = field(default_factory=dict)  # label -> {epoch, val_top1} chosen on val
    data: Mapping[str, JSON] = field(default_factory=dict, repr=False)  # DataSource.describe()
    preprocessing: Mapping[str, JSON] = field(default_factory=dict, repr=False)  # the base's, with its origin
