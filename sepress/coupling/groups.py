"""From the facts of a trace to Coupling: gates, groups of channels, readers, and exact costs.

A component of slots is a channel. Channels that live on the same producers form a CouplingGroup;
those that a rule froze form frozen groups, which say why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from torch import nn

from sepress.coupling.endings import Ending
from sepress.coupling.forwards import Idle, run_tracer
from sepress.coupling.slots import FIRST_SLOT, NONE, PADDING, owner_of
from sepress.coupling.trace import Inputs, LayerKind, Operation, Product, Tracer, traceable
from sepress.errors import InputError
from sepress.types import CouplingGroup, Gate, Member, Producer, Reader, Reason, Removed, Role


@dataclass(frozen=True, eq=False)
class SizeUse:
    """A Python number of a module that counts channels: `ids` survivors / factor."""

    module: str
    attribute: str
    index: int | None
    ids: np.ndarray
    factor: Fraction


@dataclass(frozen=True, eq=False)
class Factor:
    """Entries of a parameter that are multiplied by the root of the share of `width` left: see scaling.py."""

    parameter: str
    dim: int
    index: np.ndarray  # along dim
    width: np.ndarray  # ids


@dataclass(frozen=True, eq=False)
class CostTable:
    """Sums of products of axis lengths, as a function of the units removed.

    `units_on_axis` counts the slots that each unit has on each axis; products refer to axes by
    number, padded with the last axis, whose length is always 1.
    """

    lengths: np.ndarray  # (axes + 1,)
    units_on_axis: csr_matrix  # (axes + 1, units)
    constants: np.ndarray  # (products,)
    axes: np.ndarray  # (products, most axes of any)

    def total(self, units_removed: np.ndarray) -> int:
        """Return the sum over products when the units marked in a 0/1 vector are gone."""
        return int((self.constants * self.lengths_left(units_removed).prod(axis=1)).sum())

    def lengths_left(self, units_removed: np.ndarray) -> np.ndarray:
        """Return the lengths of every product's axes, (products, most axes), with those units gone."""
        left: np.ndarray = (self.lengths - self.units_on_axis @ units_removed)[self.axes]
        return left

    def shrinking(self) -> np.ndarray:
        """Return which of those axes hold units at all, (products, most axes) bool."""
        held: np.ndarray = (np.diff(self.units_on_axis.indptr) > 0)[self.axes]
        return held


def _cost_table(products: Sequence[Product], unit_of_slot: np.ndarray, units: int) -> CostTable:
    numbers: dict[bytes, int] = {}
    lines: list[np.ndarray] = []
    rows = []
    for product in products:
        row = []
        for ids in (*product.axes, *product.beside):
            key = ids.tobytes()
            if key not in numbers:
                numbers[key] = len(lines)
                lines.append(ids)
            row.append(numbers[key])
        rows.append(row)
    most = max((len(row) for row in rows), default=0)
    axes = np.array([row + [len(lines)] * (most - len(row)) for row in rows], dtype=np.int64)
    axis = np.repeat(np.arange(len(lines)), [len(ids) for ids in lines])
    unit = unit_of_slot[np.concatenate([np.zeros(0, np.int64), *lines])]
    known = unit >= 0
    counts = coo_matrix(
        (np.ones(int(known.sum()), np.int64), (axis[known], unit[known])), shape=(len(lines) + 1, units)
    ).tocsr()
    lengths = np.array([len(ids) for ids in lines] + [1], dtype=np.int64)
    constants = np.array([product.constant for product in products], dtype=np.int64)
    return CostTable(lengths, counts, constants, axes.reshape(len(rows), most))


@dataclass(frozen=True, eq=False)
class Layers:
    """The convolutions and matrix products of one forward of one image, an array entry each.

    A convolution's lengths are those of its weight (out, in / groups, kernel...), its `positions` those of
    its output; a transposed one's weight is (in, out / groups, kernel...), and its positions are its input's.
    A matrix product's lengths are those of its axes that are channels, or of a parameter (inner, columns);
    its positions are the product of the others. Padded with ones.
    """

    positions: np.ndarray  # (layers,) int: what the product of the lengths is multiplied by
    lengths: np.ndarray  # (layers, most axes) int
    shrinking: np.ndarray  # (layers, most axes) bool: the axis is of a group's units, frozen or not
    kinds: tuple[LayerKind, ...]
    groups: np.ndarray  # (layers,) int: of a convolution, else 1

    @property
    def macs(self) -> np.ndarray:
        """Multiply-accumulates, (layers,)."""
        result: np.ndarray = self.positions * self.lengths.prod(axis=1)
        return result


@dataclass(frozen=True, eq=False)
class Coupling:
    """What one trace says about a net: plain values and numpy, no reference to the net."""

    gates: tuple[Gate, ...]
    groups: tuple[CouplingGroup, ...]
    producers: tuple[Producer, ...]
    readers: tuple[Reader, ...]
    shapes: Mapping[str, tuple[int, ...]]  # parameters and buffers, first name where tied
    parameters: frozenset[str]  # which of shapes are parameters
    idle: Idle  # modules that the forward in eval mode does not run
    calls: tuple[str, ...] = field(repr=False)  # function names by call index, to check sites
    along_channels: Mapping[str, tuple[str, ...]]  # group -> modules that convolve along its channels (ECA)
    _unit_of_slot: np.ndarray = field(repr=False)  # number among the units of all groups, -1: none
    _macs: CostTable = field(repr=False)
    _params: CostTable = field(repr=False)
    # Of _macs' products: kind, groups of a convolution, how many axes are the layer's own.
    _kinds: tuple[tuple[LayerKind, int, int], ...] = field(repr=False)
    _sizes: tuple[SizeUse, ...] = field(repr=False)
    _factors: tuple[Factor, ...] = field(repr=False)
    _operations: tuple[Operation, ...] = field(repr=False)
    ending: Ending | None = field(repr=False)  # where post-processing begins, and calls and operations end

    def group(self, name: str) -> CouplingGroup:
        """Return the group of that name; raises InputError for an unknown one."""
        for group in self.groups:
            if group.name == name:
                return group
        raise InputError(
            f"no coupling group '{name}' in this network",
            remedy=f"Groups: {', '.join(group.name for group in self.groups[:20])}.",
        )

    def prunable(self) -> tuple[CouplingGroup, ...]:
        """Return the groups from which something can go."""
        return tuple(group for group in self.groups if group.role != "frozen" and group.units > 1)

    def count_macs(self, removed: Removed) -> int:
        """Return the MACs of one image, as traced, with those units gone (convolutions, matrix products)."""
        return self._macs.total(self._removed_units(removed))

    def count_params(self, removed: Removed) -> int:
        """Return the number of parameters with those units gone; tied ones count once."""
        return self._params.total(self._removed_units(removed))

    def layers(self, removed: Removed) -> Layers:
        """Return the shape of every layer that multiplies, in order of execution, with those units gone."""
        left = self._macs.lengths_left(self._removed_units(removed))
        own = np.arange(left.shape[1]) < np.array([axes for _, _, axes in self._kinds])[:, None]
        return Layers(
            positions=self._macs.constants * np.where(own, 1, left).prod(axis=1),
            lengths=np.where(own, left, 1),
            shrinking=self._macs.shrinking() & own,
            kinds=tuple(kind for kind, _, _ in self._kinds),
            groups=np.array([groups for _, groups, _ in self._kinds]),
        )

    def partners(self) -> dict[str, str]:
        """Return the groups whose channels are the two sides of a grouped convolution, each way."""
        of_unit = np.repeat(np.arange(len(self.groups)), [group.units for group in self.groups])
        found: dict[str, str] = {}
        for (kind, _, _), axes in zip(self._kinds, self._macs.axes, strict=True):
            if kind != "grouped":
                continue
            sides = [np.unique(of_unit[self._macs.units_on_axis[axis].indices]) for axis in axes[:2]]
            if all(len(side) == 1 for side in sides) and sides[0] != sides[1]:
                out, into = (self.groups[int(side[0])].name for side in sides)
                found.setdefault(out, into)
                found.setdefault(into, out)
        return found

    def with_frozen(self, reasons: Mapping[str, str]) -> Coupling:
        """Return this coupling with more groups frozen: name -> why."""
        for name in reasons:
            self.group(name)
        groups = tuple(
            replace(group, role="frozen", reasons=group.reasons or (Reason(reasons[group.name]),))
            if group.name in reasons
            else group
            for group in self.groups
        )
        return replace(self, groups=groups)

    def check_removed(self, removed: Removed) -> None:
        """Raise InputError for an unknown or frozen group, a unit out of range, or a group left empty."""
        for name, units in removed.items():
            group = self.group(name)
            if not units:
                continue
            if group.role == "frozen":
                raise InputError(
                    f"group '{name}' is frozen: {group.frozen_because}",
                    remedy="Leave it out of what is removed.",
                )
            if len(set(units)) != len(units) or min(units) < 0 or max(units) >= group.units:
                raise InputError(
                    f"group '{name}' has units 0..{group.units - 1}; removed: {_abbreviated(units)}",
                    remedy="Name every unit once, within that range.",
                )
            if len(units) >= group.units:
                raise InputError(
                    f"removing all {group.units} units of group '{name}' would leave it empty",
                    remedy="Keep at least one unit.",
                )

    def gone(self, removed: Removed) -> np.ndarray:
        """Return for every slot whether it goes (bool)."""
        units = np.append(self._removed_units(removed), 0)  # -1 reads the last: stays
        result: np.ndarray = units[self._unit_of_slot].astype(bool)
        return result

    def factors(self, removed: Removed) -> dict[tuple[str, int], np.ndarray]:
        """Return what surgery multiplies entries by, along an axis of a parameter before the cut.

        A change of an attention's head width changes the scale it has by default; what makes its queries
        makes up for that.
        """
        gone = self.gone(removed)
        found: dict[tuple[str, int], np.ndarray] = {}
        for factor in self._factors:
            left = float((~gone[factor.width]).mean())
            if left < 1:
                key = factor.parameter, factor.dim
                by_index = found.setdefault(key, np.ones(self.shapes[factor.parameter][factor.dim]))
                by_index[factor.index] = left**0.5
        return found

    def _removed_units(self, removed: Removed) -> np.ndarray:
        first, marks = 0, np.zeros(sum(group.units for group in self.groups), np.int64)
        for group in self.groups:
            if group.name in removed:
                marks[first + np.asarray(removed[group.name], dtype=np.int64)] = 1
            first += group.units
        return marks


def _abbreviated(units: Sequence[int]) -> str:
    return ", ".join(str(unit) for unit in units[:8]) + (", ..." if len(units) > 8 else "")


# ---- building -----------------------------------------------------------------------------------
class _Builder:
    """Turns a tracer's facts into groups; every step is a method, in order."""

    def __init__(self, tracer: Tracer, idle: Idle, net: nn.Module) -> None:
        self.t = tracer
        self.idle = idle
        self.order = {name: number for number, (name, _) in enumerate(net.named_modules())}
        self.label = tracer.facts.components(tracer.slots.size)
        self.reasons = self._frozen_labels()
        self.producer_axes = self._producers()
        self.group_of = np.full(tracer.slots.size, -1)
        self.unit_of = np.full(tracer.slots.size, -1)

    def _frozen_labels(self) -> dict[int, list[Reason]]:
        reasons: dict[int, list[Reason]] = defaultdict(list)
        reasons[int(self.label[PADDING])] = [Reason("meets zeros padded beside its channels")]
        for ids, why in self.t.facts.frozen:
            for label in np.unique(self.label[ids]).tolist():
                if why not in reasons[label]:
                    reasons[label].append(why)
        return reasons

    def _producers(self) -> list[int]:
        """Return the axes that producers make, by module order and then by place in the net."""
        slots = self.t.slots
        axes = {int(slots.axis_of[made.slots[0]]) for made in self.t.producers}
        return sorted(axes, key=lambda axis: (self.order[self._module(axis)], axis))

    def _module(self, axis: int) -> str:
        return owner_of(self.t.slots.names[self.t.slots.axes[axis][0]])

    def _first_of_axis(self, axis: int) -> int:
        parameter, dim = self.t.slots.axes[axis]
        return self.t.slots.first_slot[parameter][dim]

    def _slots_of_axis(self, axis: int) -> np.ndarray:
        parameter, dim = self.t.slots.axes[axis]
        first = self._first_of_axis(axis)
        return np.arange(first, first + self.t.slots.shapes[parameter][dim])

    def alike(self) -> list[np.ndarray]:
        """Return the labels that live on the same producers in the same numbers, in order of appearance.

        Every axis parts the labels that it holds from those that were like them and that it doesn't hold, or
        holds in another number; how many of a frozen label lie on an axis parts nothing.
        """
        size = int(self.label.max()) + 1
        frozen = np.isin(np.arange(size), list(self.reasons))
        kind = frozen.astype(np.int64)  # of each label
        axis_met, first_met = np.full(size, -1), np.zeros(size, np.int64)  # where it appears
        kinds = 2
        for number, axis in enumerate(self.producer_axes):
            labels, first, counts = np.unique(
                self.label[self._slots_of_axis(axis)], return_index=True, return_counts=True
            )
            counts[frozen[labels]] = 1
            parts = np.unique(kind[labels] * (counts.max() + 1) + counts, return_inverse=True)[1]
            kind[labels] = kinds + parts
            kinds += int(parts.max()) + 1
            new = axis_met[labels] < 0
            axis_met[labels[new]], first_met[labels[new]] = number, first[new]
        met = np.flatnonzero(axis_met >= 0)
        met = met[np.lexsort((first_met[met], kind[met]))]
        sets = np.split(met, np.flatnonzero(np.diff(kind[met])) + 1) if len(met) else []
        return sorted(sets, key=lambda labels: (axis_met[labels[0]], frozen[labels[0]], first_met[labels[0]]))

    def groups(self) -> list[CouplingGroup]:
        slots = self.t.slots
        alike = self.alike()
        number_of_label = np.full(int(self.label.max()) + 1, -1)
        unit_of_label = np.full(int(self.label.max()) + 1, -1)
        for number, labels in enumerate(alike):
            number_of_label[labels] = number
            unit_of_label[labels] = np.arange(len(labels))
        self.group_of, self.unit_of = number_of_label[self.label], unit_of_label[self.label]
        self.group_of[:FIRST_SLOT] = self.unit_of[:FIRST_SLOT] = -1
        members, axes = self._members(len(alike)), self._axes_of_groups(len(alike))
        in_gate = self._axes_in_gates()
        groups: list[CouplingGroup] = []
        times_named: dict[str, int] = defaultdict(int)
        for number, labels in enumerate(alike):
            width = int((self.group_of[self._slots_of_axis(axes[number][0])] == number).sum())
            producers = tuple(dict.fromkeys(self._module(axis) for axis in axes[number]))
            times_named[producers[0]] += 1
            times = times_named[producers[0]]
            reasons = dict.fromkeys(why for label in labels.tolist() for why in self.reasons.get(label, ()))
            role: Role = "se_hidden" if in_gate.issuperset(axes[number]) else "ungated"
            groups.append(
                CouplingGroup(
                    name=(producers[0] or "net") + (f"#{times}" if times > 1 else ""),
                    role="frozen" if reasons else role,
                    width=width,
                    units=len(labels),
                    producers=producers,
                    gates=(),
                    members=members[number],
                    reasons=tuple(reasons),
                )
            )
        assert slots.size == len(self.group_of)
        return groups

    def _axes_of_groups(self, groups: int) -> list[list[int]]:
        """Return the axes of producers that each group has channels on."""
        axes: list[list[int]] = [[] for _ in range(groups)]
        for axis in self.producer_axes:
            for number in np.unique(self.group_of[self._slots_of_axis(axis)]).tolist():
                if number >= 0:
                    axes[number].append(axis)
        return axes

    def _axes_in_gates(self) -> set[int]:
        """Return the axes that producers make in gates' branches only."""
        axes: dict[bool, set[int]] = {True: set(), False: set()}
        for made in self.t.producers:
            in_gate = made.mark is not None and made.mark.in_gate
            axes[in_gate].add(int(self.t.slots.axis_of[made.slots[0]]))
        return axes[True] - axes[False]

    def _members(self, groups: int) -> list[tuple[Member, ...]]:
        slots = self.t.slots
        members: list[list[Member]] = [[] for _ in range(groups)]
        inside = np.flatnonzero(self.group_of >= 0)
        order = inside[np.lexsort((inside, slots.axis_of[inside], self.group_of[inside]))]
        keys = self.group_of[order] * len(slots.axes) + slots.axis_of[order]
        for part in np.split(order, np.flatnonzero(np.diff(keys)) + 1) if len(order) else ():
            axis = int(slots.axis_of[part[0]])
            dim, which, index = slots.places(axis, part - self._first_of_axis(axis))
            member = Member(slots.names[slots.axes[axis][0]], dim, self.unit_of[part][which], index)
            members[int(self.group_of[part[0]])].append(member)
        return [tuple(parts) for parts in members]

    def gates(self, groups: list[CouplingGroup]) -> tuple[Gate, ...]:
        """Name each found gate and its group: the one that most of its channels belong to."""
        gates: list[Gate] = []
        times_named: dict[str, int] = defaultdict(int)
        for found in self.t.gates.found:
            times_named[found.module] += 1
            times = times_named[found.module]
            number = _most_common(self.group_of[found.gated])
            units = np.where(self.group_of[found.gated] == number, self.unit_of[found.gated], -1)
            made = found.gated[found.gated != NONE]
            gate = Gate(
                name=(found.module or "net") + (f"#{times}" if times > 1 else ""),
                channels=found.channels,
                activation=found.activation,
                kind=found.kind,
                producer=self.t.slots.owner(int(made[0])) if len(made) else "",
                group=groups[number].name if number >= 0 else "",
                units=units if number >= 0 else np.full(found.channels, -1),
                site=found.site,
            )
            gates.append(gate)
            if number >= 0:
                group = groups[number]
                multiplied = group.role != "frozen" and gate.kind != "shift"
                role: Role = "gated" if multiplied else group.role
                groups[number] = replace(group, gates=(*group.gates, gate.name), role=role)
        return tuple(gates)

    def producers(self) -> tuple[Producer, ...]:
        """Return every layer that makes channels, in module order, and then those that nothing follows."""
        followed = [
            Producer(self._module(axis), self.group_of[self._slots_of_axis(axis)])
            for axis in self.producer_axes
        ]
        opaque = [
            Producer(module, np.full(channels, -1), why) for module, (channels, why) in self.t.opaque.items()
        ]
        return (*followed, *opaque)

    def readers(self) -> tuple[Reader, ...]:
        return tuple(
            Reader(
                parameter=read.parameter,
                dim=read.dim,
                groups=read.groups,
                transposed=read.transposed,
                pooled=read.mark is not None and read.mark.in_gate,
                site=read.site,
                group=self.group_of[read.ids],
                unit=self.unit_of[read.ids],
                mixed=read.mixed,
            )
            for read in self.t.readers
            if (self.group_of[read.ids] >= 0).any()
        )

    def parameter_products(self) -> list[Product]:
        slots = self.t.slots
        every: list[Product] = []
        for number, name in enumerate(slots.names):
            if name in slots.parameters:
                lengths, first = slots.shapes[number], slots.first_slot[number]
                axes = tuple(np.arange(f, f + n) for f, n in zip(first, lengths, strict=True))
                every.append(Product(1, axes))
        return every

    def sizes(self) -> tuple[SizeUse, ...]:
        return tuple(
            SizeUse(source.module, source.attribute, source.index, ids, factor)
            for source, (ids, factor) in self.t.claims.counted.items()
        )

    def factors(self) -> tuple[Factor, ...]:
        slots, found = self.t.slots, []
        for rescaling in self.t.rescalings:
            of_axis = slots.axis_of[rescaling.slots]
            for axis in np.unique(of_axis).tolist():
                parameter, dim = slots.axes[axis]
                index = rescaling.slots[of_axis == axis] - self._first_of_axis(axis)
                found.append(Factor(slots.names[parameter], dim, index, rescaling.width))
        return tuple(found)

    def along_channels(self, groups: list[CouplingGroup]) -> dict[str, tuple[str, ...]]:
        modules: dict[str, list[str]] = defaultdict(list)
        for module, ids in self.t.along_channels:
            for number in np.unique(self.group_of[ids]).tolist():
                if number >= 0:
                    modules[groups[number].name].append(module)
        return {name: tuple(dict.fromkeys(found)) for name, found in modules.items()}

    def build(self) -> Coupling:
        groups = self.groups()
        gates = self.gates(groups)
        first = np.cumsum([0, *(group.units for group in groups)])
        inside = self.group_of >= 0
        unit_of_slot = np.where(inside, first[self.group_of] + self.unit_of, -1)
        units = int(first[-1])
        slots = self.t.slots
        return Coupling(
            gates=gates,
            groups=tuple(groups),
            producers=self.producers(),
            readers=self.readers(),
            shapes=dict(zip(slots.names, slots.stored, strict=True)),
            parameters=frozenset(slots.parameters),
            idle=self.idle,
            calls=tuple(self.t.calls[: self.t.ending.calls if self.t.ending else None]),
            along_channels=self.along_channels(groups),
            _unit_of_slot=unit_of_slot,
            _macs=_cost_table(self.t.products, unit_of_slot, units),
            _params=_cost_table(self.parameter_products(), unit_of_slot, units),
            _kinds=tuple((p.kind, p.groups, len(p.axes)) for p in self.t.products),
            _sizes=self.sizes(),
            _factors=self.factors(),
            _operations=tuple(self.t.operations),
            ending=self.t.ending,
        )


def _most_common(numbers: np.ndarray) -> int:
    """Return the most frequent number that is not -1, or -1."""
    found, counts = np.unique(numbers[numbers >= 0], return_counts=True)
    return int(found[counts.argmax()]) if len(found) else -1


def trace(net: nn.Module, inputs: Inputs, *, eca_neighbours: bool = False) -> Coupling:
    """Trace one forward of one image in eval mode and return gates, groups, readers and costs.

    Where the net has parameters that this forward doesn't take, another in training mode adds what the layers
    that run only there tie together; what runs in neither stays as it is, and `idle` names it.

    `inputs` is a tensor (N, ...) or a tuple of them; the first image is used, at its real size. The
    net is left as it was. With `eca_neighbours`, channels along which a convolution runs (ECA) may go; those
    left become neighbours, so that its result is not that of masking. Raises InputError where the forward
    fails or decides on data.
    """
    net, inputs = traceable(net, inputs)
    return _Builder(*run_tracer(net, inputs, eca_neighbours=eca_neighbours), net).build()


def find_gates(net: nn.Module, inputs: Inputs) -> tuple[Gate, ...]:
    """Return the network's Squeeze-and-Excitation gates, in the order in which they run.

    >>> import sepress, timm, torch
    >>> net = timm.create_model("mobilenetv3_small_050")
    >>> gates = sepress.find_gates(net, torch.randn(1, 3, 64, 64))
    >>> len(gates), gates[0].name, gates[0].channels, gates[0].activation
    (9, 'blocks.0.0.se', 16, 'hardsigmoid')
    """
    return trace(net, inputs).gates


def find_groups(net: nn.Module, inputs: Inputs) -> tuple[CouplingGroup, ...]:
    """Return the sets of channels that can only be removed together, in module order.

    >>> import sepress, timm, torch
    >>> net = timm.create_model("mobilenetv3_small_050")
    >>> groups = sepress.find_groups(net, torch.randn(1, 3, 64, 64))
    >>> [(group.name, group.width, group.role) for group in groups][:2]
    [('conv_stem', 16, 'gated'), ('blocks.0.0.se.conv_reduce', 8, 'se_hidden')]
    >>> groups[-1].frozen_because
    'network output'
    """
    return trace(net, inputs).groups


__all__ = ["Coupling", "find_gates", "find_groups", "trace"]
