"""What is frozen, by reason: what met the channels, where, and why that makes them immovable."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sepress.coupling import NETWORK_OUTPUT, Coupling
from sepress.inspection.shares import is_output, made_channels
from sepress.types import Reason

_NO_LAYER = "what it meets has no channels that could go along"
_LAYOUT = "it can't be told which of its numbers belong to which channel"
_CODE = "surgery doesn't rewrite numbers in code"
_POSITION = "each channel means something by its place, and removal moves the later ones up"
_OTHERS = "one channel's value depends on all the others, so that a removed one is not just missing"
_TWO_AXES = "each of its numbers belongs to several channels at once"
_UNSEEN = "what training does with it was not seen, and it must still fit there"
_COMPUTED = "it is computed in the forward, while surgery cuts tensors that are stored"

# what a rule says (a pattern) -> why channels can't go; the tests hold that every rule's reason is here
_WHY = {
    NETWORK_OUTPUT: "whoever calls the net counts on them",
    "shares memory with another parameter": "cutting the one would cut the other",
    "written to in the forward": "the net changes it while it runs",
    "in-place *": "it overwrites what others may still read",
    "no rule for operation '*'": "the engine doesn't know what it does with channels; please report it",
    "a bias whose layout is unclear": _LAYOUT,
    "a weight whose layout is unclear": _LAYOUT,
    "read by a weight whose layout is unclear": _LAYOUT,
    "meets a parameter whose layout is unclear": _LAYOUT,
    "a grouped convolution whose layout is unclear": _LAYOUT,
    "a parameter along an axis without channels": _LAYOUT,
    "scales a weight along an axis that it has not": _LAYOUT,
    "a batched product with a parameter": _LAYOUT,
    "matrix product with a parameter on the left": _LAYOUT,
    "meets data that no layer made": _NO_LAYER,
    "multiplied with data that no layer made": _NO_LAYER,
    "heads multiplied with heads that no layer made": _NO_LAYER,
    "added to attention over heads that no layer made": _NO_LAYER,
    "a grouped convolution reads data that no layer made": _NO_LAYER,
    "meets zeros padded beside its channels": _NO_LAYER,
    "a linear layer over positions": "what it makes are positions, not channels",
    "a product with channels on two axes": _TWO_AXES,
    "a product with channels on three axes": _TWO_AXES,
    "meets channels on two axes": _TWO_AXES,
    "channels on two axes in '*'": _TWO_AXES,
    "attention over channels": _OTHERS,
    "softmax over channels": _OTHERS,
    "* over channels": _OTHERS,
    "* along channels": _OTHERS,
    "* over positions of several channels": _OTHERS,
    "a norm over other axes": _OTHERS,
    "attention scaled by its head width": "a narrower head would be scaled by another number",
    "convolution along the channel axis*": "it mixes neighbours, and survivors would get others",
    "a channel picked by its position": _POSITION,
    "channels picked by stored positions (*)": _POSITION,
    "ordered by value (*)": "the order of the others changes where one is missing",
    "what is picked depends on its values (*)": "which are picked depends on the image",
    "pooled over no region of the image that was traced": "nothing showed where they go",
    "made in training, where the forward fails (*)": _UNSEEN,
    "'*' may read it in training, where the forward can't be traced*": _UNSEEN,
    "* written in the code*": _CODE,
    "computed with as a number": "what is computed from it would change, and surgery can't follow that",
    "a width fixed by *": "that function wants all its widths alike",
    "a size computed in the code": _CODE,
    "convolution with a weight that is not a parameter": _COMPUTED,
    "a weight computed by '*'": _COMPUTED,
}


def explain(what: str) -> str | None:
    """Why the channels that a reason (`Reason.what`) names can't go; None for one that nobody explained."""
    if what in _WHY:
        return _WHY[what]
    return next((why for pattern, why in _WHY.items() if fnmatchcase(what, pattern)), None)


@dataclass(frozen=True)
class Frozen:
    """All that one kind of reason freezes; a group with several reasons stands under each."""

    what: str  # Reason.what
    modules: tuple[str, ...]  # where it happens
    names: tuple[str, ...]  # of the groups, and of layers whose channels nothing follows
    channels: int  # output channels, as ChannelShares counts them


def frozen_by_reason(coupling: Coupling) -> tuple[Frozen, ...]:
    """What is frozen, outputs apart, by kind of reason, the most channels first."""
    held: list[tuple[str, int, tuple[Reason, ...]]] = [
        (group.name, int(channels), group.reasons)
        for group, channels in zip(coupling.groups, made_channels(coupling), strict=True)
        if group.reasons and not is_output(group)
    ]
    held += [(made.module, len(made.group), (made.reason,)) for made in coupling.producers if made.reason]
    modules: dict[str, dict[str, None]] = defaultdict(dict)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, channels, reasons in held:
        for reason in reasons:
            modules[reason.what][reason.module] = None
        for what in dict.fromkeys(reason.what for reason in reasons):
            counts[what][name] += channels
    found = [
        Frozen(what, tuple(filter(None, modules[what])), tuple(names), sum(names.values()))
        for what, names in counts.items()
    ]
    return tuple(sorted(found, key=lambda frozen: -frozen.channels))
