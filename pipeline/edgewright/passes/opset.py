"""Raise the default operator set, operator by operator, to what quantization needs.

onnx.version_converter leaves nested graphs and metadata behind; onnxscript's converter starts
at 18. Between 6, the oldest version ONNX Runtime still runs most of, and 17 few operators
changed what they mean, and each has one adapter here. An operator that cannot be carried over
with unchanged results (per-activation BatchNormalization, training outputs, Scan 8) raises
`NotConvertible`, and the whole model stays at its version.

| since | operator | change |
|---|---|---|
| 7 | Add, Mul, ... and Gemm | operands broadcast by themselves, aligned at the end |
| 7 | BatchNormalization, Dropout | `is_test` gone (1 is what is left) |
| 9 | BatchNormalization | `spatial` gone (1 is what is left) |
| 10 | Upsample | became Resize |
| 10 | Slice, TopK | attributes became inputs |
| 11 | Resize | learned coordinate modes; the old one is asymmetric, floor when growing |
| 11 | Clip, Pad | attributes became inputs |
| 11 | Scatter | renamed to ScatterElements |
| 12 | Dropout | attribute became an input; without training it is Identity |
| 13 | Softmax, LogSoftmax, Hardmax | from "flatten to 2-D at axis (default 1)" to one axis |
| 13 | Squeeze, Unsqueeze, ReduceSum, Split | attributes became inputs |
| 14 | BatchNormalization | training outputs changed |
| 16 | RoiAlign | `coordinate_transformation_mode`; the old one is output_half_pixel |
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgewright.passes.edit import (
    DEFAULT_DOMAINS,
    all_nodes,
    attribute,
    bypass,
    constant,
    dims,
    drop_unread,
    insert_before,
    is_alive,
    matching,
    operand,
    producer,
    rank,
    replace,
    same_shape,
    stored,
)

OLDEST, TARGET, NEWEST = 6, 17, 20
FLOAT_MAX = float(np.finfo(np.float32).max)


class NotConvertible(ValueError):
    """A node that means nothing in the target operator set."""


def opset(model: ir.Model) -> int:
    """Version of the default operator set, 0 where the model uses none of it."""
    return max((model.opset_imports.get(d, 0) for d in DEFAULT_DOMAINS), default=0)


def raise_opset(model: ir.Model, target: int = TARGET) -> int:
    """Convert all nodes to the operator set `target`; a newer model stays as it is.

    Needs types and ranks (`shapes.infer`). Returns how many nodes changed, at least 1 where the
    version did. Raises NotConvertible, with the model half converted.
    """
    source = opset(model)
    if source >= target:
        return 0
    if 0 < source < OLDEST:
        raise NotConvertible(f"operator set {source} is older than {OLDEST}")
    changes = 0
    for node in all_nodes(model):
        if node.domain not in DEFAULT_DOMAINS or not is_alive(node):
            continue
        if source < 7 and node.op_type in BROADCAST:
            broadcast_by_itself(model, node)
            changes += 1
        if node.op_type in LOST and source < LOST[node.op_type]:
            raise NotConvertible(f"{node.op_type} of operator set {source}")
        since, adapt = ADAPTERS.get(node.op_type, (0, None))
        if adapt is not None and source < since <= target:
            adapt(model, node, source)
            changes += 1
    for name in DEFAULT_DOMAINS:
        model.opset_imports.pop(name, None)
    model.opset_imports[""] = target
    for node in all_nodes(model):
        node.version = None
    return max(changes, 1)


def add_inputs(
    model: ir.Model, node: ir.Node, values: dict[str, np.ndarray | None], start: int = 1
) -> None:
    """Give the node stored inputs from `start` on and drop its attributes of the same names."""
    inputs: list[ir.Value | None] = list(node.inputs[:start])
    for name, array in values.items():
        node.attributes.pop(name, None)
        stem = node.outputs[0].name or node.op_type
        inputs.append(None if array is None else stored(model, array, f"{stem}_{name}"))
    while inputs and inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))
    for k, value in enumerate(inputs):
        node.replace_input_with(k, value)


def numbers(node: ir.Node, name: str) -> np.ndarray | None:
    """A list attribute as an int64 array."""
    values = attribute(node, name)
    return None if values is None else np.array(values, np.int64)


def like_input(node: ir.Node, number: float) -> np.ndarray:
    """The number as a 0-D array of the first input's type."""
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    if kind is None:
        raise NotConvertible(f"{node.op_type} '{node.name}': the type of its input is not known")
    return np.array(number, kind.numpy())


def broadcast_by_itself(model: ir.Model, node: ir.Node) -> None:
    """Before 7 the second operand was aligned at `axis`, by default at the end, which is what
    is left; an operand aligned elsewhere gets axes of size 1 at its end.
    """
    node.attributes.pop("broadcast", None)
    axis = node.attributes.pop("axis", None)
    if axis is None:
        return
    left, right = rank(node.inputs[0]), rank(node.inputs[1])
    if left is None or right is None:
        raise NotConvertible(f"{node.op_type} '{node.name}' with an axis, of unknown rank")
    missing = left - (axis.as_int() % left) - right
    if missing > 0:
        axes = stored(model, np.arange(right, right + missing), f"{node.name}_axes")
        value = insert_before(node, "Unsqueeze", [node.inputs[1], axes])
        node.replace_input_with(1, value)


def axes_to_input(model: ir.Model, node: ir.Node, source: int) -> None:
    add_inputs(model, node, {"axes": numbers(node, "axes")})


def split_to_input(model: ir.Model, node: ir.Node, source: int) -> None:
    add_inputs(model, node, {"split": numbers(node, "split")})


def slice_to_inputs(model: ir.Model, node: ir.Node, source: int) -> None:
    if len(node.inputs) == 1:
        add_inputs(model, node, {n: numbers(node, n) for n in ("starts", "ends", "axes")})


def topk_to_input(model: ir.Model, node: ir.Node, source: int) -> None:
    if len(node.inputs) == 1:
        add_inputs(model, node, {"k": np.array([attribute(node, "k")], np.int64)})


def clip_to_inputs(model: ir.Model, node: ir.Node, source: int) -> None:
    low, high = attribute(node, "min", -FLOAT_MAX), attribute(node, "max", FLOAT_MAX)
    bounds = {
        "min": like_input(node, low) if low > -FLOAT_MAX else None,
        "max": like_input(node, high) if high < FLOAT_MAX else None,
    }
    add_inputs(model, node, bounds)


def pad_to_inputs(model: ir.Model, node: ir.Node, source: int) -> None:
    fills = attribute(node, "mode", "constant") == "constant"
    value = like_input(node, attribute(node, "value", 0.0)) if fills else None
    add_inputs(model, node, {"pads": numbers(node, "pads"), "value": value})


def scatter_renamed(model: ir.Model, node: ir.Node, source: int) -> None:
    node.op_type = "ScatterElements"


def dropout_to_identity(model: ir.Model, node: ir.Node, source: int) -> None:
    if source < 7 and not attribute(node, "is_test", 0):
        raise NotConvertible(f"Dropout '{node.name}' in training")
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise NotConvertible(f"Dropout '{node.name}' whose mask is read")
    if not bypass(node):
        replace(node, "Identity", node.inputs[:1])


def normalization_outputs(model: ir.Model, node: ir.Node, source: int) -> None:
    if source < 7 and not attribute(node, "is_test", 0):
        raise NotConvertible(f"BatchNormalization '{node.name}' in training")
    if attribute(node, "spatial", 1) != 1:
        raise NotConvertible(f"BatchNormalization '{node.name}' with spatial = 0")
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise NotConvertible(f"BatchNormalization '{node.name}' with training outputs")
    for name in ("spatial", "is_test"):
        node.attributes.pop(name, None)
    node.resize_outputs(1)


def roi_mode(model: ir.Model, node: ir.Node, source: int) -> None:
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def resize_modes(model: ir.Model, node: ir.Node, source: int) -> None:
    """Upsample (7, 9) and Resize 10: x_old = x_new / scale; nearest takes floor when it grows
    and ceil when it shrinks (as the runtime does for Resize 10)."""
    if "scales" in node.attributes:
        factors = np.array(attribute(node, "scales"), np.float32)
        scales: ir.Value | None = stored(model, factors, f"{node.outputs[0].name}_scales")
    else:
        scales = operand(node, 1)
    known = constant(scales)
    rounding = "floor"
    if known is not None and (known < 1).any():
        if (known > 1).any():
            raise NotConvertible(f"{node.op_type} '{node.name}' that grows and shrinks")
        rounding = "ceil"
    attributes = {
        "mode": attribute(node, "mode", "nearest"),
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": rounding,
    }
    replace(node, "Resize", [node.inputs[0], None, scales], attributes)


def softmax_axis(model: ir.Model, node: ir.Node, source: int) -> None:
    """The old operator flattens to 2-D at `axis` and works on the rows.

    That is one axis where all axes behind it have size 1; else the flattening is written out:
    Reshape(Softmax(Flatten(x, axis), axis=-1), Shape(x)).
    """
    axis = attribute(node, "axis", 1)
    value, size = node.inputs[0], rank(node.inputs[0])
    if axis < 0 and size is not None:
        axis += size
    shape = dims(value)
    if axis == -1 or (shape is not None and all(d == 1 for d in shape[axis + 1 :])):
        node.attributes.add(ir.AttrInt64("axis", axis))
        return
    flat = insert_before(node, "Flatten", [value], {"axis": axis})
    shape_of = insert_before(node, "Shape", [value])
    rows = insert_before(node, node.op_type, [flat], {"axis": -1})
    for new in (flat, rows):
        new.type = value.type if value is not None else None
    shape_of.type = ir.TensorType(ir.DataType.INT64)
    replace(node, "Reshape", [rows, shape_of])


def unflatten_softmax(model: ir.Model) -> int:
    """Undo the flattening of `softmax_axis` where the rank has become known only since.

    Reshape(Softmax(Flatten(x, axis), -1), shape of x) = Softmax(x, axis) if all axes behind have
    size 1. Returns the number of Softmax nodes changed.
    """
    count = 0
    for node in matching(model, "Reshape"):
        rows = producer(node.inputs[0], *SOFTMAX)
        flat = producer(rows.inputs[0], "Flatten") if rows is not None else None
        if rows is None or flat is None or attribute(rows, "axis", -1) not in (-1, 1):
            continue
        value, shape_of = flat.inputs[0], producer(node.inputs[1], "Shape")
        shape, axis = dims(value), attribute(flat, "axis", 1)
        restores = shape_of is not None and shape_of.inputs[0] is value
        if shape is None or not (restores or same_shape(value, node.outputs[0])):
            continue
        axis %= len(shape)
        if all(d == 1 for d in shape[axis + 1 :]):
            replace(node, rows.op_type, [value], {"axis": axis})
            drop_unread([flat, rows])
            count += 1
    return count


SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")
Adapter = Callable[[ir.Model, ir.Node, int], None]
ADAPTERS: dict[str, tuple[int, Adapter]] = {
    "Upsample": (10, resize_modes),
    "Slice": (10, slice_to_inputs),
    "TopK": (10, topk_to_input),
    "Resize": (11, resize_modes),
    "Clip": (11, clip_to_inputs),
    "Pad": (11, pad_to_inputs),
    "Scatter": (11, scatter_renamed),
    "Dropout": (12, dropout_to_identity),
    **dict.fromkeys(SOFTMAX, (13, softmax_axis)),
    "Squeeze": (13, axes_to_input),
    "Unsqueeze": (13, axes_to_input),
    "ReduceSum": (13, axes_to_input),
    "Split": (13, split_to_input),
    "BatchNormalization": (14, normalization_outputs),
    "RoiAlign": (16, roi_mode),
}
LOGIC = ("And", "Or", "Xor", "Equal", "Greater", "Less")
BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "Gemm", *LOGIC)
LOST = {"Scan": 9}  # operators whose older form has no equal in the newer sets
