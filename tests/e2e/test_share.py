"""share in a build and as a command: sizes, the metric's say, codes where no int8 follows."""

from pathlib import Path

import numpy as np
import onnx
from conftest import RECIPE, write_tiny


def shared(report: dict) -> dict:
    return next(s["report"] for s in report["stages"] if s["stage"] == "share")


def build(edgewright, recipe: Path, out: Path) -> dict:
    ran = edgewright("build", recipe, "--target", "cpu", "--out", out, "--json")
    assert ran.code in (0, 1, 4), ran.err
    return ran.json["targets"][0]["report"]


def test_clustered_weights_stay_clustered_through_int8(edgewright, tmp_path: Path) -> None:
    recipe = write_tiny(
        tmp_path / "r", RECIPE + "\n[share]\ncodebook = 16\nmax_drop = 0.05\ncompress = true\n"
    )
    report = build(edgewright, recipe, tmp_path / "out")
    found = shared(report)
    assert found["form"] == "values" and found["tries"][-1]["kept"]
    entries = {row["tensor"]: row["entries"] for row in found["codebooks"]}
    assert max(entries.values()) <= found["tries"][-1]["entries"]
    assert found["sent_bytes"]["after"] < 0.5 * found["sent_bytes"]["before"]
    # The int8 codes are no more than the codebook has: nothing moved a weight off its entry.
    most = found["tries"][-1]["entries"]
    for tensor in onnx.load(tmp_path / "out" / "cpu" / "model.onnx").graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            assert len(np.unique(onnx.numpy_helper.to_array(tensor))) <= most
    whole, sent = (next((tmp_path / "out" / "cpu").glob(f"*.tar{end}")) for end in ("", ".xz"))
    assert sent.stat().st_size < 0.8 * whole.stat().st_size
    manifests = [edgewright("verify", path, "--json") for path in (whole, sent)]
    assert manifests[0].code == manifests[1].code == 0
    assert manifests[0].json == manifests[1].json
    assert edgewright("self-test", sent).code == 0
    assert "share" in {s["stage"] for s in report["stages"]}
    assert (
        "share"
        in report["stages"][[s["stage"] for s in report["stages"]].index("validate")]["report"][
            "metric"
        ]["stages"]
    )


def test_without_int8_codes_are_stored(edgewright, tmp_path: Path) -> None:
    text = RECIPE + '\n[quantize]\nscope = "off"\n[share]\ncodebook = 64\nmax_drop = 0.1\n'
    text += 'assignment = "soft"\ntrain = { steps = 10, threads = 1 }\n'
    recipe = write_tiny(tmp_path / "r", text)
    out = tmp_path / "shared.onnx"
    ran = edgewright("share", recipe.parent / "model.onnx", "--recipe", recipe, "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["share"]["form"] == "codes"
    told = ran.json["share"]["training"]
    assert told["best"]["distance"] <= told["start"]["distance"]
    before = (recipe.parent / "model.onnx").stat().st_size
    assert out.stat().st_size < 0.35 * before
    kinds = {t.data_type for t in onnx.load(out).graph.initializer}
    assert onnx.TensorProto.UINT8 in kinds


def test_what_costs_too_much_gets_more_values_or_none(edgewright, tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path / "r", RECIPE + "\n[share]\ncodebook = 2\nmax_drop = 0.0\n")
    out = tmp_path / "shared.onnx"
    ran = edgewright("share", recipe.parent / "model.onnx", "--recipe", recipe, "-o", out, "--json")
    assert ran.code == 0, ran.err
    tries, notes = ran.json["share"]["tries"], ran.json["share"]["notes"]
    assert tries[0]["entries"] == 2 and not tries[0]["kept"]
    assert notes and ("are used" in notes[0]["text"] or "left as they were" in notes[0]["text"])


def test_bad_settings_and_no_table(edgewright, tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path / "r", RECIPE + "\n[share]\ncodebook = 300\n")
    ran = edgewright("build", recipe, "--target", "cpu")
    assert ran.code == 3 and "share.codebook" in ran.err and "2 to 256" in ran.err
    recipe.write_text(RECIPE)
    ran = edgewright("share", recipe.parent / "model.onnx", "--recipe", recipe, "-o", "x.onnx")
    assert ran.code == 3 and "[share]" in ran.err
