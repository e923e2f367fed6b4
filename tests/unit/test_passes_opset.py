"""Every adapter of the operator sets 6 to 17: the runtime's own results before and after."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_passes_support import load, normal, ops, parse, prove, run

from edgewright.passes.opset import NotConvertible, opset, raise_opset, unflatten_softmax
from edgewright.passes.shapes import infer

REWRITES = {
    "softmax over the last axis": (
        12,
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=2>(x) }",
        {},
        ["Softmax"],
    ),
    "softmax, default axis 1, flattens": (
        11,
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }",
        {},
        ["Flatten", "Shape", "Softmax", "Reshape"],
    ),
    "softmax over channels, the axes behind of size 1": (
        11,
        "g (float[2,5,1,1] x) => (float[2,5,1,1] y) { y = Softmax<axis=1>(x) }",
        {},
        ["Softmax"],
    ),
    "log softmax, negative axis that is not the last": (
        11,
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax<axis=-2>(x) }",
        {},
        ["Flatten", "Shape", "LogSoftmax", "Reshape"],
    ),
    "softmax of a tensor with free dimensions": (
        12,
        "g (float[N,3,M] x) => (float[N,3,M] y) { y = Softmax<axis=1>(x) }",
        {},
        ["Flatten", "Shape", "Softmax", "Reshape"],
    ),
    "squeeze with axes": (
        11,
        "g (float[2,1,3,1] x) => (float[2,3,1] y) { y = Squeeze<axes=[1]>(x) }",
        {},
        ["Squeeze"],
    ),
    "squeeze without axes": (
        11,
        "g (float[2,1,3,1] x) => (float[2,3] y) { y = Squeeze(x) }",
        {},
        ["Squeeze"],
    ),
    "unsqueeze": (
        12,
        "g (float[2,3] x) => (float[1,2,3,1] y) { y = Unsqueeze<axes=[0,3]>(x) }",
        {},
        ["Unsqueeze"],
    ),
    "sum over axes": (
        11,
        "g (float[2,3,4] x) => (float[2,4] y) { y = ReduceSum<axes=[1],keepdims=0>(x) }",
        {},
        ["ReduceSum"],
    ),
    "sum over all": (
        11,
        "g (float[2,3] x) => (float[1,1] y) { y = ReduceSum(x) }",
        {},
        ["ReduceSum"],
    ),
    "clip with both attributes": (
        10,
        "g (float[2,3] x) => (float[2,3] y) { y = Clip<min=-0.5,max=0.25>(x) }",
        {},
        ["Clip"],
    ),
    "clip with the lower one": (
        7,
        "g (float[2,3] x) => (float[2,3] y) { y = Clip<min=-0.5>(x) }",
        {},
        ["Clip"],
    ),
    "pad of doubles: the value has their type": (
        10,
        "g (double[2] x) => (double[3] y) { y = Pad<pads=[0,1],value=2.5>(x) }",
        {},
        ["Pad"],
    ),
    "pad with a value": (
        10,
        "g (float[1,2] x) => (float[2,4] y) { y = Pad<pads=[0,1,1,1],value=2.5>(x) }",
        {},
        ["Pad"],
    ),
    "pad by reflection": (
        10,
        'g (float[1,4] x) => (float[1,6] y) { y = Pad<mode="reflect",pads=[0,1,0,1]>(x) }',
        {},
        ["Pad"],
    ),
    "split into given sizes": (
        11,
        "g (float[2,6] x) => (float[2,2] y, float[2,4] z) { y, z = Split<axis=1,split=[2,4]>(x) }",
        {},
        ["Split"],
    ),
    "split into equal parts": (
        11,
        "g (float[4,2] x) => (float[2,2] y, float[2,2] z) { y, z = Split(x) }",
        {},
        ["Split"],
    ),
    "slice with attributes": (
        9,
        "g (float[4,5] x) => (float[2,2] y) { y = Slice<axes=[1,0],ends=[4,3],starts=[2,1]>(x) }",
        {},
        ["Slice"],
    ),
    "largest k": (
        9,
        "g (float[2,5] x) => (float[2,2] y, int64[2,2] z) { y, z = TopK<axis=1,k=2>(x) }",
        {},
        ["TopK"],
    ),
    "dropout": (
        11,
        "g (float[2,5] x) => (float[2,5] y) { a = Relu(x) b = Dropout<ratio=0.3>(a) y = Neg(b) }",
        {},
        ["Relu", "Neg"],
    ),
    "dropout between input and output": (
        7,
        "g (float[2,5] x) => (float[2,5] y) { y = Dropout(x) }",
        {},
        ["Identity"],
    ),
    "upsample": (
        9,
        'g (float[1,1,2,3] x) => (float[1,1,4,9] y) { y = Upsample<mode="nearest">(x, s) }',
        {"s": np.array([1, 1, 2, 3], np.float32)},
        ["Resize"],
    ),
    "upsample, scales as attribute, linear": (
        7,
        "g (float[1,1,2,3] x) => (float[1,1,4,6] y)"
        ' { y = Upsample<mode="linear",scales=[1.0,1.0,2.0,2.0]>(x) }',
        {},
        ["Resize"],
    ),
    "resize that shrinks": (
        10,
        'g (float[1,1,5,7] x) => (float[1,1,2,3] y) { y = Resize<mode="nearest">(x, s) }',
        {"s": np.array([1, 1, 0.5, 0.5], np.float32)},
        ["Resize"],
    ),
    "resize, linear": (
        10,
        'g (float[1,1,5,7] x) => (float[1,1,10,14] y) { y = Resize<mode="linear">(x, s) }',
        {"s": np.array([1, 1, 2, 2], np.float32)},
        ["Resize"],
    ),
    "scatter": (
        10,
        "g (float[3,2] x) => (float[3,2] y) { y = Scatter(x, i, u) }",
        {"i": np.array([[2, 0]], np.int64), "u": np.array([[5, 6]], np.float32)},
        ["ScatterElements"],
    ),
    "batch normalization": (
        8,
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = BatchNormalization(x, s, s, s, v) }",
        {"s": normal(3), "v": np.abs(normal(3)) + 1},
        ["BatchNormalization"],
    ),
    "regions of interest": (
        11,
        "g (float[1,2,8,8] x) => (float[1,2,2,2] y)"
        " { y = RoiAlign<output_height=2,output_width=2>(x, r, i) }",
        {"r": np.array([[1, 1, 6, 5]], np.float32), "i": np.array([0], np.int64)},
        ["RoiAlign"],
    ),
    "inside the branches of an If": (
        11,
        """g (bool c, float[2,1,3] x) => (float[2,3] y) {
            y = If (c) <
                then_branch = a () => (float[2,3] t) {
                    e = Squeeze<axes=[1]>(x)  t = Softmax<axis=1>(e) },
                else_branch = b () => (float[2,3] u) {
                    f = Squeeze<axes=[1]>(x)  u = Clip(f, lo) }
            > }""",
        {"lo": np.float32(0.1)},
        ["If", "Squeeze", "Softmax", "Squeeze", "Clip"],
    ),
}


@pytest.mark.parametrize("name", REWRITES)
def test_results_stay_equal(name):
    version, text, weights, expected = REWRITES[name]
    model = prove(parse(text, version, **weights), raise_opset, expected)
    assert opset(model) == 17


# ONNX Runtime has no kernels for these of operator set 6, so the results are written down.
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
OLD = {
    "operands aligned at an axis": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = Add<broadcast=1,axis=1>(x, s) }",
        np.float32([1, 2, 3]),
        X + np.float32([1, 2, 3])[:, None],
    ),
    "operands aligned at the end": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = Mul<broadcast=1>(x, s) }",
        np.float32([1, 2, 3, 4]),
        X * np.float32([1, 2, 3, 4]),
    ),
    "operands that name the last axis": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = Sub<broadcast=1,axis=2>(x, s) }",
        np.float32([1, 2, 3, 4]),
        X - np.float32([1, 2, 3, 4]),
    ),
    "dropout": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { b = Dropout<is_test=1>(x) y = Mul(b, s) }",
        np.full((2, 3, 4), 2, np.float32),
        X * 2,
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_operator_set_6(name):
    text, operand, expected = OLD[name]
    model = load(parse(text, 6, s=operand))
    raise_opset(model)
    model.ir_version = 8
    np.testing.assert_array_equal(run(ir.to_proto(model), {"x": X})[0], expected)


@pytest.mark.parametrize("version", [17, 18, 20, 21])
def test_newer_models_stay(version):
    proto = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", version)
    model = load(proto)
    assert raise_opset(model) == 0
    assert opset(model) == version


REFUSED = {
    "older than 6": (5, "g (float[2] x) => (float[2] y) { y = Relu(x) }", {}),
    "normalization in training": (
        6,
        "g (float[2,3] x) => (float[2,3] y) { y = BatchNormalization(x, s, s, s, v) }",
        {"s": normal(3), "v": np.ones(3, np.float32)},
    ),
    "normalization per activation": (
        8,
        "g (float[2,3] x) => (float[2,3] y) { y = BatchNormalization<spatial=0>(x, s, s, s, v) }",
        {"s": normal(3), "v": np.ones(3, np.float32)},
    ),
    "a mask that is read": (
        10,
        "g (float[2,5] x) => (float[2,5] y, bool[2,5] m) { y, m = Dropout(x) }",
        {},
    ),
    "nearest that grows and shrinks": (
        10,
        "g (float[1,1,4,4] x) => (float[1,1,2,8] y) { y = Resize(x, s) }",
        {"s": np.array([1, 1, 0.5, 2], np.float32)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused(name):
    version, text, weights = REFUSED[name]
    with pytest.raises(NotConvertible):
        raise_opset(load(parse(text, version, **weights)))


def test_metadata_and_other_domains_stay():
    proto = parse("g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }", 12)
    onnx.helper.set_model_props(proto, {"characters": "äöü"})
    model = load(proto)
    raise_opset(model)
    after = ir.to_proto(model)
    assert [(p.key, p.value) for p in after.metadata_props] == [("characters", "äöü")]
    assert {(o.domain, o.version) for o in after.opset_import} == {("", 17), ("com.microsoft", 1)}


def test_flattening_goes_once_the_rank_is_known():
    text = """g (float[N,3,M] x) => (float[N,3,M] y) {
        a = Flatten<axis=2>(x)  b = Softmax<axis=-1>(a)  s = Shape(x)  y = Reshape(b, s) }"""
    model = prove(parse(text), unflatten_softmax)
    infer(model)
    assert "Softmax" in ops(model) and "Reshape" not in ops(model)


def test_flattening_of_two_axes_stays():
    text = """g (float[N,3,4] x) => (float[N,3,4] y) {
        a = Flatten<axis=1>(x)  b = Softmax<axis=-1>(a)  s = Shape(x)  y = Reshape(b, s) }"""
    prove(parse(text), unflatten_softmax, ["Flatten", "Softmax", "Shape", "Reshape"])
