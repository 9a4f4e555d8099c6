"""Labelled images + a net -> the net trained (or fine-tuned, with a teacher), and how accurate it is.

loop        train: epochs, distillation, penalties, weight averaging, selection on validation
polarise    a penalty that drives gates apart
checkpoint  a run's state as tensors and plain values, so that an interrupted run goes on bit-equal
evaluate    accuracy and loss on a split
recalibrate batch-norm statistics on calibration images
ranks       what several processes agree on
"""

from sepress.schedule import TrainConfig, learning_rate
from sepress.train.evaluate import Accuracy, count_right, evaluate, logits_of
from sepress.train.loop import EpochRow, Penalty, TrainResult, train
from sepress.train.polarise import Decisions, Polarisation, decisions, polarisation_notes
from sepress.train.recalibrate import recalibrate_batchnorm

__all__ = [
    "TrainConfig",
    "train",
    "TrainResult",
    "EpochRow",
    "Penalty",
    "Polarisation",
    "Decisions",
    "decisions",
    "polarisation_notes",
    "learning_rate",
    "evaluate",
    "count_right",
    "Accuracy",
    "logits_of",
    "recalibrate_batchnorm",
]
