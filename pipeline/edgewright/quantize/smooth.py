"""Smoothing: give a loud channel's range to the weights that read it, as SmoothQuant does.

One scale serves all channels of an activation; a few loud ones (the outliers of transformers)
leave few codes to the others. Channel j of what MatMul and Gemm layers read is divided by
s_j = max|x_j|^a / max|w_j|^(1-a), and row j of their weights multiplied by it (Xiao et al.,
SmoothQuant, 2211.10438, eq. 4). No node is added: 1/s goes into stored tensors before, found
by going backwards through what passes a positive factor on unchanged: the scale and bias of a
normalization, a multiplication with a stored vector, the columns of an earlier MatMul, behind
ReLU, Reshape, Transpose or an attention product. The model's function stays the same but for
float32 rounding. Where anything else sees the tensor (the residual path of a post-norm
transformer, say), there is no such place, and the tensor is left with a reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.model import array, consumers, initializers
from edgewright.quantize.equalize import LARGEST, scale
from edgewright.quantize.layers import Layer, attribute, layer_of

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
PASSING = ("Relu", "LeakyRelu", "Identity")
Found = tuple[dict[str, np.ndarray], list[str]]  # places of a `Fold`, and tensors that change


class NoPlace(Exception):
    """Why a factor cannot be folded exactly; for the report."""


@dataclass(frozen=True)
class Fold:
    """Layers that read one tensor, and the stored tensors that set its channels' size.

    places: stored tensor -> the channel that each of its entries belongs to, as an array that
    broadcasts to its shape. changed: tensors of the graph whose values change.
    """

    tensor: str
    readers: tuple[Layer, ...]
    places: dict[str, np.ndarray]
    changed: tuple[str, ...]


class Tracer:
    """Finds the stored tensors behind one activation; `index` says which channel an entry is."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.stored = initializers(graph)
        self.readers = consumers(graph.node)
        self.makers = {o: n for n in graph.node for o in n.output if o}
        self.outputs = {o.name for o in graph.output}
        self.shapes: dict[str, list[int]] = {}
        for value in [*graph.value_info, *graph.input, *graph.output]:
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                self.shapes[value.name] = [
                    d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim
                ]

    def shape(self, name: str) -> list[int]:
        """Dimensions, 0 where free."""
        if name in self.stored:
            return list(self.stored[name].dims)
        if name not in self.shapes:
            raise NoPlace(f"the shape of '{name}' is not known")
        return self.shapes[name]

    def tensor(self, name: str, index: np.ndarray, *, top: bool = False) -> Found:
        """The places that take a factor of this activation; NoPlace where one cannot."""
        if name in self.stored:
            return self.parameter(name, index), []
        if name in self.outputs:
            raise NoPlace("it is an output of the model")
        if not top and len(self.readers.get(name, [])) != 1:
            others = sorted({n.op_type for n in self.readers.get(name, [])})
            raise NoPlace(f"'{name}' before it is read by {', '.join(others)}, too")
        node = self.makers.get(name)
        if node is None:
            raise NoPlace("it is an input of the model")
        rank = len(self.shape(name))
        if index.ndim > rank:
            raise NoPlace(f"'{name}' has fewer dimensions than its channels need")
        index = index.reshape((1,) * (rank - index.ndim) + index.shape)
        places, changed = self.behind(node, index)
        return places, [name, *changed]

    def parameter(self, name: str, index: np.ndarray) -> dict[str, np.ndarray]:
        """A stored tensor as a place, where it has an entry for every channel and one reader."""
        tensor = self.stored[name]
        dims = tuple(tensor.dims)
        while index.ndim > len(dims) and index.shape[0] == 1:
            index = index[0]
        fits = index.ndim <= len(dims)
        if not fits or np.broadcast_shapes(*padded(index.shape, dims)) != dims:
            raise NoPlace(f"stored '{name}' before it has no value for each channel")
        if len(self.readers[name]) != 1 or name in self.outputs:
            raise NoPlace(f"stored '{name}' before it has other readers")
        if tensor.data_type != onnx.TensorProto.FLOAT:
            raise NoPlace(f"stored '{name}' before it is not float32")
        return {name: index}

    def behind(self, node: onnx.NodeProto, index: np.ndarray) -> Found:
        """The places behind one node; `index` has the rank of its output."""
        op, inputs = node.op_type, [i for i in node.input if i]
        if len(set(inputs)) != len(inputs):
            raise NoPlace(f"{op} '{node.name}' before it reads a tensor twice")
        if op in NORMS:
            return self.all_of(inputs[1:], index)
        if op == "Mul":
            return self.one_of(node, inputs, index)
        if op == "Div":
            return self.operand(inputs[0], index)
        if op in ("Add", "Sub"):
            return self.all_of(inputs, index)
        if op in PASSING:
            return self.tensor(inputs[0], index)
        if op == "Transpose":
            order = attribute(node, "perm", list(range(index.ndim))[::-1])
            return self.tensor(inputs[0], index.transpose(np.argsort(order)))  # type: ignore[arg-type]
        if op in RESHAPES:
            return self.tensor(inputs[0], self.reshaped(node, index))
        if op in ("MatMul", "Gemm"):
            return self.product(node, inputs, index)
        raise NoPlace(f"{op} '{node.name}' before it does not pass a factor on")

    def all_of(self, names: list[str], index: np.ndarray) -> Found:
        """The places of several tensors, all of which must take the factor."""
        places: dict[str, np.ndarray] = {}
        changed: list[str] = []
        for name in names:
            found, more = self.operand(name, index)
            places |= found
            changed += more
        return places, changed

    def one_of(self, node: onnx.NodeProto, names: list[str], index: np.ndarray) -> Found:
        """The places of either factor of a product, stored ones first."""
        reasons = []
        for name in sorted(names, key=lambda n: n not in self.stored):
            try:
                return self.operand(name, index)
            except NoPlace as reason:
                reasons.append(str(reason))
        raise NoPlace(reasons[-1])

    def operand(self, name: str, index: np.ndarray) -> Found:
        """The places of an operand that broadcasts to the shape of the result."""
        if name in self.stored:
            return self.parameter(name, index), []
        dims = self.shape(name)
        cut = index.ndim - len(dims)
        if cut < 0 or any(n != 1 for n in index.shape[:cut]):
            raise NoPlace(f"'{name}' before it has no value for each channel")
        sizes = list(index.shape[cut:])
        if any(size not in (1, dim) for size, dim in zip(sizes, dims, strict=True)):
            raise NoPlace(f"'{name}' before it has no value for each channel")
        return self.tensor(name, index.reshape(sizes))

    def reshaped(self, node: onnx.NodeProto, index: np.ndarray) -> np.ndarray:
        """The index over the input of a node that only gives a tensor another shape.

        The last dimensions, from the first with channels on, must be the same number of
        entries on both sides: rows are then cut alike, whatever the dimensions before.
        """
        after, before = self.shape(node.output[0]), self.shape(node.input[0])
        first = int(np.argmax(np.array(index.shape) > 1)) if index.size > 1 else index.ndim - 1
        tail = after[first:]
        size = int(np.prod(tail))
        k = len(before)
        while k > 0 and int(np.prod(before[k:])) < size and before[k - 1] > 0:
            k -= 1
        if size == 0 or int(np.prod(before[k:])) != size:
            raise NoPlace(f"{node.op_type} '{node.name}' before it mixes channels")
        flat = np.broadcast_to(index.reshape(index.shape[first:]), tail)
        return flat.reshape(before[k:])

    def product(self, node: onnx.NodeProto, inputs: list[str], index: np.ndarray) -> Found:
        """The places behind a MatMul or Gemm: the columns of the stored weight, or the right
        one of two activations."""
        if any(n > 1 for n in index.shape[-2:-1]):
            raise NoPlace(f"{node.op_type} '{node.name}' before it mixes channels")
        right = inputs[1]
        if node.op_type == "Gemm":
            if attribute(node, "transB", 0):
                weight = self.parameter(right, index.reshape(-1, 1)) if right in self.stored else {}
            else:
                weight = self.parameter(right, index) if right in self.stored else {}
            if not weight:
                raise NoPlace(f"Gemm '{node.name}' before it has no stored weight")
            rest, changed = self.all_of(inputs[2:], index)
            return weight | rest, changed
        return self.operand(right, index)


def padded(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Both shapes with the same number of dimensions."""
    return (1,) * (len(dims) - len(shape)) + shape, dims


def find_folds(model: onnx.ModelProto, nodes: Iterable[str]) -> tuple[list[Fold], dict[str, str]]:
    """(folds among the named layers in graph order, tensor -> why it has none).

    model: with the shapes of its tensors.
    """
    tracer, wanted = Tracer(model), set(nodes)
    folds: list[Fold] = []
    refused: dict[str, str] = {}
    for node in model.graph.node:
        name = node.input[0] if node.input else ""
        if node.name not in wanted or node.op_type not in ("MatMul", "Gemm") or not name:
            continue
        if name in refused or any(f.tensor == name for f in folds):
            continue
        try:
            seeing = [n for n in tracer.readers[name] if n.op_type != "Shape"]
            readers = tuple(reading_layer(n, name, tracer) for n in seeing)
            places, changed = tracer.tensor(name, np.arange(readers[0].columns), top=True)
            if any(r.weight in places for r in readers):
                raise NoPlace("its weight is also a factor before it")
            folds.append(Fold(name, readers, places, tuple(changed)))
        except NoPlace as reason:
            refused[name] = str(reason)
    return folds, refused


def reading_layer(node: onnx.NodeProto, name: str, tracer: Tracer) -> Layer:
    """A reader as a layer whose weight can take the factor."""
    layer = layer_of(node, tracer.stored)
    if layer is None or layer.op == "Conv" or list(node.input).count(name) != 1:
        raise NoPlace(f"{node.op_type} '{node.name}' reads it, too, and cannot take the factor")
    if layer.input != name or len(tracer.readers[layer.weight]) != 1:
        raise NoPlace(f"the weight of '{node.name}' has other readers")
    return layer


def smooth(
    model: onnx.ModelProto, folds: list[Fold], peaks: dict[str, np.ndarray], alpha: float
) -> None:
    """Fold the factors in, in place.

    peaks: largest |value| of each channel of each fold's tensor in calibration.
    """
    stored = initializers(model.graph)
    for fold in folds:
        x = peaks[fold.tensor].astype(np.float64)
        rows = [
            np.abs(np.moveaxis(array(stored[r.weight]), r.channel_axis, -1)) for r in fold.readers
        ]
        w = np.max([r.max(axis=1) for r in rows], axis=0).astype(np.float64)
        alive = (x > 0) & (w > 0) & np.isfinite(x) & np.isfinite(w)
        if not alive.any():
            continue
        log = np.zeros(x.size)
        log[alive] = alpha * np.log(x[alive]) - (1 - alpha) * np.log(w[alive])
        log[alive] -= log[alive].mean()  # a factor common to all channels changes nothing
        factor = np.exp(np.clip(log, -np.log(LARGEST), np.log(LARGEST)))
        for reader in fold.readers:
            scale(stored[reader.weight], factor, 1 - reader.channel_axis)
        for name, index in fold.places.items():
            values = array(stored[name])
            divided = (values / factor[index]).astype(np.float32)
            stored[name].CopyFrom(numpy_helper.from_array(divided, name))
