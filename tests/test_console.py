"""What libraries print is kept from the user, and what a user set is back afterwards."""

from __future__ import annotations

import logging
import warnings

import pytest

from sepress.console import silenced


def test_silencing_libraries_gives_logging_back_after_a_failure():
    def chatter() -> None:
        print("not seen")
        warnings.warn("not seen", stacklevel=1)
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), silenced():
        chatter()
    assert logging.root.manager.disable == logging.NOTSET
