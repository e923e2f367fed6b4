"""Give the model's inputs the shapes the recipe states.

A number fixes a free dimension; a name keeps it free and becomes its name. A dimension that the
model already fixes stays: another number there is an error, a name is reported. Where inputs
and outputs share the name of a dimension, they go on sharing it (or its number).
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgewright.errors import BadInput
from edgewright.passes.edit import DEFAULT_DOMAINS, all_nodes, dims
from edgewright.settings import suggestion

Dim = int | str | None


def set_input_shapes(
    model: ir.Model, shapes: Mapping[str, Sequence[int | str]]
) -> tuple[int, list[str]]:
    """Set the shapes; returns the number of changed dimensions and what to tell the user.

    Raises BadInput for an unknown input, a wrong rank, or a number that contradicts the model.
    """
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs if v.name and v.name not in graph.initializers}
    renamed: dict[str, set[Dim]] = {}
    notes: list[str] = []
    changed = 0
    for name, wanted in shapes.items():
        if name not in inputs:
            raise BadInput(
                f"[model.inputs.{name}]: the model has no input of that name",
                expected="one of: " + ", ".join(inputs),
                hint=suggestion(name, list(inputs)),
            )
        value = inputs[name]
        have: list[Dim] = dims(value) or [None] * len(wanted)
        if len(have) != len(wanted):
            raise BadInput(
                f"[model.inputs.{name}]: shape",
                expected=f"{len(have)} dimensions, as in the model",
                found=f"{len(wanted)}: {list(wanted)}",
            )
        new: list[Dim] = []
        for k, (old, want) in enumerate(zip(have, wanted, strict=True)):
            if isinstance(old, int) and isinstance(want, int) and old != want:
                raise BadInput(
                    f"[model.inputs.{name}]: dimension {k}",
                    expected=f"{old}, which the model fixes",
                    found=str(want),
                    hint="export the model with that dimension free, or with the size you want",
                )
            if isinstance(old, int) and isinstance(want, str):
                notes.append(
                    f"input '{name}': dimension {k} is fixed to {old} in the model and cannot be "
                    f"left free as '{want}'"
                )
            if isinstance(old, str):
                renamed.setdefault(old, set()).add(want)
            new.append(old if isinstance(old, int) else want)
            changed += new[-1] != old
        value.shape = ir.Shape(new)
    one = {old: next(iter(new)) for old, new in renamed.items() if len(new) == 1}
    for value in [*inputs.values(), *graph.outputs]:
        shape = dims(value)
        if shape is not None and value.name not in shapes:
            value.shape = ir.Shape([one.get(d, d) if isinstance(d, str) else d for d in shape])
    return changed, notes


def forget_shapes(model: ir.Model) -> None:
    """Drop the stored shapes of values inside the graph: they may tell of other input shapes.

    Those of operators of other domains stay; nothing here could infer them again.
    """
    for node in all_nodes(model):
        if node.domain in DEFAULT_DOMAINS:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
