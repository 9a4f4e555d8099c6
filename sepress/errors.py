"""The error tree. Every message says what went wrong, where, what was expected and what to do next.

The exit code of the command line is the class of the error; scripts may rely on it.
"""

from __future__ import annotations


class SepressError(Exception):
    """A fault of ours (exit code 1), and the base of every error that sepress raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n{self.remedy}"


class InputError(SepressError):
    """The user's input can't be used (exit code 2): a file, an argument, a recipe, a data set."""

    exit_code = 2


class ConstraintError(SepressError):
    """A constraint the user stated is not met (exit code 3)."""

    exit_code = 3


class CheckError(SepressError):
    """A correctness check failed (exit code 4): nothing is written under a final name."""

    exit_code = 4
