"""The constants and attributes that hold a size, after indices have gone.

Each node that needs a new constant gets one of its own: what a stored shape is shared with may
need another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.model import array, opset, reads
from edgewright.prune.axes import attribute, integer, operand


@dataclass
class Sizes:
    """The graph being rewritten, the one it came from, and what is left of each axis.

    `model`: stored tensors are sliced already. `lengths`: of all axes before.
    """

    model: onnx.ModelProto
    original: onnx.ModelProto
    kept: dict[tuple[str, int], np.ndarray]
    lengths: dict[str, tuple[int, ...]]
    new: list[tuple[str, np.ndarray]] = field(default_factory=list)
    pieces: list[tuple[onnx.NodeProto, onnx.NodeProto]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opset = opset(self.model)
        self.stored = {t.name: t for t in self.original.graph.initializer}
        self.maker = {o: n for n in self.model.graph.node for o in n.output if o}
        self.names = {*self.maker, *self.stored, *(v.name for v in self.model.graph.input)}
        self.lost = {name for name, _ in self.kept}

    def touched(self, node: onnx.NodeProto) -> bool:
        return any(name in self.lost for name in (*node.input, *node.output))

    def length(self, name: str, axis: int) -> int:
        """What is left of an axis, 0 where its length is not known."""
        found = self.kept.get((name, axis))
        return self.lengths[name][axis] if found is None else len(found)

    def left(self, name: str, axis: int) -> np.ndarray:
        """The kept indices of an axis of known length."""
        found = self.kept.get((name, axis))
        return np.arange(self.lengths[name][axis]) if found is None else found

    def store(self, node: onnx.NodeProto, place: int, values: object, what: str) -> None:
        """Give the node an integer constant of its own as operand `place`."""
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = self.constant(f"{node.output[0]}_{what}", values)

    def constant(self, name: str, values: object) -> str:
        unique, count = name, 0
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        self.new.append((unique, np.asarray(values, np.int64)))
        return unique

    def set(self, node: onnx.NodeProto, name: str, value: object) -> None:
        """Set or replace an attribute."""
        self.drop(node, name)
        node.attribute.append(helper.make_attribute(name, value))

    def drop(self, node: onnx.NodeProto, name: str) -> None:
        left = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(left)

    def target(self, node: onnx.NodeProto, place: int, entries: dict[int, int]) -> None:
        """Change entries of a shape operand: stored, or a Concat with stored pieces."""
        name = node.input[place]
        if name in self.stored:
            values = array(self.stored[name]).astype(np.int64).reshape(-1)
            changed = values.copy()
            for k, entry in entries.items():
                changed[k] = entry
            if not np.array_equal(values, changed):
                self.store(node, place, changed, "shape")
            return
        maker = self.maker[name]
        inputs, at, found = [], 0, False
        for piece in maker.input:
            if piece not in self.stored:
                inputs.append(piece)
                at += self.lengths[piece][0]
                continue
            values = array(self.stored[piece]).astype(np.int64).reshape(-1)
            changed = np.array([entries.get(at + k, v) for k, v in enumerate(values)], np.int64)
            at += len(values)
            same = np.array_equal(values, changed)
            found |= not same
            inputs.append(piece if same else self.constant(f"{node.output[0]}_part", changed))
        if found:
            output = f"{node.output[0]}_shape"
            while output in self.names:
                output += "_"
            self.names.add(output)
            joined = helper.make_node("Concat", inputs, [output], f"{output}_concat", axis=0)
            node.input[place] = output
            self.pieces.append((node, joined))

    def finish(self) -> None:
        """Add the new constants, drop what nobody reads any more."""
        graph = self.model.graph
        for node, before in self.pieces:
            place = next(k for k, n in enumerate(graph.node) if n.output == node.output)
            graph.node.insert(place, before)
        graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in self.new)
        read_before = {name for node in self.original.graph.node for name in reads(node)}
        read = {name for node in graph.node for name in reads(node)}
        gone = {t.name for t in graph.initializer if t.name in read_before - read}
        kept = [t for t in graph.initializer if t.name not in gone]
        if gone:
            del graph.initializer[:]
            graph.initializer.extend(kept)


def convolution(sizes: Sizes, node: onnx.NodeProto) -> None:
    """`group`: what is left of the grouped side, by what is left of one group."""
    x, w, y = node.input[0], node.input[1], node.output[0]
    if integer(node, "group", 1) > 1:
        grouped = x if node.op_type == "Conv" else y
        sizes.set(node, "group", sizes.length(grouped, 1) // sizes.length(w, 1))


def hidden_size(sizes: Sizes, node: onnx.NodeProto) -> None:
    sizes.set(node, "hidden_size", sizes.length(node.input[2], 2))


def split(sizes: Sizes, node: onnx.NodeProto) -> None:
    axis = integer(node, "axis", 0) % len(sizes.lengths[node.input[0]])
    before = [sizes.lengths[name][axis] for name in node.output]
    after = [sizes.length(name, axis) for name in node.output]
    if before == after:
        return
    if sizes.opset < 13:
        sizes.set(node, "split", after)
        return
    sizes.drop(node, "num_outputs")
    sizes.store(node, 1, after, "split")


def slice_(sizes: Sizes, node: onnx.NodeProto) -> None:
    """Bounds counted among what is left; all operands written anew, in one type."""
    x = node.input[0]
    rank = len(sizes.lengths[x])
    lost = {axis for name, axis in sizes.kept if name == x}
    old = [_numbers(sizes, node, name, k + 1) for k, name in enumerate(("starts", "ends"))]
    axes = _numbers(sizes, node, "axes", 3) or list(range(len(old[0] or old[1])))
    steps = _numbers(sizes, node, "steps", 4) or [1] * len(axes)
    if not lost & {axis % rank for axis in axes}:
        return
    starts, ends = list(old[0]), list(old[1])
    for k, axis in enumerate(axes):
        place = axis % rank
        if (x, place) not in sizes.kept:
            continue
        left = sizes.kept[x, place]
        first, stop, _ = slice(starts[k], ends[k]).indices(sizes.lengths[x][place])
        starts[k], ends[k] = (int(np.searchsorted(left, b)) for b in (first, stop))
    if sizes.opset < 10:
        sizes.set(node, "starts", starts)
        sizes.set(node, "ends", ends)
        return
    for place, (values, what) in enumerate(
        ((starts, "starts"), (ends, "ends"), (axes, "axes"), (steps, "steps"))
    ):
        sizes.store(node, place + 1, values, what)


def gather(sizes: Sizes, node: onnx.NodeProto) -> None:
    """Stored indices become places among what is left of the axis they look up."""
    x, y = node.input[0], node.output[0]
    axis = integer(node, "axis", 0) % len(sizes.lengths[x])
    if (x, axis) not in sizes.kept:
        return
    indices = array(sizes.stored[node.input[1]])[sizes.left(y, axis)]
    indices = indices % sizes.lengths[x][axis]
    sizes.store(node, 1, np.searchsorted(sizes.kept[x, axis], indices), "indices")


def reshape(sizes: Sizes, node: onnx.NodeProto) -> None:
    """New lengths where an axis lost some, the other entries as they are.

    An entry 0 copies a length of the input and is written out: there it may have changed
    for another reason than here.
    """
    y = node.output[0]
    entries = dict[int, int]()
    for axis in range(len(sizes.lengths[y])):
        length = sizes.length(y, axis)
        if (y, axis) in sizes.kept or (node.input[0], axis) in sizes.kept:
            entries[axis] = length
    before = _numbers(sizes, node, "", 1, default=())
    for axis, entry in enumerate(before):
        if entry == -1 or (axis in entries and entries[axis] == 0):
            entries.pop(axis, None)
    sizes.target(node, 1, entries)


def expand(sizes: Sizes, node: onnx.NodeProto) -> None:
    """Entries that are 1 take the input's length; others say it."""
    y = node.output[0]
    rank = len(sizes.lengths[y])
    values = _numbers(sizes, node, "", 1, default=())
    size = len(values) if values else rank
    entries = {}
    for axis in range(rank):
        k = axis - rank + size
        if (y, axis) in sizes.kept and k >= 0 and (not values or values[k] != 1):
            entries[k] = sizes.length(y, axis)
    sizes.target(node, 1, entries)


def resize(sizes: Sizes, node: onnx.NodeProto) -> None:
    name = operand(node, 3)
    if not name:
        return
    x = node.input[0]
    axes = attribute(node, "axes") or range(len(sizes.lengths[x]))
    places = {k % len(sizes.lengths[x]): i for i, k in enumerate(axes)}  # type: ignore[arg-type, var-annotated]
    entries = {i: sizes.length(x, k) for k, i in places.items() if (x, k) in sizes.kept}
    sizes.target(node, 3, entries)


def _numbers(
    sizes: Sizes, node: onnx.NodeProto, name: str, place: int, default: tuple[int, ...] = ()
) -> list[int]:
    value = attribute(node, name) if name else None
    if value is not None:
        return [int(v) for v in value]  # type: ignore[attr-defined]
    tensor = sizes.stored.get(operand(node, place))
    return list(default) if tensor is None else [int(v) for v in array(tensor).reshape(-1)]


Rewrite = Callable[[Sizes, onnx.NodeProto], None]
REWRITES: dict[str, Rewrite] = {
    "Conv": convolution,
    "ConvTranspose": convolution,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), hidden_size),
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Reshape": reshape,
    "Expand": expand,
    "Resize": resize,
}
