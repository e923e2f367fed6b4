"""The torch runner of ONNX graphs: the standard's own cases, gradients, copy-back."""

import collections
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.backend.test.case.node import collect_testcases

from edgewright.errors import BadInput
from edgewright.runtime.local import open_local

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from edgewright.recover.executor import to_module, trainable  # noqa: E402
from edgewright.recover.ops import OPS  # noqa: E402

# What the runner leaves out, by the names of the standard's cases: types torch cannot compute
# with, then results that no float model needs a gradient of.
LEFT_OUT = re.compile(
    "FLOAT[48]|U?INT[248]|uint(16|32|64)|bitwise_not_[34]d|_opt$|_seq$|sequence|"
    "fp16_expanded|"  # half precision rounds differently in another order of sums
    "select_last_index|averagepool_.*dilations|batchnorm_.*training_mode|training_dropout|"
    "maxpool_2d_uint8|maxpool_with_argmax|reduce_(max|min)_empty_set|"
    "resize_tf_crop|_antialias|scatter.*(reduction|duplicate|add|multiply|max|min)|"
    "top_k_uint64|optional"
)


def standard_cases():
    """The cases of the ONNX standard whose nodes are all in OPS, by their first operator."""
    cases = collections.defaultdict(dict)
    for case in collect_testcases(None):
        if case.model is None or case.model.functions or LEFT_OUT.search(case.name):
            continue
        arrays = [a for pair in case.data_sets for values in pair for a in values]
        if any(isinstance(a, list) or np.asarray(a).dtype.kind not in "fiub" for a in arrays):
            continue  # sequences, bfloat16, strings
        used = {n.op_type for n in case.model.graph.node}
        if used <= set(OPS) | {"If"}:
            cases[case.model.graph.node[0].op_type][case.name] = case
    return cases


CASES = standard_cases()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted(CASES))
def test_results_are_those_of_the_standard(op):
    for name, case in CASES[op].items():
        module = to_module(case.model)
        for inputs, outputs in case.data_sets:
            values = zip(case.model.graph.input, inputs, strict=False)
            got = module({v.name: np.array(x) for v, x in values})
            for value, want in zip(got, outputs, strict=True):
                found = value.detach().numpy()
                assert found.shape == np.shape(want), name
                assert found.dtype == np.asarray(want).dtype, name
                # The standard's own tolerance.
                np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-7, err_msg=name)


def test_the_standard_was_really_asked():
    assert sum(len(c) for c in CASES.values()) > 900
    asked = {n.op_type for cs in CASES.values() for c in cs.values() for n in c.model.graph.node}
    # No case of their own in the standard, or one of those left out.
    assert set(OPS) - asked <= {"Upsample", "Constant", "CastLike", "BatchNormalization"}


def graph(text: str, **stored: np.ndarray) -> onnx.ModelProto:
    """A model in ONNX's text form, with its stored tensors beside it."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    for name, value in stored.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape) * 0.5


# Text of a graph in float64, shape of its input, its trained tensors.
GRADIENTS = {
    "convolution": (
        "g (double[2,4,5,5] x) => (double[2,4,9,9] y) {"
        " a = Conv <group=2, pads=[1,0,0,1], strides=[2,2], kernel_shape=[3,3]> (x, w, b)"
        " c = HardSwish (a) d = ConvTranspose <strides=[2,2], kernel_shape=[3,3]> (c, t)"
        " s = Constant <value = float[4] {1.0, 1.0, 1.8, 1.8}> ()"
        ' y = Resize <mode="linear"> (d, , s) }',
        (2, 4, 5, 5),
        {"w": (6, 2, 3, 3), "b": (6,), "t": (6, 4, 3, 3)},
    ),
    "attention": (
        "g (double[2,3,4] x) => (double[2,3,4] y) {"
        " n = LayerNormalization <axis=-1> (x, scale, bias) q = MatMul (n, wq) k = MatMul (n, wk)"
        " kt = Transpose <perm=[0,2,1]> (k) l = MatMul (q, kt) p = Softmax <axis=-1> (l)"
        " v = MatMul (p, n) h = MatMul (v, w) e = Erf (h) y = Add (x, e) }",
        (2, 3, 4),
        {"scale": (4,), "bias": (4,), "wq": (4, 4), "wk": (4, 4), "w": (4, 4)},
    ),
    "lstm": (
        "g (double[3,2,4] x) => (double[3,2,2,5] y, double[2,2,5] h) {"
        ' y, h = LSTM <hidden_size=5, direction="bidirectional"> (x, w, r, b) }',
        (3, 2, 4),
        {"w": (2, 20, 4), "r": (2, 20, 5), "b": (2, 40)},
    ),
    "gru": (
        "g (double[3,2,4] x) => (double[3,1,2,5] y) {"
        " y = GRU <hidden_size=5, linear_before_reset=1> (x, w, r, b) }",
        (3, 2, 4),
        {"w": (1, 15, 4), "r": (1, 15, 5), "b": (1, 30)},
    ),
    "squeeze and excite": (
        "g (double[2,4,3,3] x) => (double[2,6] y) {"
        " m = GlobalAveragePool (x) a = Conv (m, w) s = HardSigmoid (a) z = Mul (x, s)"
        " q = PRelu (z, slope) i = InstanceNormalization (q, gain, shift)"
        " f = MaxPool <kernel_shape=[2,2], pads=[1,1,0,0]> (i) r = ReduceMean <keepdims=0>"
        " (f, axes) y = Gemm <transB=1> (r, head, bias) }",
        (2, 4, 3, 3),
        {"w": (4, 4, 1, 1), "slope": (4, 1, 1), "gain": (4,), "shift": (4,),
         "head": (6, 4), "bias": (6,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name):
    text, shape, trained = GRADIENTS[name]
    stored = {k: normal(*s) for k, s in trained.items()}
    extra = {"axes": np.array([2, 3])} if "axes)" in text else {}
    module = to_module(graph(text, **stored, **extra), train=list(trained))
    x = torch.from_numpy(normal(*shape, seed=1)).requires_grad_()

    def run(x, *weights):
        for weight, value in zip(module.weights, weights, strict=True):
            module.weights[weight] = value
        return tuple(module({"x": x}))

    weights = [w.detach().clone().requires_grad_() for w in module.weights.values()]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)  # float64


CLASSIFIER = (
    "g (float[N,4] x) => (float[N,3] y) {"
    " h = Gemm <transB=1> (x, w, b) a = Add (h, one) r = Clip (a, low, high)"
    " m = Add (r, mask) y = MatMul (m, v) }"
)


def classifier() -> onnx.ModelProto:
    values = {"w": normal(6, 4), "b": normal(6), "v": normal(6, 3), "one": np.ones(1)}
    values |= {"low": np.array(0.0), "high": np.array(6.0), "mask": np.full(6, -1e9)}
    values["mask"][:4] = 0
    return graph(CLASSIFIER, **{k: v.astype(np.float32) for k, v in values.items()})


def test_limits_masks_and_single_numbers_are_not_trained():
    assert trainable(classifier()) == ["w", "b", "v"]


def test_trained_values_go_back_under_the_same_names():
    model = classifier()
    before = [n.SerializeToString() for n in model.graph.node]
    module = to_module(model)
    with torch.no_grad():
        for weight in module.weights.values():
            weight += 0.1
    module.write_back(model)
    assert [n.SerializeToString() for n in model.graph.node] == before
    onnx.checker.check_model(model)
    x = normal(5, 4).astype(np.float32)
    (want,) = open_local(model.SerializeToString()).run({"x": x})
    (got,) = module({"x": x})
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(stored["w"], normal(6, 4).astype(np.float32) + np.float32(0.1))
    assert stored["one"] == 1


def test_a_value_in_a_constant_node_is_trained_and_written_back_too():
    text = "g (float[N,2] x) => (float[N,2] y) {"
    text += " w = Constant <value = float[2,2] {1, 2, 3, 4}> () y = MatMul (x, w) }"
    model = graph(text)
    module = to_module(model)
    with torch.no_grad():
        module.weights["w"] *= 2
    module.write_back(model)
    (got,) = open_local(model.SerializeToString()).run({"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(got, [[2, 4], [6, 8]])


def test_tensors_inside_can_be_asked_for():
    module = to_module(classifier())
    x = normal(5, 4).astype(np.float32)
    clipped, y = module({"x": x}, ["r", "y"])
    assert clipped.shape == (5, 6) and clipped.min().item() >= 0 and y.shape == (5, 3)
    with pytest.raises(BadInput, match="no tensor 'z'"):
        module({"x": x}, ["z"])


def test_the_branch_that_the_condition_takes_is_run_and_sees_what_is_around_it():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])
    twice = helper.make_graph([helper.make_node("Add", ["x", "w"], ["out"])], "t", [], [out])
    none = helper.make_graph([helper.make_node("Neg", ["x"], ["out"])], "e", [], [out])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=twice, else_branch=none)
    weight = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    model = helper.make_model(helper.make_graph([node], "g", [yes, x], [y], [weight]))
    module = to_module(model)
    feed = {"x": np.array([1, 1], np.float32)}
    assert module({**feed, "yes": np.array(True)})[0].tolist() == [2, 3]
    assert module({**feed, "yes": np.array(False)})[0].tolist() == [-1, -1]
    assert not module.weights  # what a branch reads is left alone


def test_an_unknown_operator_is_named_with_its_node():
    node = helper.make_node("Det", ["x"], ["y"], name="the determinant")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    with pytest.raises(BadInput, match=r"Det \(the determinant\)"):
        to_module(helper.make_model(helper.make_graph([node], "g", [x], [y])))


def test_a_model_of_other_shapes_is_refused_at_copy_back():
    module, other = to_module(classifier()), classifier()
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((5, 4), "f"), "w"))
    with pytest.raises(BadInput, match=r"\[6, 4\].*\[5, 4\]"):
        module.write_back(other)


def test_a_feed_of_a_wrong_shape_is_one_message():
    with pytest.raises(BadInput, match="Gemm"):
        to_module(classifier())({"x": np.zeros((1, 5), np.float32)})
