"""The stage simplify on small models made here: reports, proofs, fallbacks, stable bytes."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edgewright import simplify
from edgewright.errors import BadInput
from edgewright.recipe import DataSettings, InputShape, ModelSettings, Recipe
from edgewright.simplify import compare
from edgewright.stage import Job, Report
from edgewright.target import load_target


def parse(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>' + text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def simplified(
    folder: Path,
    model: onnx.ModelProto,
    data: dict[str, np.ndarray],
    shapes: dict[str, tuple[int | str, ...]] = {},
    out: str = "out",
) -> tuple[Report, onnx.ModelProto]:
    """Run the stage; its report and the model it wrote."""
    (folder / out).mkdir()
    onnx.save(model, folder / "source.onnx")
    np.savez(folder / "calibration.npz", **data)
    inputs = {name: InputShape(shape=shape) for name, shape in shapes.items()}
    recipe = Recipe(
        model=ModelSettings(name="m", version="1", source="source.onnx", inputs=inputs),
        data=DataSettings(calibration="calibration.npz"),
        folder=folder,
    )
    told: list[tuple[str, int, int]] = []
    job = Job(
        recipe=recipe,
        target=load_target("cpu"),
        folder=folder / out,
        model=folder / "source.onnx",
        tell=lambda text, done=0, total=0: told.append((text, done, total)),
    )
    report = simplify.run(job)
    assert told and all(0 <= done <= total for _, done, total in told)
    return report, onnx.load(job.output_model())


def outputs(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


NET = """g (float[N,3,8,8] x) => (float[N,5] y) {
    k = Constant<value_float=6.0>()  z = Constant<value_float=0.0>()
    p = Pad(x, around)  a = Conv(p, w)
    n = BatchNormalization(a, gamma, beta, mean, var)
    i = Identity(n)  r = Relu(i)  c = Min(r, k)
    m = ReduceMean<axes=[2,3],keepdims=0>(c)
    s = Shape(m)  b = Gather(s, first)  u = Unsqueeze(b, axis)  t = Concat<axis=0>(u, four)
    f = Reshape(m, t)
    v = Transpose<perm=[1,0]>(dense)  h = MatMul(f, v)  y = Add(h, bias)
}"""


def net() -> onnx.ModelProto:
    model = parse(
        NET,
        around=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        w=normal(4, 3, 3, 3),
        gamma=normal(4, seed=2),
        beta=normal(4, seed=3),
        mean=normal(4, seed=4),
        var=np.abs(normal(4, seed=5)) + 1,
        first=np.int64(0),
        axis=np.array([0]),
        four=np.array([4]),
        dense=normal(5, 4),
        bias=normal(5),
    )
    onnx.helper.set_model_props(model, {"characters": "äöü"})
    return model


def test_a_small_net(tmp_path):
    source = net()
    x = normal(12, 3, 8, 8)
    report, model = simplified(tmp_path, source, {"x": x}, {"x": ("batch", 3, 8, 8)})
    assert operators(model) == [
        "Conv",
        "Clip",
        "GlobalAveragePool",
        "Flatten",
        "MatMul",
        "Add",
    ]
    assert [n.name for n in model.graph.node] == [
        f"{op}_{k}" for k, op in enumerate(operators(model))
    ]
    assert report["notes"] == []
    assert report["opset"] == {"before": 17, "after": 17}
    assert report["before"]["nodes"] == len(source.graph.node)
    assert report["before"]["bytes"] == (tmp_path / "source.onnx").stat().st_size
    assert report["after"]["nodes"] == 6
    assert report["after"]["operators"]["Conv"] == 1
    assert report["model"]["nodes"] == 6
    assert report["equality"]["samples"] == 8
    assert report["equality"]["doubled"] == ["batch"]
    assert report["equality"]["sqnr_db"]["y"] > 100
    applied = [step["name"] for step in report["steps"] if step["applied"]]
    assert "affine maps into weights" in applied
    assert all(
        set(s) == {"name", "nodes_before", "nodes_after", "applied", "reason"}
        for s in report["steps"]
    )
    assert {p.key: p.value for p in model.metadata_props} == {"characters": "äöü"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].name == "y"
    many = outputs(source, {"x": x})[0]
    np.testing.assert_allclose(outputs(model, {"x": x})[0], many, atol=1e-5)


def test_the_same_bytes_every_time(tmp_path):
    data = {"x": normal(2, 3, 8, 8)}
    for out in ("first", "second"):
        simplified(tmp_path, net(), data, out=out)
    assert (tmp_path / "first/model.onnx").read_bytes() == (
        tmp_path / "second/model.onnx"
    ).read_bytes()


def test_a_fixed_batch_is_written_into_shapes(tmp_path):
    _, model = simplified(tmp_path, net(), {"x": normal(2, 3, 8, 8)}, {"x": (1, 3, 8, 8)})
    dims = [
        [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    ]
    assert dims == [[1, 3, 8, 8], [1, 5]]
    assert len(model.graph.value_info) >= len(model.graph.node) - 1


CAPTURE = """g (bool c, float[N,1,3] x) => (float[N,3] y) {
    outer = Neg(x)
    k = Constant<value = float[3] {1,2,3}>()
    y = If (c) <
        then_branch = a () => (float[N,3] t) {
            k2 = Constant<value = float {0.5}>()
            i = Identity(outer)  e = Squeeze<axes=[1]>(i)
            d = Mul(e, k2)  t = Softmax<axis=1>(d) },
        else_branch = b () => (float[N,3] t) {
            i = Identity(outer)  e = Squeeze<axes=[1]>(i)
            d = Add(e, k)  t = Clip(d, low, high) }
    >
}"""


def test_branches_that_read_outer_values_from_operator_set_11(tmp_path):
    source = parse(CAPTURE, 11, low=np.float32(-0.5), high=np.float32(2))
    data = {"c": np.array([True, False, True]), "x": normal(3, 1, 1, 3)}
    report, model = simplified(tmp_path, source, data)
    assert report["opset"] == {"before": 11, "after": 17}
    assert report["notes"] == []
    assert operators(model) == ["Neg", "If"]
    inner = [
        node.op_type for attribute in model.graph.node[1].attribute for node in attribute.g.node
    ]
    assert inner == ["Squeeze", "Add", "Clip", "Squeeze", "Mul", "Softmax"] or inner == [
        "Squeeze",
        "Mul",
        "Softmax",
        "Squeeze",
        "Add",
        "Clip",
    ]
    assert not any(a.g.initializer for a in model.graph.node[1].attribute)
    for c in (True, False):
        feed = {"c": np.array(c), "x": normal(4, 1, 3, seed=7)}
        np.testing.assert_allclose(outputs(model, feed)[0], outputs(source, feed)[0], rtol=1e-6)


LOOP = """g (int64 n, float[2,3] x) => (float[2,3] y) {
    yes = Constant<value: tensor = bool {1}>()
    y = Loop (n, yes, x) <
        body = b (int64 i, bool c, float[2,3] state) => (bool d, float[2,3] next) {
            d = Identity(c)
            w = Constant<value = float[3] {1,2,3}>()
            one = Constant<value_float=1.0>()
            a = Mul(state, one)  e = Add(a, w)  f = Cast<to=1>(i)  next = Sub(e, f) }
    >
}"""


def test_a_loop(tmp_path):
    source = parse(LOOP, 13)
    data = {"n": np.array([0, 3, 5]), "x": normal(3, 2, 3)}
    report, model = simplified(tmp_path, source, data)
    assert report["notes"] == []
    assert operators(model) == ["Loop"]
    assert [n.op_type for n in model.graph.node[0].attribute[0].g.node] == [
        "Identity",
        "Add",
        "Cast",
        "Sub",
    ]


def test_a_step_that_breaks_the_model_is_left_out(tmp_path, monkeypatch):
    def spoil(model):
        bias = model.graph.initializers["bias"]
        if bias.const_value.name == "spoilt":
            return 0
        bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(1), name="spoilt")
        return 1

    def fail(model):
        raise RuntimeError("this pass\nhas a bug")

    steps = [*simplify.STEPS, ("spoiling", spoil), ("failing", fail)]
    monkeypatch.setattr(simplify, "STEPS", tuple(steps))
    source = net()
    x = normal(3, 3, 8, 8)
    report, model = simplified(tmp_path, source, {"x": x})
    texts = [n["text"] for n in report["notes"] if n["level"] == "warning"]
    assert len(texts) == 2
    assert "'spoiling' was left out: output 'y' differs by up to 1" in texts[0]
    assert "'failing' was left out: RuntimeError: this pass has a bug" in texts[1]
    refused = {s["name"]: s for s in report["steps"] if s["name"] in ("spoiling", "failing")}
    assert not any(s["applied"] for s in refused.values())
    assert operators(model)[:2] == ["Conv", "Clip"]
    assert report["equality"]["sqnr_db"]["y"] > 100
    np.testing.assert_allclose(outputs(model, {"x": x})[0], outputs(source, {"x": x})[0], atol=1e-5)


def test_a_step_that_fixes_a_free_dimension_is_left_out(tmp_path, monkeypatch):
    """All calibration inputs have a batch of 1; only the doubled one can tell."""

    def bake(model):
        (reshape,) = [n for n in model.graph if n.op_type == "Reshape"]
        shape = reshape.inputs[1]
        if shape.const_value.numpy()[0] == 1:
            return 0
        shape.const_value = ir.tensor(np.array([1, 2, 2]), name=shape.name)
        return 1

    text = "g (float[N,4] x) => (float[A,2,2] y) { y = Reshape(x, s) }"
    monkeypatch.setattr(simplify, "STEPS", (("baking", bake),))
    source = parse(text, s=np.array([0, 2, 2]))
    report, model = simplified(tmp_path, source, {"x": normal(3, 4)})
    assert [n["level"] for n in report["notes"]] == ["warning"]
    assert outputs(model, {"x": normal(5, 4)})[0].shape == (5, 2, 2)


def test_random_numbers_stay_as_many_and_as_they_are(tmp_path):
    """Without a seed any change of the graph is a change of the numbers: nothing is proved."""
    text = """g (float[N,4] x) => (float[N,4] y) { a = Identity(x)  n = RandomNormal<shape=[1,4]>()
        m = RandomNormal<shape=[1,4]>()  d = Sub(n, m)  y = Add(a, d) }"""
    report, model = simplified(tmp_path, parse(text), {"x": normal(3, 4)})
    assert operators(model).count("RandomNormal") == 2
    assert all("was left out" in n["text"] for n in report["notes"])
    assert report["equality"]["sqnr_db"]["y"] > 80


def test_what_cannot_be_proved_ships_as_it_came(tmp_path, monkeypatch):
    never = simplify.Proof(False, 0.0, {}, "output 'y' has other values")
    monkeypatch.setattr(simplify, "prove", lambda *arguments: never)
    text = "g (float[N,4] x) => (float[N,4] y) { a = Identity(x)  y = Neg(a) }"
    report, model = simplified(tmp_path, parse(text), {"x": normal(3, 4)}, {"x": ("batch", 4)})
    texts = [n["text"] for n in report["notes"]]
    assert "the model ships as it came" in texts[-1] and "has other values" in texts[-1]
    assert operators(model) == ["Identity", "Neg"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert report["equality"]["sqnr_db"] == {"y": 200.0}


def test_a_newer_operator_set_stays_and_is_told(tmp_path):
    text = "g (float[N,4] x) => (float[N,4] y) { a = Identity(x)  y = Neg(a) }"
    report, model = simplified(tmp_path, parse(text, 21), {"x": normal(3, 4)})
    assert report["opset"] == {"before": 21, "after": 21}
    assert [n["level"] for n in report["notes"]] == ["warning"]
    assert "operator set 21" in report["notes"][0]["text"]
    assert operators(model) == ["Neg"]


def test_what_cannot_be_raised_stays_as_it_is(tmp_path):
    text = """g (float[N,3] x) => (float[N,3] y)
        { a = Identity(x)  y = BatchNormalization<spatial=0>(a, s, s, s, v) }"""
    source = parse(text, 8, s=normal(3), v=np.ones(3, np.float32))
    report, model = simplified(tmp_path, source, {"x": normal(3, 3)})
    assert report["opset"] == {"before": 8, "after": 8}
    assert any("'operator set' was left out" in n["text"] for n in report["notes"])
    assert "spatial" in {a.name for n in model.graph.node for a in n.attribute}


def test_stored_tensors_listed_as_inputs(tmp_path):
    source = parse("g (float[N,4] x, float[4] w) => (float[N,4] y) { y = Mul(x, w) }", 7)
    source.ir_version = 3
    source.graph.initializer.append(onnx.numpy_helper.from_array(normal(4), "w"))
    report, model = simplified(tmp_path, source, {"x": normal(3, 4)})
    assert [v.name for v in model.graph.input] == ["x"]
    assert model.ir_version >= 4
    assert "no longer listed as inputs" in report["notes"][0]["text"]


def test_functions_are_inlined(tmp_path):
    source = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N,4] x) => (float[N,4] y) { a = local.twice(x)  y = Neg(a) }
        <domain: "local", opset_import: ["" : 17]>
        twice (x) => (y) { y = Add(x, x) }"""
    )
    report, model = simplified(tmp_path, source, {"x": normal(3, 4)})
    assert operators(model) == ["Add", "Neg"]
    assert not model.functions
    assert [o.domain for o in model.opset_import] == [""]
    assert report["notes"] == [{"level": "info", "text": "1 functions inlined"}]


def test_traces_of_the_exporter_are_gone(tmp_path):
    source = parse("g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }")
    source.graph.node[0].doc_string = "/home/someone/model.py:12"
    source.graph.node[0].metadata_props.add(key="trace", value="/home/someone/model.py:12")
    simplified(tmp_path, source, {"x": normal(3, 4)})
    assert b"someone" not in (tmp_path / "out/model.onnx").read_bytes()


def test_a_contradicting_recipe_is_an_error(tmp_path):
    source = parse("g (float[1,4] x) => (float[1,4] y) { y = Neg(x) }")
    with pytest.raises(BadInput, match="which the model fixes"):
        simplified(tmp_path, source, {"x": normal(3, 4)}, {"x": (2, 4)})


ARRAY = np.array([1.0, -2.0, np.nan, np.inf], np.float32)
COMPARED = {
    "the same": (ARRAY, ARRAY, True),
    "rounding": (ARRAY, ARRAY * np.float32(1 + 1e-6), True),
    "80 dB": (np.float32([1, 1]), np.float32([1.0001, 1]), True),
    "a thousandth": (np.float32([1, 1]), np.float32([1.001, 1]), False),
    "one small outlier beside a large value": (
        np.float32([1000, 0.001]),
        np.float32([1000, 0.002]),
        True,
    ),
    "NaN elsewhere": (ARRAY, ARRAY[::-1].copy(), False),
    "another infinity": (np.float32([np.inf]), np.float32([-np.inf]), False),
    "another shape": (ARRAY, ARRAY[:3], False),
    "another type": (ARRAY, ARRAY.astype(np.float64), False),
    "whole numbers": (np.array([1, 2]), np.array([1, 2]), True),
    "other whole numbers": (np.array([1, 2]), np.array([1, 3]), False),
    "zeros": (np.zeros(3, np.float32), np.zeros(3, np.float32), True),
    "not zeros": (np.zeros(3, np.float32), np.full(3, 1e-9, np.float32), False),
    "lists": ([np.ones(2), np.zeros(1)], [np.ones(2), np.zeros(1)], True),
    "other lists": ([np.ones(2)], [np.ones(2), np.zeros(1)], False),
    "maps": ([{1: 0.5}], [{1: 0.25}], False),
}


@pytest.mark.parametrize("name", COMPARED)
def test_compare(name):
    reference, found, equal = COMPARED[name]
    proof = compare(["y"], [[reference]], [[found]])
    assert proof.equal is equal
    assert bool(proof.why) is not equal
