"""The small integer graphs in which exporters compute shapes, followed without running them.

Shape -> Gather -> Unsqueeze -> Concat -> Reshape: each value of such a graph is followed as a
list of entries, each a number, a name of a free dimension (a number of at least 0, the same
wherever the name stands), or None for anything else. Values are of integers or booleans and
have at most one dimension and LONGEST entries; more is data, not a shape.
"""

from collections.abc import Callable

import onnx_ir as ir

from edgewright.passes.edit import (
    all_nodes,
    attribute,
    constant,
    dims,
    integers,
    is_op,
    operand,
    rank,
    static_dims,
)

Entry = int | str | None
Entries = list[Entry]
Known = dict[ir.Value, Entries]
LONGEST = 64
INTEGERS = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)


def follow(model: ir.Model) -> Known:
    """The entries of all values that can be followed. Needs inferred shapes."""
    known: Known = {}
    for node in all_nodes(model):
        if len(node.outputs) == 1:
            entries = entries_of(node, known)
            if entries is not None:
                known[node.outputs[0]] = entries
    return known


def look_up(value: ir.Value | None, known: Known) -> Entries | None:
    """The entries of a followed or stored value of integers or booleans; of any other such
    value, as many None as it has entries.
    """
    if value is None or value in known:
        return known[value] if value is not None else None
    array = constant(value)
    if array is None:
        return unknown_entries(value)
    if array.ndim > 1 or array.size > LONGEST or array.dtype.kind not in "iub":
        return None
    return [int(v) for v in array.reshape(-1)]


def unknown_entries(value: ir.Value) -> Entries | None:
    shape, kind = static_dims(value), value.dtype
    if kind not in INTEGERS or shape is None or len(shape) > 1:
        return None
    count = shape[0] if shape else 1
    return [None] * count if count <= LONGEST else None


def entries_of(node: ir.Node, known: Known) -> Entries | None:
    """What the node computes from followed values; None where it cannot be told."""
    if not is_op(node, *FOLLOW):
        return None
    size = rank(node.outputs[0])
    if size is None or size > 1:
        return None
    entries = FOLLOW[node.op_type](node, known)
    return None if entries is None or len(entries) > LONGEST else entries


def follow_shape(node: ir.Node, known: Known) -> Entries | None:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    return shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))]


def follow_size(node: ir.Node, known: Known) -> Entries | None:
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    return [product(shape)]


def follow_product(node: ir.Node, known: Known) -> Entries | None:
    entries = look_up(node.inputs[0], known)
    return None if entries is None else [product(entries)]


def product(entries: Entries) -> Entry:
    result: Entry = 1
    for entry in entries:
        result = combine("Mul", result, entry)
    return result


def follow_same(node: ir.Node, known: Known) -> Entries | None:
    """Squeeze, Unsqueeze, Reshape, Identity: the same entries in another shape."""
    return look_up(node.inputs[0], known)


def follow_cast(node: ir.Node, known: Known) -> Entries | None:
    kind = ir.DataType(attribute(node, "to"))
    if kind not in INTEGERS:
        return None
    entries = look_up(node.inputs[0], known)
    if entries is None or kind != ir.DataType.BOOL:
        return entries
    return [int(e != 0) if isinstance(e, int) else None for e in entries]


def follow_gather(node: ir.Node, known: Known) -> Entries | None:
    entries, places = look_up(node.inputs[0], known), integers(node.inputs[1])
    if entries is None or places is None:
        return None
    if not all(-len(entries) <= p < len(entries) for p in places):
        return None
    return [entries[p] for p in places]


def follow_slice(node: ir.Node, known: Known) -> Entries | None:
    entries = look_up(node.inputs[0], known)
    start, end = integers(node.inputs[1]), integers(node.inputs[2])
    step = [1] if operand(node, 4) is None else integers(operand(node, 4))
    if entries is None or start is None or end is None or step is None:
        return None
    if rank(node.inputs[0]) != 1 or not len(start) == len(end) == len(step) == 1:
        return None
    if step[0] < 0 and end[0] < -len(entries):  # "past the first", which Python spells None
        return entries[start[0] :: step[0]]
    return entries[start[0] : end[0] : step[0]]


def follow_concat(node: ir.Node, known: Known) -> Entries | None:
    parts = [look_up(v, known) for v in node.inputs]
    return None if None in parts else [e for p in parts if p is not None for e in p]


def follow_filled(node: ir.Node, known: Known) -> Entries | None:
    """ConstantOfShape of a known, short length."""
    length = look_up(node.inputs[0], known)
    fill = attribute(node, "value")
    if length is None or len(length) > 1 or fill is None or not fill.dtype.is_integer():
        return None
    count = length[0] if length else 1
    return [int(fill.numpy()[0])] * count if isinstance(count, int) and count <= LONGEST else None


def follow_pairs(node: ir.Node, known: Known) -> Entries | None:
    """Element-wise operators of two values, either of which may be a single number."""
    if len(node.inputs) != 2:
        return None
    left, right = look_up(node.inputs[0], known), look_up(node.inputs[1], known)
    pairs = broadcast([left, right])
    return None if pairs is None else [combine(node.op_type, a, b) for a, b in pairs]


def follow_not(node: ir.Node, known: Known) -> Entries | None:
    entries = look_up(node.inputs[0], known)
    if entries is None:
        return None
    return [int(not e) if isinstance(e, int) else None for e in entries]


def follow_where(node: ir.Node, known: Known) -> Entries | None:
    rows = broadcast([look_up(v, known) for v in node.inputs])
    if rows is None:
        return None
    return [
        (a if test else b) if isinstance(test, int) else (a if a == b else None)
        for test, a, b in rows
    ]


def broadcast(parts: list[Entries | None]) -> list[tuple[Entry, ...]] | None:
    """The entries side by side, those of length 1 repeated."""
    lists = [p for p in parts if p is not None]
    if len(lists) != len(parts):
        return None
    lengths = {len(p) for p in lists if len(p) != 1}
    if len(lengths) > 1:
        return None
    length = lengths.pop() if lengths else 1
    return list(zip(*(p if len(p) == length else p * length for p in lists), strict=True))


def combine(op_type: str, a: Entry, b: Entry) -> Entry:
    """One entry of a binary operator; names are numbers of at least 0."""
    if isinstance(a, int) and isinstance(b, int):
        return NUMBERS[op_type](a, b)
    if op_type == "Mul" and 0 in (a, b):
        return 0
    if op_type == "Equal":
        if a is not None and a == b:
            return 1
        never = None not in (a, b) and any(isinstance(e, int) and e < 0 for e in (a, b))
        return 0 if never else None
    if op_type in ("Add", "Sub") and b == 0:
        return a
    if op_type in ("Mul", "Div") and b == 1:
        return a
    if (op_type == "Add" and a == 0) or (op_type == "Mul" and a == 1):
        return b
    if op_type in ("Min", "Max") and a is not None and a == b:
        return a
    return None


def divide(a: int, b: int) -> int | None:
    """Division as the runtime does it: towards zero."""
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


NUMBERS: dict[str, Callable[[int, int], int | None]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "Min": min,
    "Max": max,
    "Equal": lambda a, b: int(a == b),
    "Greater": lambda a, b: int(a > b),
    "Less": lambda a, b: int(a < b),
    "And": lambda a, b: int(bool(a) and bool(b)),
    "Or": lambda a, b: int(bool(a) or bool(b)),
}
Follow = Callable[[ir.Node, Known], Entries | None]
FOLLOW: dict[str, Follow] = {
    "Shape": follow_shape,
    "Size": follow_size,
    "ReduceProd": follow_product,
    "Squeeze": follow_same,
    "Unsqueeze": follow_same,
    "Reshape": follow_same,
    "Identity": follow_same,
    "Cast": follow_cast,
    "Gather": follow_gather,
    "Slice": follow_slice,
    "Concat": follow_concat,
    "ConstantOfShape": follow_filled,
    "Not": follow_not,
    "Where": follow_where,
    **dict.fromkeys(NUMBERS, follow_pairs),
}
