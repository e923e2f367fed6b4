"""Layers that keep channels apart: BatchNormalization and depthwise convolutions.

They cannot make up for channels that are gone, but what they read has changed, and with it the mean
and spread of what they give on (which is why BatchNormalization is re-estimated after pruning:
EagleEye, 2007.02491). Scale and shift of each channel are fitted to the original's output.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.model import array, consumers, initializers

LIMIT = 10.0  # factor on a channel above which (or below 1 / LIMIT) it is left alone


@dataclass(frozen=True)
class Channelwise:
    """One such layer: the stored tensors that scale and shift its output, channels first."""

    node: str
    op: str
    output: str
    scale: str
    shift: str


def find_channelwise(model: onnx.ModelProto) -> list[Channelwise]:
    """BatchNormalizations and depthwise convolutions with a scale and shift of their own."""
    stored, readers = initializers(model.graph), consumers(model.graph.node)
    found = []
    for node in model.graph.node:
        if len(node.input) < 3 or node.domain not in ("", "ai.onnx"):
            continue
        scale, shift = node.input[1], node.input[2]
        own = all(n in stored and len(readers[n]) == 1 for n in (scale, shift))
        if not own or stored[scale].data_type != onnx.TensorProto.FLOAT:
            continue
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        depthwise = node.op_type == "Conv" and groups == stored[scale].dims[0] > 1
        if node.op_type == "BatchNormalization" or depthwise:
            found.append(Channelwise(node.name, node.op_type, node.output[0], scale, shift))
    return found


@dataclass
class Spread:
    """Sums of one half of the samples per channel: z now, x in the original."""

    n: float = 0.0
    z: np.ndarray | float = 0.0
    x: np.ndarray | float = 0.0
    zz: np.ndarray | float = 0.0
    xz: np.ndarray | float = 0.0
    xx: np.ndarray | float = 0.0

    def add(self, x: np.ndarray, z: np.ndarray) -> None:
        """One sample: (channels, places) each."""
        x, z = x.astype(np.float64), z.astype(np.float64)
        self.n += x.shape[1]
        self.z, self.x = self.z + z.sum(axis=1), self.x + x.sum(axis=1)
        self.zz, self.xx = self.zz + (z * z).sum(axis=1), self.xx + (x * x).sum(axis=1)
        self.xz = self.xz + (x * z).sum(axis=1)

    def __add__(self, other: "Spread") -> "Spread":
        names = ("n", "z", "x", "zz", "xz", "xx")
        return Spread(*(getattr(self, k) + getattr(other, k) for k in names))

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift of least squares, x ~ scale z + shift, per channel."""
        mean_z, mean_x = np.asarray(self.z) / self.n, np.asarray(self.x) / self.n
        var = np.asarray(self.zz) / self.n - mean_z**2
        both = np.asarray(self.xz) / self.n - mean_x * mean_z
        small = var <= 1e-12 * (mean_z**2 + 1e-30)
        scale = np.where(small, 1.0, both / np.where(small, 1.0, var))
        scale = np.where((scale > 1 / LIMIT) & (scale < LIMIT), scale, 1.0)
        return scale, mean_x - scale * mean_z

    def error(self, scale: np.ndarray | float, shift: np.ndarray | float) -> float:
        """Squared error of x ~ scale z + shift, summed over channels relative to x's variance."""
        mean_x = np.asarray(self.x) / self.n
        var = np.maximum(np.asarray(self.xx) / self.n - mean_x**2, 1e-30)
        square = (
            np.asarray(self.xx) - 2 * scale * self.xz - 2 * shift * self.x
            + scale**2 * np.asarray(self.zz) + 2 * scale * shift * self.z
        ) / self.n + shift**2  # fmt: skip
        return float(np.mean(np.minimum(np.maximum(square, 0) / var, 100.0)))


def refit(halves: tuple[Spread, Spread]) -> tuple[np.ndarray, np.ndarray, float, float] | None:
    """Scale, shift, and the relative error on the half not fitted on, before and after; None where
    nothing is gained."""
    if not (halves[0].n and halves[1].n):
        return None
    before = sum(h.error(1.0, 0.0) for h in halves) / 2
    after = (halves[1].error(*halves[0].affine()) + halves[0].error(*halves[1].affine())) / 2
    if after >= before:
        return None
    scale, shift = (halves[0] + halves[1]).affine()
    return scale, shift, before, after


def apply(model: onnx.ModelProto, layer: Channelwise, scale: np.ndarray, shift: np.ndarray) -> None:
    """Put scale and shift into the layer's stored tensors."""
    stored = initializers(model.graph)
    old, base = array(stored[layer.scale]), array(stored[layer.shift])
    wide = scale.reshape([-1] + [1] * (old.ndim - 1))
    new = (old * wide).astype(np.float32)
    stored[layer.scale].CopyFrom(numpy_helper.from_array(new, layer.scale))
    new = (base * scale + shift).astype(np.float32)
    stored[layer.shift].CopyFrom(numpy_helper.from_array(new, layer.shift))
