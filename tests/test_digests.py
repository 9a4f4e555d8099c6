"""A digest tells values, names, shapes and dtypes apart, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sepress.digests import file_digest, tensor_digest

HALVES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}


def test_the_digest_is_that_of_the_bytes_behind_each_name() -> None:
    text = b"a torch.float32 (2, 3)\n" + HALVES["a"].numpy().tobytes() + b"b torch.bool ()\n\x01"
    assert tensor_digest(HALVES) == hashlib.sha256(text).hexdigest()


def test_order_and_memory_layout_do_not_matter() -> None:
    turned = {"b": HALVES["b"], "a": HALVES["a"].T.contiguous().T.requires_grad_()}
    assert not turned["a"].is_contiguous()
    assert tensor_digest(turned) == tensor_digest(HALVES)


@pytest.mark.parametrize(
    "other",
    [
        HALVES | {"a": HALVES["a"] + torch.eye(2, 3) * 1e-6},
        HALVES | {"a": HALVES["a"].reshape(3, 2)},
        HALVES | {"b": torch.tensor(1, dtype=torch.uint8)},
        {"a": HALVES["a"], "c": HALVES["b"]},
        HALVES | {"c": torch.empty(0)},
    ],
)
def test_another_value_shape_dtype_or_name_is_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert tensor_digest(other) != tensor_digest(HALVES)


def test_types_without_a_numpy_dtype_have_a_digest() -> None:
    whole, half = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16) / 2
    assert tensor_digest({"a": whole}) != tensor_digest({"a": half})


def test_a_files_digest_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"12345").hexdigest()
