"""Nodes without an int8 kernel, or in a form that has none. Facts of ONNX Runtime's CPU kernels.

Layers first (they hold the work), then what stands between layers and costs a conversion to
float and back on each side.
"""

from collections.abc import Iterator

import onnx_ir as ir

from edgewright.lint.finding import Hit
from edgewright.passes.affine import chain_at
from edgewright.passes.edit import (
    all_nodes,
    attribute,
    constant,
    is_op,
    matching,
    operand,
    producer,
    rank,
)
from edgewright.target import Target

BORDERS = "no int8 kernel: float between int8 layers, with a conversion on each side"
PLACED = "quantize: placement"
STAYS = "stays float; the pay check drops int8 where the borders cost more than it gains"
SOFTMAX = "its int8 form is 4 times slower than the float one, and loses precision"
FLOAT_ONLY = (
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "Softmax"),
    *("LogSoftmax", "ReduceMean", "ReduceSum", "ReduceMax", "LpNormalization", "Einsum"),
)
RECURRENT = ("LSTM", "GRU", "RNN")


def hits(model: ir.Model, target: Target) -> Iterator[Hit]:
    """All but activations, for a target whose runtime is ONNX Runtime's CPU provider."""
    yield from recurrent(model, target)
    yield from layers(model)
    yield from products(model)
    yield from normalizations(model)
    yield from float_only(model)


def key(node: ir.Node) -> str:
    """The first output with a name: that of a recurrent layer's sequence is often left out."""
    return next((str(o.name) for o in node.outputs if o.name), "")


def main(node: ir.Node, model: ir.Model) -> bool:
    return node.graph is model.graph


def recurrent(model: ir.Model, target: Target) -> Iterator[Hit]:
    """LSTM, GRU, RNN."""
    for node in matching(model, *RECURRENT):
        stored = all(constant(operand(node, k)) is not None for k in (1, 2))
        batch_first = attribute(node, "layout", 0)
        if node.op_type == "LSTM" and target.int8.dynamic and stored and not batch_first:
            yield Hit(
                "no-int8-kernel",
                "LSTM",
                key(node),
                "info",
                "no static int8 kernel; the dynamic one quantizes activations at run time",
                "dynamic int8, where the metric holds and it pays",
                "quantize: dynamic int8 LSTM",
            )
        else:
            why = "no int8 kernel" if stored else "its weights are computed, not stored"
            yield Hit(
                "no-int8-kernel",
                node.op_type,
                key(node),
                "warning",
                f"{why}: its work stays float",
                "an LSTM with stored weights has a dynamic int8 kernel on CPU targets",
            )


def layers(model: ir.Model) -> Iterator[Hit]:
    """Conv, Gemm, ConvTranspose in a form that does not fuse, or out of reach."""
    for node in matching(model, "ConvTranspose"):
        yield Hit(
            "no-int8-kernel",
            "ConvTranspose",
            key(node),
            "warning",
            "no int8 kernel: its work stays float",
            "export the upsampling as nearest Resize and Conv, where that can be trained",
        )
    for node in matching(model, "Conv", "Gemm", "MatMul"):
        weight, bias = constant(operand(node, 1)), operand(node, 2)
        form = remedy = ""
        if from_codes(operand(node, 1)):
            continue  # int8 already, which the file's findings say
        if node.op_type in ("Conv", "Gemm") and weight is None:
            form, remedy = "with computed weights", "store the weights: fold what makes them"
        elif bias is not None and constant(bias) is None:
            form, remedy = "with a computed bias", "add it behind the layer"
        elif node.op_type == "Gemm" and attribute(node, "transA", 0):
            form, remedy = "with a transposed activation", "transpose before, or swap the operands"
        elif node.op_type == "Gemm" and (
            attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1
        ):
            form, remedy = "with alpha or beta", "multiply the stored weights and bias with them"
        elif node.op_type == "MatMul" and weight is not None and weight.ndim < 2:
            form, remedy = "with a vector as weight", "store it as a matrix of one column"
        if form:
            yield Hit(
                "layer-form",
                f"{node.op_type} {form}",
                key(node),
                "warning",
                "the int8 kernel does not take this form: it stays float",
                remedy,
            )
        elif weight is not None and not main(node, model):
            yield Hit(
                "in-subgraph",
                f"{node.op_type} inside If, Loop or Scan",
                key(node),
                "warning",
                "the int8 writer does not reach nested graphs: it stays float",
                "export without the control flow, or fix the input that decides it",
            )
        if is_op(node, "Conv") and attribute(node, "auto_pad", "NOTSET") in (
            "SAME_UPPER",
            "SAME_LOWER",
        ):
            yield Hit(
                "layer-form",
                "Conv with auto_pad",
                key(node),
                "info",
                "its padding follows from the input's size: no weight rounding by output, and "
                "scales chosen by the writer",
                "export with the numbers in pads",
            )


def from_codes(value: ir.Value | None) -> bool:
    """Whether a value is dequantized from stored codes."""
    maker = producer(value, "DequantizeLinear")
    return maker is not None and constant(operand(maker, 0)) is not None


def products(model: ir.Model) -> Iterator[Hit]:
    """MatMul of two activations."""
    for node in matching(model, "MatMul"):
        stored = any(constant(v) is not None or from_codes(v) for v in node.inputs)
        if not stored:
            yield Hit(
                "product",
                "MatMul of two activations",
                key(node),
                "info",
                "both operands would be quantized at every run: slower than the float kernel",
                "stays float (scope 'full' takes it)",
                PLACED,
            )


def between_layers(model: ir.Model) -> set[ir.Node]:
    """The nodes with a layer of stored weights somewhere before and somewhere behind them."""
    nodes = all_nodes(model)
    layers = {
        n for n in nodes if is_op(n, "Conv", "Gemm", "MatMul") and stored_weight(n) is not None
    }
    before: set[ir.Node] = set()
    for node in nodes:
        makers = [v.producer() for v in node.inputs if v is not None]
        if any(m in before or m in layers for m in makers if m is not None):
            before.add(node)
    behind: set[ir.Node] = set()
    for node in reversed(nodes):
        users = [u.node for o in node.outputs for u in o.uses()]
        if any(u in behind or u in layers for u in users):
            behind.add(node)
    return before & behind


def stored_weight(node: ir.Node) -> ir.Value | None:
    value = operand(node, 1)
    return value if constant(value) is not None else None


def normalizations(model: ir.Model) -> Iterator[Hit]:
    """BatchNormalization: what folds goes with simplify, the rest stands between layers."""
    inner = between_layers(model)
    for node in matching(model, "BatchNormalization"):
        source = node.inputs[0]
        maker = source.producer() if source is not None else None
        if maker is None or not is_op(maker, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            where = "with no layer before it"
        elif source is not None and len(source.uses()) > 1:
            where = "behind a layer with several readers"
        else:
            where = "behind a layer"
        yield Hit(
            "batchnorm",
            f"BatchNormalization {where}",
            str(chain_end(node).name),
            "warning" if node in inner else "info",
            BORDERS if node in inner else "no int8 kernel: it stays a float node",
            "put it behind a layer whose output nothing else reads, then it folds into weights",
        )


def chain_end(node: ir.Node) -> ir.Value:
    """The last output of the affine chain a node is in: what it folds into keeps that name."""
    for start in all_nodes_of(node):
        chain = chain_at(start)
        if chain is not None and node in chain.nodes:
            return chain.result
    return node.outputs[0]


def all_nodes_of(node: ir.Node) -> list[ir.Node]:
    """The node and those before it, nearest first, as far as they follow each other."""
    found, current = [node], node
    while current.inputs and current.inputs[0] is not None:
        before = current.inputs[0].producer()
        if before is None or before in found or len(found) > 16:
            break
        found.append(before)
        current = before
    return found


def left_of_chains(model: ir.Model, ends: set[str]) -> set[str]:
    """Of the values that affine chains with a BatchNormalization ended in, those that still are
    made by one: a chain that folds into no layer becomes Mul and Add under the same name. The
    Add that stays behind a MatMul is its bias.
    """
    found = set()
    for node in all_nodes(model):
        bias = is_op(node, "Add") and any(producer(v, "MatMul") for v in node.inputs)
        if key(node) in ends and is_op(node, "Mul", "Add", "Sub", "Div") and not bias:
            found.add(key(node))
    return found


def float_only(model: ir.Model) -> Iterator[Hit]:
    """Other operators that stay float between int8 layers."""
    inner = between_layers(model)
    for node in all_nodes(model):
        if node not in inner or not is_float(node.outputs[0]):
            continue
        if is_op(node, *FLOAT_ONLY):
            why = SOFTMAX if node.op_type == "Softmax" else BORDERS
            yield Hit("no-int8-kernel", node.op_type, key(node), "info", why, STAYS, PLACED)
        elif is_op(node, "Resize") and attribute(node, "mode", "nearest") != "nearest":
            mode = attribute(node, "mode", "nearest")
            yield Hit(
                "no-int8-kernel",
                f"Resize ({mode})",
                key(node),
                "info",
                "only nearest-neighbour Resize has an int8 kernel",
                "use mode='nearest' where that is good enough",
                PLACED,
            )


def is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point() and rank(value) != 0
