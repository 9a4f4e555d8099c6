"""Methods x operating points x seeds, under one graph, calibration set and schedule -> one table.

methods  what is compared: a criterion, with or without compensation, a scope; or training from scratch
folder   the comparison's facts, and the folder of finished cells that goes on growing
run      the cells: prune, measure, recalibrate, fine-tune
table    means, deviations and paired differences; Markdown and JSON
plot     accuracy against multiply-adds
"""

from sepress.compare.folder import BaseFigures, Cell, Comparison, Point, split_policy
from sepress.compare.methods import SCRATCH, Method, read_method
from sepress.compare.run import compare
from sepress.compare.table import Table

__all__ = [
    "compare",
    "Comparison",
    "Method",
    "read_method",
    "SCRATCH",
    "Point",
    "split_policy",
    "Cell",
    "BaseFigures",
    "Table",
]
