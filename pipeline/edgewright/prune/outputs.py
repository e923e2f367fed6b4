"""Let the channels behind an output go: a product of the output's own gives its width back.

Outputs keep their shapes, so a stream of channels that ends in one (the residual stream of a
sentence encoder or a backbone) would stay whole in every layer. `opened` puts a product with the
identity in between. It changes nothing; but the channels before it are now units like others,
and once its matrix has lost rows it still gives all columns: zeros where units went, until least
squares over the other channels (`recover.compensate`) puts there what those can tell. `closed`
takes out again what lost nothing.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewright.model import all_graphs, array, initializers
from edgewright.prune.axes import Dim
from edgewright.prune.labels import Analysis, analyse, known_shapes

# Behind the output's name: the matrix, what it multiplies, the product, what is added to that.
MATRIX, NARROW, PRODUCT, SHIFT = ".widening", ".narrow", ".product", ".shift"
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FEWEST = 8  # channels that are worth a product of their own

Shapes = Mapping[str, Sequence[Dim]]


def opened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function; an output whose channels other layers read as well is made by a product.

    Its channels are the last axis, or axis 1 where there are three axes or more. The model itself
    where no output is such a one. Nodes have names of their own (`model.name_nodes`).
    """
    shapes = known_shapes(model)
    for axis in (-1, 1):
        wide = {}
        for value in model.graph.output:
            shape = shapes.get(value.name, [])
            width = shape[axis] if len(shape) > max(1, 2 * axis) else None
            if isinstance(width, int) and width >= FEWEST and may_open(model, value):
                wide[value.name] = width
        if wide:
            found = shared(analyse(with_products(model, wide, axis, shapes)), list(wide))
            model = with_products(model, {n: wide[n] for n in found}, axis, shapes)
    return model


def may_open(model: onnx.ModelProto, value: onnx.ValueInfoProto) -> bool:
    """Whether an output is float32, no product made it alone for itself, and it can be renamed."""
    graph, name = model.graph, value.name
    nested = {x for g in list(all_graphs(graph))[1:] for n in g.node for x in n.input}
    taken = {name + NARROW, name + PRODUCT, name + MATRIX, name + SHIFT}
    taken &= {*initializers(graph), *(o for n in graph.node for o in n.output)}
    maker = next((n for n in graph.node if name in n.output), None)
    if maker is None or name in nested or taken:
        return False
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return False
    return maker.op_type not in PRODUCTS or any(name in n.input for n in graph.node)


def shared(analysis: Analysis, names: list[str]) -> list[str]:
    """The outputs whose channels are units now, and ones that another layer's weights meet."""
    met: set[int] = set()
    for mix in analysis.mixes:
        if mix.weight is not None and not mix.weight.endswith(MATRIX):
            met.update(analysis.labels[mix.weight][mix.weight_axis].tolist())
    met.discard(0)
    own = {n: [u for axis in analysis.labels[n + NARROW] for u in axis.tolist()] for n in names}
    return [n for n in names if met & set(own[n])]


def with_products(
    model: onnx.ModelProto, widths: Mapping[str, int], axis: int, shapes: Shapes
) -> onnx.ModelProto:
    """A copy in which these outputs are their narrow selves times the identity."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for name, width in widths.items():
        rename(graph, name, name + NARROW)
        matrix = np.eye(width, dtype=np.float32)
        shift = numpy_helper.from_array(np.zeros(width, np.float32), name + SHIFT)
        if axis == 1:
            matrix = matrix.reshape(width, width, *[1] * (len(shapes[name]) - 2))
            nodes = [("Conv", [name + NARROW, name + MATRIX, name + SHIFT], name)]
        else:
            nodes = [("MatMul", [name + NARROW, name + MATRIX], name + PRODUCT),
                     ("Add", [name + PRODUCT, name + SHIFT], name)]  # fmt: skip
        graph.initializer.extend([numpy_helper.from_array(matrix, name + MATRIX), shift])
        for op, reads, made in nodes:
            graph.node.append(helper.make_node(op, reads, [made], f"{made}.{op}"))
    return result


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """A tensor of the main graph, in place."""
    for node in graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == old:
                    names[k] = new


def whole(model: onnx.ModelProto) -> list[str]:
    """The outputs with a product whose matrix is the identity still."""
    found = []
    for value in model.graph.output:
        tensor = initializers(model.graph).get(value.name + MATRIX)
        if tensor is not None and tensor.dims[0] == tensor.dims[1]:
            values = array(tensor).reshape(tensor.dims[0], tensor.dims[1])
            if np.array_equal(values, np.eye(tensor.dims[0])):
                found.append(value.name)
    return found


def closed(model: onnx.ModelProto, but: Collection[str] = ()) -> onnx.ModelProto:
    """A copy without the products that lost nothing, but for those whose matrices are named."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for name in whole(model):
        if name + MATRIX in but:
            continue
        extra = {name + MATRIX, name + SHIFT}
        for node in [n for n in graph.node if extra & set(n.input)]:
            graph.node.remove(node)
        for tensor in [t for t in graph.initializer if t.name in extra]:
            graph.initializer.remove(tensor)
        for value in [v for v in graph.value_info if v.name in (name + NARROW, name + PRODUCT)]:
            graph.value_info.remove(value)
        rename(graph, name + NARROW, name)
    return result
