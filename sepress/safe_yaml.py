"""YAML text -> plain values and where each stands; nothing that can run code or explode is read.

No tags, no anchors and aliases, no key twice, bounded size and depth, so that a file of unknown origin is
safe to read. Scalars follow YAML 1.2: `off` is a word and `1e-4` a number, not the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sepress.errors import InputError
from sepress.types import JSON

MAX_BYTES = 1 << 20
MAX_DEPTH = 20  # of nested collections

KeyPath = tuple[str | int, ...]
Marks = Mapping[KeyPath, str]  # where a value was written: 'FILE:LINE', or the option that gave it


class Fault(NamedTuple):
    """One thing wrong, where it was written, and its key (empty where the mark says it)."""

    mark: str | None
    path: KeyPath
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.mark, ".".join(map(str, self.path)), self.message) if part)


class Document(NamedTuple):
    """What a text says: values, the place of each, and faults that leave the rest readable."""

    values: Any
    marks: dict[KeyPath, str]
    faults: list[Fault]


def read_text(path: Path) -> str:
    """Read a small UTF-8 file; InputError where it is none."""
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is too large: a text file of at most {MAX_BYTES:,} bytes was expected")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as text: {error}") from error


def read_yaml(text: str, origin: str) -> Document:
    """Read one YAML document; `origin` is its file's name, or the option ('--set ...') that holds it."""

    def where(mark: Any) -> str:
        return origin if mark is None or origin.startswith("-") else f"{origin}:{mark.line + 1}"

    try:
        for what, mark in _dangers(text):
            raise InputError(f"{where(mark)}: {what} are not read", remedy="Write the values out.")
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{where(error.problem_mark)}: this is no YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: this is no YAML: {error}") from error
    document = Document({}, {}, [])
    values = None if node is None else _read_node(node, (), where(None), where, document)
    return document._replace(values=values)


def dump_yaml(values: JSON) -> str:
    """Write plain values so that `read_yaml` gives them back, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_node(node: yaml.Node, path: KeyPath, mark: str, where: Any, document: Document) -> Any:
    document.marks[path] = mark
    if isinstance(node, yaml.SequenceNode):
        return [
            _read_node(item, (*path, number), where(item.start_mark), where, document)
            for number, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return yaml.constructor.SafeConstructor().construct_object(node)
    values: dict[str, Any] = {}
    for key, item in node.value:
        name, place = str(key.value), where(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            document.faults.append(Fault(place, path, "a key is a word"))
        elif name in values:
            document.faults.append(Fault(place, (*path, name), "this key is written twice"))
        else:
            values[name] = _read_node(item, (*path, name), place, where, document)
    return values


def _dangers(text: str) -> Iterator[tuple[str, Any]]:
    """Whatever makes YAML run code or explode, before anything is built of it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            yield "anchors and aliases", event.start_mark
        if (tag := getattr(event, "tag", None)) is not None:
            yield f"tags ({tag})", event.start_mark
        if _SURROGATE.search(getattr(event, "value", "")):
            yield "halves of characters (surrogates)", event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            yield f"more than {MAX_DEPTH} nested levels", event.start_mark


_SURROGATE = re.compile(r"[\ud800-\udfff]")

# Unlike YAML 1.1, PyYAML's own: no yes/no/on/off, no octal or base-60 numbers, no dates, no merge keys.
# A number with leading zeros is text, as readers do not agree on it.
_SCALARS = {
    None: [
        ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$")),
        ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
        ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,30})$")),
        (
            "tag:yaml.org,2002:float",
            re.compile(r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        ),
        ("tag:yaml.org,2002:float", re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")),
    ]
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _SCALARS


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _SCALARS

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists stand under their key
