"""From a placement to an int8 model: ranges, weight scales, corrections, writing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.calibration.statistics import Statistics
from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.model import consumers, initializers
from edgewright.quantize import (
    clip,
    correct,
    embeddings,
    fidelity,
    headroom,
    layers,
    ranges,
    rounding,
    saturation,
)
from edgewright.quantize.placement import Placement
from edgewright.quantize.scales import ActivationRange, WeightScales
from edgewright.quantize.write import write_qdq
from edgewright.recipe import QuantizeSettings
from edgewright.target import Int8Scheme

FLOAT_OUTPUTS = ("MatMul", "Gemm")
FIT_SAMPLES = 32
LIVE_BYTES = 192 << 20  # activations held for bias correction, all samples together
ALIVE = 3  # tensors of the largest size that are alive at one place of a graph, by experience
WORSE_DB = 0.1  # a correction must gain more than this on held-out inputs to be kept
TINY = 1e-30  # a peak below is a channel of zeros: its scale would vanish in float32
Tell = Callable[[str, int, int], None]


@dataclass
class Ingredients:
    """All that writing an int8 model needs, beside the choice of nodes.

    model: the float model whose weights and biases may be adjusted. fit, held: calibration
    feeds to compute corrections from, and others to judge them on. judged: the tensors compared
    there; reference: their values in the float model. gains: share of the time that int8 saves
    in each layer, where that was measured.
    """

    model: onnx.ModelProto
    scheme: Int8Scheme
    settings: QuantizeSettings
    statistics: dict[str, Statistics]
    ranges: dict[str, ActivationRange]
    fit: list[Feed]
    held: list[Feed]
    judged: list[str]
    reference: list[list[np.ndarray]]
    weights: dict[str, WeightScales] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)

    def samples(self) -> int:
        """Number of calibration samples seen."""
        return max(s.samples for s in self.statistics.values())


def activation_ranges(
    statistics: dict[str, Statistics],
    responses: dict[str, np.ndarray],
    scheme: Int8Scheme,
    settings: QuantizeSettings,
) -> dict[str, ActivationRange]:
    """The int8 range of every tensor with statistics."""
    found = {}
    # With 65536 codes nothing is gained by cutting, and the histogram has fewer bins than that.
    method = "minmax" if scheme.steps > 255 else settings.ranges
    for name, s in statistics.items():
        if s.samples == 0:
            continue
        low, high = ranges.choose(
            s,
            method,
            settings.percentile,
            scheme.symmetric_activations,
            responses.get(name),
        )
        found[name] = (float(low), float(high) if high > low else float(low) + 1e-6)
    return found


def weight_scales(
    model: onnx.ModelProto, found: list[layers.Layer], scheme: Int8Scheme
) -> dict[str, WeightScales]:
    """Symmetric scales of the layers' weights from their peaks, per channel where asked.

    A weight that layers read along different axes gets one scale for all.
    """
    stored = initializers(model.graph)
    axes: dict[str, set[int]] = {}
    for layer in found:
        axes.setdefault(layer.weight, set()).add(layer.channel_axis)
    scales = {}
    for layer in found:
        weight = numpy_helper.to_array(stored[layer.weight])
        if scheme.per_channel and len(axes[layer.weight]) == 1:
            peak = np.abs(layer.matrix(weight)).max(axis=2).reshape(-1)
            axis: int | None = layer.channel_axis
        else:
            peak, axis = np.abs(weight).max().reshape(1), None
        values = np.where(peak > TINY, peak, rounding.QMAX) / rounding.QMAX
        scales[layer.weight] = WeightScales(axis, values.astype(np.float32))
    return scales


def scales_of(
    model: onnx.ModelProto, placement: Placement, scheme: Int8Scheme
) -> dict[str, WeightScales]:
    """The scales of all weights of a placement, with head-room where the target needs it."""
    scales = weight_scales(model, layers.find_layers(model, placement.nodes), scheme)
    if headroom.needed(scheme):
        scales = headroom.with_room(model, placement.nodes, scales, scheme)
    return scales


def write(ingredients: Ingredients, placement: Placement) -> onnx.ModelProto:
    """The int8 model for a placement."""
    wanted = set(placement.nodes)
    used = {i for n in ingredients.model.graph.node if n.name in wanted for i in n.input}
    quantized = write_qdq(
        ingredients.model,
        ingredients.scheme,
        list(placement.nodes),
        ingredients.ranges,
        {k: v for k, v in ingredients.weights.items() if k in used},
        FLOAT_OUTPUTS,
    )
    if headroom.needed(ingredients.scheme):
        headroom.repair(quantized)
    embeddings.shrink(quantized, placement.tables)
    return quantized


def judge(ingredients: Ingredients, quantized: onnx.ModelProto) -> float:
    """SQNR in dB of an int8 model against the original on held-out inputs."""
    values = fidelity.values_of(quantized, ingredients.judged, ingredients.held)
    return fidelity.sqnr_db(ingredients.reference, values)


def adjust(
    ingredients: Ingredients, placement: Placement, tell: Tell
) -> tuple[onnx.ModelProto, list[str], list[dict[str, object]]]:
    """The int8 model with each correction that helps on held-out inputs.

    Each is tried together with those kept before it, in the order in which they build on each
    other (biases take what the weights leave). Returns the model, the names of the corrections
    kept, and what was tried: {"correction", "with", "sqnr_db_before", "sqnr_db_after", "kept"}.
    The ingredients stay as they are.
    """
    best = write(ingredients, placement)
    score = judge(ingredients, best)
    kept: list[str] = []
    tried: list[dict[str, object]] = []
    asked = ingredients.settings.corrections
    for name in TRIED if asked is True else TRIED[:1] if asked else ():
        names = [n for n in CORRECTIONS if n in (name, *kept)]
        row: dict[str, object] = {"correction": name, "kept": False}
        if len(names) > 1:
            row["with"] = [n for n in names if n != name]
        try:
            changed = corrected(ingredients, placement, names, tell)
            candidate = write(changed, placement)
            after = judge(ingredients, candidate)
        except (BadInput, np.linalg.LinAlgError) as error:
            tried.append(row | {"reason": str(error)[:300]})
            continue
        row |= {"sqnr_db_before": round(score, 2), "sqnr_db_after": round(after, 2)}
        if after > score + WORSE_DB:
            best, score, kept = candidate, after, names
            row["kept"] = True
        tried.append(row)
    return best, kept, tried


def corrected(
    ingredients: Ingredients, placement: Placement, names: list[str], tell: Tell
) -> Ingredients:
    """A copy of the ingredients with the named corrections applied for this placement."""
    changed = copy_of(ingredients)
    for name in names:
        CORRECTIONS[name](changed, placement, tell)
    return changed


def closeness(ingredients: Ingredients, placement: Placement, tell: Tell) -> float:
    """SQNR in dB with corrected biases, or without where they cannot be corrected."""
    try:
        changed = corrected(ingredients, placement, ["bias correction"], tell)
    except BadInput:  # `adjust` tries it, too, and reports why it failed
        changed = ingredients
    return judge(changed, write(changed, placement))


def copy_of(ingredients: Ingredients) -> Ingredients:
    """The same with a model of its own."""
    model = onnx.ModelProto()
    model.CopyFrom(ingredients.model)
    return Ingredients(**{**vars(ingredients), "model": model})


def correct_biases(ingredients: Ingredients, placement: Placement, tell: Tell) -> None:
    """Sequential bias correction on the ingredients' model, in place."""
    found, _ = correct.find_biases(ingredients.model, placement.nodes)
    quantized = write(ingredients, placement)
    largest = max(s.size for s in ingredients.statistics.values()) * 4
    room = max(4, LIVE_BYTES // (ALIVE * largest))
    few = ingredients.fit[:room]
    correct.correct_biases(ingredients.model, quantized, found, lambda: iter(few), tell)


def clip_weights(ingredients: Ingredients, placement: Placement, tell: Tell) -> None:
    """Cut weights where a smaller scale lowers the layers' output error; in place.

    Only the float weights change: scales follow their peaks.
    """
    tell("clipping weights", 0, 0)
    chosen = own_weights(ingredients, placement)
    if not chosen:
        return
    inputs = clip.input_statistics(ingredients.model, chosen, ingredients.fit)
    stored = initializers(ingredients.model.graph)
    for layer in chosen:
        weight = numpy_helper.to_array(stored[layer.weight])
        matrix = layer.matrix(weight)
        joint = ingredients.weights[layer.weight].axis is None
        peaks = clip.clipped_peaks(matrix, *inputs[layer.node], joint=joint)[..., None]
        moved = layer.stored(np.clip(matrix, -peaks, peaks), weight).astype(np.float32)
        stored[layer.weight].CopyFrom(numpy_helper.from_array(moved, layer.weight))
    ingredients.weights = scales_of(ingredients.model, placement, ingredients.scheme)


def own_weights(ingredients: Ingredients, placement: Placement) -> list[layers.Layer]:
    """The layers whose weight no other node reads: a shared one cannot suit the inputs of both."""
    readers = consumers(ingredients.model.graph.node)
    return [
        la
        for la in layers.find_layers(ingredients.model, placement.nodes)
        if la.weight in ingredients.weights and len(readers[la.weight]) == 1
    ]


def round_weights(ingredients: Ingredients, placement: Placement, tell: Tell) -> None:
    """Round each layer's weights by its output error; in place.

    Only layers whose bias can take the mean shift: the moments are centred. The rounded
    weights lie on the int8 grid, so the writer's rounding to nearest keeps them.
    """
    found, _ = correct.find_biases(ingredients.model, placement.nodes)
    with_bias = {b.node for b in found}
    chosen = [la for la in own_weights(ingredients, placement) if la.node in with_bias]
    moments = layers.input_moments(ingredients.model, chosen, lambda: iter(ingredients.fit), tell)
    stored = initializers(ingredients.model.graph)
    nodes = {n.name: n for n in ingredients.model.graph.node}
    for k, layer in enumerate(chosen):
        tell("rounding weights", k, len(chosen))
        if layer.node not in moments:
            continue
        weight = numpy_helper.to_array(stored[layer.weight])
        matrix = layer.matrix(weight)
        values = ingredients.weights[layer.weight].values.astype(np.float64)
        shape = matrix.shape[:2] if values.size > 1 else (1, 1)
        scale = np.broadcast_to(values.reshape(shape), matrix.shape[:2])
        pairs = saturation.pairs(0)
        if headroom.needed(ingredients.scheme):
            pairs = headroom.meeting(nodes[layer.node], weight.shape)
        codes = rounding.round_by_output(matrix, scale, moments[layer.node], pairs=pairs)
        rounded = layer.stored(codes * scale[..., None], weight).astype(np.float32)
        stored[layer.weight].CopyFrom(numpy_helper.from_array(rounded, layer.weight))


# In the order in which they are applied.
CORRECTIONS: dict[str, Callable[[Ingredients, Placement, Tell], None]] = {
    "weight clipping": clip_weights,
    "rounding by output error": round_weights,
    "bias correction": correct_biases,
}
TRIED = ("bias correction", "weight clipping", "rounding by output error")
