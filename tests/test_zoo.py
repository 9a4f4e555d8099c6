"""Networks that people deploy: a fixed sample on every run, all of them with `-m zoo`, and their table.

See zoo.py for what is in the list and zoo_checks.py for what is checked of each.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
import zoo
import zoo_checks

import sepress
from sepress.coupling import Coupling, apply_removal
from sepress.export import Exporter
from sepress.types import Removed

DETECTOR = "torchvision:ssdlite320_mobilenet_v3_large"
# torchscript, several times quicker, does the others; the whole list takes the default exporter.
EXPORTERS: dict[str, Exporter | None] = {DETECTOR: None, "timm:haloregnetz_b": "dynamo"}
# The smallest member of every hard family.
SAMPLE = (
    "timm:mobilenetv3_small_050",
    "torchvision:mobilenet_v3_small",
    DETECTOR,
    "timm:legacy_seresnet18",
    "timm:test_efficientnet",
    "timm:test_efficientnet_ln",
    "timm:test_efficientnet_evos",
    "timm:efficientnet_cc_b0_4e",
    "timm:ghostnetv2_100",
    "timm:ghostnetv3_050",
    "timm:repvit_m0_9",
    "timm:cspnext_tiny",
    "timm:ese_vovnet19b_slim_dw",
    "timm:test_nfnet",
    "timm:fastvit_t8",
    "timm:efficientvim_m1",
    "timm:test_coatnet",
    "timm:test_maxvit",
    "timm:sebotnet33ts_256",
    "timm:haloregnetz_b",
    "timm:eca_resnext26ts",
    "timm:gcresnext26ts",
    "timm:resnest14d",
    "timm:skresnet18",
)


def each(gates: int, references: str) -> dict[str, int]:
    return dict.fromkeys(references.split(), gates)


# Gates counted by hand in papers' and libraries' block tables: one a block, in the stages that have any.
GATES = {
    # ResNet-18, 26, 34, 50, 101, 152, 200, 269 (He et al. 2016, table 1): 2+2+2+2, ..., 3+30+48+8
    **each(8, "timm:seresnet18 timm:legacy_seresnet18 timm:nf_seresnet26"),
    **each(8, "timm:seresnext26d_32x4d timm:seresnext26t_32x4d timm:legacy_seresnext26_32x4d"),
    **each(16, "timm:seresnet34 timm:legacy_seresnet34 timm:seresnet50 timm:seresnet50t"),
    **each(16, "timm:legacy_seresnet50 timm:seresnetaa50d timm:nf_seresnet50"),
    **each(16, "timm:seresnext50_32x4d timm:legacy_seresnext50_32x4d timm:resnetrs50"),
    **each(33, "timm:seresnet101 timm:legacy_seresnet101 timm:nf_seresnet101"),
    **each(33, "timm:seresnext101_32x4d timm:seresnext101_64x4d timm:seresnext101_32x8d"),
    **each(33, "timm:legacy_seresnext101_32x4d timm:seresnext101d_32x8d timm:resnetrs101"),
    **each(50, "timm:seresnet152 timm:legacy_seresnet152 timm:seresnet152d timm:senet154"),
    **each(50, "timm:legacy_senet154 timm:resnetrs152"),
    **each(66, "timm:seresnet200d timm:resnetrs200"),
    "timm:seresnet269d": 89,
    # MobileNetV3 (Howard et al. 2019, tables 1 and 2); LR-ASPP's head has one more
    **each(9, "timm:mobilenetv3_small_050 timm:mobilenetv3_small_075"),
    **each(9, "timm:tf_mobilenetv3_small_100 torchvision:mobilenet_v3_small"),
    **each(8, "timm:mobilenetv3_large_075 timm:mobilenetv3_large_100 timm:mobilenetv3_rw"),
    "torchvision:mobilenet_v3_large": 8,
    "torchvision:deeplabv3_mobilenet_v3_large": 8,
    "torchvision:lraspp_mobilenet_v3_large": 9,
    # EfficientNet (Tan & Le 2019): 1+2+2+3+3+4+1 blocks times the depth factor, each stage rounded up
    **{f"timm:efficientnet_b{n}": gates for n, gates in enumerate((16, 23, 23, 26, 32, 39, 45, 55, 61))},
    **{f"torchvision:efficientnet_b{n}": gates for n, gates in enumerate((16, 23, 23, 26, 32, 39, 45, 55))},
    "timm:efficientnet_cc_b0_4e": 16,
    # EfficientNetV2 (Tan & Le 2021, table 4): the fused stages have none; S 6+9+15, M 7+14+18+5, L 10+19+25+7
    **each(30, "timm:tf_efficientnetv2_s torchvision:efficientnet_v2_s"),
    **each(44, "timm:efficientnetv2_m torchvision:efficientnet_v2_m"),
    **each(61, "timm:efficientnetv2_l torchvision:efficientnet_v2_l"),
    # RegNetY (Radosavovic et al. 2020, figure 19): the sum of d
    "timm:regnety_002": 1 + 1 + 4 + 7,
    "timm:regnety_006": 1 + 3 + 7 + 4,
    "timm:regnety_040": 2 + 6 + 12 + 2,
    "timm:regnety_064": 2 + 7 + 14 + 2,
    "timm:regnety_120": 2 + 5 + 11 + 1,
    **each(1 + 3 + 6 + 6, "timm:regnety_004 torchvision:regnet_y_400mf"),
    **each(1 + 3 + 8 + 2, "timm:regnety_008 torchvision:regnet_y_800mf"),
    **each(2 + 6 + 17 + 2, "timm:regnety_016 torchvision:regnet_y_1_6gf"),
    **each(2 + 5 + 13 + 1, "timm:regnety_032 torchvision:regnet_y_3_2gf"),
    **each(2 + 4 + 10 + 1, "timm:regnety_080 torchvision:regnet_y_8gf"),
    **each(2 + 4 + 11 + 1, "timm:regnety_160 torchvision:regnet_y_16gf"),
    # NFNet-F0 (Brock et al. 2021): 1+2+6+3; NF-RegNet-B0: one a block
    **each(12, "timm:nfnet_f0 timm:dm_nfnet_f0"),
    "timm:nf_regnet_b0": 16,
    # VoVNetV2 (Lee & Park 2020): eSE in the last OSA module of each of four stages
    **each(4, "timm:ese_vovnet19b_dw timm:ese_vovnet19b_slim_dw timm:ese_vovnet39b"),
    **each(4, "timm:ese_vovnet57b timm:ese_vovnet99b"),
    # GhostNet (Han et al. 2020, table 1): 2+2+3; MnasNet-A1 (Tan et al. 2019, figure 7): 3+2+3; small: 4+3+3
    **each(7, "timm:ghostnet_050 timm:ghostnet_100"),
    **each(8, "timm:semnasnet_050 timm:semnasnet_100"),
    "timm:mnasnet_small": 10,
    # PP-LCNet (Cui et al. 2021, table 1): the last two; MixNet (Tan & Le 2019, figure 3)
    **each(2, "timm:lcnet_035 timm:lcnet_100"),
    "timm:mixnet_s": 4 + 3 + 3 + 3,
    **each(4 + 4 + 4 + 4, "timm:mixnet_m timm:mixnet_l"),
    # FBNetV3-B; ReXNet (Han et al. 2021): all but the first three blocks
    "timm:fbnetv3_b": 18,
    "timm:rexnet_100": 2 + 3 + 3 + 5,
    # CoAtNet (Dai et al. 2021, table 3): the MBConv blocks of two stages; MaxViT (Tu et al. 2022, table 1)
    "timm:coatnet_0_224": 2 + 3,
    **each(2 + 6, "timm:coatnet_1_224 timm:coatnet_2_224"),
    "timm:maxvit_rmlp_nano_rw_256": 1 + 2 + 3 + 1,
    **each(2 + 2 + 5 + 2, "timm:maxvit_tiny_tf_224 timm:maxvit_small_tf_224 torchvision:maxvit_t"),
    "timm:maxvit_base_tf_224": 2 + 6 + 14 + 2,
}
NAMED = (  # whose whole way by the defaults is tried
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:seresnet50",
    "timm:regnety_016",
    "timm:seresnext50_32x4d",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
)


def check(result: zoo_checks.Result) -> None:
    assert not result.failures, zoo.line(result)
    if result.reference in GATES:
        assert result.gates == GATES[result.reference]


@pytest.mark.parametrize("reference", SAMPLE)
def test_everything_holds_of_the_sample(reference: str, tmp_path: Path) -> None:
    """The detector, whose export takes longest, is exported with the whole list only."""
    exporter = EXPORTERS.get(reference, "torchscript")
    check(zoo_checks.examine(zoo.architecture(reference), tmp_path, exporter=exporter))


@pytest.mark.zoo
@pytest.mark.timeout(zoo_checks.PROCESS_SECONDS + 60)
@pytest.mark.parametrize("reference", [of.reference for of in zoo.architectures()])
def test_everything_holds_of_every_architecture(reference: str) -> None:
    """Whatever is known of this very code is not examined again; see zoo.py."""
    check(zoo.result_of(zoo.architecture(reference)))


@pytest.mark.zoo
def test_the_table_is_written_and_nearly_all_channels_are_free() -> None:
    """Runs after the architectures of the list; ones that were not chosen are not in the table."""
    results = list(zoo.known().values())
    zoo.write_tables(results)
    free = [result.free for result in results if result.section == "se" and result.free is not None]
    assert fmean(free) >= 0.99


@pytest.mark.zoo
@pytest.mark.timeout(900)
def test_the_list_is_what_the_installed_registries_hold() -> None:
    listed = {(of.reference, of.section, of.params) for of in zoo.architectures()}
    found = set(zoo.find())
    assert not found - listed, f"new: {sorted(found - listed)}; python tests/zoo.py list"
    assert not listed - found, f"gone: {sorted(listed - found)}; python tests/zoo.py list"


@pytest.mark.parametrize(
    "reference", [name if name == NAMED[0] else pytest.param(name, marks=pytest.mark.zoo) for name in NAMED]
)
def test_the_defaults_prune_a_named_net_exactly(reference: str) -> None:
    """Reconstruction, with compensation and norms estimated again, where the examination ranks cheaply."""
    torch.manual_seed(0)
    net, images = zoo_checks.build(reference), torch.randn(12, 3, 96, 96)
    zoo_checks.make_lively(net, images)
    result = sepress.prune(net, calibration=images, ratio=0.3)
    assert result.report.checks["masked_equals_removed"].passed is True
    base, pruned = result.report.measurements
    assert base.macs is not None
    assert pruned.macs is not None
    assert pruned.macs < 0.6 * base.macs
    assert result.net(images[:3]).shape == (3, 1000)


# ---- the examination itself -----------------------------------------------------------------------
def test_an_examination_sees_that_other_channels_went_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: where surgery removes other channels than planned, masking disagrees."""
    from sepress import pruning

    def off_by_one(net: torch.nn.Module, coupling: Coupling, removed: Removed) -> None:
        name = next(name for name, units in removed.items() if units[-1] + 1 < coupling.group(name).units)
        shifted = tuple(unit + 1 for unit in removed[name])
        apply_removal(net, coupling, {**removed, name: shifted})

    monkeypatch.setattr(pruning, "apply_removal", off_by_one)
    architecture = zoo.architecture("timm:mobilenetv3_small_050")
    result = zoo_checks.Examination(architecture, tmp_path, "torchscript").run()
    assert list(result.failures) == ["pruned_by_ratio"]
    assert "masked = removed does not hold" in result.failures["pruned_by_ratio"]


def test_a_process_that_dies_or_hangs_is_its_architectures_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = zoo_checks.Architecture("timm:no_such_net", "se", 0, 96, None)
    assert "built" in zoo_checks.examine(nobody, tmp_path).failures
    result = zoo_checks.examine(nobody, tmp_path / "no" / "such" / "folder")
    assert result.failures == {"process": "the process died (exit code 1)"}
    monkeypatch.setattr(zoo_checks, "PROCESS_SECONDS", 0.0)
    result = zoo_checks.examine(zoo.architecture("timm:seresnet269d"), tmp_path)
    assert result.failures == {"process": "not done after 0 s"}


def test_what_is_known_is_not_examined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[str] = []

    def examine(of: zoo_checks.Architecture, folder: Path, *, exporter: str) -> zoo_checks.Result:
        examined.append(of.reference)
        return zoo_checks.Result(of.reference, of.section, {"traced": "why"}, kinds=("scale sigmoid",))

    monkeypatch.setenv("SEPRESS_ZOO", str(tmp_path))
    monkeypatch.setattr(zoo, "results_file", zoo.results_file.__wrapped__)
    monkeypatch.setattr(zoo, "examine", examine)
    of = zoo.architectures()[0]
    first, second = zoo.result_of(of), zoo.result_of(of)
    assert first == second
    zoo.result_of(of, force=True)
    assert examined == [of.reference] * 2
    assert zoo.known() == {of.reference: first}


def test_the_table_tells_what_failed_and_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (of.reference for of in zoo.architectures()[:2])
    done = {name: None for _, names in zoo.CHECKS for name in names if name != "process"}
    channels = {"gated": 60, "ungated": 20, "se_hidden": 10, "frozen": 10, "outputs": 1000}
    results = [
        zoo_checks.Result(good, "se", {}, channels=channels, figures=done, seconds=1.5, memory_mb=20),
        zoo_checks.Result(bad, "se", {"exported": "no"}, channels={**channels, "frozen": 0}, figures=done),
    ]
    monkeypatch.setattr(zoo, "TABLES", tmp_path)
    zoo.write_tables(reversed(results))
    assert zoo.totals(results) == [
        "Working: 2 of 2; equal to masking: 2 of 2; ONNX-exact: 1 of 2.",
        f"Free output channels: 95.00% on average, least 90.0% ({good}).",
        f"Slowest: 1.5 s ({good}), on average 1.5 s.",
        f"Largest extra memory: 20 MB ({good}).",
    ]
    header, *rows = (line.split("\t") for line in (tmp_path / "zoo.tsv").read_text().splitlines())
    assert [row[0] for row in rows] == [good, bad]
    assert [row[header.index("ONNX")] for row in rows] == ["yes", "no"]
    assert "| all but ONNX |" in (tmp_path / "zoo.md").read_text()
