"""Layers with stored weights: their weights as (groups, channels, n), their input moments.

Conv, Gemm and MatMul with constant weights are all y = W x over columns x of n inputs. This
file knows how an ONNX node lays its weight out and how its columns are cut from an activation.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.model import initializers
from edgewright.runtime.local import open_local
from edgewright.taps import expose, fetch_groups

MAX_COLUMNS = 2304  # inputs of one output above which the n x n moments cost too much
SHRINK = 2.0
POSITIONS = 256  # columns taken from one sample's activation at most


@dataclass(frozen=True)
class Layer:
    """One layer: node name and operator, the tensors it reads, and its weight's layout.

    channel_axis: axis of the output channels in the stored weight. groups, columns: the weight
    as (groups, channels per group, columns). Kernel facts are for Conv only.
    """

    node: str
    op: str
    input: str
    weight: str
    output: str
    channel_axis: int
    groups: int
    columns: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The stored weight as (groups, channels, columns)."""
        w = weight if self.channel_axis == 0 else np.moveaxis(weight, self.channel_axis, 0)
        return w.reshape(self.groups, -1, self.columns)

    def stored(self, matrix: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`, in the layout of the stored weight `like`."""
        if self.channel_axis == 0:
            return matrix.reshape(like.shape)
        moved = np.moveaxis(like, self.channel_axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(moved), 0, self.channel_axis))


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    """The value of a node's attribute, or the default."""
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default


def layer_of(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> Layer | None:
    """The layer a node is, None where it has no stored 2-D (or convolution) weight."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    tensor = stored.get(node.input[1])
    if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    dims = list(tensor.dims)
    common = {
        "node": node.name,
        "op": node.op_type,
        "input": node.input[0],
        "weight": node.input[1],
        "output": node.output[0],
    }
    if node.op_type == "Conv":
        if len(dims) < 3 or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return None
        rank = len(dims) - 2
        groups = int(attribute(node, "group", 1))  # type: ignore[call-overload]
        return Layer(
            **common,
            channel_axis=0,
            groups=groups,
            columns=int(np.prod(dims[1:])),
            kernel=tuple(dims[2:]),
            strides=tuple(attribute(node, "strides", [1] * rank)),  # type: ignore[arg-type]
            dilations=tuple(attribute(node, "dilations", [1] * rank)),  # type: ignore[arg-type]
            pads=tuple(attribute(node, "pads", [0] * 2 * rank)),  # type: ignore[arg-type]
        )
    if len(dims) != 2:
        return None
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            return None
        axis = 0 if attribute(node, "transB", 0) else 1
    else:
        axis = 1
    return Layer(**common, channel_axis=axis, groups=1, columns=dims[1 - axis])


def find_layers(model: onnx.ModelProto, nodes: Iterable[str]) -> list[Layer]:
    """The layers among the named nodes of the main graph, in graph order."""
    wanted, stored = set(nodes), initializers(model.graph)
    found = (layer_of(n, stored) for n in model.graph.node if n.name in wanted)
    return [layer for layer in found if layer is not None]


def columns_of(layer: Layer, x: np.ndarray, sample: int) -> np.ndarray:
    """Input columns of one activation: (groups, columns, positions), at most POSITIONS each.

    x: (N, C, *space) for Conv, (..., C) otherwise. Positions are taken at an even stride, with
    an offset that moves with the sample's index.
    """
    if layer.op != "Conv":
        flat = x.reshape(-1, layer.columns)
        return thin(flat.T, sample)[None]
    rank = len(layer.kernel)
    if all(k == 1 for k in layer.kernel) and not any(layer.pads):
        cut = x[(slice(None), slice(None), *(slice(None, None, s) for s in layer.strides))]
        return thin(np.moveaxis(cut, 1, 0).reshape(layer.groups, layer.columns, -1), sample)
    pads = [(layer.pads[i], layer.pads[i + rank]) for i in range(rank)]
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = tuple(d * (k - 1) + 1 for k, d in zip(layer.kernel, layer.dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, reach, axis=tuple(range(2, 2 + rank))
    )
    steps = [slice(None, None, s) for s in (*layer.strides, *layer.dilations)]
    windows = windows[(slice(None), slice(None), *steps)]  # (N, C, *positions, *kernel)
    shape = windows.shape
    positions = int(np.prod(shape[2 : 2 + rank]))
    stride = max(1, -(-positions * shape[0] // POSITIONS))
    chosen = np.arange(sample % stride, positions * shape[0], stride)
    batch, *place = np.unravel_index(chosen, (shape[0], *shape[2 : 2 + rank]))
    # Advanced indices around the slice for C put the chosen positions first.
    where: tuple[Any, ...] = (batch, slice(None), *place)
    taken = windows[where]  # (P, C, *kernel)
    taken = taken.reshape(len(chosen), layer.groups, layer.columns)
    return np.ascontiguousarray(np.moveaxis(taken, 0, 2))


def thin(columns: np.ndarray, sample: int) -> np.ndarray:
    """At most POSITIONS of the last axis."""
    stride = max(1, -(-columns.shape[-1] // POSITIONS))
    return columns[..., sample % stride :: stride]


def input_moments(
    model: onnx.ModelProto,
    layers: list[Layer],
    feeds: Callable[[], Iterable[Feed]],
    tell: Callable[[str, int, int], None],
) -> dict[str, np.ndarray]:
    """Centred second moments of the inputs of each layer: node name -> (groups, n, n) float64.

    Centred, because bias correction takes the mean away. Layers with more than MAX_COLUMNS
    columns are left out. Memory: the sums, plus FETCH_BYTES of activations. Summed in float32
    around the first sample's mean: around zero, a mean far from it would swallow the variance.
    """
    fitting = [la for la in layers if la.columns <= MAX_COLUMNS]
    if not fitting:
        return {}
    inputs = {v.name for v in model.graph.input}
    names = list(dict.fromkeys(la.input for la in fitting))
    session = open_local(expose(model, names).SerializeToString(), threads=2)
    origins: dict[str, np.ndarray] = {}
    squares: dict[str, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    groups: list[list[str]] = []
    for k, feed in enumerate(feeds()):
        tell("input moments", k, 0)
        if not groups:
            groups = fetch_groups(session, feed, [n for n in names if n not in inputs])
            if any(n in inputs for n in names):
                groups.append([n for n in names if n in inputs])
        for group in groups:
            missing = [n for n in group if n not in inputs]
            values = dict(zip(missing, session.run(feed, missing) if missing else [], strict=True))
            values |= {n: feed[n] for n in group if n in inputs}
            for la in fitting:
                if la.input not in values:
                    continue
                x = columns_of(la, values[la.input], k).astype(np.float32)
                x = x - origins.setdefault(la.node, x.mean(axis=2, keepdims=True))
                squares[la.node] = squares.get(la.node, 0.0) + x @ np.swapaxes(x, 1, 2)
                sums[la.node] = sums.get(la.node, 0.0) + x.sum(axis=2, dtype=np.float64)
                counts[la.node] = counts.get(la.node, 0) + x.shape[2]
    return {
        node: shrunk(square / counts[node], sums[node] / counts[node], counts[node])
        for node, square in squares.items()
    }


def shrunk(square: np.ndarray, mean: np.ndarray, count: int) -> np.ndarray:
    """Centred moments, the off-diagonal part scaled down where there are few columns.

    square: (groups, n, n), mean: (groups, n). With `count` columns an estimated correlation is
    off by about 1/sqrt(count); for n near count the matrix is singular and rounding would fit
    the calibration data, not the model. The part kept is count / (count + SHRINK * n).
    """
    centred = square - mean[:, :, None] * mean[:, None, :]
    n = centred.shape[1]
    keep = count / (count + SHRINK * n)
    diagonal = np.einsum("gii->gi", centred)
    result: np.ndarray = centred * keep
    result[:, np.arange(n), np.arange(n)] = diagonal
    return result
