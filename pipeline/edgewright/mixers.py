"""Mixing layers: nodes whose stored weight sums over all channels of one activation.

Conv with one group, ConvTranspose with one group, Gemm, MatMul with a stored second operand, the
input side of LSTM, GRU and RNN. What comes out of such a node depends on the channels of its
input only through the weight: where channels go away, the weight can make up for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.model import consumers, initializers

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
RECURRENT_BIAS = 3  # index of the input B of a recurrent node
POSITIONS = 256  # channel vectors taken from one sample's activation at most


@dataclass(frozen=True)
class Mixer:
    """One mixing layer.

    input: the activation it reads, channels along `axis` (1, or -1 for the last). in_axis,
    out_axis: of the stored weight. bias: the stored bias, "" where there is none yet but one can
    be added, None where a constant cannot be added to the output (`no_bias` says why). share:
    how much of the sum over all kernel positions reaches one output, on average (below 1 for a
    transposed convolution with strides).
    """

    node: str
    op: str
    input: str
    axis: int
    weight: str
    in_axis: int
    out_axis: int
    bias: str | None
    no_bias: str = ""
    share: float = 1.0

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The stored weight as (in channels, everything else)."""
        return np.moveaxis(weight, self.in_axis, 0).reshape(weight.shape[self.in_axis], -1)

    def mapped(self, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The weight for inputs z where x = matrix z: (old channels, new channels)."""
        moved = np.tensordot(weight, matrix, axes=(self.in_axis, 0))
        return np.ascontiguousarray(np.moveaxis(moved, -1, self.in_axis))

    def constant(self, weight: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """What a constant input (in channels) adds to each output, padding left out of account.

        Shape (out channels), of recurrent nodes (directions, gates * hidden).
        """
        added = np.tensordot(weight, offset, axes=(self.in_axis, 0))
        if self.op in GATES:
            return added
        left = self.out_axis - (self.in_axis < self.out_axis)
        flat = np.moveaxis(added, left, 0).reshape(added.shape[left], -1)
        return np.asarray(flat.sum(axis=1) * self.share)


def channels(value: np.ndarray, axis: int, sample: int) -> np.ndarray:
    """Channel vectors of one activation: (channels, positions), at most POSITIONS.

    Positions stand at an even stride, with an offset that moves with the sample's index.
    """
    flat = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
    stride = max(1, -(-flat.shape[1] // POSITIONS))
    return np.ascontiguousarray(flat[:, sample % stride :: stride], dtype=np.float32)


def find_mixers(model: onnx.ModelProto) -> tuple[list[Mixer], list[dict[str, str]]]:
    """The mixing layers of the main graph in graph order, and those left out, with the reason."""
    stored = initializers(model.graph)
    readers = consumers(model.graph.node)
    given = {v.name for v in model.graph.input} & set(stored)
    found, without = [], []
    for node in model.graph.node:
        try:
            mixer = mixer_of(node, stored, readers)
            if mixer and mixer.weight in given:
                raise Unfit("its weight can be overridden by a graph input")
        except Unfit as why:
            without.append({"node": node.name, "op": node.op_type, "reason": str(why)})
            continue
        if mixer is not None:
            found.append(mixer)
    return found, without


class Unfit(Exception):
    """Why a node with a stored weight is no mixing layer that we can change."""


Stored = dict[str, onnx.TensorProto]
Readers = dict[str, list[onnx.NodeProto]]


def mixer_of(node: onnx.NodeProto, stored: Stored, readers: Readers) -> Mixer | None:
    """The mixing layer a node is, None where it has no stored weight; raises Unfit."""
    kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul", *GATES)
    if node.op_type not in kinds or len(node.input) < 2 or node.domain not in ("", "ai.onnx"):
        return None
    tensor = stored.get(node.input[1])
    if tensor is None:
        if node.op_type == "MatMul" and node.input[0] in stored:
            raise Unfit("its weight is the first operand")
        return None
    if tensor.data_type != onnx.TensorProto.FLOAT:
        raise Unfit("its weight is not float32")
    if len(readers[tensor.name]) > 1:
        raise Unfit("its weight is shared with other nodes")
    facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    dims = list(tensor.dims)
    common = {"node": node.name, "op": node.op_type, "input": node.input[0]}
    common["weight"] = tensor.name
    if node.op_type in ("Conv", "ConvTranspose"):
        if facts.get("group", 1) != 1:
            raise Unfit("it does not mix channels across its groups")
        share, out = 1.0, 0
        if node.op_type == "ConvTranspose":
            share, out = 1 / float(np.prod(facts.get("strides", [1]))), 1
        bias, why = own_bias(node, stored, readers, dims[out])
        return Mixer(**common, axis=1, in_axis=1 - out, out_axis=out, bias=bias, no_bias=why,
                     share=share)  # fmt: skip
    if node.op_type in GATES:
        if facts.get("layout", 0):
            raise Unfit("its layout is batch first")
        bias, why = own_bias(node, stored, readers, 0)
        return Mixer(**common, axis=-1, in_axis=2, out_axis=1, bias=bias, no_bias=why)
    if len(dims) != 2:
        raise Unfit(f"its weight has {len(dims)} dimensions")
    if node.op_type == "Gemm":
        if facts.get("transA") or facts.get("alpha", 1.0) != 1.0 or facts.get("beta", 1.0) != 1.0:
            raise Unfit("Gemm with transA, alpha or beta")
        out = 0 if facts.get("transB") else 1
        bias, why = own_bias(node, stored, readers, dims[out])
    else:
        out = 1
        bias, why = added_bias(node, stored, readers, dims[out])
    return Mixer(**common, axis=-1, in_axis=1 - out, out_axis=out, bias=bias, no_bias=why)


def own_bias(
    node: onnx.NodeProto, stored: Stored, readers: Readers, width: int
) -> tuple[str | None, str]:
    """The bias input of a node (width 0: recurrent), or None and why it cannot be moved."""
    place = RECURRENT_BIAS if node.op_type in GATES else 2
    name = node.input[place] if len(node.input) > place else ""
    if not name:
        return "", ""
    tensor = stored.get(name)
    if tensor is None:
        return None, "its bias is computed"
    if len(readers[name]) > 1:
        return None, "its bias is shared with other nodes"
    if width and int(np.prod(tensor.dims)) != width:
        return None, "its bias is not one value per channel"
    return name, ""


def added_bias(
    node: onnx.NodeProto, stored: Stored, readers: Readers, width: int
) -> tuple[str | None, str]:
    """The constant that the Add behind a MatMul adds, or None and why there is none."""
    after = readers.get(node.output[0], [])
    if len(after) == 1 and after[0].op_type == "Add":
        name = next((n for n in after[0].input if n != node.output[0]), "")
        tensor = stored.get(name)
        if tensor is not None and len(readers[name]) == 1:
            dims = list(tensor.dims)
            if dims and dims[-1] == width == int(np.prod(dims)):
                return name, ""
    return None, "no constant of its own is added behind it"


def by_input(mixers: Iterable[Mixer]) -> dict[str, list[Mixer]]:
    """The mixing layers by the activation that they read, in graph order."""
    table: dict[str, list[Mixer]] = {}
    for mixer in mixers:
        table.setdefault(mixer.input, []).append(mixer)
    return table


def give_biases(model: onnx.ModelProto, mixers: Iterable[Mixer]) -> None:
    """Zeros for the layers that can have a bias and have none."""
    nodes = {n.name: n for n in model.graph.node}
    stored = initializers(model.graph)
    taken = {o for n in model.graph.node for o in n.output} | set(stored)
    for mixer in mixers:
        if mixer.bias != "":
            continue
        dims = stored[mixer.weight].dims
        place, shape = 2, [dims[mixer.out_axis]]
        if mixer.op in GATES:
            place, shape = RECURRENT_BIAS, [dims[0], 2 * dims[1]]
        name = f"{mixer.weight}_bias"
        while name in taken:
            name += "_"
        taken.add(name)
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        inputs = nodes[mixer.node].input
        inputs.extend([""] * (place + 1 - len(inputs)))
        inputs[place] = name
