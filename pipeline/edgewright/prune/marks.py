"""What went, written into the cut model: so a file alone tells `recover` what it was cut from."""

import json

import numpy as np
import onnx

from edgewright.errors import BadInput
from edgewright.prune.labels import Analysis

KEY = "edgewright.pruned"


def mark(
    model: onnx.ModelProto, analysis: Analysis, removed: frozenset[int] | set[int]
) -> onnx.ModelProto:
    """The cut model with a note of what went: stored tensor -> axis -> indices of the original.

    One slice of each unit says which it is.
    """
    gone: dict[str, dict[str, list[int]]] = {}
    for group in analysis.groups:
        tensor, axis = group.slices[0]
        labels = analysis.labels[tensor][axis]
        indices = np.flatnonzero(np.isin(labels, sorted(removed & set(group.units)))).tolist()
        if indices:
            gone.setdefault(tensor, {})[str(axis)] = sorted(
                {*indices, *gone.get(tensor, {}).get(str(axis), [])}
            )
    marked = unmarked(model)
    text = json.dumps(gone, sort_keys=True, separators=(",", ":"))
    marked.metadata_props.add(key=KEY, value=text)
    return marked


def unmarked(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the note."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [p for p in copy.metadata_props if p.key != KEY]
    del copy.metadata_props[:]
    copy.metadata_props.extend(kept)
    return copy


def removed_units(model: onnx.ModelProto, original: Analysis) -> frozenset[int]:
    """The units that a cut model lacks, as labels of the original's analysis; none without a note.

    Raises BadInput where the note does not fit the original.
    """
    text = next((p.value for p in model.metadata_props if p.key == KEY), "")
    if not text:
        return frozenset()
    units = {unit for group in original.groups for unit in group.units}
    found = set()
    try:
        for tensor, axes in json.loads(text).items():
            for axis, indices in axes.items():
                found |= {int(original.labels[tensor][int(axis)][i]) for i in indices}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        found = {0}
    if not found <= units:
        raise BadInput(
            "the pruned model was not cut from this original",
            expected="the model that `prune` was given",
            found="a note of units that the original does not have",
        )
    return frozenset(found)
