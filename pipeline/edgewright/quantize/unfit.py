"""Calibration that gives no usable range: a sample far out of line, a tensor without values."""

import numpy as np
import onnx

from edgewright.calibration.statistics import Statistics
from edgewright.errors import BadInput
from edgewright.quantize.placement import Placement

GAP = 1e6  # times: 120 dB between samples, beyond what any sensor gives
FEWEST = 3  # samples: of two, nobody can tell which one is out of line


def refuse_outliers(statistics: dict[str, Statistics]) -> None:
    """Raise BadInput where few samples lie GAP times above all others in some tensor.

    One scale for both would leave a single code, zero, to the others; no way to choose a range
    mends that. Tensors are looked at in their order, so the first one named is the cause.
    """
    for name, s in statistics.items():
        kept = s.recent >= 0
        peaks = np.abs(s.extrema[kept]).max(axis=1, initial=0.0)
        order = np.argsort(peaks, kind="stable")
        order = order[peaks[order] > 0]
        if len(order) < FEWEST:
            continue
        ranked = peaks[order]
        jumps = np.nonzero(ranked[1:] > GAP * ranked[:-1])[0]
        if not jumps.size or jumps[-1] + 1 <= len(ranked) / 2:
            continue
        first = jumps[-1] + 1
        sample = int(s.recent[kept][order[first:]].min())
        raise BadInput(
            f"calibration sample {sample} is out of line in tensor '{name}' of the model",
            expected=f"values of the size of the others', at most {ranked[first - 1]:.3g}",
            found=f"{ranked[first]:.3g}",
            hint="remove that sample: one int8 scale cannot hold both",
        )


def without_empty(
    model: onnx.ModelProto, plan: Placement, statistics: dict[str, Statistics]
) -> Placement:
    """The placement without nodes around tensors that never had a value."""
    empty = {name for name, s in statistics.items() if s.samples == 0}
    for node in model.graph.node:
        found = sorted(empty & {*node.input, *node.output})
        if found and node.name in plan.nodes:
            reason = f"its tensor '{found[0]}' is empty in every calibration sample"
            plan = plan.without([node.name], reason)
    return plan.tidied(model) if empty else plan
