"""A graph without the units that go, and the same graph with them silenced.

`cut` slices every stored tensor, rewrites what holds a size (`rewrite.py`), infers the shapes
again and compares them with what the labels say. `masked` keeps all shapes and zeroes what
reads the units: on any input both give the same outputs, but for units that statistics count
(`Group.exact`).
"""

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from edgewright.errors import BadInput
from edgewright.model import array
from edgewright.passes.inputs import forget_shapes
from edgewright.passes.shapes import infer
from edgewright.prune.labels import Analysis
from edgewright.prune.outputs import closed
from edgewright.prune.rewrite import REWRITES, Sizes

Kept = dict[tuple[str, int], np.ndarray]


def cut(
    model: onnx.ModelProto, analysis: Analysis, remove: Iterable[int]
) -> tuple[onnx.ModelProto, Kept]:
    """A new model without the units, and what is left of every axis that lost some.

    Kept indices are those of the original, sorted, for each (tensor, axis), activations
    included. Names of nodes and tensors stay; products of `outputs.opened` that lost nothing are
    left out. BadInput for labels that are no units and where an axis would become empty.
    """
    gone = checked(analysis, remove)
    kept = kept_indices(analysis, gone)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    for tensor in result.graph.initializer:
        slice_tensor(tensor, kept)
    sizes = Sizes(result, model, kept, {n: tuple(map(len, a)) for n, a in analysis.labels.items()})
    for node in list(result.graph.node):
        if node.op_type in REWRITES and sizes.touched(node):
            REWRITES[node.op_type](sizes, node)
    sizes.finish()
    result = inferred(result)
    compare_shapes(result, analysis, kept)
    result = closed(result)
    onnx.checker.check_model(result)
    return result, kept


def checked(analysis: Analysis, remove: Iterable[int]) -> np.ndarray:
    """Whether each label goes, as a boolean array; BadInput for what is no unit."""
    units = {unit for group in analysis.groups for unit in group.units}
    gone = np.zeros(max(units, default=0) + 1, bool)
    for label in remove:
        if int(label) not in units:
            raise BadInput(
                "cannot remove this unit",
                expected="a label of one of the analysis's groups",
                found=str(label),
            )
        gone[int(label)] = True
    return gone


def kept_indices(analysis: Analysis, gone: np.ndarray) -> Kept:
    kept: Kept = {}
    for name, axes in analysis.labels.items():
        for axis, labels in enumerate(axes):
            lost = gone[labels] if len(labels) else np.zeros(0, bool)
            if not lost.any():
                continue
            if lost.all():
                raise BadInput(
                    f"axis {axis} of '{name}' would become empty",
                    expected="at least one unit left in every group",
                    found=f"all {len(labels)} indices removed",
                )
            kept[name, axis] = np.flatnonzero(~lost)
    return kept


def slice_tensor(tensor: onnx.TensorProto, kept: Kept) -> None:
    """Keep the kept indices of a stored tensor, in place."""
    axes = [k for k in range(len(tensor.dims)) if (tensor.name, k) in kept]
    if not axes:
        return
    values = array(tensor)
    for axis in axes:
        values = np.take(values, kept[tensor.name, axis], axis)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes that can be inferred, none of them taken over."""
    work = ir.from_proto(model)
    forget_shapes(work)
    infer(work)
    return ir.to_proto(work)


def compare_shapes(model: onnx.ModelProto, analysis: Analysis, kept: Kept) -> None:
    """Inferred lengths against those the labels say: a difference is a fault of a rule."""
    for value in [*model.graph.value_info, *model.graph.output]:
        axes = analysis.labels.get(value.name)
        dims = value.type.tensor_type.shape.dim
        if axes is None or len(axes) != len(dims):
            continue
        for axis, (labels, dim) in enumerate(zip(axes, dims, strict=True)):
            want = len(kept.get((value.name, axis), labels))
            if want and dim.dim_value > 0 and dim.dim_value != want:
                raise BadInput(
                    f"the pruned graph does not fit together at axis {axis} of '{value.name}'",
                    expected=f"{want} indices",
                    found=f"{dim.dim_value} by shape inference",
                    hint="this is a fault of the pruner; please report it",
                )


def masked(model: onnx.ModelProto, analysis: Analysis, remove: Iterable[int]) -> onnx.ModelProto:
    """The model with its shapes, where nothing reads the units any more.

    The entries of consumers' weights that meet the units are zero; where an activation meets
    another (no weights), one of both is multiplied with zero there.
    """
    gone = checked(analysis, remove)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {t.name: t for t in result.graph.initializer}
    nodes = {n.name or n.output[0]: n for n in result.graph.node}
    types = {
        v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
        for v in inferred(model).graph.value_info
    }
    for count, mix in enumerate(analysis.mixes):
        if mix.weight is not None:
            lost = gone[analysis.labels[mix.weight][mix.weight_axis]]
            if lost.any():
                values = array(stored[mix.weight]).copy()
                values[(slice(None),) * mix.weight_axis + (lost,)] = 0
                stored[mix.weight].CopyFrom(numpy_helper.from_array(values, mix.weight))
            continue
        lost = gone[analysis.labels[mix.input][mix.axis]]
        if lost.any():
            rank = len(analysis.labels[mix.input])
            mask = (~lost).astype(types[mix.input]).reshape([-1] + [1] * (rank - 1 - mix.axis))
            silence(result, nodes[mix.node], mix.input, mask, count)
    return result


def silence(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    name: str,
    mask: np.ndarray,
    count: int,
) -> None:
    """Multiply what `node` reads as `name` with the mask."""
    model.graph.initializer.append(numpy_helper.from_array(mask, f"{name}_mask_{count}"))
    product = helper.make_node(
        "Mul", [name, f"{name}_mask_{count}"], [f"{name}_masked_{count}"], f"{name}_mul_{count}"
    )
    place = next(k for k, n in enumerate(model.graph.node) if n.output == node.output)
    node.input[list(node.input).index(name)] = f"{name}_masked_{count}"
    model.graph.node.insert(place, product)
