"""A Report -> what continuous integration shows: JUnit XML, or GitHub's workflow commands.

One test case for every constraint and every check. A check that could not be made is skipped and says why;
a constraint that can't be told is not met, and fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from sepress.report import words
from sepress.types import Report

Verdict = Literal["passed", "failed", "skipped"]
# What XML 1.0 can't hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One thing that was held to: its kind, its name, how it went and the figures."""

    kind: Literal["require", "check"]
    name: str
    verdict: Verdict
    figures: str


def cases(report: Report) -> list[Case]:
    """Return what a report's constraints and checks say, constraints first."""
    found = []
    for constraint in report.constraints:
        text, _, figures = words.constraint_words(constraint)
        found.append(Case("require", text, "passed" if constraint.get("passed") else "failed", figures))
    for name, check in report.checks.items():
        if check.passed is None:
            found.append(Case("check", name, "skipped", check.reason or "not made"))
        else:
            error = "" if check.relative_error is None else f"relative error {check.relative_error:.3g}"
            figures = ": ".join(part for part in (check.reason, error) if part)
            found.append(Case("check", name, "passed" if check.passed else "failed", figures))
    return found


def report_to_junit(report: Report) -> str:
    """Return one test suite in JUnit's XML, as Jenkins, GitLab and GitHub's actions read it."""
    found = cases(report)
    counts = {
        "tests": str(len(found)),
        "failures": str(sum(case.verdict == "failed" for case in found)),
        "errors": "0",
        "skipped": str(sum(case.verdict == "skipped" for case in found)),
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _xml(f"sepress.{report.name}"), **counts})
    for case in found:
        of = {"classname": _xml(f"sepress.{report.name}.{case.kind}"), "name": _xml(case.name)}
        element = ElementTree.SubElement(suite, "testcase", of)
        if case.verdict == "failed":
            ElementTree.SubElement(element, "failure", {"message": _xml(case.figures)})
        elif case.verdict == "skipped":
            ElementTree.SubElement(element, "skipped", {"message": _xml(case.figures)})
        elif case.figures:
            ElementTree.SubElement(element, "system-out").text = _xml(case.figures)
    ElementTree.indent(suites)
    text: str = ElementTree.tostring(suites, encoding="unicode", xml_declaration=False)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def report_to_annotations(report: Report) -> str:
    """Return a GitHub workflow command a line: errors for what failed, notices for what held."""
    lines = []
    for case in cases(report):
        command = {"failed": "error", "passed": "notice", "skipped": "warning"}[case.verdict]
        if case.kind == "check" and case.verdict != "failed":
            continue  # a green check needs no line of its own
        verdict = "met" if case.verdict == "passed" else "not met"
        title = f"{report.name}: {case.name} {verdict if case.kind == 'require' else case.verdict}"
        lines.append(f"::{command} title={_property(title)}::{_message(case.figures or case.name)}\n")
    return "".join(lines)


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def _message(text: str) -> str:
    """Escape as the runner's toolkit does (actions/toolkit, packages/core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
