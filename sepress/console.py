"""What a person sees while the work goes on: log lines and progress bars, on stderr only.

The library is silent; the command line switches the console on. stdout belongs to results.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
_console: Console | None = None
_quiet = False


def enable() -> Console:
    """Switch log lines and progress on (the command line does); returns stderr's console."""
    global _console
    from rich.console import Console

    _console = Console(stderr=True, highlight=False, emoji=False)  # `pkg:factory:` is a name
    return _console


def log(message: str) -> None:
    """One plain line for the person watching; markup in it is not interpreted."""
    if _console is not None and not _quiet:
        _console.print(message, markup=False, soft_wrap=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the log lines of what runs inside, where one line for all of it follows; bars stay."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yield the items behind a progress bar, or plainly where nobody watches a terminal."""
    if not _watched():
        yield from items
        return
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total=total, console=_console, transient=True)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that one piece of work without countable steps goes on, where somebody watches a terminal."""
    if _console is None or not _watched():
        yield
        return
    with _console.status(description):
        yield


def _watched() -> bool:
    return _console is not None and _console.is_terminal and sys.stderr.isatty()


@contextmanager
def silenced() -> Iterator[None]:
    """Keep a library's prints, warnings and log records from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
