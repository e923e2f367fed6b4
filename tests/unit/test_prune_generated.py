"""Random graphs, random units: a pruned graph loads, runs, and computes what the masked one does.

Two oracles that share nothing but the labels: `masked`, where consumers' weights (or products of
activations) are zero, and the original in which every stored value a unit owns is zero.
"""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.prune.cut import cut, masked
from edgewright.prune.labels import Analysis, analyse
from edgewright.prune.outputs import MATRIX, opened
from edgewright.runtime.local import open_local

GRAPHS, BATCHES = 320, 16


class Graph:
    """A graph under construction. `x` is the current value, `shape` its shape without batch."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.frozen: list[str] = []  # what an operator without a rule reads and makes

    def pick(self, *choices: object) -> object:
        return choices[self.rng.integers(len(choices))]

    def weight(self, *shape: int, low: float | None = None) -> str:
        values = self.rng.normal(0, 1 / np.sqrt(max(np.prod(shape[1:]), 1)), shape)
        if low is not None:
            values = np.abs(values) + low
        return self.const(values.astype(np.float32))

    def const(self, values: np.ndarray) -> str:
        name = f"t{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def ints(self, *values: int, kind: type = np.int64) -> str:
        return self.const(np.array(values, kind))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        made = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), made, f"n{len(self.nodes)}", **attributes)
        )
        return made[0]


# Images: (C, H, W)


def activation(g: Graph, x: str, c: int) -> str:
    kind = str(g.pick("Relu", "HardSwish", "Sigmoid", "LeakyRelu", "PRelu", "Clip", "none"))
    if kind == "PRelu":
        return g.op(kind, x, g.weight(c, 1, 1))
    if kind == "Clip":
        return g.op(kind, x, g.const(np.float32(-1)), g.const(np.float32(2)))
    return x if kind == "none" else g.op(kind, x)


def conv(g: Graph, x: str, c: int, o: int, k: int = 3, group: int = 1) -> str:
    inputs = [x, g.weight(o, c // group, k, k), *([g.weight(o)] if g.pick(0, 1) else [])]
    y = g.op("Conv", *inputs, pads=[k // 2] * 4, group=group)
    if g.pick(0, 1):
        rest = g.weight(o), g.weight(o), g.weight(o), g.weight(o, low=0.5)
        y = g.op("BatchNormalization", y, *rest)
    return activation(g, y, o)


def dense(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    o = int(g.pick(4, 6, 8, 12))
    return conv(g, x, s[0], o, int(g.pick(1, 3))), [o, *s[1:]]


def grouped(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    way = g.pick("depthwise", "multiplied", "groups")
    if way == "groups" and s[0] % 2 == 0:
        o = int(g.pick(4, 8))
        return conv(g, x, s[0], o, 3, 2), [o, *s[1:]]
    o = s[0] * (2 if way == "multiplied" and s[0] <= 8 else 1)
    return conv(g, x, s[0], o, 3, s[0]), [o, *s[1:]]


def residual(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    y = conv(g, conv(g, x, s[0], 8, 1), 8, s[0])
    return g.op(str(g.pick("Add", "Mul", "Sub", "Max")), x, y), s


def squeeze_excite(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    y = g.op("GlobalAveragePool", x)
    y = g.op("Relu", g.op("Conv", y, g.weight(4, s[0], 1, 1), g.weight(4)))
    y = g.op("HardSigmoid", g.op("Conv", y, g.weight(s[0], 4, 1, 1)))
    return g.op("Mul", y, x), s


def joined(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    return g.op("Concat", conv(g, x, s[0], 4), x, axis=1), [s[0] + 4, *s[1:]]


def halved(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    a = s[0] // 2
    sizes = [g.ints(a, s[0] - a)] if g.pick(0, 1) else []
    first = g.op("Split", x, *sizes, axis=1, outputs=2, **({} if sizes else {"num_outputs": 2}))
    a = a if sizes else -(-s[0] // 2)
    second = first[:-1] + "1"
    way = g.pick("csp", "glu", "swap")
    if way == "glu" and a * 2 == s[0]:
        return g.op("Mul", first, g.op("Sigmoid", second)), [a, *s[1:]]
    if way == "swap":
        return g.op("Concat", second, first, axis=-3), s
    return g.op("Concat", first, conv(g, second, s[0] - a, 6), axis=1), [a + 6, *s[1:]]


def shuffled(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    if s[0] % 2:
        return x, s
    y = g.op("Reshape", x, g.ints(0, 2, s[0] // 2, s[1], s[2]))
    y = g.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return g.op("Reshape", y, g.ints(0, -1, s[1], s[2])), s


def moved(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    """Channels cut out, looked up, padded, repeated, scaled by stored values."""
    c, way = s[0], g.pick("slice", "gather", "pad", "tile", "expand", "scale", "where", "flip")
    if way == "slice" and c > 4:
        kind = g.pick(np.int32, np.int64)
        bounds = [g.ints(v, kind=kind) for v in (1, int(g.pick(-1, c - 1)), 1)]
        return g.op("Slice", x, *bounds), [c - 2, *s[1:]]
    if way == "gather":
        order = g.rng.permutation(c)[: max(2, c - 1)] - int(g.pick(0, c))
        return g.op("Gather", x, g.ints(*order), axis=1), [len(order), *s[1:]]
    if way == "pad":
        pads = g.ints(0, 1, 0, 0, 0, 2, 0, 0)
        return g.op("Pad", x, pads, g.const(np.float32(0.5))), [c + 3, *s[1:]]
    if way == "tile" and c <= 8:
        return g.op("Tile", x, g.ints(1, 2, 1, 1)), [2 * c, *s[1:]]
    if way == "expand":
        y = g.op("Expand", g.op("GlobalMaxPool", x), g.ints(1, c, s[1], s[2]))
        return g.op("Add", x, y), s
    if way == "where":
        y = g.op("Greater", x, g.const(np.float32(0)))
        return g.op("Where", y, x, g.weight(c, 1, 1)), s
    if way == "flip":
        rest = [g.ints(v) for v in (-1, -100, 1, -1)]
        return g.op("Slice", x, *rest), s
    return g.op("Mul", x, g.weight(1, c, 1, 1)), s


def sized(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    """What changes the picture's size."""
    c, h, w = s
    way = g.pick("pool", "resize", "sizes", "transpose", "depth", "space", "grouped")
    if way == "pool" and h > 2:
        kind = str(g.pick("MaxPool", "AveragePool"))
        return g.op(kind, x, kernel_shape=[2, 2], strides=[2, 2]), [c, h // 2, w // 2]
    if way == "space" and c <= 4 and h > 2:
        return g.op("SpaceToDepth", x, blocksize=2), [4 * c, h // 2, w // 2]
    if h > 4:
        return x, s
    if way == "depth" and c % 4 == 0:
        mode = str(g.pick("DCR", "CRD"))
        return g.op("DepthToSpace", x, blocksize=2, mode=mode), [c // 4, 2 * h, 2 * w]
    if way == "resize":
        scales = g.const(np.array([1, 1, 2, 2], np.float32))
        return g.op("Resize", x, "", scales), [c, 2 * h, 2 * w]
    if way == "sizes":
        return g.op("Resize", x, "", "", g.ints(1, c, 2 * h, 2 * w)), [c, 2 * h, 2 * w]
    group = int(g.pick(1, c, 2 if c % 2 == 0 else 1))
    o = int(g.pick(1, 2)) if group == c else 4
    inputs = [x, g.weight(c, o, 2, 2), g.weight(o * group)]
    return g.op("ConvTranspose", *inputs, strides=[2, 2], group=group), [o * group, 2 * h, 2 * w]


def normed(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    c, way = s[0], g.pick("instance", "group")
    if way == "instance" or c % 2:
        return g.op("InstanceNormalization", x, g.weight(c), g.weight(c)), s
    y = g.op("Reshape", x, g.ints(0, 2, -1))
    y = g.op("InstanceNormalization", y, g.const(np.ones(2, np.float32)), g.weight(2))
    y = g.op("Reshape", y, g.ints(1, c, s[1], s[2]))
    return g.op("Add", g.op("Mul", y, g.weight(c, 1, 1)), g.weight(c, 1, 1)), s


def unknown(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    y = g.op("LRN", x, size=3)
    g.frozen += [x, y]
    return y, s


# Sequences: (T, C)


def linear(g: Graph, x: str, c: int, o: int) -> str:
    y = g.op("MatMul", x, g.weight(c, o))
    return g.op("Add", y, g.weight(o)) if g.pick(0, 1) else y


def feed_forward(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    t, c = s
    way = g.pick("mlp", "glu", "tokens", "einsum", "conv", "wide")
    if way == "glu":
        a = g.op("Split", linear(g, x, c, 12), axis=-1, outputs=2, num_outputs=2)
        y = linear(g, g.op("Mul", a, g.op("Sigmoid", a[:-1] + "1")), 6, c)
    elif way == "tokens":
        y = g.op("Relu", g.op("MatMul", g.weight(6, t), x))
        y = g.op("MatMul", g.weight(t, 6), y)
    elif way == "einsum":
        y = g.op("Relu", g.op("Einsum", x, g.weight(10, c), equation="btc,oc->bto"))
        y = g.op("Einsum", g.weight(10, c), y, equation="oc,bto->btc")
    elif way == "conv":
        y = g.op("Transpose", x, perm=[0, 2, 1])
        y = g.op("Conv", y, g.weight(c, 1, 3), pads=[1, 1], group=c)
        y = g.op("Transpose", y, perm=[0, 2, 1])
    elif way == "wide":
        return g.op("Erf", linear(g, x, c, 12)), [t, 12]
    else:
        y = linear(g, g.op("Tanh", linear(g, x, c, 10)), 10, c)
    return g.op("Add", x, y), s


def layer_norm(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    way = g.pick("operator", "rms", "softmax")
    if way == "operator":
        return g.op("LayerNormalization", x, g.weight(s[1]), g.weight(s[1]), axis=-1), s
    if way == "softmax":
        return g.op("Softmax", x, axis=int(g.pick(-1, 1))), s
    y = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
    y = g.op("Sqrt", g.op("Add", y, g.const(np.float32(1e-3))))
    return g.op("Mul", g.op("Div", x, y), g.weight(s[1])), s


def attention(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    t, c = s
    h, d = int(g.pick(2, 4)), int(g.pick(2, 3))
    kv = int(g.pick(h, 2))
    if g.pick(0, 1):
        y = g.op("Reshape", linear(g, x, c, 3 * h * d), g.ints(0, 0, 3, h, d))
        y = g.op("Transpose", y, perm=[2, 0, 3, 1, 4])
        q, k, v = (g.op("Gather", y, g.const(np.int64(i)), axis=0) for i in range(3))
    else:
        q, k, v = (
            g.op(
                "Transpose",
                g.op("Reshape", linear(g, x, c, n * d), g.ints(0, -1, n, d)),
                perm=[0, 2, 1, 3],
            )
            for n in (h, kv, kv)
        )
        if kv != h:
            k, v = (repeated(g, a, kv, h // kv, t, d) for a in (k, v))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, t, h * d))
    return g.op("Add", x, linear(g, y, h * d, c)), s


def repeated(g: Graph, x: str, kv: int, times: int, t: int, d: int) -> str:
    y = g.op("Expand", g.op("Unsqueeze", x, g.ints(2)), g.ints(1, kv, times, t, d))
    return g.op("Reshape", y, g.ints(-1, kv * times, t, d))


def recurrent(g: Graph, x: str, s: list[int]) -> tuple[str, list[int]]:
    t, c = s
    kind, h, d = str(g.pick("LSTM", "GRU", "RNN")), int(g.pick(4, 6)), int(g.pick(1, 2))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    rest = [g.weight(d, 2 * gates * h)] if g.pick(0, 1) else []
    y = g.op(
        kind,
        *(g.op("Transpose", x, perm=[1, 0, 2]), g.weight(d, gates * h, c)),
        *(g.weight(d, gates * h, h), *rest),
        hidden_size=h,
        direction="bidirectional" if d == 2 else str(g.pick("forward", "reverse")),
    )
    y = g.op("Reshape", g.op("Transpose", y, perm=[2, 0, 1, 3]), g.ints(0, 0, -1))
    return y, [t, d * h]


Step = Callable[[Graph, str, list[int]], tuple[str, list[int]]]
IMAGE: tuple[Step, ...] = (
    *(dense, dense, grouped, residual, squeeze_excite, joined, halved, shuffled),
    *(moved, moved, sized, sized, normed, unknown),
)
SEQUENCE: tuple[Step, ...] = (feed_forward, feed_forward, layer_norm, attention, recurrent)


def generated(seed: int, seen: bool = False) -> tuple[onnx.ModelProto, list[str]]:
    """A graph of 3 to 9 steps, and what must be frozen in it.

    seen: what its last layer reads is an output, too.
    """
    g = Graph(seed)
    image = bool(g.pick(0, 1, 1))
    source = [3, 4, 4] if image else [5, 6]
    free = "N" if g.pick(0, 1) else 1
    x, s = "x", list(source)
    for _ in range(g.rng.integers(2, 6)):
        step: Step = g.pick(*(IMAGE if image else SEQUENCE))  # type: ignore[assignment]
        if step is unknown and g.pick(0, 1):
            continue
        x, s = step(g, x, s)
        if s[0] > 24 and image:
            x, s = dense(g, x, s)
    if image and g.pick(0, 1):
        c, t = s[0], s[1] * s[2]
        x = g.op("Transpose", g.op("Reshape", x, g.ints(0, c, -1)), perm=[0, 2, 1])
        x, s = feed_forward(g, x, [t, c])
        x, s = attention(g, x, s)
    if g.pick(0, 1) and len(s) == 3:
        x, s = g.op("GlobalAveragePool", x), [s[0], 1, 1]
    size = int(np.prod(s))
    features = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [free, *s])] if seen else []
    x = g.op("Flatten", x) if g.pick(0, 1) else g.op("Reshape", x, g.ints(-1, size))
    y = g.op("Gemm", x, g.weight(3, size), g.weight(3), transB=1)
    graph = helper.make_graph(
        g.nodes,
        "generated",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [free, *source])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [free, 3]), *features],
        g.stored,
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8), g.frozen


def zeroed(model: onnx.ModelProto, analysis: Analysis, units: list[int]) -> onnx.ModelProto:
    """The model with every stored value that a unit owns set to zero."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        for axis, labels in enumerate(analysis.labels[tensor.name]):
            values[(slice(None),) * axis + (np.isin(labels, units),)] = 0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return result


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return list(open_local(model.SerializeToString()).run({"x": x}))


def check_some(model: onnx.ModelProto, analysis: Analysis, rng: np.random.Generator) -> list[int]:
    """Remove random units, run, and compare with both oracles; the units that were compared."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    x = rng.normal(0, 1, [d.dim_value or 1 for d in dims]).astype(np.float32)
    some = {
        g.name: rng.permutation(g.units)[: rng.integers(0, len(g.units))].tolist()
        for g in analysis.groups
    }
    every = [u for units in some.values() for u in units]
    small, kept = cut(model, analysis, every)
    whole = run(model, x)
    assert [y.shape for y in run(small, x)] == [y.shape for y in whole]
    for tensor in small.graph.initializer:
        assert 0 not in tensor.dims, tensor.name
    assert bool(kept) == bool(every)
    sure = {g.name for g in analysis.groups if g.exact or g.kind == "head_dim"}
    units = [u for name, part in some.items() if name in sure for u in part]
    result = run(cut(model, analysis, units)[0], x)
    for other in (masked(model, analysis, units), zeroed(model, analysis, units)):
        for mine, theirs, first in zip(result, run(other, x), whole, strict=True):
            scale = max(float(np.abs(first).max()), 1.0)
            # Sums of up to some hundred float32 terms in another order.
            assert np.abs(mine - theirs).max() <= 2e-5 * scale
    return units


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_units_of_random_graphs(batch):
    pruned = 0
    for seed in range(batch, GRAPHS, BATCHES):
        model, frozen = generated(seed)
        analysis = analyse(model)
        assert {f["op"] for f in analysis.frozen} <= {"LRN"}, (seed, analysis.frozen)
        for name in frozen:
            assert not any(a.any() for a in analysis.labels[name]), (seed, name)
        try:
            pruned += bool(check_some(model, analysis, np.random.default_rng(seed)))
        except AssertionError as error:
            raise AssertionError(f"graph {seed}") from error
    assert pruned > GRAPHS // BATCHES // 2


def test_random_graphs_whose_features_are_an_output():
    """The channels of these can go, too, where other layers read them (`prune.outputs`)."""
    freed = 0
    for seed in range(48):
        model, _ = generated(seed, seen=True)
        wide = opened(model)
        units = check_some(wide, analyse(wide), np.random.default_rng(seed))
        own = [t.name for t in wide.graph.initializer if t.name.endswith(MATRIX)]
        labels = analyse(wide).labels
        freed += any(set(units) & set(labels[n][axis].tolist()) for n in own for axis in (0, 1))
    assert freed >= 8
