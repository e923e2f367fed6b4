"""The gate of a release as users start it: bundles and models, with a recipe and without."""

import numpy as np
import onnx
import pytest
from conftest import RECIPE, tiny_model, write_tiny
from onnx import helper, numpy_helper


def with_slow_node(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that squares its enlarged input as a matrix: many times the work, no weights."""
    graph = model.graph
    sizes = numpy_helper.from_array(np.array([1.0, 1.0, 32.0, 32.0], np.float32), "sizes")
    tiny = numpy_helper.from_array(np.float32(1e-30), "tiny")
    graph.initializer.extend([sizes, tiny])
    graph.node[-1].output[0] = "plain"
    graph.node.extend(
        [
            helper.make_node("Resize", ["x", "", "sizes"], ["large"], "enlarge"),
            helper.make_node("MatMul", ["large", "large"], ["square"], "slow"),
            helper.make_node(
                "ReduceMean", ["square"], ["mean"], "mean", axes=[1, 2, 3], keepdims=0
            ),
            helper.make_node("Flatten", ["mean"], ["row"], "row"),
            helper.make_node("Mul", ["row", "tiny"], ["little"], "little"),
            helper.make_node("Add", ["plain", "little"], ["scores"], "sum"),
        ]
    )
    return model


def that_breaks(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that asks for an entry that a table has not, once it is run."""
    graph = model.graph
    table = numpy_helper.from_array(np.zeros(4, np.float32), "table")
    offset = numpy_helper.from_array(np.array(1_000_000), "offset")
    graph.initializer.extend([table, offset])
    graph.node[-1].output[0] = "plain"
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["plain"], ["best"], "best", axis=1),
            helper.make_node("Add", ["best", "offset"], ["beyond"], "beyond"),
            helper.make_node("Gather", ["table", "beyond"], ["none"], "none"),
            helper.make_node("Add", ["plain", "none"], ["scores"], "sum"),
        ]
    )
    return model


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, edgewright):
    """The tiny model in a bundle, and beside it a slow copy in one of its own."""
    recipe = write_tiny(tmp_path_factory.mktemp("gate") / "tiny")
    folder = recipe.parent
    onnx.save(with_slow_node(tiny_model()), str(folder / "slow.onnx"))
    onnx.save(that_breaks(tiny_model()), str(folder / "breaks.onnx"))
    for name in ("model", "slow"):
        ran = edgewright(
            "bundle", folder / f"{name}.onnx", "--recipe", recipe, "-o", folder / f"{name}.tar"
        )
        assert ran.code == 0, ran.err
    return folder


def verdicts(ran):
    return {check["name"]: check["verdict"] for check in ran.json["gate"]["checks"]}


def test_a_bundle_against_itself(bundles, edgewright):
    same = bundles / "model.tar"
    ran = edgewright("gate", "--candidate", same, "--baseline", same, "--golden", same, "--json")
    assert ran.code in (0, 4), ran.err  # a very busy machine may leave the latency open
    found = verdicts(ran)
    assert "FAIL" not in found.values()
    for name in ("metric", "agreement", "memory", "size", "cold_start", "runs"):
        assert found[name] == "PASS"
        assert found.get(f"golden_{name}", "PASS") == "PASS"
    assert "golden_latency" in found
    assert "golden inputs" in ran.json["gate"]["notes"][0]["text"]


def test_one_more_slow_node_fails_by_name(bundles, edgewright):
    ran = edgewright(
        *("gate", "--candidate", bundles / "slow.tar", "--baseline", bundles / "model.tar"),
        "--json",
    )
    assert ran.code == 1, ran.err
    found = verdicts(ran)
    assert found["latency"] == "FAIL"
    assert found["metric"] == "NOT JUDGED"  # the race had decided
    (latency,) = [c for c in ran.json["gate"]["checks"] if c["name"] == "latency"]
    assert latency["low"] > 1.05


def test_five_samples_prove_nothing(bundles, edgewright, tmp_path):
    warns = RECIPE + '\n[gate.tolerance]\ninconclusive = "warn"\n'
    recipe = write_tiny(tmp_path / "few", warns)
    with np.load(recipe.parent / "evaluation.npz") as data:
        np.savez(recipe.parent / "evaluation.npz", x=data["x"][:5], y=data["y"][:5])
    other = tiny_model()
    other.doc_string = "the same network in another file"
    onnx.save(other, str(tmp_path / "other.onnx"))
    ran = edgewright(
        *("gate", "--candidate", tmp_path / "other.onnx", "--baseline", bundles / "model.tar"),
        *("--recipe", recipe, "--json"),
    )
    assert ran.code == 0, ran.err  # the policy only warns
    assert "the policy only warns" in ran.err
    assert ran.json["gate"]["verdict"] == "INCONCLUSIVE"
    found = verdicts(ran)
    assert found["metric"] == "INCONCLUSIVE"
    assert found["agreement"] == "PASS"  # equal outputs
    assert "FAIL" not in found.values()


def test_a_candidate_that_breaks_fails_with_the_cause(bundles, edgewright):
    ran = edgewright(
        *("gate", "--candidate", bundles / "breaks.onnx", "--baseline", bundles / "model.tar"),
        "--json",
    )
    assert ran.code == 1, ran.err
    (runs,) = [c for c in ran.json["gate"]["checks"] if c["name"] == "runs"]
    assert runs["verdict"] == "FAIL"
    assert "out of data bounds" in runs["reason"]
    ran = edgewright(
        "gate", "--candidate", bundles / "breaks.onnx", "--baseline", bundles / "model.tar"
    )
    assert (ran.code, ran.out.strip()) == (1, "FAIL")
    assert "FAIL   breaks 0 for cpu" in ran.err, "without a recipe the file has the name"


def test_a_baseline_that_cannot_be_trusted_is_no_pass(bundles, edgewright, tmp_path):
    good = bundles / "model.tar"
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(data)
    for baseline, code in ((damaged, 5), (tmp_path / "absent.tar", 3)):
        ran = edgewright("gate", "--candidate", good, "--baseline", baseline)
        assert ran.code == code, ran.err
        assert "PASS" not in ran.out
    words = ("gate", "--candidate", good, "--baseline", good)
    ran = edgewright(*words, "--target", "cpu-avx2")
    assert ran.code == 3
    assert "cpu-avx2" in ran.err
