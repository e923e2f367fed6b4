"""The lint: each finding on a graph that has the trouble, and not on its twin without it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewright import simplify
from edgewright.inspection import describe
from edgewright.lint import ROUNDS, STEPS, lint
from edgewright.lint.finding import Finding
from edgewright.model import load
from edgewright.quantize import placement, ready
from edgewright.recipe import QuantizeSettings
from edgewright.report.findings import findings_text
from edgewright.target import Target, load_target, parse_target

KIT = Path(__file__).resolve().parents[3] / "shared" / "kit"


def net(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text; nodes are called after their first output."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(head + text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    for node in model.graph.node:
        node.name = node.output[0]
        for a in node.attribute:
            for inner in a.g.node:
                inner.name = inner.output[0]
    return model


def f32(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def profile(name: str = "cpu", **int8: object) -> Target:
    raw = copy.deepcopy(load_target(name).raw)
    raw["int8"].update(int8)
    return parse_target(raw)


def found(model: onnx.ModelProto, target: Target | None = None) -> list[Finding]:
    facts = describe(model)
    facts["bytes"] = model.ByteSize()
    return lint(model, facts, target or profile())


def of(kind: str, model: onnx.ModelProto, target: Target | None = None) -> list[Finding]:
    return [f for f in found(model, target) if f.kind == kind]


def conv_net(body: str, **more: Any) -> onnx.ModelProto:
    """A convolution `a` of 4 channels, the body, and a convolution `y` of `m`."""
    return net(
        f"""g (float[1,3,8,8] x) => (float[1,4,8,8] y) {{
            a = Conv(x, w) {body} y = Conv(m, v)
        }}""",
        **{"w": f32(4, 3, 1, 1), "v": f32(4, 4, 1, 1, seed=2), **more},
    )


def clean() -> onnx.ModelProto:
    return conv_net("m = Relu(a)")


@pytest.mark.parametrize("name", ["cpu", "arm", "cpu-avx2"])
def test_a_clean_model_has_nothing(name: str) -> None:
    assert [f.kind for f in found(clean(), profile(name))] == (
        ["saturation"] if name == "cpu-avx2" else []
    )


# --- values of different size under one scale ----------------------------------------------

BOXES = """g (float[1,4,8] x) => (float[1,4,8] s, float[1,8,8] y) {{
    a = MatMul(x, w)  b = {box}  c = MatMul(x, v)  s = {score}  y = Concat<axis=1>(b, s)
}}"""


def boxes(box: str, score: str) -> onnx.ModelProto:
    numbers = {k: np.float32(v) for k, v in {"big": 640, "one": 1, "zero": 0, "three": 3}.items()}
    return net(BOXES.format(box=box, score=score), w=f32(8, 8), v=f32(8, 8, seed=2), **numbers)


@pytest.mark.parametrize(
    ("box", "score", "text"),
    [
        ("Mul(a, big)", "Sigmoid(c)", "Concat of [0, 1] and unbounded times 640"),
        ("Mul(a, big)", "Softmax(c)", "Concat of [0, 1] and unbounded times 640"),
        ("Clip(a, zero, big)", "Tanh(c)", "Concat of [-1, 1] and [0, 640]"),
        ("Relu(a)", "Sigmoid(c)", "Concat of [0, 1] and unbounded"),
    ],
)
def test_boxes_and_scores_under_one_scale(box: str, score: str, text: str) -> None:
    model = boxes(box, score)
    (finding,) = of("mixed-ranges", model)
    assert finding.text == f"1 {text}: y"
    assert finding.nodes == ("y",)
    # Nothing to do for the user, because the placement leaves it in float; and so it does.
    assert finding.fixed_by == "quantize: placement"
    assert finding.level == "info"
    assert "y" not in placement.choose(ready(model), QuantizeSettings(scope="full")).nodes


@pytest.mark.parametrize(
    ("box", "score"),
    [("Sigmoid(a)", "Sigmoid(c)"), ("Clip(a, zero, three)", "Sigmoid(c)"), ("Relu(a)", "Relu(c)")],
)
def test_tensors_of_like_size_may_share_a_scale(box: str, score: str) -> None:
    assert of("mixed-ranges", boxes(box, score)) == []


def test_clipped_branches_are_the_users_to_keep_apart() -> None:
    def branches(high: float) -> onnx.ModelProto:
        return net(
            """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
                a = Conv(x, w)  b = Clip(a, zero, high)  c = Conv(x, w)  d = Clip(c, zero, one)
                k = Concat<axis=1>(b, d)  y = Conv(k, v)
            }""",
            w=f32(4, 3, 1, 1),
            v=f32(4, 8, 1, 1),
            zero=np.float32(0),
            one=np.float32(1),
            high=np.float32(high),
        )

    (finding,) = of("mixed-ranges", branches(100))
    assert (finding.level, finding.fixed_by) == ("warning", "")
    assert "quantize.exclude" in finding.remedy
    assert "k" in placement.choose(ready(branches(100)), QuantizeSettings(scope="full")).nodes
    assert of("mixed-ranges", branches(6)) == []


def spread(factor: float) -> np.ndarray:
    return f32(4, 3, 1, 1) * np.float32([1, factor, 1, 1]).reshape(4, 1, 1, 1)


def test_channels_far_apart_under_one_scale() -> None:
    per_tensor = profile(per_channel=False)
    model = conv_net("m = Relu(a)", w=spread(0.001))
    (finding,) = of("spread-weights", model, per_tensor)
    assert finding.nodes == ("a",)
    assert finding.fixed_by == "quantize: equalization"
    assert of("spread-weights", model) == []  # a scale per channel
    assert of("spread-weights", conv_net("m = Relu(a)", w=spread(0.5)), per_tensor) == []
    # A dead channel loses nothing.
    assert of("spread-weights", conv_net("m = Relu(a)", w=spread(0)), per_tensor) == []
    (alone,) = of("spread-weights", conv_net("m = Sigmoid(a)", w=spread(0.001)), per_tensor)
    assert (alone.level, alone.fixed_by) == ("warning", "")


def test_stacked_matrices_have_one_scale_everywhere() -> None:
    def stack(factor: float) -> onnx.ModelProto:
        weight = f32(2, 8, 5) * np.float32([1, 1, factor, 1, 1])
        return net("g (float[2,1,8] x) => (float[2,1,5] y) { y = MatMul(x, w) }", w=weight)

    assert [f.nodes for f in of("spread-weights", stack(0.001))] == [("y",)]
    assert of("spread-weights", stack(1)) == []


def test_weights_read_along_different_axes() -> None:
    text = """g (float[1,8] x) => (float[1,8] y) {{
        a = Gemm(x, w) r = Relu(a) y = Gemm<transB={}>(r, w)
    }}"""
    (finding,) = of("shared-weights", net(text.format(1), w=f32(8, 8)))
    assert finding.nodes == ("a", "y")
    assert of("shared-weights", net(text.format(0), w=f32(8, 8))) == []


# --- the operator set, and operators -------------------------------------------------------


def test_an_old_operator_set_is_raised() -> None:
    old = conv_net("m = Relu(a)", opset=11)
    (finding,) = of("opset", old)
    assert (finding.level, finding.fixed_by) == ("info", "simplify: operator set")
    assert of("opset", conv_net("m = Relu(a)", opset=13)) == []


def test_an_operator_set_that_cannot_be_raised() -> None:
    def upsampled(op: str, opset: int) -> onnx.ModelProto:
        return net(
            f"g (float[1,3,8,8] x) => (float[1,3,16,16] y) {{ y = {op} }}",
            opset=opset,
            s=np.float32([1, 1, 2, 2]),
        )

    findings = of("opset", upsampled("Upsample(x, s)", 9))
    assert any("deprecated operators (Upsample)" in f.text for f in findings)
    assert all(f.fixed_by == "simplify: operator set" for f in findings)
    assert of("opset", upsampled("Resize(x, , s)", 13)) == []
    lost = net(
        """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
            y = BatchNormalization<spatial=0>(x, s, s, s, s)
        }""",
        opset=8,
        s=np.ones((3, 8, 8), np.float32),
    )
    (finding,) = of("opset", lost)
    assert (finding.level, finding.fixed_by) == ("warning", "")


def test_scales_per_axis_before_there_were_any() -> None:
    def dequantized(opset: int) -> onnx.ModelProto:
        return net(
            "g (uint8[4,3] x) => (float[4,3] y) { y = DequantizeLinear<axis=0>(x, s, z) }",
            opset=opset,
            s=np.ones(4, np.float32),
            z=np.zeros(4, np.uint8),
        )

    assert any("with an axis" in f.text for f in of("opset", dequantized(12)))
    assert not any("with an axis" in f.text for f in of("opset", dequantized(13)))


def test_a_model_that_is_quantized_already() -> None:
    model = conv_net(
        "q = QuantizeLinear(a, s, z)  m = DequantizeLinear(q, s, z)",
        s=np.float32(0.1),
        z=np.uint8(128),
    )
    (finding,) = of("quantized", model)
    assert (finding.level, finding.nodes) == ("warning", ("q", "m"))
    codes = net(
        """g (float[1,4,8] x) => (float[1,4,5] y) {
            d = DequantizeLinear(w, s, z)  y = MatMul(x, d)
        }""",
        w=np.ones((8, 5), np.int8),
        s=np.float32(0.1),
        z=np.int8(0),
    )
    assert [f.kind for f in found(codes)] == ["quantized"]  # and not of two activations


def test_operators_of_one_runtime() -> None:
    model = conv_net("m = com.microsoft.BiasGelu(a, b)", b=f32(8))
    (finding,) = of("contrib", model)
    assert finding.nodes == ("m",)
    assert "BiasGelu" in finding.text


@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_weights_of_other_types(kind: type) -> None:
    name = {"float64": "double", "float16": "float16"}[np.dtype(kind).name]
    model = net(
        f"g ({name}[1,8] x) => ({name}[1,5] y) {{ y = MatMul(x, w) }}", w=f32(8, 5).astype(kind)
    )
    (finding,) = of("weight-type", model)
    assert finding.nodes == ("y",)
    assert finding.text.startswith(f"1 layers with weights stored as {name}")
    cast = net(
        "g (float[1,8] x) => (float[1,5] y) { c = Cast<to=1>(w) y = MatMul(x, c) }",
        w=f32(8, 5).astype(kind),
    )
    assert [f.nodes for f in of("weight-type", cast)] == [("y",)]


# --- normalisation and activations ---------------------------------------------------------

NORM = {n: np.abs(f32(4, seed=k)) + np.float32(0.1) for k, n in enumerate(("g", "h", "i", "j"))}


def test_a_normalization_that_folds_is_mended() -> None:
    (finding,) = of("batchnorm", conv_net("m = BatchNormalization(a, g, h, i, j)", **NORM))
    assert finding.fixed_by == "simplify: affine maps into weights"
    assert finding.level == "info"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("r = Relu(a) b = BatchNormalization(r, g, h, i, j) m = Relu(b)", "no layer before it"),
        ("b = BatchNormalization(a, g, h, i, j) m = Add(a, b)", "several readers"),
    ],
)
def test_a_normalization_that_does_not_fold(body: str, where: str) -> None:
    (finding,) = of("batchnorm", conv_net(body, **NORM))
    assert (finding.level, finding.fixed_by, finding.count) == ("warning", "", 1)
    assert where in finding.text


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("m = HardSwish(a)", "HardSwish"),
        ("s = Sigmoid(a) m = Mul(a, s)", "SiLU"),
        ("m = LeakyRelu(a)", "LeakyRelu"),
        ("m = PRelu(a, slope)", "PRelu"),
        ("b = Add(a, three) c = Clip(b, zero, six) d = Mul(a, c) m = Div(d, six)", "HardSwish"),
        ("d = Div(a, root) e = Erf(d) f = Add(e, one) p = Mul(a, f) m = Mul(p, half)", "Gelu"),
        ("m = Clip(a, one, six)", "Clip whose bounds do not hold zero"),
        ("u = ReduceMax<keepdims=0>(a) m = Clip(a, zero, u)", "Clip with computed bounds"),
    ],
)
def test_activations_that_do_not_vanish(body: str, name: str) -> None:
    numbers = {"zero": 0, "half": 0.5, "one": 1, "root": 1.4142135, "three": 3, "six": 6}
    more = {k: np.float32(v) for k, v in numbers.items()}
    findings = of("activation", conv_net(body, slope=f32(4, 1, 1), **more))
    assert [f.text.split(":")[0] for f in findings] == [f"1 {name}"]
    assert findings[0].fixed_by == "quantize: placement"


def test_what_does_not_stand_between_layers_costs_nothing() -> None:
    model = net(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            h = HardSwish(x) a = Conv(h, w) b = Tanh(a) y = Softmax(b)
        }""",
        w=f32(4, 3, 1, 1),
    )
    assert found(model) == []


@pytest.mark.parametrize("body", ["m = Relu(a)", "m = Clip(a, zero, six)", "m = Clip(a, low, six)"])
def test_activations_that_vanish(body: str) -> None:
    more = {"zero": np.float32(0), "six": np.float32(6), "low": np.float32(-1)}
    assert of("activation", conv_net(body, **more)) == []


# --- layers without a kernel ---------------------------------------------------------------


def test_operators_without_a_kernel_and_their_work() -> None:
    model = conv_net("m = ConvTranspose<pads=[1,1,1,1]>(a, u)", u=f32(4, 4, 3, 3))
    (finding,) = of("no-int8-kernel", model)
    assert (finding.level, finding.fixed_by, finding.nodes) == ("warning", "", ("m",))
    # 64 places of 3x4 weights before, of 4x4 behind, and 4x4x9 of its own
    assert finding.share == pytest.approx(144 / (12 + 16 + 144), abs=1e-4)
    assert "84% of the work" in finding.text


RECURRENT = """g (float[6,1,8] x) => (float[6,1,1,16] y) {{
    y = {}<hidden_size=16>(x, w, r)
}}"""


@pytest.mark.parametrize(
    ("op", "gates", "name", "by"),
    [
        ("LSTM", 4, "cpu", "quantize: dynamic int8 LSTM"),
        ("GRU", 3, "cpu", ""),
        ("RNN", 1, "cpu", ""),
    ],
)
def test_recurrent_layers(op: str, gates: int, name: str, by: str) -> None:
    model = net(RECURRENT.format(op), w=f32(1, 16 * gates, 8), r=f32(1, 16 * gates, 16))
    (finding,) = of("no-int8-kernel", model, profile(name))
    assert finding.fixed_by == by
    assert finding.level == ("info" if by else "warning")
    assert "100% of the work" in finding.text
    if op == "LSTM":
        (finding,) = of("no-int8-kernel", model, profile(dynamic=False))
        assert finding.level == "warning"


def test_recurrent_layers_that_give_their_last_state_only() -> None:
    model = net(
        """g (float[6,1,8] x) => (float[1,1,16] y, float[1,1,16] z) {
            , y = GRU<hidden_size=16>(x, w, r)  , z = GRU<hidden_size=16>(x, v, r)
        }""",
        w=f32(1, 48, 8),
        v=f32(1, 48, 8, seed=2),
        r=f32(1, 48, 16, seed=3),
    )
    for node, name in zip(model.graph.node, ("first", "second"), strict=True):
        node.name = name
    (finding,) = of("no-int8-kernel", model)
    assert finding.text == "2 GRU, 100% of the work: first, second"


def test_a_layout_that_the_int8_lstm_does_not_have() -> None:
    text = "g (float[1,6,8] x) => (float[1,6,1,16] y) {{ y = LSTM<hidden_size=16{}>(x, w, r) }}"
    stored = {"w": f32(1, 64, 8), "r": f32(1, 64, 16)}
    (finding,) = of("no-int8-kernel", net(text.format(", layout=1"), **stored))
    assert (finding.level, finding.fixed_by) == ("warning", "")


FORMS = {
    "Gemm with a transposed activation": (
        "g (float[8,4] x) => (float[4,3] y) { y = Gemm<transA=1>(x, w) }",
        "g (float[4,8] x) => (float[4,3] y) { y = Gemm(x, w) }",
        {"w": f32(8, 3)},
    ),
    "Gemm with alpha or beta": (
        "g (float[4,8] x) => (float[4,3] y) { y = Gemm<alpha=0.5>(x, w) }",
        "g (float[4,8] x) => (float[4,3] y) { y = Gemm<alpha=1.0>(x, w) }",
        {"w": f32(8, 3)},
    ),
    "Conv with computed weights": (
        "g (float[1,3,8,8] x, float[4,3,1,1] k) => (float[1,4,8,8] y) { y = Conv(x, k) }",
        # Computed from stored values only: folded, so nothing is said of it in the end.
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { k = Neg(w) y = Conv(x, k) }",
        {"w": f32(4, 3, 1, 1)},
    ),
    "Conv with auto_pad": (
        'g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }',
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
        {"w": f32(4, 3, 3, 3)},
    ),
    "MatMul with a vector as weight": (
        "g (float[4,8] x) => (float[4] y) { y = MatMul(x, w) }",
        "g (float[4,8] x) => (float[4,8] y) { y = Relu(x) }",
        {"w": f32(8)},
    ),
    "Conv with a computed bias": (
        """g (float[1,3,8,8] x, float[4] c) => (float[1,4,8,8] y) { y = Conv(x, w, c) }""",
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv(x, w, b) }""",
        {"w": f32(4, 3, 1, 1), "b": f32(4)},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_layers_in_a_form_without_a_kernel(name: str) -> None:
    bad, good, weights = FORMS[name]
    (finding,) = of("layer-form", net(bad, **weights))
    assert finding.text == f"1 {name}, 100% of the work: y"
    assert finding.fixed_by == ""
    assert [f for f in of("layer-form", net(good, **weights)) if not f.fixed_by] == []


def test_layers_in_subgraphs() -> None:
    def branched(condition: str) -> onnx.ModelProto:
        return net(
            f"""g (float[1,3,8,8] x, bool c) => (float[1,4,8,8] y) {{
                y = If({condition}) <
                    then_branch = one () => (float[1,4,8,8] inner) {{ inner = Conv(x, w) }},
                    else_branch = two () => (float[1,4,8,8] other) {{ other = Conv(x, v) }}
                >
            }}""",
            w=f32(4, 3, 1, 1),
            v=f32(4, 3, 1, 1, seed=2),
            yes=np.array(True),
        )

    (kept,), (gone,) = (of("control-flow", branched(c)) for c in ("c", "yes"))
    assert kept.text.startswith("1 If: 1 left") and kept.fixed_by == ""
    assert gone.text.startswith("1 If: 0 left") and gone.fixed_by.startswith("simplify")
    (finding,) = of("in-subgraph", branched("c"))
    assert finding.nodes == ("inner", "other")
    assert finding.fixed_by == ""
    # The condition is stored: the branch that is taken stands in the main graph then.
    mended = of("in-subgraph", branched("yes"))
    assert {f.fixed_by for f in mended} == {"simplify: folding constants"}


def test_products_of_two_activations() -> None:
    text = "g (float[1,6,8] x) => (float[1,6,{}] y) {{ t = Transpose<perm=[0,2,1]>(x) y = {} }}"
    (finding,) = of("product", net(text.format(6, "MatMul(x, t)")))
    assert finding.nodes == ("y",)
    assert of("product", net(text.format(3, "MatMul(x, w)"), w=f32(8, 3))) == []


def test_operators_between_layers() -> None:
    model = conv_net("m = InstanceNormalization(a, g, h)", **NORM)
    assert [f.text for f in of("no-int8-kernel", model)] == ["1 InstanceNormalization: m"]
    body = 's1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) m = Resize<mode="{}">(s1, , s)'
    twice = np.float32([1, 1, 2, 2])
    model = conv_net(body.format("linear"), s=twice)
    assert [f.text for f in of("no-int8-kernel", model)] == ["1 Resize (linear): m"]
    assert of("no-int8-kernel", conv_net(body.format("nearest"), s=twice)) == []


def test_means_over_pixels_are_rewritten() -> None:
    (finding,) = of("no-int8-kernel", conv_net("m = ReduceMean<axes=[2,3]>(a)"))
    assert finding.fixed_by == "simplify: means to global pooling"


# --- the file ------------------------------------------------------------------------------


def test_free_dimensions_and_what_they_cost() -> None:
    text = """g (float[{},8] x) => (float[M,8] y) {{
        n = Shape(x)  b = Gather(n, zero)  h = Div(b, two)  u = Unsqueeze(h, start)
        y = Slice(x, start, u, start)
    }}"""
    stored = {"zero": np.int64(0), "two": np.int64(2), "start": np.int64([0])}
    (finding,) = of("free-dimensions", net(text.format("N"), **stored))
    assert finding.nodes == ("x",)
    assert "4 of 5 nodes compute shapes" in finding.why
    assert of("free-dimensions", net(text.format("4"), **stored)) == []
    (strict,) = of("free-dimensions", net(text.format("N"), **stored), load_target("tensorrt"))
    assert (strict.level, "engine" in strict.why) == ("warning", True)


def test_tensors_stored_twice() -> None:
    weight = f32(4, 4, 8, 8)
    double = conv_net("b = Conv<pads=[4,4,3,3]>(a, p) m = Conv<pads=[4,4,3,3]>(b, q)",
                      p=weight, q=weight)  # fmt: skip
    (finding,) = of("duplicates", double)
    stored = int(finding.text.split()[0])
    assert weight.nbytes <= stored < weight.nbytes + 32  # its name and shape are in the file, too
    assert of("duplicates", clean()) == []


def test_targets_that_say_less() -> None:
    (none,) = of("no-int8-target", clean(), load_target("gpu"))
    assert none.level == "warning"
    model = conv_net("m = HardSwish(a)")
    assert of("activation", model, load_target("openvino")) == []
    (unknown,) = of("unknown-kernels", model, load_target("openvino"))
    assert "OpenVINOExecutionProvider" in unknown.text


def test_a_budget_that_the_file_exceeds() -> None:
    raw = copy.deepcopy(load_target("cpu").raw)
    raw["budget"] = {"max_size_bytes": 100}
    (finding,) = of("size", clean(), parse_target(raw))
    assert finding.level == "warning"
    raw["budget"] = {"max_size_bytes": 1 << 20}
    assert of("size", clean(), parse_target(raw)) == []


# --- as a whole ----------------------------------------------------------------------------


def test_the_steps_are_those_of_simplify() -> None:
    theirs = [name for name, _ in simplify.STEPS]
    ours = [name for name, _ in STEPS]
    assert ours == [name for name in theirs if name in ours]
    assert ROUNDS == simplify.ROUNDS
    same = dict(simplify.STEPS)
    assert all(same[name] is step for name, step in STEPS if name != "shape arithmetic")


def test_the_model_stays_as_it_is() -> None:
    model = conv_net("m = BatchNormalization(a, g, h, i, j)", opset=12, **NORM)
    before = model.SerializeToString(deterministic=True)
    found(model)
    assert model.SerializeToString(deterministic=True) == before


def test_warnings_come_first_and_the_table_holds_everything() -> None:
    model = conv_net("r = Relu(a) b = BatchNormalization(r, g, h, i, j) m = HardSwish(b)", **NORM)
    rows = [f.facts() for f in found(model)]
    assert [r["level"] for r in rows] == sorted((r["level"] for r in rows), reverse=True)
    page = findings_text(rows, 400)
    for row in rows:
        assert row["text"] in page
        assert row["why"] in page
        assert row["remedy"] in page
    assert "you" in page
    assert max(map(len, findings_text(rows, 100).splitlines())) <= 100


def test_a_pass_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("no such shape")

    monkeypatch.setattr("edgewright.lint.store_constants", fail)
    (finding,) = of("lint", clean())
    assert finding.level == "warning" and "RuntimeError: no such shape" in finding.text


@pytest.mark.skipif(not KIT.exists(), reason="no measuring kit here")
def test_no_false_alarms_on_the_kit() -> None:
    # All of them become int8 with the default recipe, so no warning is due.
    for path in sorted(KIT.glob("*/model.onnx")):
        assert [f.text for f in found(load(path)) if f.level == "warning"] == [], path.parent.name
