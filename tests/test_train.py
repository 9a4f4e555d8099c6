"""train: the schedule, one step and one run by hand, resuming to the bit, evaluation, batch norm afresh."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from sepress.coupling import trace
from sepress.data import DataSource, DataSpec, make_loader, open_data
from sepress.errors import InputError
from sepress.train import (
    Accuracy,
    Polarisation,
    TrainConfig,
    decisions,
    evaluate,
    learning_rate,
    logits_of,
    loop,
    polarisation_notes,
    recalibrate_batchnorm,
    train,
)
from sepress.train.checkpoint import tensors_of
from sepress.train.loop import WeightAverage, build_optimizer, distillation_loss
from sepress.train.polarise import polarisation
from sepress.types import Preprocessing

CPU = torch.device("cpu")
GREY8 = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))
SHORT = TrainConfig(epochs=3, batch_size=8, lr=0.05)


def write_images(root: Path, *, classes: int, each: dict[str, int]) -> Path:
    """Class folders of 8 x 8 grey noise around a brightness of the class's own."""
    rng = np.random.default_rng(0)
    for split, count in each.items():
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(40 + 150 * label / max(1, classes - 1), 40, (8, 8)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """Three classes; 24 images to train on, 12 to validate, 9 to test."""
    root = write_images(tmp_path_factory.mktemp("three"), classes=3, each={"train": 8, "val": 4, "test": 3})
    return open_data(DataSpec(str(root), augment="none"), preprocessing=GREY8)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """Seven classes, one test image of each."""
    root = write_images(tmp_path_factory.mktemp("seven"), classes=7, each={"train": 2, "val": 1, "test": 1})
    return open_data(DataSpec(str(root), augment="none"), preprocessing=GREY8)


def small_net(seed: int = 0, *, dropout: float = 0.5) -> nn.Sequential:
    """A convolution, a norm, dropout and a classifier of three."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )


def linear_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def run(net: nn.Module, source: DataSource, config: TrainConfig = SHORT, **more: Any) -> Any:
    return train(net, source, config=config, device=CPU, **more)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = tensors_of(a), tensors_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


# ---- the configuration ----------------------------------------------------------------------------
def test_learning_rate_is_a_line_and_then_half_a_cosine() -> None:
    config = TrainConfig(epochs=2, lr=0.8, warmup_epochs=0.5)
    rates = [learning_rate(step, config, steps_per_epoch=4) for step in range(9)]
    cosine = [0.8 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert rates == pytest.approx([0.4, 0.8, *cosine])
    assert rates[5] == pytest.approx(0.4)
    assert rates[8] == pytest.approx(0)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(0, TrainConfig(epochs=1, lr=0.3, warmup_epochs=0), steps_per_epoch=5) == 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"batch_size": 1},
        {"optimizer": "adam"},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"warmup_epochs": 3.0, "epochs": 3},
        {"label_smoothing": 1.0},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"amp": "on"},
        {"channels_last": "on"},
        {"seed": -1},
        {"distill_weight": 1.5},
        {"temperature": 0.0},
        {"workers": -1},
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_expected(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))) as error:
        TrainConfig(**wrong)
    assert "Expected" in str(error.value)


# ---- the parts of a step --------------------------------------------------------------------------
def test_distillation_loss_is_the_softened_divergence_times_temperature_squared() -> None:
    student = torch.tensor([[0.0, math.log(3)]])  # 1/4, 3/4
    teacher = torch.zeros(1, 2)  # 1/2, 1/2
    by_hand = 0.5 * math.log(4 / 3)
    assert distillation_loss(student, teacher, temperature=1.0).item() == pytest.approx(by_hand)
    assert distillation_loss(2 * student, teacher, temperature=2.0).item() == pytest.approx(4 * by_hand)


def test_distillation_loss_is_zero_where_student_and_teacher_agree() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits + 3, temperature=4.0).item() == pytest.approx(0, abs=1e-6)


def test_weights_are_averaged_with_a_decay_that_grows_and_counters_are_copied() -> None:
    net = nn.BatchNorm1d(1)
    average = WeightAverage(net, decay=0.25)
    with torch.no_grad():
        for step, weight in ((1, 2.0), (2, 4.0), (5, 8.0)):
            net.weight.fill_(weight)
            net.num_batches_tracked.fill_(step)
            average.update(net, step)
    first = 2 / 11 * 1 + 9 / 11 * 2.0  # (1 + 1) / (10 + 1)
    second = 3 / 12 * first + 9 / 12 * 4.0
    third = 0.25 * second + 0.75 * 8.0  # 6 / 15 is above the decay asked for
    assert average.tensors["weight"].item() == pytest.approx(third)
    assert average.tensors["num_batches_tracked"].item() == 5


def test_applied_average_gives_the_nets_own_weights_back_after_an_error() -> None:
    net = small_net()
    before = copy.deepcopy(net)
    average = WeightAverage(small_net(1), decay=0.9)
    inside = []

    def fail() -> None:
        with average.applied(net):
            inside.append(equal(net, small_net(1)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert inside == [True]
    assert equal(net, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed_and_frozen_weights_not_trained(optimizer: Any) -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    built = build_optimizer(net, TrainConfig(optimizer=optimizer, weight_decay=0.01))
    decayed = {id(p) for g in built.param_groups if g["weight_decay"] == 0.01 for p in g["params"]}
    plain = {id(p) for g in built.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed == {id(net[6].weight)}
    assert plain == {id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[6].bias)}


def test_a_net_without_trainable_weights_is_refused(source: DataSource) -> None:
    net = linear_net().requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        run(net, source)


# ---- one step by hand -----------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("distilled", [False, True])
def test_one_step_is_the_one_worked_out_by_hand(
    source: DataSource, clip: float | None, distilled: bool
) -> None:
    """One batch of all 24 images, a linear net: the softmax's gradient is p - y, and so on."""
    net, teacher = linear_net(), linear_net()
    with torch.no_grad():
        teacher[1].weight.mul_(3)
    config = TrainConfig(
        epochs=1,
        batch_size=24,
        lr=0.2,
        momentum=0.9,
        weight_decay=0.01,
        warmup_epochs=0,
        label_smoothing=0.1,
        ema_decay=None,
        clip_norm=clip,
        distill_weight=0.25,
        temperature=3.0,
    )
    (images, targets), *none = make_loader(source.dataset("train"), batch_size=24)
    assert not none
    x = images.flatten(1).double()  # (24, 64)
    w, b = (t.detach().double().clone() for t in net[1].parameters())
    z = x @ w.T + b
    wanted = F.one_hot(targets, 3) * 0.9 + 0.1 / 3
    dz = z.softmax(1) - wanted
    if distilled:
        taught = x @ (3 * w).T + b
        # d/dz of T^2 KL(softmax(taught/T) || softmax(z/T)) is T (softmax(z/T) - softmax(taught/T))
        dz = 0.75 * dz + 0.25 * 3 * ((z / 3).softmax(1) - (taught / 3).softmax(1))
    dw, db = dz.T @ x / 24, dz.mean(0)
    if clip is not None:
        norm = (dw.square().sum() + db.square().sum()).sqrt()
        assert norm > clip
        dw, db = dw * clip / norm, db * clip / norm
    w_after = w - 0.2 * 1.9 * (dw + 0.01 * w)  # Nesterov's first step: (1 + momentum) times the gradient
    b_after = b - 0.2 * 1.9 * db

    result = run(net, source, config, teacher=teacher if distilled else None)

    assert torch.allclose(net[1].weight.double(), w_after, rtol=1e-4, atol=1e-6)
    assert torch.allclose(net[1].bias.double(), b_after, rtol=1e-4, atol=1e-6)
    assert result.history[0].lr == 0.2


# ---- a run ----------------------------------------------------------------------------------------
def test_training_learns_and_says_what_it_selected(source: DataSource) -> None:
    net = small_net(dropout=0)
    result = run(net, source, replace(SHORT, epochs=12, ema_decay=0.9, label_smoothing=0))
    accuracy = evaluate(net, source, split="val", device=CPU)
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert accuracy.top1 == result.best_val_top1 >= 0.75
    assert [row.epoch for row in result.history] == list(range(1, 13))
    assert result.history[result.best_epoch - 1].val_top1 == result.best_val_top1


def test_the_same_seed_gives_the_same_weights_to_the_bit(source: DataSource) -> None:
    nets = [small_net() for _ in range(3)]
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        torch.rand(3)  # what happened before is of no account
        run(net, source, replace(SHORT, seed=seed))
    assert equal(nets[0], nets[1])
    assert not equal(nets[0], nets[2])


def test_training_leaves_random_state_modes_layout_and_gradients_as_they_were(source: DataSource) -> None:
    net = small_net()
    net.train()
    net[5].eval()
    net[0].weight.requires_grad_(False)
    parameters, strides = list(net.parameters()), [p.stride() for p in net.parameters()]
    state = torch.get_rng_state()
    run(net, source)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net] == [True, True, True, True, True, False, True]
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert [p.stride() for p in net.parameters()] == strides
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in net.parameters())


def test_the_teacher_is_untouched(source: DataSource) -> None:
    teacher = small_net(1)
    teacher.train()
    before = copy.deepcopy(teacher)
    run(small_net(), source, teacher=teacher)
    assert equal(teacher, before)
    assert all(m.training for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_net_that_is_its_own_teacher_is_refused(source: DataSource) -> None:
    net = small_net()
    with pytest.raises(InputError, match="own teacher"):
        run(net, source, teacher=net)


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 1.0), (0.7, 1.0), (0.6, 0.1)], 2),  # the highest top-1
        ([(0.5, 1.0), (0.5, 0.8), (0.5, 0.9)], 2),  # of equal ones the lowest loss
        ([(0.5, 0.8), (0.5, 0.8), (0.4, 0.8)], 1),  # of equal ones the first
    ],
)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_validation_selects_the_weights_the_net_ends_with(
    source: DataSource,
    monkeypatch: pytest.MonkeyPatch,
    figures: list[tuple[float, float]],
    best: int,
    ema: float | None,
) -> None:
    seen: list[nn.Module] = []

    def scripted(net: nn.Module, source: DataSource, *, split: str, **_: Any) -> Accuracy:
        assert split == "val"
        top1, loss = figures[len(seen)]
        seen.append(copy.deepcopy(net))
        return Accuracy(split, 12, top1, None, loss, {})

    monkeypatch.setattr(loop, "evaluate", scripted)
    net = small_net()
    result = run(net, source, replace(SHORT, ema_decay=ema))
    assert (result.best_epoch, result.best_val_top1) == (best, figures[best - 1][0])
    assert equal(net, seen[best - 1])


@dataclass
class Several:
    logits: Tensor
    maps: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda z: (z, z.sum()),
    "list": lambda z: [z.sum(1), z],
    "dict": lambda z: {"loss": z.sum(), "logits": z},
    "dataclass": lambda z: Several(logits=z, maps=z[:, :, None, None]),
    "nested": lambda z: {"aux": (z[:, :1],), "out": [z.argmax(1), z]},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_nets_with_structured_outputs_train_like_plain_ones(source: DataSource, kind: str) -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[kind](self.net(x))

    plain, structured = small_net(), Structured()
    one = replace(SHORT, epochs=1)
    run(plain, source, one)
    run(structured, source, one)
    assert equal(plain, structured.net)


def test_logits_are_the_first_tensor_with_a_column_for_each_class() -> None:
    z, aux = torch.rand(2, 3), torch.rand(2, 3)
    assert logits_of((z, aux), classes=3) is z
    assert logits_of((torch.rand(2, 4), aux), classes=3) is aux
    with pytest.raises(InputError, match=r"\(2, 3\), \(2, 3\); logits of shape \(N, 10\)"):
        logits_of([z, aux], classes=10)
    with pytest.raises(InputError, match="no tensor"):
        logits_of(None, classes=10)


def test_data_without_usable_labels_or_validation_is_refused(source: DataSource, tmp_path: Path) -> None:
    root = Path(source.spec.path)
    unlabelled = open_data(DataSpec(str(root)), preprocessing=GREY8, num_classes=10)
    with pytest.raises(InputError, match="labels"):
        run(small_net(), unlabelled)
    source_without = copy.copy(source)
    source_without.splits = {"train": 24}
    with pytest.raises(InputError, match=r"'val'; the data has: train \(24\)"):
        run(small_net(), source_without)


# ---- going on after an interruption ---------------------------------------------------------------
class Interrupting(nn.Module):
    """A net that stops its training run in the given forward."""

    def __init__(self, net: nn.Module, at: int) -> None:
        super().__init__()
        self.net, self.left = net, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        if self.left == 0:
            raise KeyboardInterrupt
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize(
    "choice",
    [{}, {"optimizer": "adamw", "lr": 0.01}, {"ema_decay": None, "clip_norm": None}],
    ids=["sgd", "adamw", "bare"],
)
@pytest.mark.parametrize("at", [1, 5, 9])  # in the first, second, third epoch of three steps each
def test_an_interrupted_run_goes_on_to_the_same_weights_to_the_bit(
    source: DataSource, tmp_path: Path, choice: dict[str, Any], at: int
) -> None:
    config, path, teacher = replace(SHORT, **choice), tmp_path / "run.checkpoint", small_net(1)
    straight = Interrupting(small_net(), 0)
    expected = run(straight, source, config, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(small_net(), at), source, config, teacher=teacher, checkpoint=path)
    assert path.exists() == (at > 3)
    resumed = Interrupting(small_net(), 0)
    result = run(resumed, source, config, teacher=teacher, checkpoint=path)
    assert equal(resumed, straight)
    assert [replace(row, seconds=0) for row in result.history] == [
        replace(row, seconds=0) for row in expected.history
    ]
    assert result.best_epoch == expected.best_epoch


def test_bfloat16_is_taken_on_a_cpu_where_it_is_asked_for() -> None:
    cpu = torch.device("cpu")
    assert loop._mixed_precision(TrainConfig(amp="bfloat16"), cpu) is torch.bfloat16
    assert loop._mixed_precision(TrainConfig(), cpu) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_goes_on_to_the_bit(
    source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On the CPU, which has the same autocast and gradient scaler as a GPU, though no use for them."""
    monkeypatch.setattr(loop, "_mixed_precision", lambda config, device: dtype)
    path, full, straight = tmp_path / "run.checkpoint", linear_net(), Interrupting(linear_net(), 0)
    run(straight, source)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(linear_net(), 8), source, checkpoint=path)
    scale = torch.load(path, weights_only=True)["state"]["scaler"].get("scale")
    assert (scale is not None) == (dtype is torch.float16)
    resumed = Interrupting(linear_net(), 0)
    run(resumed, source, checkpoint=path)
    assert equal(resumed, straight)
    monkeypatch.undo()
    run(full, source)
    weights, rounded = full[1].weight, straight.net[1].weight  # type: ignore[index,union-attr]
    assert not torch.equal(rounded, weights)
    assert torch.allclose(rounded, weights, atol=0.01)


def test_a_finished_run_is_not_trained_again(source: DataSource, tmp_path: Path) -> None:
    path, net = tmp_path / "run.checkpoint", Interrupting(small_net(), 0)
    first = run(net, source, checkpoint=path)
    written = path.read_bytes()
    again = Interrupting(small_net(), 1)  # would stop in its first step
    assert run(again, source, checkpoint=path) == first
    assert equal(again, net)
    assert path.read_bytes() == written


def test_a_checkpoint_holds_tensors_and_plain_values_only(source: DataSource, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    run(small_net(), source, checkpoint=path)
    found = torch.load(path, weights_only=True)
    assert found["schema"] == "sepress.checkpoint/1"
    assert len(found["state"]["history"]) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("named", "other"),
    [
        (r"config\.lr \(0\.05 there, 0\.01 here\)", {"config": replace(SHORT, lr=0.01)}),
        ("config.epochs", {"config": replace(SHORT, epochs=4)}),
        ("first weights", {"net": 1}),
        ("teacher", {"teacher": 1}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(
    source: DataSource, tmp_path: Path, named: str, other: dict[str, Any]
) -> None:
    path = tmp_path / "run.checkpoint"
    run(small_net(), source, checkpoint=path)
    teacher = small_net(other["teacher"]) if "teacher" in other else None
    with pytest.raises(InputError, match=named) as error:
        run(
            small_net(other.get("net", 0)),
            source,
            other.get("config", SHORT),
            teacher=teacher,
            checkpoint=path,
        )
    assert "Delete" in str(error.value)


def test_other_data_does_not_continue_a_checkpoint(
    source: DataSource, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = write_images(tmp_path_factory.mktemp("more"), classes=3, each={"train": 9, "val": 4})
    other = open_data(DataSpec(str(root), augment="none"), preprocessing=GREY8)
    path = tmp_path / "run.checkpoint"
    run(small_net(), source, checkpoint=path)
    with pytest.raises(InputError, match=r"data .*splits"):
        run(small_net(), other, checkpoint=path)


def test_a_different_number_of_workers_continues_the_same_run(source: DataSource, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    first = run(small_net(), source, checkpoint=path)
    assert run(small_net(), source, replace(SHORT, workers=2), checkpoint=path) == first


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_refused(
    source: DataSource, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "run.checkpoint"
    if content is None:
        torch.save(torch.zeros(2), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="can't be read as a training checkpoint"):
        run(small_net(), source, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    source: DataSource, tmp_path: Path
) -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = small_net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            out: Tensor = self.net(x)
            return out * math.nan if self.calls == 5 else out

    net, path = Breaking(), tmp_path / "run.checkpoint"
    net.eval()
    with pytest.raises(InputError, match="loss is nan in epoch 2, step 2 ") as error:
        run(net, source, checkpoint=path)
    assert "lower the learning rate" in str(error.value)
    assert len(torch.load(path, weights_only=True)["state"]["history"]) == 1
    assert not any(m.training for m in net.modules())


def test_weights_that_explode_in_the_last_step_are_found_in_validation(source: DataSource) -> None:
    config = TrainConfig(epochs=1, batch_size=24, lr=1e38, warmup_epochs=0, ema_decay=None, clip_norm=None)
    with pytest.raises(InputError, match=r"validation after epoch 1 .* not finite for 12 of 12"):
        run(small_net(), source, config)


# ---- polarisation -------------------------------------------------------------------------------
class GatedNet(nn.Module):
    """A convolution and a norm, SE on 8 channels, a classifier of three; may stop its training run."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
            self.head = nn.Linear(8, 3)
        self.left = stop_at

    def excite(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(x)).relu()
        return x, self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # in a step of training
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        x, s = self.excite(x)  # (N, 8, H, W), (N, 8, 1, 1)
        out: Tensor = self.head((x * s).mean((2, 3)))
        return out


def polarised(net: GatedNet, strength: float = 2.0, **more: Any) -> Polarisation:
    return Polarisation(trace(net.eval(), torch.rand(1, 1, 8, 8)), strength=strength, **more)


def test_the_regulariser_is_the_one_worked_out_by_hand() -> None:
    m = torch.tensor([0.2, 0.6])  # mean 0.4
    assert polarisation(m, open_share=0.25).item() == pytest.approx((0.2 + 0.6 - 0.2 - 0.2) / 2)  # t = 1
    assert polarisation(m, open_share=0.5).item() == pytest.approx(-0.2)  # t = 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_regulariser_is_least_where_the_share_asked_for_is_open(share: float) -> None:
    corners = [polarisation((torch.arange(8) < k).float(), open_share=share) for k in range(9)]
    inside = polarisation(torch.rand(1000, 8).clamp(0.01, 0.99)[0], open_share=share)
    assert int(torch.stack(corners).argmin()) == 8 * share
    assert min(corners) < inside


def test_one_polarising_step_is_that_of_the_loss_plus_the_penalty_with_norms_frozen(
    source: DataSource,
) -> None:
    net, ours = GatedNet(), GatedNet().eval()
    config = TrainConfig(
        epochs=1,
        batch_size=24,
        lr=0.1,
        weight_decay=0,
        warmup_epochs=0,
        label_smoothing=0,
        ema_decay=None,
        clip_norm=None,
    )
    ((images, targets),) = make_loader(source.dataset("train"), batch_size=24)
    x, s = ours.excite(images)
    m = s.mean((0, 2, 3))
    penalty = 2.0 * (1.0 * m - (m - m.mean()).abs()).mean()
    (F.cross_entropy(ours.head((x * s).mean((2, 3))), targets) + penalty).backward()
    run(net, source, config, penalty=polarised(net, open_share=0.25))
    for (name, after), before in zip(net.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(after, before - 0.1 * 1.9 * before.grad, rtol=1e-4, atol=1e-6), name
    assert equal(net.norm, nn.BatchNorm2d(8)) is False  # its gain was trained
    assert torch.equal(net.norm.running_mean, torch.zeros(8))


def test_polarising_decides_the_gates_and_the_last_epoch_is_kept(source: DataSource) -> None:
    net = GatedNet()
    result = run(net, source, replace(SHORT, epochs=12, lr=0.5, ema_decay=None), penalty=polarised(net, 20))
    images = torch.stack([source.dataset("train")[i][0] for i in range(24)])
    with torch.no_grad():
        m = net.eval().excite(images)[1].mean((0, 2, 3))
    found = decisions(0.5, {"se": m})
    assert found.closed["se"] + found.open["se"] == 1
    assert 0 < found.open["se"] < 1
    assert result.best_epoch == 12


@pytest.mark.parametrize("at", [2, 8])
def test_an_interrupted_polarisation_goes_on_to_the_same_weights_to_the_bit(
    source: DataSource, tmp_path: Path, at: int
) -> None:
    path, straight, resumed = tmp_path / "run.checkpoint", GatedNet(), GatedNet()
    expected = run(straight, source, penalty=polarised(straight))
    broken = GatedNet(at)
    with pytest.raises(KeyboardInterrupt):
        run(broken, source, penalty=polarised(GatedNet()), checkpoint=path)
    result = run(resumed, source, penalty=polarised(resumed), checkpoint=path)
    assert equal(resumed, straight)
    assert [row.train_loss for row in result.history] == [row.train_loss for row in expected.history]
    with pytest.raises(InputError, match=r"penalty .*2\.0.*3\.0"):
        run(GatedNet(), source, penalty=polarised(GatedNet(), 3.0), checkpoint=path)
    with pytest.raises(InputError, match="penalty"):
        run(GatedNet(), source, checkpoint=path)


def test_polarisation_is_refused_where_there_is_nothing_to_polarise_or_no_sense_in_it() -> None:
    plain = small_net().eval()
    with pytest.raises(InputError, match="no gate"):
        Polarisation(trace(plain, torch.rand(1, 1, 8, 8)), strength=1.0)
    for wrong in ({"strength": 0.0}, {"open_share": 1.0}):
        with pytest.raises(InputError, match="Expected"):
            polarised(GatedNet(), **wrong)  # type: ignore[arg-type]


def test_notes_on_polarisation_state_its_cost_and_the_decided_channels_of_each_gate() -> None:
    before = decisions(0.98, {"se": torch.tensor([0.5, 0.05, 0.5, 0.5])})
    after = decisions(0.97, {"se": torch.tensor([0.0, 0.0, 0.95, 0.9])})
    assert polarisation_notes(before, after) == [
        "polarised: top-1 on validation 98.00% -> 97.00%",
        "channels of a mean excitation under 0.1 / over 0.9, by gate: se 25% / 0% -> 50% / 25%",
    ]


# ---- evaluation -----------------------------------------------------------------------------------
class Scripted(nn.Module):
    """Gives rows of a table of logits, in the order in which images come."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.at = logits, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        rows = self.logits[self.at : self.at + len(x)]
        self.at += len(x)
        return rows


def test_accuracy_and_loss_are_those_worked_out_by_hand(source: DataSource) -> None:
    """Nine test images, three of each class: logits ln 2 at the guess and 0 elsewhere."""
    guesses = [0, 0, 0, 1, 2, 2, 2, 2, 0]
    net = Scripted(F.one_hot(torch.tensor(guesses), 3) * math.log(2))
    accuracy = evaluate(net, source, split="test", device=CPU, batch_size=4)
    assert (accuracy.split, accuracy.n) == ("test", 9)
    assert accuracy.top1 == 6 / 9
    assert accuracy.per_class == {"c0": 1.0, "c1": 1 / 3, "c2": 2 / 3}
    assert accuracy.loss == pytest.approx((6 * math.log(4 / 2) + 3 * math.log(4)) / 9)
    assert accuracy.top5 is None
    assert accuracy.reason is not None
    assert "3 classes" in accuracy.reason
    assert net.training


def test_top5_counts_the_five_highest(seven: DataSource) -> None:
    falling = -torch.arange(7.0).repeat(7, 1)  # class 0 first, class 6 last, whatever the image
    accuracy = evaluate(Scripted(falling), seven, split="test", device=CPU)
    assert (accuracy.n, accuracy.top1, accuracy.top5) == (7, 1 / 7, 5 / 7)
    assert accuracy.reason is None


def test_labels_that_do_not_fit_give_no_accuracy_but_the_reason(source: DataSource) -> None:
    other = open_data(DataSpec(source.spec.path), preprocessing=GREY8, num_classes=10)
    accuracy = evaluate(nn.Identity(), other, split="test", device=CPU)
    assert accuracy == Accuracy(None, None, None, None, None, None, other.labels_reason)
    assert accuracy.reason is not None


def test_a_missing_split_gives_no_accuracy_but_the_reason(source: DataSource) -> None:
    accuracy = evaluate(nn.Identity(), source, split="holdout", device=CPU)
    assert (accuracy.split, accuracy.n, accuracy.top1) == (None, None, None)
    assert accuracy.reason == "the data has no 'holdout' split (it has: train, val, test)"


def test_a_split_without_a_label_gives_no_accuracy_but_the_reason(
    source: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = source.dataset("test")
    dataset.targets = torch.full_like(dataset.targets, -1)
    monkeypatch.setattr(source, "dataset", lambda split: dataset)
    accuracy = evaluate(Scripted(torch.zeros(9, 3)), source, split="test", device=CPU)
    assert accuracy == Accuracy(None, None, None, None, None, None, "no image of the test split has a label")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_counted_as_right(source: DataSource, broken: float) -> None:
    logits = torch.zeros(9, 3)
    logits[4] = broken
    accuracy = evaluate(Scripted(logits), source, split="test", device=CPU, batch_size=4)
    assert (accuracy.n, accuracy.top1, accuracy.loss) == (9, None, None)
    assert accuracy.reason == "the outputs are not finite for 1 of 9 images"


def test_classes_of_one_name_stay_two_in_the_table(seven: DataSource) -> None:
    twins = copy.copy(seven)
    twins.class_names = ("crane", "b", "crane", "d", "e", "f", "g")
    accuracy = evaluate(Scripted(torch.eye(7)), twins, split="test", device=CPU)
    assert accuracy.per_class == dict.fromkeys(("crane", "b", "crane (2)", "d", "e", "f", "g"), 1.0)


def test_evaluation_restores_modes_after_an_error(source: DataSource) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3, 3))
    net[1].eval()
    with pytest.raises(RuntimeError):
        evaluate(net, source, split="test", device=CPU)
    assert [m.training for m in net] == [True, False, True]


# ---- batch norm afresh ----------------------------------------------------------------------------
NORMS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.BatchNorm1d(3),
    "2d": lambda: nn.BatchNorm2d(3),
    "3d": lambda: nn.BatchNorm3d(3),
    "timm": lambda: BatchNormAct2d(3, drop_layer=nn.Dropout),
    "sync": lambda: nn.SyncBatchNorm(3),
}
SHAPES = {"1d": (5,), "2d": (4, 5), "3d": (2, 4, 5), "timm": (4, 5), "sync": (4, 5)}


@pytest.mark.parametrize("kind", NORMS)
def test_statistics_are_the_batches_means_and_unbiased_variances(kind: str) -> None:
    batches = list(torch.randn(4, 6, 3, *SHAPES[kind], generator=torch.Generator().manual_seed(0)) * 3 + 1)
    norm = NORMS[kind]()
    norm.running_mean.fill_(99)  # type: ignore[union-attr,operator]
    assert recalibrate_batchnorm(norm, batches, device=CPU) == 1
    flat = [b.transpose(0, 1).flatten(1).double() for b in batches]  # (3, images x positions)
    mean = torch.stack([f.mean(1) for f in flat]).mean(0)
    variance = torch.stack([f.var(1, unbiased=True) for f in flat]).mean(0)
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-6)  # type: ignore[union-attr,operator]
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-5)  # type: ignore[union-attr,operator]
    assert norm.num_batches_tracked == 4
    assert norm.momentum == 0.1
    assert norm.training


def test_a_short_last_batch_counts_by_its_images() -> None:
    images = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(3)
    recalibrate_batchnorm(norm, [(images[:5], None), (images[5:], None)], device=CPU)
    assert torch.allclose(norm.running_mean, images.mean((0, 2, 3)), atol=1e-6)
    parts = [part.transpose(0, 1).flatten(1).var(1) for part in (images[:5], images[5:])]
    assert torch.allclose(norm.running_var, (5 * parts[0] + 2 * parts[1]) / 7)


def test_a_net_of_two_inputs_is_recalibrated_on_pairs_of_them() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)

    x, y = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = Sum()
    recalibrate_batchnorm(net, [[x, y]], device=CPU)
    assert torch.allclose(net.norm.running_mean, (x + y).mean((0, 2, 3)), atol=1e-6)


def test_a_single_image_is_left_out_and_alone_refused() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    recalibrate_batchnorm(net, [images[:4], images[4:]], device=CPU)
    assert torch.allclose(net[1].running_mean, images[:4].mean((0, 2, 3)))
    with pytest.raises(InputError, match="two images"):
        recalibrate_batchnorm(net, [images[:1]], device=CPU)


def test_only_norms_that_keep_statistics_are_recalibrated() -> None:
    net = nn.Sequential(
        nn.Dropout(0.9),
        nn.BatchNorm2d(3, momentum=None),
        FrozenBatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.GroupNorm(1, 3),
    )
    net[0].eval()
    images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    frozen = {name: t.clone() for name, t in net[2].state_dict().items()}
    assert recalibrate_batchnorm(net, [images], device=CPU) == 1
    assert torch.allclose(net[1].running_mean, images.mean((0, 2, 3)), atol=1e-6)  # no dropout before it
    assert all(torch.equal(t, frozen[name]) for name, t in net[2].state_dict().items())
    assert net[1].momentum is None
    assert [m.training for m in net] == [False, True, True, True, True]


def test_modes_and_momenta_are_restored_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout())
    net.eval()
    with pytest.raises(ValueError, match="expected 4D"):
        recalibrate_batchnorm(net, [torch.zeros(2, 3)], device=CPU)
    assert net[0].momentum == 0.3
    assert not any(m.training for m in net.modules())


def test_a_net_without_batch_norms_reads_no_batch() -> None:
    def never() -> Any:
        raise AssertionError("a batch was read")
        yield

    assert recalibrate_batchnorm(linear_net(), never(), device=CPU) == 0


# ---- several processes ----------------------------------------------------------------------------
def test_a_world_that_is_not_running_is_refused(source: DataSource) -> None:
    with pytest.raises(InputError, match=r"process 0 of 2, .* runs it as 0 of 1"):
        run(linear_net(), source, rank=0, world_size=2)


def _train_one_of_two(rank: int, folder: Path, root: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    source = open_data(DataSpec(root, augment="none"), preprocessing=GREY8)
    net = linear_net()
    if rank == 1:
        nn.init.zeros_(net[1].weight)  # process 0's weights count
    config = replace(SHORT, batch_size=4, ema_decay=None)
    result = run(net, source, config, checkpoint=folder / "run.checkpoint", rank=rank, world_size=2)
    accuracy = evaluate(net, source, split="test", device=CPU, rank=rank, world_size=2)
    torch.save((net.state_dict(), result.best_epoch, accuracy.n, accuracy.top1), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one_with_twice_the_batch(
    source: DataSource, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(_train_one_of_two, args=(tmp_path, source.spec.path), nprocs=2)
    alone = linear_net()
    result = run(alone, source, replace(SHORT, ema_decay=None))
    accuracy = evaluate(alone, source, split="test", device=CPU)
    for rank in range(2):
        weights, best, n, top1 = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (best, n, top1) == (result.best_epoch, 9, accuracy.top1)
        for name, t in alone.state_dict().items():
            assert torch.allclose(weights[name], t, rtol=1e-4, atol=1e-6)
