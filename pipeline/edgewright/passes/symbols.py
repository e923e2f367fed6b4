"""Names of free dimensions carried further than onnx's shape inference carries them.

onnx gives a new name (unk__7) to a dimension wherever its rule for an operator does not see
that it is an old one: behind every broadcast of two free dimensions, Pow, Pad, Slice, a Reshape
with -1. Here each operator below says what its output dimensions are; where that differs from
the name they have, both names are the same number, and one of them takes the place of the
other in the whole model. Numbers win over names, names of inputs over others.

Only what must hold in every valid run is used: dimensions that are broadcast together are
equal where neither is 1, which is known only if they have the same name already or one of them
is a number above 1 (then the result is that number).
"""

from collections.abc import Callable

import onnx_ir as ir

from edgewright.passes.edit import all_nodes, attribute, dims, integers, is_op, operand
from edgewright.passes.entries import Known, follow, look_up

Dim = int | str | None
Dims = list[Dim]

BROADCAST = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "And", "Or", "Xor", "Mod", "Sum"),
    *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "PRelu", "Mean"),
)


def unify_dims(model: ir.Model) -> int:
    """Merge names of equal dimensions; returns how many names went."""
    inputs = {d for v in model.graph.inputs for d in dims(v) or [] if isinstance(d, str)}
    outputs = {value: value.shape for value in model.graph.outputs}
    count = 0
    for _ in range(4):  # each round can prove more from what the one before merged
        merged: dict[str, int | str] = {}
        known = follow(model)
        for node in all_nodes(model):
            wanted = expected_dims(node, known)
            output = node.outputs[0] if node.outputs else None
            if wanted is None or output is None:
                continue
            have = dims(output)
            if have is None:
                output.shape = ir.Shape(wanted)
            elif len(have) == len(wanted):
                for old, new in zip(have, wanted, strict=True):
                    merge(merged, inputs, old, new)
        if not merged:
            break
        count += len(merged)
        rename(model, merged)
    for value, shape in outputs.items():
        if shape is not None and value.shape is not None and len(shape) == len(value.shape):
            pairs = zip(shape, value.shape, strict=True)
            kept = [new if isinstance(new, int) else old for old, new in pairs]
            value.shape = ir.Shape(kept)
    return count


def find(merged: dict[str, int | str], name: Dim) -> Dim:
    """What stands for a name now."""
    while isinstance(name, str) and name in merged:
        name = merged[name]
    return name


def merge(merged: dict[str, int | str], inputs: set[str], old: Dim, new: Dim) -> None:
    """Note that both are the same number."""
    old, new = find(merged, old), find(merged, new)
    if old is None or new is None or old == new:
        return
    if isinstance(old, int) or (isinstance(new, str) and old in inputs):
        old, new = new, old
    if isinstance(old, str):  # else: two numbers, a contradiction of the model's own
        merged[old] = new


def rename(model: ir.Model, merged: dict[str, int | str]) -> None:
    """Write the names that are left into all shapes but those of inputs."""
    values = [output for node in all_nodes(model) for output in node.outputs]
    for value in {*values, *model.graph.outputs}:
        shape = dims(value)
        if shape is not None and any(isinstance(d, str) and d in merged for d in shape):
            value.shape = ir.Shape([find(merged, d) for d in shape])


def expected_dims(node: ir.Node, known: Known) -> Dims | None:
    """The dimensions of the first output as far as they follow from the inputs."""
    rule = RULES.get(node.op_type)
    if rule is None or not is_op(node, node.op_type):
        return None
    return rule(node, known)


def broadcast_dims(shapes: list[Dims | None]) -> Dims | None:
    """The dimensions of values computed together, aligned at the end."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or not known:
        return None
    result: Dims = []
    for k in range(max(len(s) for s in known)):
        column = [s[-1 - k] for s in known if k < len(s)]
        result.append(broadcast_dim(column))
    return result[::-1]


def broadcast_dim(column: Dims) -> Dim:
    wide = {d for d in column if d != 1}
    numbers = {d for d in wide if isinstance(d, int)}
    if numbers:
        return numbers.pop()
    names = {d for d in wide if not is_capped(d, wide)}
    return names.pop() if len(names) == 1 else (None if wide else 1)


def is_capped(name: Dim, others: set[Dim]) -> bool:
    """Whether the name is min(n, number above 1) beside n itself: n above that number could not
    be broadcast with it, so in a valid run both are n.
    """
    return isinstance(name, str) and any(
        isinstance(n, str) and name.startswith(f"min({n}, ") for n in others
    )


def elementwise(node: ir.Node, known: Known) -> Dims | None:
    return broadcast_dims([dims(v) for v in node.inputs])


def expanded(node: ir.Node, known: Known) -> Dims | None:
    return broadcast_dims([dims(node.inputs[0]), look_up(operand(node, 1), known)])


def multiplied(node: ir.Node, known: Known) -> Dims | None:
    """MatMul of two values with at least 2 dimensions."""
    left, right = dims(node.inputs[0]), dims(node.inputs[1])
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    batch = broadcast_dims([left[:-2], right[:-2]])
    return None if batch is None else [*batch, left[-2], right[-1]]


def convolved(node: ir.Node, known: Known) -> Dims | None:
    """Conv, ConvTranspose and pools keep the batch; the rest is onnx's own result."""
    shape, result = dims(node.inputs[0]), dims(node.outputs[0])
    if shape is None or result is None:
        return None
    return [shape[0], *[None] * (len(result) - 1)]


def padded(node: ir.Node, known: Known) -> Dims | None:
    shape, pads = dims(node.inputs[0]), integers(operand(node, 1))
    if shape is None or pads is None or operand(node, 3) is not None:
        return None
    size = len(shape)
    return [d if pads[k] == pads[k + size] == 0 else None for k, d in enumerate(shape)]


def sliced(node: ir.Node, known: Known) -> Dims | None:
    """Axes that are not cut stay. The first n of a number of entries, n a free dimension, are
    min(n, number); see `broadcast_dim`.
    """
    shape, starts = dims(node.inputs[0]), integers(operand(node, 1))
    if shape is None or starts is None:
        return None
    axes = list(range(len(starts))) if operand(node, 3) is None else integers(operand(node, 3))
    ends = look_up(operand(node, 2), known) or [None] * len(starts)
    steps = [1] * len(starts) if operand(node, 4) is None else integers(operand(node, 4))
    if axes is None or steps is None or not len(starts) == len(axes) == len(ends) == len(steps):
        return None
    result = list(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first_ones = start == 0 and step == 1 and isinstance(end, str)
        size = shape[axis]
        keeps = first_ones and isinstance(size, int) and size > 1
        result[axis] = f"min({end}, {size})" if keeps else None
    return result


def reshaped(node: ir.Node, known: Known) -> Dims | None:
    """0 copies; -1 is what is left when equal dimensions on both sides are struck out."""
    shape, target = dims(node.inputs[0]), look_up(operand(node, 1), known)
    if shape is None or target is None or (attribute(node, "allowzero", 0) and 0 in target):
        return None
    if any(t == 0 and k >= len(shape) for k, t in enumerate(target)):
        return None
    result: Dims = [shape[k] if t == 0 else t for k, t in enumerate(target)]
    if -1 in target:
        result[target.index(-1)] = left_over(shape, [d for d in result if d != -1])
    return result


def left_over(shape: Dims, taken: Dims) -> Dim:
    """The quotient of two products of dimensions, if it is one number or one name."""
    above, below = list(shape), []
    for d in taken:
        if d in above:
            above.remove(d)
        else:
            below.append(d)
    top, names = 1, []
    for d in above:
        if isinstance(d, int):
            top *= d
        else:
            names.append(d)
    bottom = 1
    for d in below:
        if not isinstance(d, int):
            return None
        bottom *= d
    if bottom == 0 or top % bottom:
        return None
    if not names:
        return top // bottom
    return names[0] if len(names) == 1 and top == bottom else None


def counted(node: ir.Node, known: Known) -> Dims | None:
    """Range(0, n, 1) has n entries."""
    start, limit, step = (look_up(v, known) for v in node.inputs)
    return limit if start == [0] and step == [1] and limit is not None else None


def filled(node: ir.Node, known: Known) -> Dims | None:
    """ConstantOfShape."""
    return look_up(node.inputs[0], known)


def recurrent(node: ir.Node, known: Known) -> Dims | None:
    """Y of LSTM, GRU and RNN: sequence, directions, batch, hidden."""
    shape, result = dims(node.inputs[0]), dims(node.outputs[0])
    if shape is None or result is None or len(shape) != 3 or attribute(node, "layout", 0):
        return None
    return [shape[0], result[1], shape[1], result[3]] if len(result) == 4 else None


RULES: dict[str, Callable[[ir.Node, Known], Dims | None]] = {
    **dict.fromkeys(BROADCAST, elementwise),
    **dict.fromkeys(("Conv", "ConvTranspose", "AveragePool", "MaxPool"), convolved),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    "ConstantOfShape": filled,
    "Expand": expanded,
    "MatMul": multiplied,
    "Pad": padded,
    "Range": counted,
    "Slice": sliced,
    "Reshape": reshaped,
}
