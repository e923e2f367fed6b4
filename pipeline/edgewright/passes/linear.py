"""Affine maps folded into the weights of Conv, ConvTranspose, Gemm and MatMul around them.

Behind the operator, Y = W x + b:   Y * s + t = (s W) x + (b * s + t), s along output channels.
In front of it, x -> x * s + t:     W (x * s + t) + b = (W s) x + (b + W t), s along input channels.

The shift in front is exact only where every output sees the whole kernel: not with padding,
not for ConvTranspose. There a scale of one number still passes, W (x * s + t) = (W s)(x + t / s),
and one node less is left. MatMul has no bias: a shift behind it stays an Add.

| case | chain | operator | result |
|---|---|---|---|
| 1 | behind | any with stored weights | all folded (MatMul: Add stays) |
| 2 | in front | any with stored weights, shift exact | all folded |
| 3 | in front, 2 nodes or more | the same, shift not exact, scale one number | Add stays |
| 4 | elsewhere | | Mul and Add, where that is fewer nodes |

Layouts: Conv (out, in / group, *kernel); ConvTranspose (in, out / group, *kernel);
Gemm (in, out), or (out, in) with transB; MatMul (in, out). Weights that other nodes read too
are copied, but not if that adds more than COPY bytes. The last factor of a GELU or of a
LayerNormalization stays where it is: runtimes fuse these patterns whole.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.passes.affine import FLOATS, Affine, Chain, chain_at
from edgewright.passes.edit import (
    all_nodes,
    attribute,
    constant,
    drop_unread,
    insert_before,
    is_alive,
    is_op,
    lone_user,
    operand,
    producer,
    rank,
    redirect,
    replace,
    stored,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
COPY = 1 << 20
FOLDED = "_folded"


@dataclass
class Weights:
    """The stored parameters of a linear node in float64, in a layout that scales easily.

    matrix: (group, in / group, out / group, *kernel). bias: (out,), zeros where there is none;
    None for MatMul, which cannot have one.
    """

    node: ir.Node
    matrix: np.ndarray
    bias: np.ndarray | None

    @property
    def outputs(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[2]

    @property
    def inputs(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[1]

    def channel_axis(self) -> int | None:
        """The axis of the input and output that holds the channels."""
        if self.node.op_type in ("Conv", "ConvTranspose"):
            return 1
        size = rank(self.node.outputs[0])
        return None if size is None else size - 1

    def scale_outputs(self, scale: np.ndarray) -> None:
        group, _, out, *kernel = self.matrix.shape
        s = np.broadcast_to(scale, (self.outputs,))
        self.matrix = self.matrix * s.reshape(group, 1, out, *[1] * len(kernel))
        if self.bias is not None:
            self.bias = self.bias * s

    def scale_inputs(self, scale: np.ndarray) -> None:
        group, inner, _, *kernel = self.matrix.shape
        s = np.broadcast_to(scale, (self.inputs,))
        self.matrix = self.matrix * s.reshape(group, inner, 1, *[1] * len(kernel))

    def response(self, shift: np.ndarray) -> np.ndarray:
        """The output (out,) for an input that is `shift` everywhere."""
        group, inner, _, *kernel = self.matrix.shape
        t = np.broadcast_to(shift, (self.inputs,)).reshape(group, inner, 1, *[1] * len(kernel))
        axes = (1, *range(3, self.matrix.ndim))
        result: np.ndarray = (self.matrix * t).sum(axis=axes).reshape(-1)
        return result


def fold_affine(model: ir.Model) -> int:
    """Apply the cases until nothing is left; returns the number of nodes that went."""
    before = len(all_nodes(model))
    changed = True
    while changed:
        changed = False
        for node in all_nodes(model):
            if not is_alive(node):
                continue
            chain = chain_at(node)
            if chain is not None:
                changed |= fold_behind(model, chain) or fold_in_front(model, chain)
    for node in all_nodes(model):
        if is_alive(node) and (chain := chain_at(node)) is not None:
            merge_chain(model, chain)
    return before - len(all_nodes(model))


def weights_of(node: ir.Node | None) -> Weights | None:
    """The parameters of a linear node, None unless all of them are stored."""
    if node is None or not is_op(node, *LINEAR):
        return None
    value, bias_value = operand(node, 1), operand(node, 2)
    array, bias = constant(value), constant(bias_value)
    if value is None or array is None or value.dtype not in FLOATS:
        return None
    if bias_value is not None and bias is None:
        return None
    if len(value.uses()) > 1 and array.nbytes > COPY:
        return None
    matrix = array.astype(np.float64)
    if node.op_type in ("Conv", "ConvTranspose"):
        group = attribute(node, "group", 1)
        first, second, *kernel = array.shape
        matrix = matrix.reshape(group, first // group, second, *kernel)
        if node.op_type == "Conv":
            matrix = np.swapaxes(matrix, 1, 2)
    elif array.ndim != 2:
        return None
    else:
        if node.op_type == "Gemm":
            if attribute(node, "transB", 0):
                matrix = matrix.T
            matrix = matrix * attribute(node, "alpha", 1.0)
            if attribute(node, "transA", 0) or (bias is not None and bias.ndim > 1):
                return None
            bias = None if bias is None else bias * attribute(node, "beta", 1.0)
        matrix = matrix[None]
    result = Weights(node, matrix, None)
    if node.op_type != "MatMul":
        line = np.zeros(1) if bias is None else bias.astype(np.float64).reshape(-1)
        result.bias = np.broadcast_to(line, (result.outputs,)).copy()
    return result


def store_weights(model: ir.Model, weights: Weights) -> bool:
    """Write the parameters back as new stored tensors; False where they left the type's range."""
    node, matrix = weights.node, weights.matrix
    value, bias_value = node.inputs[1], operand(node, 2)
    assert value is not None and value.dtype is not None
    kind = value.dtype.numpy()
    if node.op_type in ("Conv", "ConvTranspose"):
        if node.op_type == "Conv":
            matrix = np.swapaxes(matrix, 1, 2)
        matrix = matrix.reshape(-1, *matrix.shape[2:])
    else:
        matrix = matrix[0]
    with np.errstate(over="ignore"):
        matrix = matrix.astype(kind)
        bias = None if weights.bias is None else weights.bias.astype(kind)
    if not np.isfinite(matrix).all() or (bias is not None and not np.isfinite(bias).all()):
        return False
    if node.op_type == "Gemm":  # stored as (in, out), with the factors inside
        for name in ("alpha", "beta", "transB"):
            node.attributes.pop(name, None)
    stem = (value.name or node.op_type).removesuffix(FOLDED)
    node.replace_input_with(1, stored(model, matrix, stem + FOLDED))
    if bias is not None and (bias_value is not None or bias.any()):
        node.resize_inputs(3)
        stem = f"{stem}_bias"
        if bias_value is not None and bias_value.name:
            stem = bias_value.name.removesuffix(FOLDED)
        node.replace_input_with(2, stored(model, bias, stem + FOLDED))
    return True


def fits(weights: Weights, affine: Affine, channels: int) -> bool:
    """Whether the map acts on all values alike or along the channels."""
    if affine.axis is None:
        return True
    size = max(affine.scale.size, affine.shift.size)
    return affine.axis == weights.channel_axis() and size == channels


def fold_behind(model: ir.Model, chain: Chain) -> bool:
    """Case 1."""
    maker = chain.source.producer()
    first, affine = chain.nodes[0], chain.affine
    if maker is None or lone_user(chain.source, first.graph) is not first:
        return False
    if maker.graph is not first.graph or (is_op(maker, "MatMul") and affine.is_shift()):
        return False  # MatMul and its bias: as it should be
    weights = weights_of(maker)
    if weights is None or not fits(weights, affine, weights.outputs):
        return False
    bare = weights.bias is None and not affine.is_scale()
    weights.scale_outputs(affine.scale)
    if weights.bias is not None:
        weights.bias = weights.bias + affine.shift
    if not store_weights(model, weights):
        return False
    if bare:
        put_affine(model, chain, Affine(np.ones(1), affine.shift, affine.axis))
    else:
        redirect(chain.result, chain.source)
        drop_unread(chain.nodes)
    return True


def fold_in_front(model: ir.Model, chain: Chain) -> bool:
    """Cases 2 and 3."""
    user = lone_user(chain.result, chain.nodes[0].graph)
    if user is None or user.inputs[0] is not chain.result or ends_pattern(chain.source):
        return False
    affine, rest = chain.affine, None
    exact = affine.is_scale() or sees_whole_kernel(user)
    if not exact:
        if len(chain.nodes) < 2 or affine.scale.size > 1 or not affine.scale.all():
            return False
        rest = Affine(np.ones(1), affine.shift / affine.scale, affine.axis)
        if affine.is_shift() or not rest.is_sound():
            return False
    weights = weights_of(user)
    if weights is None or not fits(weights, affine, weights.inputs):
        return False
    if exact and weights.bias is not None:
        weights.bias = weights.bias + weights.response(affine.shift)
    weights.scale_inputs(affine.scale)
    if not store_weights(model, weights):
        return False
    if rest is not None:
        put_affine(model, chain, rest)
    else:
        user.replace_input_with(0, chain.source)
        drop_unread(chain.nodes)
    return True


def ends_pattern(value: ir.Value) -> bool:
    """Whether the chain behind this value ends a GELU or a LayerNormalization written out.

    Runtimes fuse these whole patterns, the last factor included, which is worth more.
    """
    maker = producer(value, "Mul", "Div")
    if maker is None:
        return False
    for factor in maker.inputs:
        node = producer(factor, "Add", "Sqrt", "Reciprocal")
        if node is not None and (
            not is_op(node, "Add") or any(producer(v, "Erf", "Tanh") for v in node.inputs)
        ):
            return True
    return False


def sees_whole_kernel(node: ir.Node) -> bool:
    """Whether no output of the node reads padding."""
    if node.op_type == "Conv":
        valid = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        return valid and not any(attribute(node, "pads", ()))
    return node.op_type == "Gemm"


def merge_chain(model: ir.Model, chain: Chain) -> None:
    """Case 4."""
    needed = (not chain.affine.is_shift()) + (not chain.affine.is_scale())
    if len(chain.nodes) > max(needed, 1):
        put_affine(model, chain, chain.affine)


def put_affine(model: ir.Model, chain: Chain, affine: Affine) -> None:
    """Write the map as Mul and Add, whichever is needed, in the place of the chain."""
    last, source = chain.nodes[-1], chain.source
    kind, size = source.dtype or chain.result.dtype, rank(source)
    assert kind is not None and size is not None

    def operand_of(values: np.ndarray, what: str) -> ir.Value:
        shape = (-1, *[1] * (size - 1 - affine.axis)) if affine.axis is not None else ()
        array = values.reshape(shape if values.size > 1 else ())
        return stored(model, array.astype(kind.numpy()), f"{last.name}_{what}")

    parts = [("Mul", affine.scale, "scale")] if not affine.is_shift() else []
    if not affine.is_scale() or not parts:
        parts.append(("Add", affine.shift, "shift"))
    value = source
    for op_type, values, what in parts[:-1]:
        value = insert_before(last, op_type, [value, operand_of(values, what)], like=source)
    op_type, values, what = parts[-1]
    replace(last, op_type, [value, operand_of(values, what)])
    drop_unread(chain.nodes)
