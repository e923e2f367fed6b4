"""Which nodes become int8, by rule, and why each other one stays float.

The rules are facts about ONNX Runtime's kernels (measured, see docs/quantize.md): weighted
layers have int8 kernels; what stands between two of them follows when it has one too, because
leaving it float costs a Q/DQ border on each side; element-wise activations stay float, because
their int8 forms are slower than their float forms or lose the metric.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from edgewright.model import all_nodes, array, consumers, initializers
from edgewright.quantize import embeddings
from edgewright.recipe import QuantizeSettings

CORE = ("Conv", "Gemm", "MatMul")
FOLDED = ("Relu", "Clip")  # vanish into the range of the layer before them
GLUE = frozenset(
    ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Transpose")
    + ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Resize")
    + ("DepthToSpace", "SpaceToDepth")
)
NO_KERNEL = {
    "ConvTranspose": "no int8 kernel in the runtime",
    "LSTM": "no static int8 kernel in the runtime",
    "GRU": "no int8 kernel in the runtime",
    "RNN": "no int8 kernel in the runtime",
    "LayerNormalization": "no int8 kernel in the runtime",
    "InstanceNormalization": "no int8 kernel in the runtime",
    "Softmax": "int8 form is slower than float and loses precision",
    "Erf": "no int8 kernel in the runtime",
    "Gelu": "no int8 kernel in the runtime",
    "HardSwish": "no int8 kernel in the runtime",
    "HardSigmoid": "no int8 kernel in the runtime",
    "Tanh": "no int8 kernel in the runtime",
    "ReduceMean": "no int8 kernel in the runtime",
    "Sigmoid": "element-wise: int8 form does not pay",
    "PRelu": "no int8 kernel in the runtime",
}


@dataclass(frozen=True)
class Placement:
    """What becomes int8: nodes by name in graph order, embedding tables by tensor name.

    reasons: why other nodes stay float.
    """

    nodes: tuple[str, ...]
    reasons: dict[str, str]
    tables: tuple[str, ...] = ()

    def without(self, names: Iterable[str], reason: str) -> "Placement":
        """The placement with some nodes back in float."""
        gone = set(names)
        return Placement(
            tuple(n for n in self.nodes if n not in gone),
            self.reasons | {n: reason for n in self.nodes if n in gone},
            self.tables,
        )

    def cores(self, model: onnx.ModelProto) -> bool:
        """Whether any weighted layer is int8."""
        chosen = set(self.nodes)
        return any(n.name in chosen and n.op_type in CORE for n in model.graph.node)

    def adding(self, names: Iterable[str]) -> "Placement":
        """The placement with more int8 nodes."""
        more = tuple(n for n in names if n not in self.nodes)
        reasons = {n: r for n, r in self.reasons.items() if n not in more}
        return Placement((*self.nodes, *more), reasons, self.tables)

    def tidied(self, model: onnx.ModelProto) -> "Placement":
        """The placement without nodes that no longer stand between int8 nodes."""
        reasons = dict(self.reasons)
        chosen = set(self.nodes)
        grown = chosen & {n.name for n in model.graph.node if n.op_type in CORE}
        allowed = chosen - grown
        grow(model, grown, reasons, allowed, full=False)
        for name in sorted(chosen - grown):
            reasons[name] = "no longer between int8 nodes"
        return Placement(tuple(n for n in self.nodes if n in grown), reasons, self.tables)


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors of the main graph whose type is known."""
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    kind = onnx.TensorProto.FLOAT
    return {v.name for v in values if v.type.tensor_type.elem_type == kind}


def choose(model: onnx.ModelProto, settings: QuantizeSettings) -> Placement:
    """The int8 nodes of the main graph by rule and by the recipe's scope and excludes."""
    graph = model.graph
    stored, floats = initializers(graph), float_tensors(model)
    scope = settings.scope
    reasons: dict[str, str] = {}
    chosen: set[str] = set()
    for node in graph.node:
        why = core_reason(node, stored, floats)
        product = node.op_type == "MatMul" and node.input[1] not in stored
        if why is None and product and scope != "full":
            why = "product of two activations: its float kernel is faster than its borders"
        if why is None and matches(node, settings.exclude):
            why = "excluded by the recipe"
        if why is None and not isinstance(scope, str) and not matches(node, scope):
            why = "outside the recipe's scope"
        if why is None:
            chosen.add(node.name)
        else:
            reasons[node.name] = why
    allowed = {n.name for n in graph.node if not matches(n, settings.exclude)}
    grow(model, chosen, reasons, allowed, full=scope == "full")
    inner = [n for n in all_nodes(graph) if n.op_type in (*CORE, "LSTM", "GRU")]
    top = {id(n) for n in graph.node}
    for node in inner:
        if id(node) not in top:
            inside = "inside a subgraph, which the int8 writer does not reach"
            reasons[node.name] = NO_KERNEL.get(node.op_type, inside)
    for name in chosen:
        reasons.pop(name, None)
    tables = embeddings.find_tables(model) if scope in ("auto", "full") else []
    return Placement(tuple(n.name for n in graph.node if n.name in chosen), reasons, tuple(tables))


def matches(node: onnx.NodeProto, patterns: tuple[str, ...]) -> bool:
    """Whether a node's name or operator fits one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(t, p) for p in patterns for t in (node.name, node.op_type))


def core_reason(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], floats: set[str]
) -> str | None:
    """None for a layer with an int8 kernel, else why it is none."""
    if node.op_type not in CORE:
        return NO_KERNEL.get(node.op_type, "no weighted layer")
    if node.input[0] not in floats or node.input[0] in stored:
        return "its input is no float32 activation"
    weight = stored.get(node.input[1])
    if node.op_type in ("Conv", "Gemm") and weight is None:
        return "its weight is computed, not stored"
    if weight is None and node.input[1] not in floats:
        return "its second input is no float32 activation"
    if weight is not None:
        if weight.data_type != onnx.TensorProto.FLOAT:
            return "its weight is not float32"
        if node.op_type == "MatMul" and len(weight.dims) < 2:
            return "its weight is a vector"
    if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
        bias, width = stored.get(node.input[2]), channels(node, weight)
        dims = list(bias.dims) if bias is not None else []
        if dims != [width] and (node.op_type == "Conv" or dims != [1, width]):
            return "its bias is not one stored value per channel"
    if node.op_type == "Gemm":
        flags = {a.name: a for a in node.attribute}
        if "transA" in flags and flags["transA"].i:
            return "Gemm with a transposed activation has no int8 kernel"
        if any(k in flags and flags[k].f != 1.0 for k in ("alpha", "beta")):
            return "Gemm with alpha or beta has no int8 kernel"
    return None


def channels(node: onnx.NodeProto, weight: onnx.TensorProto | None) -> int:
    """Output channels of a Conv or Gemm with a stored weight."""
    assert weight is not None
    rows = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
    return int(weight.dims[0 if rows else 1])


def grow(
    model: onnx.ModelProto,
    chosen: set[str],
    reasons: dict[str, str],
    allowed: set[str],
    *,
    full: bool,
) -> None:
    """Add the allowed nodes between int8 layers, in place: the largest set in which each fits.

    A node fits when every float activation it reads comes out of an int8 node and, for glue,
    at least one of its readers is int8 (else it would only end in a conversion).
    """
    graph = model.graph
    stored, floats = initializers(graph), float_tensors(model)
    makers = {o: n for n in graph.node for o in n.output if o}
    readers, outputs = consumers(graph.node), {o.name for o in graph.output}
    candidates = {}
    for node in graph.node:
        if node.name not in allowed or node.name in chosen or node.output[0] not in floats:
            continue
        activations = [i for i in node.input if i and i not in stored and i in floats]
        if not activations:
            continue
        if node.op_type in ("Add", "Mul") and len(activations) < 2 and not full:
            reasons.setdefault(node.name, "element-wise with a constant: float is as fast")
            continue
        if node.op_type == "Resize" and not nearest(node):
            reasons[node.name] = "only nearest-neighbour Resize has an int8 kernel"
            continue
        if node.op_type == "Clip" and not holds_zero(node, stored):
            reasons[node.name] = "an int8 range holds zero, this Clip does not"
            continue
        if node.op_type in GLUE or node.op_type in FOLDED:
            candidates[node.name] = (node, activations)
    inside = set(candidates)
    changed = True
    while changed:
        changed = False
        for name in sorted(inside):
            node, activations = candidates[name]
            int8 = chosen | inside
            fed = all(i in makers and makers[i].name in int8 for i in activations)
            if fed and node.op_type != "MatMul":
                fed = all(makers[i].op_type not in ("MatMul", "Gemm") for i in activations)
            read = any(r.name in int8 for o in node.output for r in readers.get(o, []))
            fits = fed if node.op_type in FOLDED else fed and (read or full)
            if node.op_type in FOLDED and fits:
                # Folding renames the layer's output, so nobody else may read it.
                fits = len(readers.get(activations[0], [])) == 1 and activations[0] not in outputs
            if not fits:
                inside.discard(name)
                reasons[name] = "not between int8 nodes"
                changed = True
    chosen |= inside


def holds_zero(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Whether zero lies within a Clip's stored bounds."""
    low, high = -np.inf, np.inf
    if len(node.input) > 1 and node.input[1]:
        low = float(array(stored[node.input[1]])) if node.input[1] in stored else np.inf
    if len(node.input) > 2 and node.input[2]:
        high = float(array(stored[node.input[2]])) if node.input[2] in stored else -np.inf
    return low <= 0 <= high


def nearest(node: onnx.NodeProto) -> bool:
    """Whether a Resize only copies values."""
    modes = [a.s for a in node.attribute if a.name == "mode"]
    return not modes or modes[0] == b"nearest"
