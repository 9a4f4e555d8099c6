"""Whatever a forward returns, takes or recomputes: every tensor is found, frozen and compared."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sepress
from sepress.coupling import apply_removal, check_removal, trace
from sepress.errors import InputError
from sepress.outputs import named_outputs, tensors_in
from sepress.parity import check_onnx_parity
from sepress.train.evaluate import logits_of

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
Pair = namedtuple("Pair", "logits aux")


@dataclasses.dataclass
class Result:
    logits: Tensor
    aux: Tensor
    loss: Tensor | None = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As Hugging Face's: a mapping whose entries are attributes too, without those that are None."""

    def __init__(self, logits: Tensor, aux: Tensor, loss: Tensor | None = None) -> None:
        fields = {"logits": logits, "aux": aux, "loss": loss}
        super().__init__({key: value for key, value in fields.items() if value is not None})

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()


class Holder:
    def __init__(self, logits: Tensor, aux: Tensor) -> None:
        self.logits, self.aux, self.parent = logits, aux, self


SHAPES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"out": a, "aux": b},
    "named tuple": Pair,
    "dataclass": Result,
    "model output": ModelOutput,
    "object": Holder,
    "nested": lambda a, b: {"out": (a, [Result(b, a)]), "names": ["x", None, 3]},
}


class Returning(nn.Module):
    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nets.conv_bn(3, 8), nets.conv_bn(8, 6)
        self.head, self.aux, self.shape = nets.Head(6), nn.Conv2d(8, 4, 1), shape

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        return self.shape(self.head(self.b(x).relu()), self.aux(x))


def remove_some(net: nn.Module, inputs: Any) -> tuple[nn.Module, Any, dict[str, tuple[int, ...]]]:
    coupling = trace(net, inputs)
    removed = {g.name: tuple(range(0, g.units, 3))[: g.units - 1] for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed, check
    assert culprits == {}
    return pruned, coupling, removed


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_that_a_net_returns_is_frozen_and_compared(shape: str) -> None:
    net = nets.lively(Returning(SHAPES[shape]))
    pruned, coupling, removed = remove_some(net, IMAGES)
    assert [g.name for g in coupling.prunable()] == ["a.0", "b.0"]
    assert coupling.group("aux").frozen_because == "network output"
    with torch.no_grad():
        pruned.aux.bias[0] += 0.1
    assert check_removal(net, pruned, coupling, removed, IMAGES)[0].passed is False


@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_the_first_tensor_of_one_row_an_image_and_one_column_a_class(shape: str) -> None:
    a, b = torch.zeros(2, 5), torch.zeros(2, 4, 3, 3)
    assert logits_of(SHAPES[shape](a, b), classes=5) is a
    assert logits_of(SHAPES[shape](b, a), classes=5) is a


@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("object", "nested")])
def test_every_output_gets_into_the_onnx_file(shape: str, tmp_path: Path) -> None:
    net = nets.lively(Returning(SHAPES[shape]))
    sepress.export_onnx(net, tmp_path / "net.onnx", example=IMAGES)
    check = check_onnx_parity(net, tmp_path / "net.onnx", IMAGES)
    assert check.passed, check
    assert len(named_outputs(net(IMAGES))) == 2


def test_outputs_that_are_no_tensors_or_have_one_name_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="holds a str"):
        named_outputs({"out": torch.zeros(1), "names": ["x"]})
    with pytest.raises(InputError, match="two of the net's outputs would be called 'a_b'"):
        named_outputs({"a": {"b": torch.zeros(1)}, "a_b": torch.zeros(1)})


def test_an_object_that_refers_to_itself_is_read_once() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert list(tensors_in(Holder(a, b))) == [a, b]


# ---- several inputs -------------------------------------------------------------------------------
class WithMetadata(nn.Module):
    """An image and a vector beside it: its features join the image's, and gate them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nets.conv_bn(3, 16), nets.conv_bn(16, 16)
        self.se = nets.SqueezeExcite(16, 8)
        self.embed, self.head = nn.Linear(7, 8), nn.Linear(24, 5)

    def forward(self, image: Tensor, metadata: Tensor) -> Tensor:
        x = self.se(self.b(self.a(image).relu())).relu()
        return self.head(torch.cat([x.mean((2, 3)), self.embed(metadata).relu()], 1))


METADATA = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))


def test_a_net_of_an_image_and_a_vector_is_traced_pruned_checked_and_exported(tmp_path: Path) -> None:
    net = nets.lively(WithMetadata())
    pruned, coupling, _ = remove_some(net, (IMAGES, METADATA))
    assert {g.name for g in coupling.prunable()} == {"a.0", "b.0", "se.squeeze", "embed"}
    sepress.export_onnx(pruned, tmp_path / "net.onnx", example=(IMAGES, METADATA))
    assert check_onnx_parity(pruned, tmp_path / "net.onnx", (IMAGES, METADATA)).passed
    pruned.train()(IMAGES, METADATA).square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_prune_takes_several_inputs_as_a_tuple_or_as_batches_of_tuples() -> None:
    net = nets.lively(WithMetadata())
    images, metadata = IMAGES.repeat(6, 1, 1, 1) + torch.randn(24, 1, 1, 1), torch.randn(24, 7)
    whole = sepress.prune(net, calibration=(images, metadata), ratio=0.3, min_width=2, batch_size=8)
    assert whole.report.checks["masked_equals_removed"].passed
    assert whole.net.head.in_features < 24
    assert whole.report.measurements[1].macs == whole.plan.macs_after
    batches = list(zip(images.split(8), metadata.split(8), strict=True))
    assert sepress.prune(net, calibration=batches, ratio=0.3, min_width=2).plan == whole.plan


def test_a_tuple_of_inputs_and_labels_is_one_batch() -> None:
    net = nets.lively(nets.Residual(se=True))
    labels = torch.arange(4)
    result = sepress.prune(
        net, calibration=(IMAGES, labels), ratio=0.3, min_width=2, criterion="fisher", compensate=False
    )
    assert result.plan.criterion == "fisher"


def test_what_takes_only_images_says_so_of_several_inputs() -> None:
    net = nets.lively(WithMetadata())
    with pytest.raises(InputError, match="2 inputs for each image"):
        sepress.fold(net, calibration=(IMAGES, METADATA))
    with pytest.raises(InputError, match="takes 2 inputs"):
        sepress.prune(net, calibration=(IMAGES, METADATA), target_latency=0.5)
    with pytest.raises(InputError, match="missing 1 required positional argument"):
        sepress.prune(net, calibration=IMAGES, ratio=0.3)


# ---- recomputed and random layers -------------------------------------------------------------------
class Recomputed(nn.Module):
    def __init__(self, *, reentrant: bool, always: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nets.conv_bn(3, 8), nets.conv_bn(8, 8), nets.conv_bn(8, 6)
        self.head = nets.Head(6)
        self.reentrant, self.always = reentrant, always

    def block(self, x: Tensor) -> Tensor:
        return self.b(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.training or self.always:
            x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        else:
            x = x + self.block(x)
        return self.head(self.c(x).relu())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("always", [True, False])
def test_a_block_that_is_recomputed_is_traced_as_any(reentrant: bool, always: bool) -> None:
    net = nets.lively(Recomputed(reentrant=reentrant, always=always))
    plain = trace(nets.lively(Recomputed(reentrant=reentrant, always=False)), IMAGES)
    pruned, coupling, _ = remove_some(net, IMAGES)
    assert [(g.name, g.producers) for g in coupling.groups] == [(g.name, g.producers) for g in plain.groups]
    assert coupling.group("a.0").producers == ("a.0", "b.0")
    pruned.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())


class Dropping(nn.Module):
    """Stochastic depth as it is written in the wild, and dropouts, with a head in training behind them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 8), nets.Head(8)
        self.aux, self.drop, self.how = nn.Linear(8, 5), nn.Dropout2d(0.5), how

    def dropped(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.how == "branch":
            return x * 0 if torch.rand(1).item() < 0.5 else x
        if self.how == "bernoulli":
            return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5) / 0.5
        if self.how == "floor":
            return x.div(0.5) * (0.5 + torch.rand(len(x), 1, 1, 1)).floor_()
        return self.drop(x)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        x = (x + self.dropped(self.b(x))).relu()
        return (self.head(x), self.aux(x.mean((2, 3)))) if self.training else self.head(x)


@pytest.mark.parametrize("how", ["branch", "bernoulli", "floor", "dropout"])
def test_what_is_dropped_at_random_in_training_ties_nothing_more(how: str) -> None:
    net = nets.lively(Dropping(how))
    pruned, coupling, removed = remove_some(net, IMAGES)
    assert coupling.idle.training == ("aux",)
    assert coupling.group("a.0").producers == ("a.0", "b.0")
    assert pruned.aux.in_features == 8 - len(removed["a.0"])
    out, aux = pruned.train()(IMAGES)
    (out.square().mean() + aux.square().mean()).backward()
