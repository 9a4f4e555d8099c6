"""What `inspect` says of a net's structure."""

from __future__ import annotations

import ast
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import sepress.coupling
from sepress.bundle import load_model
from sepress.coupling import trace
from sepress.inspection import ChannelShares, Inspection, channel_shares, inspect_bundle
from sepress.inspection.patterns import fold
from sepress.inspection.reasons import explain
from sepress.measure import count_macs, count_params
from tests import nets


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        # conv a makes 8, conv b 6, the head 5 outputs
        ("plain", ChannelShares(gated=0, ungated=14, se_hidden=0, frozen=0, outputs=5)),
        # stem 8, outer 8 and expand 8 share the gated stream; inner 6, squeeze 4
        ("se residual", ChannelShares(gated=24, ungated=6, se_hidden=4, frozen=0, outputs=5)),
    ],
)
def test_shares_count_what_every_layer_makes(name: str, shares: ChannelShares) -> None:
    counted = channel_shares(trace(*nets.build(name)))
    assert counted == shares
    assert counted.free == 1


def test_a_layer_that_nothing_follows_counts_as_frozen() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nets.conv_bn(3, 8), nets.Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.conv2d(self.a(x), torch.ones(6, 8, 3, 3)))

    coupling = trace(Computed().eval(), nets.images())
    shares = channel_shares(coupling)
    assert shares == ChannelShares(gated=0, ungated=0, se_hidden=0, frozen=8 + 6, outputs=5)
    assert (shares.free, shares.share("frozen")) == (0, 1)
    opaque = coupling.producers[-1]
    assert (opaque.module, str(opaque.reason)) == ("", "convolution with a weight that is not a parameter")


def test_a_net_of_outputs_only_is_free() -> None:
    shares = channel_shares(trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(1, 3, 2, 2)))
    assert shares == ChannelShares(gated=0, ungated=0, se_hidden=0, frozen=0, outputs=4)
    assert (shares.free, shares.share("ungated")) == (1, 0)


@pytest.mark.parametrize("name", ["seresnet18", "mobilenetv3_small_050", "regnety_002", "ghostnet_050"])
def test_shares_add_up_to_the_output_channels_of_all_layers(name: str) -> None:
    net = load_model(f"timm:{name}", weights="none").net
    shares = channel_shares(trace(net.eval(), torch.randn(1, 3, 64, 64)))
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    made = sum(m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for m in layers)
    assert shares.total + shares.outputs == made
    assert shares.outputs == 1000


# ---- one screen ---------------------------------------------------------------------------------
def inspected(net: nn.Module, x: Tensor) -> Inspection:
    coupling = trace(net, x)
    macs, params = coupling.count_macs({}), coupling.count_params({})
    return Inspection("model.pt", tuple(x.shape[1:]), True, macs, params, coupling)


def text(found: Inspection, width: int = 80, *, full: bool = False) -> str:
    """What a pipe of that width is given, without the spaces that pad tables."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(found.render(full=full, command="model.pt"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# By hand: conv weights 8*3*9 + 6*8*9 + 8*6*9 = 1080, at 12 * 12 positions; SE 2 * 8 * 4; head 8 * 5.
SE_RESIDUAL = """\
model.pt at 3x12x12: 155.6 k MACs, 1.25 k parameters

Role       Channels  Share  Groups  Judged by
gated            24  70.6%       1  reconstruction, or its gates
ungated           6  17.6%       1  reconstruction, or L2
se-hidden         4  11.8%       1  reconstruction, or L2
outputs           5      -       1  nothing: the net returns it
Channels: output channels of all convolutions and linear layers; the shares
leave outputs out.
Judged by: reconstruction is the default; criteria of excitation ask the gates,
and L2 elsewhere.

Gates: 1
Where  Gates  Channels  Kind            Judges
se         1         8  scale, sigmoid  stem.0

Frozen: nothing but what the net returns (head.fc).

Groups that most MACs depend on: those of the layers that make or read one
Group       Width  Gates    MACs  Role
stem.0          8      1  100.0%  gated
inner.0         6      0   79.9%  ungated
se.squeeze      4      0    0.0%  se-hidden
head.fc         5      0    0.0%  output

What next
sepress inspect model.pt --full (every gate, every group)
sepress prune model.pt --ratio 0.3 --dry-run (what would go)"""


def test_the_screen_of_a_small_net_is_known_word_by_word() -> None:
    assert text(inspected(*nets.build("se residual"))) == SE_RESIDUAL


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("full", [False, True])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width: int, full: bool) -> None:
    found = inspected(*nets.build("se residual"))
    shown, whole = text(found, width, full=full), text(found, 200, full=full)
    assert max(map(len, shown.splitlines())) <= width
    assert sorted(shown.split()) == sorted(whole.split())


def test_names_of_gates_stay_whole_in_sixty_columns() -> None:
    found = inspect_bundle(load_model("timm:mobilenetv3_small_050", weights="none"))
    lines = [line.split() for line in text(found, 60).splitlines()]
    named = [line[0] for line in lines if line and line[0].startswith("blocks") and line[0].endswith(".se")]
    assert named == ["blocks.0.0.se", "blocks.2.*.se", "blocks.3.*.se", "blocks.4.*.se"]


@pytest.mark.parametrize("name", ["haloregnetz_b", "efficientnet_b0"])
def test_a_net_of_any_size_takes_one_screen_and_the_full_form_names_every_group_and_gate(name: str) -> None:
    found = inspect_bundle(load_model(f"timm:{name}", weights="none"))
    assert "Structure only: no weights were loaded." in text(found)
    assert len(text(found, 100).splitlines()) <= 41
    full = set(text(found, 200, full=True).split())
    coupling = found.coupling
    assert {group.name for group in coupling.groups} | {gate.name for gate in coupling.gates} <= full


def test_what_is_frozen_says_which_operation_in_which_module_why_and_what_it_holds() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nets.conv_bn(3, 8), nets.Head(8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).split([2, 6], 1)
            return self.head(torch.cat([b, a], 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Split()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    found = inspected(Net().eval(), nets.images())
    lines = inspect.getsourcelines(Split.forward)
    number = lines[1] + next(at for at, line in enumerate(lines[0]) if "split" in line)
    what = f"split at sizes written in the code (test_inspection.py, line {number})"
    section = text(found, 200).split("\n\n")[3]
    assert section.splitlines() == [
        "Frozen: 8 channels, besides what the net returns (block.head.fc)",
        "Channels  What meets them, where, and why that holds them",
        f"       8  {what} in block: surgery doesn't rewrite numbers in code. Holds block.stem.0.",
    ]
    reasons = found.to_json()["groups"][0]["reasons"]
    assert [(reason["what"], reason["module"]) for reason in reasons] == [(what, "block")]


def test_a_pipe_gets_plain_ascii_text() -> None:
    command = [sys.executable, "-m", "sepress", "inspect", "sepress:se_resnet8"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout
    assert done.stdout.decode("ascii").startswith("sepress:se_resnet8 at 3x32x32: ")
    assert done.stderr == b""


def test_the_full_form_lists_groups_and_hints_at_nothing() -> None:
    command = [sys.executable, "-m", "sepress", "inspect", "sepress:se_resnet8", "--full"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "What next" not in done.stdout
    assert "stages.0.0.conv1" in done.stdout


# ---- words --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["layer1.0.se", "layer1.1.se", "layer2.0.se"], ["layer1.*.se", "layer2.0.se"]),
        (["b.2.0.se", "b.2.1.se", "b.4.0.se", "b.4.1.se"], ["b.2.*.se", "b.4.*.se"]),
        (["f.4.block.2", "f.5.block.2", "f.1.block.1"], ["f.*.block.2", "f.1.block.1"]),
        (["se", "se", "a.0"], ["se", "a.0"]),
        ([], []),
        ([f"s.{stage}.{block}.se" for stage in range(5) for block in range(2)], ["s.*.*.se"]),
    ],
)
def test_names_fold_by_stage_and_further_where_stages_are_many(names: list[str], patterns: list[str]) -> None:
    folded = fold(names, most=4)
    assert list(folded) == patterns
    assert sorted(name for found in folded.values() for name in found) == sorted(set(names))


def test_every_reason_that_a_rule_gives_is_explained() -> None:
    """A new one needs its line in sepress/inspection/reasons.py."""
    assert [what for what in reasons_in_the_source() if explain(what) is None] == []


def reasons_in_the_source() -> list[str]:
    """What coupling/ passes on as a reason, in calls and variables named `why`; '*' for what is filled in."""
    given: list[ast.expr] = []
    for file in Path(sepress.coupling.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given += node.args if name in REASONING else []
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "why":
                given.append(node.value)
    texts = [part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    for part in given:
        if isinstance(part, ast.JoinedStr):
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "*" for v in part.values))
    texts = [
        text for text in texts if any(map(str.isalpha, text))
    ]  # not one that is put together from others
    assert len(texts) > 30
    return texts


REASONING = {"freeze", "freeze_parameter", "_freeze_layer", "add_opaque", "Reason"}


# ---- figures ------------------------------------------------------------------------------------
def test_json_counts_gates_groups_macs_and_params_and_shares_add_up_to_one() -> None:
    bundle = load_model("timm:mobilenetv3_small_050", weights="none")
    found = inspect_bundle(bundle)
    value = found.to_json()
    assert len(value["gates"]) == 9  # SE in 9 of MobileNetV3-small's 11 blocks (Howard et al. 2019, table 2)
    assert all({"name", "channels"} <= gate.keys() for gate in value["gates"])
    assert all({"name", "role", "width", "gates"} <= group.keys() for group in value["groups"])
    assert value["macs"] == count_macs(bundle.net, torch.randn(1, 3, 224, 224))
    assert value["params"] == count_params(bundle.net)
    named = {gate["name"] for gate in value["gates"]}
    assert {name for group in value["groups"] for name in group["gates"]} == named
    shares = channel_shares(found.coupling)
    roles = ("gated", "ungated", "se_hidden", "frozen")
    assert value["channels"] == {
        **{role: getattr(shares, role) for role in roles},
        "outputs": 1000,
        "free_share": 1.0,
    }
    assert sum(group["made_channels"] for group in value["groups"]) == shares.total + shares.outputs
    assert abs(sum(map(shares.share, roles)) - 1) < 1e-9


def test_macs_of_a_group_are_those_of_the_layers_that_make_or_read_it() -> None:
    found = inspected(*nets.build("plain"))
    a, b, head = 8 * 3 * 9 * 144, 6 * 8 * 9 * 144, 5 * 6
    assert found.touched_macs().tolist() == [a + b, b + head, head]


def test_a_net_without_gates_is_said_to_have_none_and_what_is_frozen_says_why() -> None:
    found = inspect_bundle(load_model("torchvision:mobilenet_v2", weights="none"))
    shown = text(found, 100)
    assert "No excitation was found, since the net has no gate: channels are judged without it." in shown
    assert "Frozen: nothing but what the net returns (classifier.1)." in shown
    assert found.to_json()["gates"] == []
