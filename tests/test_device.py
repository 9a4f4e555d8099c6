"""The best device there is, and random state that is only lent."""

from __future__ import annotations

import pytest
import torch

from sepress.device import kept_random_state, resolve_device, seeded
from sepress.errors import InputError


class FakeMps:
    """Metal's generator, of which torch keeps one state without a device index."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = torch.tensor([7])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: self.state.clone())
        monkeypatch.setattr(torch.mps, "set_rng_state", self.set)

    def set(self, state: torch.Tensor) -> None:
        self.state = state


def test_seeded_draws_the_same_and_leaves_the_callers_state() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)


def test_seeded_restores_the_generator_of_mps_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = FakeMps(monkeypatch)

    def draw_and_fail() -> None:
        mps.state = torch.tensor([8])
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), seeded(3):
        draw_and_fail()
    assert mps.state.item() == 7


def test_random_state_is_kept_of_the_named_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = FakeMps(monkeypatch)
    with kept_random_state([torch.device("cpu")]):
        mps.state = torch.tensor([8])
    assert mps.state.item() == 8
    with kept_random_state([torch.device("mps:0")]):
        mps.state = torch.tensor([9])
    assert mps.state.item() == 8


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMps(monkeypatch)
    assert resolve_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device().type == "cpu"


@pytest.mark.parametrize("name", ["tpu", "cuda:0"])
def test_a_device_that_is_not_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=name):
        resolve_device(name)
