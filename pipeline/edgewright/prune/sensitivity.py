"""What a loss inside costs at the model's outputs: measured, group by group.

`obs` knows what the layers that read a group lose, each relative to its own output. How much of
that reaches the outputs differs by orders of magnitude between an early layer and a branch beside a
strong residual. So from every group some parts, least important first, are taken away by
themselves, the layers that read it make up for it (weights only, the graph stays as it is), and
the error of the outputs over a few samples held out scales the group's scores.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.data import Feed
from edgewright.mixers import GATES
from edgewright.model import array, initializers
from edgewright.prune.groups import Group
from edgewright.prune.obs import Reader, taken_over
from edgewright.runtime.local import open_local
from edgewright.stage import Tell

SAMPLES = 8  # spread over the calibration data
PARTS = (0.15, 0.35, 0.65)  # of a group's units taken away for a measurement


def weigh(
    model: onnx.ModelProto,
    groups: Sequence[Group],
    readers: Sequence[Reader],
    scores: dict[int, float],
    probe: Sequence[Feed],
    tell: Tell,
) -> None:
    """Scale the scores of each group, in place, so that they add up to the measured damage.

    model: with a bias wherever the readers' layers can have one; left as it was. probe: samples
    that the readers' moments do not know; on others too small a damage would show. Models
    without a float output keep their scores.
    """
    truth = outputs(model, probe)
    if not any(np.size(v) for v in truth[0]):
        return
    for k, group in enumerate(groups):
        if any(u not in scores for u in group.units):
            continue
        tell("measuring sensitivity", k, len(groups))
        order = sorted(group.units, key=lambda u: (scores[u], u))
        levels = sorted({max(1, round(part * len(order))) for part in PARTS} - {len(order)})
        damages = [damage(model, readers, order[:n], truth, probe) for n in levels]
        rescale(order, levels, damages, scores)


def rescale(
    order: list[int], levels: list[int], damages: list[float], scores: dict[int, float]
) -> None:
    """Scale the scores between two levels so that they add up to what the damage grows by there;
    never falling in the given order."""
    start, before, factor, floor = 0, 0.0, 1.0, 0.0
    for end, now in zip([*levels, len(order)], [*damages, None], strict=True):
        part = order[start:end]
        total = sum(scores[u] for u in part)
        if now is not None and total > 0:
            factor = max(now - before, 0.0) / total
            before = max(now, before)
        for unit in part:
            floor = max(floor, scores[unit] * factor)
            scores[unit] = floor
        start = end


def damage(
    model: onnx.ModelProto,
    readers: Sequence[Reader],
    gone: list[int],
    truth: list[list[np.ndarray]],
    probe: Sequence[Feed],
) -> float:
    """The error of the outputs without some units, those that read them having made up for it."""
    stored = initializers(model.graph)
    before: dict[str, bytes] = {}
    for reader in readers:
        mask = np.isin(reader.labels, gone)
        if mask.any():
            silence(stored, reader, mask, before)
    found = difference(truth, outputs(model, probe))
    for name, data in before.items():
        stored[name].ParseFromString(data)
    return found


def held_out(feeds: Callable[[], Iterable[Feed]]) -> int:
    """Every how many samples one is kept for the measurement; 0 where there is only one."""
    count = sum(1 for _ in feeds())
    return max(2, count // SAMPLES) if count > 1 else 0


def silence(
    stored: dict[str, onnx.TensorProto], reader: Reader, gone: np.ndarray, before: dict[str, bytes]
) -> None:
    """Let the layers that read an activation do without some of its channels."""
    matrix, offset = taken_over(reader, gone)
    for mixer in reader.mixers:
        weight = array(stored[mixer.weight]).astype(np.float64)
        changed = {mixer.weight: mixer.mapped(weight, matrix)}
        if mixer.bias:
            bias = array(stored[mixer.bias]).astype(np.float64)
            added = mixer.constant(weight, offset)
            if mixer.op in GATES:
                bias[:, : added.shape[1]] += added
            else:
                bias += added.reshape(bias.shape)
            changed[mixer.bias] = bias
        for name, value in changed.items():
            before.setdefault(name, stored[name].SerializeToString())
            new = numpy_helper.from_array(value.astype(np.float32), name)
            stored[name].CopyFrom(new)


def outputs(model: onnx.ModelProto, probe: Sequence[Feed]) -> list[list[np.ndarray]]:
    """The float outputs for each sample; what is not finite counts as zero."""
    session = open_local(model.SerializeToString(), threads=2)
    found = []
    for feed in probe:
        values = [v for v in session.run(feed) if v.dtype.kind == "f"]
        found.append([np.nan_to_num(v.astype(np.float64)) for v in values])
    return found


def difference(truth: list[list[np.ndarray]], now: list[list[np.ndarray]]) -> float:
    """Squared error relative to the variance of each output, the mean over outputs."""
    errors = []
    for k in range(len(truth[0])):
        square = sum(float(((a[k] - b[k]) ** 2).sum()) for a, b in zip(truth, now, strict=True))
        spread = sum(float(((a[k] - a[k].mean()) ** 2).sum()) for a in truth)
        errors.append(square / (spread or 1.0))
    return float(np.mean(errors))
