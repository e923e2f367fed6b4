"""How close a model is to the original on calibration inputs, as one number that moves smoothly.

A probability says little about the noise in a model: near 0 and 1 it hides it, in between it
explodes, and one frame that flips outweighs everything else. So outputs that come out of a
Softmax or Sigmoid are judged by what goes into it, and the ratio is averaged over samples in
dB, where one bad sample weighs as much as any other.
"""

from collections.abc import Iterable

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.model import reads
from edgewright.quantize.twin import unsigned_twin
from edgewright.runtime.local import open_local
from edgewright.taps import expose

SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Tanh")
PASSING = ("Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
CAP_DB = 100.0


def judged_tensors(model: onnx.ModelProto) -> list[str]:
    """The tensors to compare: each float output, or what its last squashing function reads."""
    makers = {o: n for n in model.graph.node for o in n.output if o}
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
    found: list[str] = []
    for output in model.graph.output:
        if kinds[output.name] != onnx.TensorProto.FLOAT:
            continue
        name, node = output.name, makers.get(output.name)
        while node is not None and node.op_type in PASSING:
            node = makers.get(node.input[0])
        if node is not None and node.op_type in SQUASHING and node.input[0] in makers:
            name = node.input[0]
        found.append(name)
    return list(dict.fromkeys(found))


def values_of(
    model: onnx.ModelProto, tensors: list[str], feeds: Iterable[Feed]
) -> list[list[np.ndarray]]:
    """The named tensors of the model for each feed, as their readers see them."""
    model = unsigned_twin(model)
    inputs = {v.name for v in model.graph.input}
    seen = {name: behind_pair(model, name) for name in tensors if name not in inputs}
    places = list(seen.values())
    session = open_local(expose(model, places).SerializeToString(), threads=2)
    rows = []
    for feed in feeds:
        made = dict(zip(seen, session.run(feed, places) if places else [], strict=True))
        rows.append([made[n] if n in made else feed[n] for n in tensors])
    return rows


def behind_pair(model: onnx.ModelProto, name: str) -> str:
    """The tensor's dequantized form, where all that reads it is the head of a Q/DQ pair.

    Before the pair it can be another value: an activation that the pair replaced is missing.
    """
    readers = [n for n in model.graph.node if name in reads(n)]
    outputs = {o.name for o in model.graph.output}
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or name in outputs:
        return name
    codes = readers[0].output[0]
    tails = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
    return next((n.output[0] for n in tails if n.input[0] == codes), name)


def sqnr_db(reference: list[list[np.ndarray]], values: list[list[np.ndarray]]) -> float:
    """Mean over samples and tensors of 10 log10(sum ref^2 / sum diff^2), each within +-100 dB.

    Values that are not finite count as -100 dB.
    """
    ratios = []
    for sample, other in zip(reference, values, strict=True):
        for r, v in zip(sample, other, strict=True):
            signal = float(np.square(r, dtype=float).sum())
            noise = float(np.square(np.subtract(r, v, dtype=float)).sum())
            if not np.isfinite(noise):
                ratios.append(-CAP_DB)
            elif noise == 0 or signal == 0:
                ratios.append(CAP_DB if noise == 0 else -CAP_DB)
            else:
                ratio = 10 * float(np.log10(signal / noise))
                ratios.append(min(CAP_DB, max(-CAP_DB, ratio)))
    return float(np.mean(ratios)) if ratios else CAP_DB
