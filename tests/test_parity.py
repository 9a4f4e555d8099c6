"""Parity that can fail: an error by the spread over images, and float64 between noise and error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import SmallNet, images
from torch import Tensor, nn

from sepress.device import seeded
from sepress.errors import InputError
from sepress.export import export_onnx
from sepress.outputs import named_outputs
from sepress.parity import check_onnx_parity, compare_outputs, judge_in_float64


@pytest.fixture
def net() -> nn.Module:
    with seeded(1):
        return SmallNet()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the net that the fixture `net` gives."""
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    with seeded(1):
        export_onnx(SmallNet(), path, example=images())
    return path


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(InputError, match="holds a str"):
        named_outputs({"logits": torch.zeros(1), "name": "x"})


def test_outputs_are_named_by_key_field_or_position():
    x = torch.zeros(1)
    assert list(named_outputs(x)) == ["logits"]
    assert list(named_outputs((x,))) == ["logits"]
    assert list(named_outputs([x, x])) == ["output_0", "output_1"]
    assert list(named_outputs({"out": x, "aux": (x, x), "none": None})) == ["out", "aux_0", "aux_1"]


# ---- parity ---------------------------------------------------------------------------------------
def test_parity_fails_on_the_file_of_another_net(net: nn.Module, small_file: Path):
    with torch.no_grad():
        net.fc.bias[2] += 1e-3
    check = check_onnx_parity(net, small_file, images())
    assert check.passed is False
    assert check.relative_error > 1e-4
    assert "logits" in check.reason


class Cancelling(nn.Module):
    """The identity, with float32's digits lost to a large number; exact in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e4) - 1e4


def test_float64_tells_float32_noise_from_an_error():
    net, x = Cancelling(), images(6, 4)
    own, exact = {"logits": net(x).numpy()}, {"logits": x.double().numpy()}
    noise = own["logits"] - exact["logits"]
    as_near = {"logits": exact["logits"] - noise}
    assert compare_outputs(own, as_near).passed is False
    check = judge_in_float64(net, [(x,)], own, as_near)
    assert check.passed
    assert check.relative_error == pytest.approx(compare_outputs(exact, own).relative_error)
    assert "float64" in check.reason
    assert judge_in_float64(net, [(x,)], own, {"logits": exact["logits"] + 3 * noise}) is None


def test_the_error_is_the_largest_difference_by_the_spread_over_images():
    a = np.array([[0.0, 10.0], [4.0, 10.0]])  # mean over images (2, 10): a spread of 2
    b = a + np.array([[0.0, 0.0], [0.0, 1e-4]])
    check = compare_outputs({"logits": a}, {"logits": b})
    assert check.relative_error == pytest.approx(1e-4 / 2)
    assert check.passed
    assert check.argmax_agreement == 1.0
    assert compare_outputs({"logits": a}, {"logits": a + 3e-4}).passed is False


def test_the_worst_output_counts():
    a, wide = np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[0.0], [2000.0]])
    check = compare_outputs({"wide": wide, "a": a}, {"wide": wide, "a": a + 0.5})
    assert check.relative_error == 0.5
    assert check.passed is False
    assert check.reason.startswith("'a' differs")


def test_argmax_agreement_is_the_share_of_images_with_the_same_top_class():
    a = np.eye(4)
    assert compare_outputs({"logits": a}, {"logits": a[[0, 1, 3, 2]]}).argmax_agreement == 0.5
    assert compare_outputs({"score": np.arange(4.0)}, {"score": np.arange(4.0)}).argmax_agreement is None


def test_tiny_outputs_are_judged_by_their_own_spread():
    a = 1e-9 * np.array([[1.0, 2.0], [3.0, 5.0]])
    assert compare_outputs({"logits": a}, {"logits": 1.1 * a}).passed is False


def test_parity_is_vacuous_only_where_no_image_differs_from_another():
    same = np.full((3, 2), 7.0)
    assert compare_outputs({"logits": same}, {"logits": same + 1}).passed is None
    nearly = same + np.array([[0.0], [1e-6], [0.0]])
    check = compare_outputs({"logits": nearly}, {"logits": nearly})
    assert (check.passed, check.relative_error) == (None, None)
    assert "do not tell the 3 images apart" in check.reason


def test_values_that_are_not_finite_fail():
    a = np.array([[0.0, 1.0], [1.0, 0.0]])
    check = compare_outputs({"logits": a}, {"logits": a * np.nan})
    assert (check.passed, check.relative_error) == (False, None)
    assert compare_outputs({"logits": a}, {"logits": a[:1]}).passed is False
