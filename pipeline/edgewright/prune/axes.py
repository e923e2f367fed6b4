"""One label per (tensor, axis, index): union-find over integer ids, in numpy.

Every index of every axis of known length has an id; id 0 is frozen and absorbs what it is tied
to. The rules of `rules_*.py` tie ids that must be kept or removed together. Axes of length 1
and of unknown length are frozen from the start: they can lose nothing.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx

from edgewright.model import array, initializers, opset

Ids = np.ndarray  # int64 (n,): ids of the indices of one axis
Dim = int | str | None
SMALL = 1 << 16  # values of a stored tensor that a rule may want to read: shapes, axes, indices


@dataclass(frozen=True)
class Mix:
    """Where an activation is summed over an axis: what a consumer's weights are.

    `axis` of `input` (an operand of `node`) meets `weight_axis` of `weight`; no weight where
    both operands are computed. Whole groups of a grouped convolution: `groups` > 1 says how
    many blocks of the activation's axis share the entries of the weight's axis.
    """

    node: str
    op: str
    input: str
    axis: int
    weight: str | None
    weight_axis: int = 0
    groups: int = 1


@dataclass
class Axes:
    """The ids of a graph's tensors, what ties them, and what the rules found on the way."""

    model: onnx.ModelProto
    shapes: dict[str, list[Dim]]
    policy: dict[tuple, int] = field(default_factory=dict)
    default: int = 0
    parent: np.ndarray = field(init=False)
    ids: dict[str, tuple[Ids, ...]] = field(default_factory=dict)
    choices: dict[tuple, int] = field(default_factory=dict)
    frozen: list[dict[str, str]] = field(default_factory=list)
    mixes: list[Mix] = field(default_factory=list)
    inexact: list[Ids] = field(default_factory=list)
    kinds: dict[str, list[Ids]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opset = opset(self.model)
        self.stored = initializers(self.model.graph)
        self.outputs = {v.name for v in self.model.graph.output}
        self.maker = {o: n for n in self.model.graph.node for o in n.output if o}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        for name, tensor in self.stored.items():
            self.shapes[name] = list(tensor.dims)
        count = 1
        for name, shape in self.shapes.items():
            axes = []
            for dim in shape:
                n = dim if isinstance(dim, int) and dim > 0 else 0
                if n > 1:
                    axes.append(np.arange(count, count + n))
                    count += n
                else:
                    axes.append(np.zeros(n, np.int64))
            self.ids[name] = tuple(axes)
        self.parent = np.arange(count)

    # Questions

    def axes(self, name: str) -> tuple[Ids, ...]:
        """The ids of a tensor's axes. KeyError where its rank is unknown."""
        return self.ids[name]

    def known(self, *names: str) -> bool:
        """Whether all tensors named have a known rank; names left out count as known."""
        return all(not name or name in self.ids for name in names)

    def const(self, name: str | None) -> np.ndarray | None:
        """The values of a small stored tensor, None for any other."""
        tensor = self.stored.get(name or "")
        if tensor is None or int(np.prod(tensor.dims, dtype=np.int64)) > SMALL:
            return None
        if tensor.data_type == onnx.TensorProto.STRING:
            return None
        return array(tensor)

    def entries(self, name: str) -> list[int | None] | None:
        """The values of a 1-D shape tensor, None in places that are computed.

        It is stored, or a Concat of stored and computed pieces, whose stored entries can be
        rewritten. None for anything else.
        """
        stored = self.const(name)
        if stored is not None:
            return [int(v) for v in stored.reshape(-1)]
        maker = self.maker.get(name)
        if maker is None or maker.op_type != "Concat":
            return None
        found: list[int | None] = []
        for piece in maker.input:
            values = self.const(piece)
            if values is not None:
                found += [int(v) for v in values.reshape(-1)]
                continue
            size = self.shapes.get(piece, [None])
            if len(size) != 1 or not isinstance(size[0], int):
                return None
            found += [None] * size[0]
        return found

    def live(self, ids: Ids) -> bool:
        """Whether any of the ids is not frozen."""
        return bool(self.find(ids).any())

    # Edits

    def find(self, ids: Ids) -> Ids:
        """The representative of each id: the smallest of its class."""
        roots = self.parent[ids]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self.parent[ids] = roots
        return roots

    def tie(self, a: Ids, b: Ids) -> None:
        """Make a[i] and b[i] one unit, for each i; arrays of one length (or broadcast)."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        while True:
            ra, rb = self.find(a), self.find(b)
            differ = ra != rb
            if not differ.any():
                return
            a, b = ra[differ], rb[differ]
            # Several pairs may want to hang one root below different others: the smallest
            # wins, and the pairs that lost are tried again from where they are now.
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def freeze(self, *ids: Ids) -> None:
        for one in ids:
            if one.size:
                self.tie(one, np.zeros(1, np.int64))

    def freeze_all(self, *names: str) -> None:
        """Freeze every axis of these tensors."""
        for name in names:
            self.freeze(*self.ids.get(name, ()))

    def refuse(self, node: onnx.NodeProto, reason: str) -> None:
        """Freeze all a node reads and makes, and say why."""
        self.freeze_all(*node.input, *node.output)
        self.note(node, reason)

    def note(self, node: onnx.NodeProto, reason: str) -> None:
        label = node.name or (node.output[0] if node.output else "")
        self.frozen.append({"node": label, "op": node.op_type, "reason": reason})

    def same(self, a: Ids, b: Ids) -> None:
        """Tie two axes that mean the same indices; freeze both where a length is unknown."""
        if len(a) == len(b):
            self.tie(a, b)
        else:
            self.freeze(a, b)

    def mix(
        self,
        node: onnx.NodeProto,
        place: int,
        axis: int,
        weight: str | None,
        weight_axis: int = 0,
        groups: int = 1,
    ) -> None:
        """Note that `node` sums its operand number `place` over `axis`."""
        name = node.name or node.output[0]
        rank = len(self.ids[node.input[place]])
        self.mixes.append(
            Mix(name, node.op_type, node.input[place], axis % rank, weight, weight_axis, groups)
        )

    def mark(self, kind: str, *ids: Ids) -> None:
        """Note what kind of unit these ids are part of."""
        self.kinds.setdefault(kind, []).extend(ids)

    def choose(self, key: tuple, count: int) -> int:
        """Which of `count` ways to go at a place where several are right; see `labels.py`."""
        self.choices[key] = max(count, self.choices.get(key, 0))
        wanted = self.policy.get(key, self.default)
        return min(wanted, count - 1) if wanted >= 0 else max(count + wanted, 0)


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """The value of a node's attribute, or the default."""
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default


def operand(node: onnx.NodeProto, index: int) -> str:
    """The name of an input, empty where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def text(node: onnx.NodeProto, name: str, default: str) -> str:
    """The value of a string attribute."""
    value = attribute(node, name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return int(attribute(node, name, default))  # type: ignore[call-overload]


def numbers(axes: Axes, node: onnx.NodeProto, name: str, place: int) -> list[int] | None:
    """Integers given as an attribute (older operator sets) or as a stored input.

    None where the input is computed; an empty list where neither is given.
    """
    value = attribute(node, name)
    if value is not None:
        return [int(v) for v in value]  # type: ignore[attr-defined]
    if not operand(node, place):
        return []
    found = axes.const(operand(node, place))
    return None if found is None else [int(v) for v in found.reshape(-1)]
