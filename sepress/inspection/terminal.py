"""Inspection -> one screen: shares, gates, what is frozen, what costs most, and what to do next.

Whatever the net's size, the short form takes about 40 lines of 100 columns: names fold into patterns, and
what is left out is counted. The full form lists every gate and group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from sepress.criteria.doubts import no_excitation
from sepress.defaults import AUTO
from sepress.inspection.patterns import fold
from sepress.inspection.reasons import Frozen, explain, frozen_by_reason
from sepress.inspection.shares import channel_shares, is_output, made_channels
from sepress.report import words
from sepress.types import CouplingGroup, Role

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from sepress.inspection import Inspection

GATES, FROZEN, COSTLY = 7, 3, 4  # rows of the short form
WHOLE_NAMES = 20  # letters of a gate's name beside which 60 columns hold all else
PLACES = 2  # patterns of names given as examples in a line
_ROLES: tuple[Role, ...] = get_args(Role)


def render(inspection: Inspection, *, full: bool, command: str) -> RenderableType:
    """Return what the terminal shows; nothing in it is taken for markup."""
    from rich.console import Group

    blocks = [*_head(inspection), *_shares(inspection)]
    sections = [_gates(inspection, full), _frozen(inspection, full)]
    sections += [_groups(inspection)] if full else [_costly(inspection), _hints(command)]
    for section in sections:
        blocks += [_line(""), *section]
    return Group(*blocks)


def _head(inspection: Inspection) -> Iterator[RenderableType]:
    size = "x".join(map(str, inspection.input_size))
    cost = f"{words.count(inspection.macs)} MACs, {words.count(inspection.params)} parameters"
    yield _line(f"{inspection.model} at {size}: {cost}", style="bold")
    if not inspection.trained:
        yield _line("Structure only: no weights were loaded.", style="dim")
    yield _line("")


def _shares(inspection: Inspection) -> Iterator[RenderableType]:
    """The output channels in each role, and what can judge them."""
    coupling = inspection.coupling
    shares = channel_shares(coupling)
    outputs = sum(map(is_output, coupling.groups))
    told = no_excitation(coupling) is None
    groups = Counter(group.role for group in coupling.groups)
    groups["frozen"] -= outputs
    judges: dict[Role, str] = {
        "gated": f"{AUTO}, or its gates" if told else AUTO,
        "ungated": f"{AUTO}, or L2" if told else AUTO,
        "se_hidden": f"{AUTO}, or L2" if told else AUTO,
        "frozen": "nothing: it stays",
    }
    table = _table("Role", ">Channels", ">Share", ">Groups", "Judged by")
    for role in _ROLES:
        count: int = getattr(shares, role)
        if count:
            share = words.percent(shares.share(role), 1)
            table.add_row(_hyphened(role), f"{count:,}", share, str(groups[role]), judges[role])
    table.add_row("outputs", f"{shares.outputs:,}", "-", str(outputs), "nothing: the net returns it")
    yield table
    yield _line(
        "Channels: output channels of all convolutions and linear layers; the shares leave outputs out.",
        style="dim",
    )
    if told:
        yield _line(
            f"Judged by: {AUTO} is the default; criteria of excitation ask the gates, and L2 elsewhere.",
            style="dim",
        )


def _gates(inspection: Inspection, full: bool) -> Iterator[RenderableType]:
    """The gates: one row for each pattern of names, or for each gate."""
    gates = {gate.name: gate for gate in inspection.coupling.gates}
    if unheard := no_excitation(inspection.coupling):
        yield _line(words.sentence(unheard))
    if not gates:
        return
    yield _line(f"Gates: {len(gates)}", style="bold")
    rows = {name: [name] for name in gates} if full else fold(gates, most=GATES)
    frozen = {group.name for group in inspection.coupling.groups if group.role == "frozen"}
    table = _table("Where", ">Gates", ">Channels", "Kind", "Judges")
    table.columns[0].no_wrap = max(map(len, rows)) <= WHOLE_NAMES
    for pattern, names in _first(rows, None if full else GATES):
        here = [gates[name] for name in names]
        table.add_row(
            _line(pattern),
            str(len(here)),
            _span(gate.channels for gate in here),
            "; ".join(dict.fromkeys(f"{gate.kind}, {gate.activation}" for gate in here)),
            _line(_judged([gate.group for gate in here], frozen)),
        )
    yield table
    yield from _left_out(len(rows), len(table.rows), "pattern")
    if not unheard:
        silent = {f"{gate.kind}, {gate.activation}": gate.silent_because for gate in gates.values()}
        for kind, why in silent.items():
            if why is not None:
                yield _line(
                    f"  A gate '{kind}' does not tell how much a channel counts: it {why}.", style="dim"
                )


def _judged(groups: Sequence[str], frozen: Collection[str]) -> str:
    """The groups that gates judge, and whether those can be pruned at all."""
    if not any(groups):
        return "channels that no layer made"
    held = sum(group in frozen for group in groups)
    note = "" if not held else " (frozen)" if held == len(groups) else " (some frozen)"
    return _places([group for group in groups if group]) + note


def _frozen(inspection: Inspection, full: bool) -> Iterator[RenderableType]:
    """What stays and why, by reason: what met the channels, where, and why that holds them."""
    outputs = [group.name for group in inspection.coupling.groups if is_output(group)]
    kinds = frozen_by_reason(inspection.coupling)
    frozen = channel_shares(inspection.coupling).frozen
    returned = f"what the net returns ({_places(outputs)})"
    if not kinds:
        yield _line(f"Frozen: nothing but {returned}.")
        return
    several = " (some for several reasons)" if sum(kind.channels for kind in kinds) > frozen else ""
    yield _line(f"Frozen: {frozen:,} channels{several}, besides {returned}", style="bold")
    shown = kinds if full else kinds[:FROZEN]
    table = _table(">Channels", "What meets them, where, and why that holds them")
    for kind in shown:
        table.add_row(f"{kind.channels:,}", _line(_kind(kind, None if full else PLACES)))
    yield table
    yield from _left_out(len(kinds), len(shown), "reason")


def _kind(kind: Frozen, most: int | None) -> str:
    where = f" in {_places(kind.modules, most)}" if kind.modules else ""
    why = explain(kind.what)
    said = f"{kind.what}{where}" + (f": {why}" if why else "")
    return f"{said}. Holds {_places(kind.names, most)}."


def _costly(inspection: Inspection) -> Iterator[RenderableType]:
    """The groups that most MACs depend on."""
    coupling = inspection.coupling
    touched = inspection.touched_macs()
    yield _line("Groups that most MACs depend on: those of the layers that make or read one", style="bold")
    table = _table("Group", ">Width", ">Gates", ">MACs", "Role")
    for at in (-touched).argsort(kind="stable")[:COSTLY]:
        group = coupling.groups[at]
        cost = words.percent(touched[at] / max(1, inspection.macs), 1)
        table.add_row(_line(group.name), str(group.width), str(len(group.gates)), cost, _role(group))
    yield table


def _groups(inspection: Inspection) -> Iterator[RenderableType]:
    """Every group, in module order."""
    coupling = inspection.coupling
    counted = zip(coupling.groups, made_channels(coupling), inspection.touched_macs(), strict=True)
    yield _line("Groups: channels that can only go together", style="bold")
    table = _table("Group", ">Width", ">Channels", ">Gates", ">MACs", "Role")
    for group, made, macs in counted:
        cost = words.percent(macs / max(1, inspection.macs), 1)
        gates = str(len(group.gates))
        table.add_row(_line(group.name), str(group.width), f"{made:,}", gates, cost, _role(group))
    yield table
    yield _line(
        "Width: channels of the group's first layer. Channels: those of all layers that make it. "
        "MACs: those of all layers that make or read it.",
        style="dim",
    )


def _role(group: CouplingGroup) -> str:
    return "output" if is_output(group) else _hyphened(group.role)


def _hyphened(role: Role) -> str:
    return role.replace("_", "-")


def _hints(command: str) -> Iterator[RenderableType]:
    yield _line("What next", style="bold")
    yield _line(f"sepress inspect {command} --full (every gate, every group)")
    yield _line(f"sepress prune {command} --ratio 0.3 --dry-run (what would go)")


# ---- words --------------------------------------------------------------------------------------
def _places(names: Sequence[str], most: int | None = PLACES) -> str:
    """Names folded: 'layer1.*.se x 3, layer2.*.se x 4 and 2 more'."""
    patterns = fold(names, most=most or len(names))
    said = [f"{name} x {len(found)}" if len(found) > 1 else name for name, found in patterns.items()]
    return words.listed(said, most or len(said))


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _first(rows: dict[str, list[str]], most: int | None) -> list[tuple[str, list[str]]]:
    return list(rows.items())[:most]


def _left_out(total: int, shown: int, what: str) -> Iterator[RenderableType]:
    if total > shown:
        more = total - shown
        yield _line(f"  and {more} more {what}{'s' * (more > 1)} (--full)", style="dim")


def _table(*headers: str) -> Table:
    """A table whose headers start with '>' where their column is one of figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        figures = header.startswith(">")
        table.add_column(
            header.removeprefix(">"), justify="right" if figures else "left", no_wrap=figures, overflow="fold"
        )
    return table


def _line(text: str, *, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(words.plain(text), style=style, overflow="fold")
