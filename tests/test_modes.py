"""Eval mode is lent: a net comes back in the modes it had, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepress.modes import evaluating, kept_modes


def mixed_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    net[1].eval()  # a frozen norm
    return net


def modes(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


def test_evaluating_is_eval_mode_without_gradients_for_a_while() -> None:
    net = mixed_net()
    with evaluating(net):
        assert modes(net) == [False] * 4
        assert not torch.is_grad_enabled()
    assert modes(net) == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_modes_come_back_when_the_forward_fails() -> None:
    net = mixed_net()
    with pytest.raises(RuntimeError, match="shapes"), evaluating(net):
        net(torch.zeros(1, 5))
    assert modes(net) == [True, True, False, True]


def test_kept_modes_leave_modes_and_gradients_to_what_runs_inside() -> None:
    net = mixed_net()
    with kept_modes(net):
        assert torch.is_grad_enabled()
        net.eval()
        net[2].train()
    assert modes(net) == [True, True, False, True]
