"""Latency tables: what they predict, by hand; their files; and the coarse one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

from sepress.costs import (
    SCHEMA,
    LatencyTable,
    coarse_table,
    features,
    layers_digest,
    predictor,
    read_table,
    table_from_json,
)
from sepress.coupling import Coupling, trace
from sepress.coupling.groups import Layers
from sepress.errors import InputError
from sepress.recipe import check_inputs, load_recipe


def traced(name: str) -> Coupling:
    return trace(*nets.build(name))


def layers_of(lengths: list[list[int]], shrinking: list[list[int]], kind: Any = "spatial", groups: int = 1):
    count = len(lengths)
    shrinks = np.array(shrinking, dtype=bool)
    return Layers(np.ones(count, int), np.array(lengths), shrinks, (kind,) * count, np.full(count, groups))


def plain_table(**fields: Any) -> LatencyTable:
    """Of nets.Plain: a (8 of 3), b (6 of 8), head (6 -> 5); blocks of 4, 4 and 1."""
    table = LatencyTable(
        net=layers_digest(traced("plain")),
        overhead=1000.0,
        block=np.array([4, 4, 1]),
        fixed=np.array([10.0, 20.0, 30.0]),
        per_channel=np.array([[1.0, 0, 0, 0], [2.0, 3.0, 0, 0], [5.0, 0, 0, 0]]),
        per_product=np.array([0.0, 0.5, 0.25]),
        per_ragged=np.zeros(3),
        conditions={"provider": "CPUExecutionProvider"},
        validation={"median_error": 0.02},
    )
    return replace(table, **fields)


# ---- features -------------------------------------------------------------------------------------
def test_widths_count_in_whole_blocks_and_axes_that_can_not_shrink_not_at_all() -> None:
    lengths = [[17, 3, 3, 3], [16, 9, 3, 3], [1, 8, 1, 1]]
    x = features(layers_of(lengths, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]), np.array([16, 8, 8]))
    assert x.channels.tolist() == [[32, 0, 0, 0], [16, 16, 0, 0], [0, 0, 0, 0]]
    assert x.product.tolist() == [0, 16 * 16, 0]  # one axis is no product
    assert x.ragged.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("out", "into", "ragged"),
    [
        (32, 16, 0),  # two groups of 16 -> 16: whole on both sides
        (24, 16, 24),  # 12 of a group come out
        (32, 12, 32),  # 12 go into a group
        (16, 8, 16),  # 8 are half a block
    ],
)
def test_a_grouped_convolution_counts_as_it_is_and_is_ragged_unless_both_sides_are_whole(
    out: int, into: int, ragged: int
) -> None:
    x = features(layers_of([[out, into, 3, 3]], [[1, 1, 0, 0]], "grouped", groups=2), np.array([16]))
    assert x.channels.tolist() == [[out, into, 0, 0]]
    assert (x.product.tolist(), x.ragged.tolist()) == ([out * into], [ragged])


# ---- prediction -----------------------------------------------------------------------------------
def test_a_prediction_is_the_sum_over_layers_and_what_is_beside_them() -> None:
    coupling, table = traced("plain"), plain_table()
    # b's 6 channels are two blocks of four: 8
    a, b, head = 10 + 8, 20 + 2 * 8 + 3 * 8 + 0.5 * 8 * 8, 30 + 5 * 6 + 0.25 * 6 * 5
    assert table.predict_ns(coupling, {}) == round(1000 + a + b + head)
    # three of a's eight gone leave two blocks still; two of b's six leave one
    assert table.predict_ns(coupling, {"a.0": (0, 1, 2)}) == table.predict_ns(coupling, {})
    b, head = 20 + 2 * 4 + 3 * 8 + 0.5 * 4 * 8, 30 + 5 * 4 + 0.25 * 4 * 5
    assert table.predict_ns(coupling, {"b.0": (0, 5)}) == round(1000 + a + b + head)
    assert predictor(coupling, table)({"b.0": (0, 5)}) == table.predict_ns(coupling, {"b.0": (0, 5)})


def test_a_table_of_another_net_or_of_no_time_is_refused() -> None:
    table = plain_table()
    table.check(traced("plain"))
    with pytest.raises(InputError, match="of another net"):
        predictor(traced("residual"), table)
    with pytest.raises(InputError, match="of another net"):  # the right digest over other layers
        replace(table, net=layers_digest(traced("residual"))).check(traced("residual"))
    with pytest.raises(InputError, match="takes -"):
        plain_table(overhead=-5000.0).check(traced("plain"))


# ---- the coarse table -----------------------------------------------------------------------------
def test_the_coarse_table_of_a_pointwise_a_depthwise_and_a_linear_layer_by_hand() -> None:
    coupling = traced("inverted bottleneck")  # 144 positions; stem 6, expand 12, depthwise, gate, project 6
    taken = coarse_table(coupling).layer_ns(coupling.layers({}))
    # one block of 16 wherever a width can shrink
    assert taken[1] == pytest.approx(5000 + 0.134 * 144 * 16 + 0.0183 * 144 * 16 * 16)
    assert taken[2] == pytest.approx(9700 + 0.041 * 144 * 16 + 0.0455 * 144 * 16 * 9)
    assert taken[3] == pytest.approx(7200 + 0.202 * 16 * 16)  # the gate's: one position is a linear layer
    head = coupling.layers({})
    assert head.lengths[6, :2].tolist() == [6, 5]
    assert taken[6] == pytest.approx(7200 + 0.202 * 16 * 16)


NO_GROUPED = [name for name in nets.NETS if name != "grouped"]


@pytest.mark.parametrize("name", NO_GROUPED)
def test_by_the_coarse_table_no_removal_takes_longer(name: str) -> None:
    coupling = traced(name)
    predict, random = predictor(coupling), np.random.default_rng(0)
    for _ in range(5):
        removed: dict[str, tuple[int, ...]] = {}
        times = [predict({})]
        for _ in range(6):
            for group in coupling.prunable():
                least = len(removed.get(group.name, ()))
                removed[group.name] = tuple(range(int(random.integers(least, group.units))))
            times.append(predict(removed))
        assert times == sorted(times, reverse=True)
        assert times[-1] > 0


# ---- files ----------------------------------------------------------------------------------------
def test_a_table_survives_its_file(tmp_path: Path) -> None:
    path, coupling = tmp_path / "table.json", traced("plain")
    path.write_text(json.dumps(plain_table().to_json(), allow_nan=False))
    read = read_table(path)
    assert read.to_json() == plain_table().to_json()
    assert read.predict_ns(coupling, {"a.0": (1, 2, 3, 4)}) == plain_table().predict_ns(
        coupling, {"a.0": (1, 2, 3, 4)}
    )


def lacking(*keys: str) -> Callable[[Any], None]:
    def damage(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return damage


def holding(replacement: Any, *keys: Any) -> Callable[[Any], None]:
    def damage(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = replacement

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacking("net"), "lacks 'net'"),
        (lacking("layers", "per_product"), "lacks 'per_product'"),
        (holding([], "layers"), "no whole latency table"),
        (holding("x" * 5000, "layers", "fixed", 0), "no whole latency table"),
        (holding(10**400, "layers", "fixed", 0), "no whole latency table"),
        (holding([1.0], "layers", "per_channel", 0), "no whole latency table"),
        (holding([1.0, 2.0], "layers", "fixed"), "unequal lengths"),
        (holding([1.0, 2.0, 3.0], "layers", "per_channel"), "unequal lengths"),
        (holding(-1.0, "layers", "fixed", 0), "negative, or no numbers"),
        (holding(float("nan"), "layers", "per_ragged", 1), "negative, or no numbers"),
        (holding(float("inf"), "layers", "per_product", 1), "negative, or no numbers"),
        (holding(0, "layers", "block", 1), "negative, or no numbers"),
        (holding(float("nan"), "overhead_ns"), "no whole latency table"),
        (holding("sepress.plan/2", "schema"), f"expected schema '{SCHEMA}'"),
        (holding(3, "conditions"), "no whole latency table"),
    ],
)
def test_a_damaged_table_is_one_bounded_error(damage: Callable[[Any], None], message: str) -> None:
    value = plain_table().to_json()
    damage(value)
    with pytest.raises(InputError, match=message) as caught:
        table_from_json(value, where="table.json")
    assert caught.value.message.startswith("table.json ")
    assert len(caught.value.message) < 400
    assert "sepress profile" in str(caught.value.remedy)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"table"', "\u00e9"])
def test_a_file_that_is_no_table_is_an_input_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"table\.json (can't be read|is no latency table)"):
        read_table(path)
    with pytest.raises(InputError, match="can't be read"):
        read_table(tmp_path / "gone.json")


def test_a_file_that_is_no_table_is_told_before_a_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("table.json").write_text("no JSON", encoding="utf-8")
    Path("r.yaml").write_text(
        "{name: r, model: timm:seresnet50, data: photos,"
        " stages: [{prune: {target_latency: 0.5, latency_table: table.json}}]}",
        encoding="utf-8",
    )
    recipe = load_recipe("r.yaml")
    with pytest.raises(InputError, match=r"table.json can't be read"):
        check_inputs(recipe)
