"""One training loop: from scratch, with the base model as teacher (Hinton et al. 2015), or with a penalty."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sepress import console
from sepress.data import make_loader
from sepress.device import seeded
from sepress.digests import tensor_digest
from sepress.errors import InputError
from sepress.modes import kept_modes
from sepress.schedule import TrainConfig, learning_rate
from sepress.train import ranks
from sepress.train.checkpoint import (
    Tensors,
    copy_into,
    load_checkpoint,
    save_checkpoint,
    tensors_of,
)
from sepress.train.evaluate import evaluate, logits_of, output_names

if TYPE_CHECKING:
    from sepress.data import DataSource
    from sepress.types import JSON

CHECK_EVERY = 50  # steps between looks at the loss: each look makes a GPU wait


@dataclass(frozen=True)
class EpochRow:
    """One epoch, counted from 1; `train_loss` is the mean of what was minimised, `lr` the last step's."""

    epoch: int
    train_loss: float
    val_top1: float
    val_loss: float
    lr: float
    seconds: float


class Penalty(Protocol):
    """A term of the loss that looks inside the net as it runs.

    What happens inside is known by a trace in eval mode, so the net trains in that mode: its norms keep their
    running statistics, and there is no dropout. That suits a short training of a trained net.
    """

    @property
    def identity(self) -> Mapping[str, JSON]:
        """All that its value depends on beside the net and the images, as plain values."""

    def watching(self, net: nn.Module) -> AbstractContextManager[Callable[[], Tensor]]:
        """Watch the forwards of `net`; what the context gives returns the term of the last one, ()."""


@dataclass(frozen=True)
class TrainResult:
    """What the epochs gave, and the one whose weights the net now has."""

    history: tuple[EpochRow, ...]
    best_epoch: int
    best_val_top1: float


def train(
    net: nn.Module,
    source: DataSource,
    *,
    config: TrainConfig,
    device: torch.device,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
    checkpoint: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainResult:
    """Train the net in place on the source's train split; it ends with the weights that val selects.

    Selection: the epoch of the highest top-1 on val, of equal ones the lowest loss, of equal ones the first;
    with `ema_decay` the averaged weights are evaluated and selected. The test split is never touched.
    With a `penalty`, which is added to the loss, the last epoch's weights are taken: accuracy alone would
    choose those that it has shaped least. In a distributed run each process has its own batch's.
    The teacher is run in eval mode and its weights stay. Both nets are moved to the device.

    `checkpoint` names a file that is written after every epoch, and continued from if it exists: the same
    call (config, data, first weights, teacher, penalty, kind of device) goes on and ends bit-equal to a run
    that was never interrupted; another call's file raises InputError. It stays; the caller deletes it.

    In a distributed run every process calls this with the same arguments but `rank`, on a file system that
    all of them see; process 0 writes.

    Raises InputError where labels or a split are missing, the classes do not fit, or the loss stops being
    finite (the net is then left as it was at that step).
    """
    ranks.check_world(rank, world_size)
    _check_source(source)
    if teacher is net:
        raise InputError(
            "the net can't be its own teacher", remedy="Pass a copy of the base model as teacher."
        )
    with ExitStack() as stack:
        stack.enter_context(ready(net, teacher, config=config, device=device))
        stack.enter_context(_restored(net))
        run = Run(net, source, config, device, teacher, penalty, rank, world_size)
        if checkpoint is not None:
            run.resume(checkpoint)
        while len(run.history) < config.epochs:
            run.epoch()
            if checkpoint is not None and rank == 0:
                save_checkpoint(checkpoint, identity=run.identity, state=run.state())
        copy_into(net, run.best)
    best = run.history[run.best_index]
    return TrainResult(tuple(run.history), best.epoch, best.val_top1)


def _check_source(source: DataSource) -> None:
    if source.labels_reason is not None:
        raise InputError(
            f"training needs labels: {source.labels_reason}",
            remedy="Pass --classes FILE, in the outputs' order.",
        )
    held = ", ".join(f"{split} ({n})" for split, n in source.splits.items())
    for split, least in (("train", 2), ("val", 1)):
        if source.splits.get(split, 0) < least:
            raise InputError(
                f"training needs {least} or more images in '{split}'; the data has: {held or 'none'}",
                remedy="Pass a folder of class folders (val is cut from train), or one with train/ and val/.",
            )


class Run:
    """The moving parts of one run: weights, their average, the optimiser, what was best so far."""

    def __init__(
        self,
        net: nn.Module,
        source: DataSource,
        config: TrainConfig,
        device: torch.device,
        teacher: nn.Module | None,
        penalty: Penalty | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.net, self.source, self.config, self.device = net, source, config, device
        self.teacher = teacher if config.distill_weight > 0 else None
        self.penalty = penalty
        self.rank, self.world_size = rank, world_size
        ranks.share(list(tensors_of(net).values()), world_size=world_size)
        self.identity = self._identity()
        self.optimizer = build_optimizer(net, config)
        self.precision = _mixed_precision(config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.average = None if config.ema_decay is None else WeightAverage(net, decay=config.ema_decay)
        self.classes = len(output_names(source))
        self.loader = make_loader(
            source.dataset("train", train=True),
            batch_size=config.batch_size,
            train=True,
            seed=config.seed,
            workers=config.workers,
            rank=rank,
            world_size=world_size,
        )
        self.history: list[EpochRow] = []
        self.best: Tensors = {}
        self.best_index = -1
        self.step = 0

    def _identity(self) -> dict[str, Any]:
        """All that the final weights depend on, as plain values by name."""
        choices = dataclasses.asdict(self.config)
        del choices["workers"]  # the loader gives the same batches with any number
        facts = {f"config.{name}": value for name, value in choices.items()}
        return facts | {
            "data": self.source.fingerprint,
            "splits": {name: int(n) for name, n in self.source.splits.items()},
            "augment": self.source.spec.augment,
            "classes": list(output_names(self.source)),
            "preprocessing": dataclasses.asdict(self.source.preprocessing),
            "first weights": tensor_digest(tensors_of(self.net)),
            "teacher": None if self.teacher is None else tensor_digest(tensors_of(self.teacher)),
            "penalty": None if self.penalty is None else dict(self.penalty.identity),
            "device": self.device.type,
            "processes": self.world_size,
        }

    # ---- one epoch ------------------------------------------------------------------------------
    def epoch(self) -> None:
        """Train for one epoch, validate, and keep the weights if they are the best so far."""
        start, epoch = time.perf_counter(), len(self.history)
        self.loader.set_epoch(epoch)
        with seeded(epoch_seed(self.config.seed, epoch, self.rank)):  # dropout's; the loader has its own
            train_loss = self._train(epoch)
        buffers = [b for b in self.net.buffers() if b.is_floating_point()]
        ranks.average(buffers, world_size=self.world_size)  # each process has its own norm statistics
        with ExitStack() as stack:
            if self.average is not None:
                ranks.average(self.average.floating(), world_size=self.world_size)
                stack.enter_context(self.average.applied(self.net))
            val = evaluate(
                self.net,
                self.source,
                split="val",
                device=self.device,
                batch_size=max(256, self.config.batch_size),
                workers=self.config.workers,
                rank=self.rank,
                world_size=self.world_size,
            )
            if val.top1 is None or val.loss is None:
                raise InputError(f"validation after epoch {epoch + 1} failed: {val.reason}", remedy=_DIVERGED)
            lr = self.optimizer.param_groups[0]["lr"]
            row = EpochRow(epoch + 1, train_loss, val.top1, val.loss, lr, time.perf_counter() - start)
            self._select(row)
        if self.rank == 0:
            console.log(
                f"epoch {row.epoch:>3}/{self.config.epochs}  loss {train_loss:.4f}  "
                f"val top-1 {val.top1:.2%}  val loss {val.loss:.4f}  {row.seconds:.1f} s"
            )

    def _select(self, row: EpochRow) -> None:
        """Add the row; keep a copy of the weights that stand in the net where they are the ones to take."""
        self.history.append(row)
        if self.best_index >= 0 and self.penalty is None:
            best = self.history[self.best_index]
            if (row.val_top1, -row.val_loss) <= (best.val_top1, -best.val_loss):
                return
        self.best_index = len(self.history) - 1
        self.best = {name: t.to("cpu", copy=True) for name, t in tensors_of(self.net).items()}

    def _train(self, epoch: int) -> float:
        """One pass over the training images; returns the mean loss over them."""
        self.net.train(self.penalty is None)
        losses: list[Tensor] = []  # of the steps since the last look, on the device
        values: list[float] = []  # of the steps before
        sizes: list[int] = []
        title = f"epoch {epoch + 1}/{self.config.epochs}"
        with nullcontext() if self.penalty is None else self.penalty.watching(self.net) as term:
            for inputs, targets in console.track(self.loader, title, total=len(self.loader)):
                losses.append(self.take_step(inputs, targets, term))
                sizes.append(len(targets))
                if len(losses) == CHECK_EVERY:
                    values += self._look(losses, epoch=epoch, first=len(values))
                    losses = []
        if losses:
            values += self._look(losses, epoch=epoch, first=len(values))
        return float(np.average(values, weights=sizes))

    def _look(self, losses: Sequence[Tensor], *, epoch: int, first: int) -> list[float]:
        """The losses as numbers, averaged over the processes so that all of them stop, or none."""
        stacked = torch.stack(list(losses))
        ranks.average([stacked], world_size=self.world_size)
        values: list[float] = stacked.tolist()
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} in epoch {epoch + 1}, step {step + 1} of the epoch",
                    remedy=_DIVERGED,
                )
        return values

    def take_step(self, inputs: Tensor, targets: Tensor, term: Callable[[], Tensor] | None) -> Tensor:
        """One step of the optimiser; returns the loss, () float32 on the device, without waiting for it.

        `term` gives the penalty of the forward just made.
        """
        config = self.config
        if (targets < 0).any():
            raise InputError("a training image has no label", remedy="Put every image into a class folder.")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config, steps_per_epoch=len(self.loader))
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if config.channels_last == "auto" and inputs.ndim == 4 and self.device.type != "mps":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            logits = logits_of(self.net(inputs), classes=self.classes).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
            if self.teacher is not None:
                with torch.no_grad():
                    taught = logits_of(self.teacher(inputs), classes=self.classes).float()
                hint = distillation_loss(logits, taught, temperature=config.temperature)
                loss = torch.lerp(loss, hint, config.distill_weight)
            if term is not None:
                loss = loss + term()
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        ranks.average([p.grad for p in parameters if p.grad is not None], world_size=self.world_size)
        self.scaler.unscale_(self.optimizer)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.net, self.step)
        return loss.detach()

    # ---- between epochs -------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """All that changes from epoch to epoch: tensors and plain values."""
        return {
            "net": tensors_of(self.net),
            "average": None if self.average is None else self.average.tensors,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": [dataclasses.asdict(row) for row in self.history],
            "best": self.best,
            "best_index": self.best_index,
        }

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint, where there is one."""
        if path.exists():
            state = load_checkpoint(path, identity=self.identity)
            copy_into(self.net, state["net"])
            if self.average is not None:
                for name, t in self.average.tensors.items():
                    t.copy_(state["average"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.best_index = state["step"], state["best"], state["best_index"]
            self.history = [EpochRow(**row) for row in state["history"]]
            if self.rank == 0:
                console.log(f"training goes on after epoch {len(self.history)} of {self.config.epochs}")
        ranks.check_equal(
            len(self.history), f"epochs in {path}", device=self.device, world_size=self.world_size
        )


# ---- what a run is made of ------------------------------------------------------------------------
_DIVERGED = (
    "Training diverged: lower the learning rate (a tenth of it is a good next try), lengthen the warm-up, "
    "or look for broken inputs."
)


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """An independent seed for each epoch and process, so that an epoch can be repeated on its own."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def build_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum or AdamW over the trainable parameters.

    Parameters of one axis or none (biases, norms' gains, layer scales) are not decayed (He et al. 2019).
    """
    trainable = [p for p in net.parameters() if p.requires_grad]
    if not trainable:
        raise InputError(
            "the net has no trainable parameter", remedy="Set requires_grad on what is to be trained."
        )
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


def distillation_loss(logits: Tensor, taught: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened classes, mean over images (Hinton et al. 2015, eq. 2-4).

    logits, taught: (N, K). T^2 keeps the gradient's size as T grows.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(taught / temperature, dim=1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


class WeightAverage:
    """The exponential moving average of a net's parameters and buffers (counters are copied)."""

    def __init__(self, net: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.tensors: Tensors = {name: t.clone() for name, t in tensors_of(net).items()}

    def floating(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.is_floating_point()]

    def update(self, net: nn.Module, step: int) -> None:
        """Move towards the net after its step number `step` (from 1).

        The decay grows as (1 + step) / (10 + step) up to its value, or short runs would end near
        their first weights.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.floating(), []
        for name, t in tensors_of(net).items():
            if t.is_floating_point():
                theirs.append(t)
            else:
                self.tensors[name].copy_(t)
        get_ema_multi_avg_fn(decay)(ours, theirs, step)  # type: ignore[no-untyped-call]

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """The averaged values in the net, its own again afterwards."""
        own = {name: t.clone() for name, t in tensors_of(net).items()}
        try:
            copy_into(net, self.tensors)
            yield
        finally:
            copy_into(net, own)


def _mixed_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for none: on a CPU it depends on the net, and MPS gains little."""
    if config.amp == "bfloat16":
        return torch.bfloat16
    if config.amp == "off" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def ready(
    net: nn.Module, teacher: nn.Module | None, *, config: TrainConfig, device: torch.device
) -> Iterator[None]:
    """Both nets on the device and in the memory order that training takes, the teacher in eval mode."""
    with ExitStack() as stack:
        for module in (net,) if teacher is None else (net, teacher):
            module.to(device)
            if config.channels_last == "auto" and device.type in ("cpu", "cuda"):
                stack.enter_context(_channels_last(module))
        if teacher is not None:
            stack.enter_context(kept_modes(teacher))
            teacher.eval()
        yield


@contextmanager
def _channels_last(net: nn.Module) -> Iterator[None]:
    """The 4-D weights in channels-last order in memory (the values and names stay); undone afterwards."""
    moved = [
        p for p in (*net.parameters(), *net.buffers()) if p.ndim == 4 and p.is_contiguous() and p.numel() > 1
    ]
    try:
        for p in moved:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p in moved:
            p.data = p.data.contiguous()


@contextmanager
def _restored(net: nn.Module) -> Iterator[None]:
    """Afterwards each module has its own mode again, and no gradients are left."""
    with kept_modes(net):
        try:
            yield
        finally:
            net.zero_grad(set_to_none=True)
