"""A Report -> JSON for machines, Markdown for a file, a table for the terminal; pure functions, no torch."""

from sepress.report.as_json import SCHEMA, report_from_json, report_to_json
from sepress.report.ci import report_to_annotations, report_to_junit
from sepress.report.markdown import report_to_markdown
from sepress.report.terminal import render_groups, render_report

__all__ = [
    "SCHEMA",
    "report_to_json",
    "report_from_json",
    "report_to_markdown",
    "report_to_junit",
    "report_to_annotations",
    "render_report",
    "render_groups",
]
