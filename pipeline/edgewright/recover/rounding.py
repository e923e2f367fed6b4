"""Quantization-aware training: what int8 will round is rounded while the float weights learn.

Weights symmetrically per output channel to -127..127, by their largest value of the moment;
what layers read per tensor to 0..255, by the range that it has on the samples before training.
Gradients pass where nothing is clipped (the straight-through estimator; Jacob et al., 1712.05877).
The weights stay float: the stage `quantize` does the rest as without.
"""

from collections.abc import Callable, Iterable, Mapping

import onnx
import torch

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.recover.batches import tensors
from edgewright.recover.executor import GraphModule
from edgewright.recover.ops import Tensor

Rounding = Mapping[str, Callable[[Tensor], Tensor]]
LEVELS, HALF = 255, 127


def weight_rounding(axis: int) -> Callable[[Tensor], Tensor]:
    """Rounds a weight per index of `axis`."""

    def rounded(weight: Tensor) -> Tensor:
        along = axis % weight.dim()
        rest = [a for a in range(weight.dim()) if a != along]
        scale = weight.detach().abs().amax(rest).clamp_min(1e-12) / HALF
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, along, -HALF, HALF)

    return rounded


def value_rounding(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Rounds an activation of that range, which is widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS, 1e-12)
    zero = max(0, min(LEVELS, round(-low / scale)))
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, LEVELS)


def out_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weight that counts its outputs."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, -1)


def rounding_of(model: onnx.ModelProto, module: GraphModule, feeds: Iterable[Feed]) -> Rounding:
    """Tensor -> its rounding: trained weights of Conv, ConvTranspose, Gemm and MatMul, and what
    these read. Raises BadInput where there is none."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    read: list[str] = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        weight = module.weights.get(node.input[1])
        if weight is not None and weight.dim() > 1:
            found.setdefault(node.input[1], weight_rounding(out_axis(node)))
            read.append(node.input[0])
    if not read:
        raise BadInput(
            "recover.distill.quantized: no layer that int8 rounds",
            expected="Conv, ConvTranspose, Gemm or MatMul with stored weights",
        )
    names = [n for n in dict.fromkeys(read) if n not in found]
    ranges: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for feed in feeds:
            for name, value in zip(names, module(tensors(feed), names), strict=True):
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found | {name: value_rounding(*ends) for name, ends in ranges.items()}
