"""Give each layer its own small vectors, so that equal values do not tie layers together.

Files store equal tensors once: the ones of two fresh normalisations, a bias of zeros. To the
analysis one stored tensor is one set of indices, and all its readers would lose the same units.
Vectors (one axis longer than 1) and tensors of one value all over, such as first states, are
copied for each reading operand; other tensors that are shared stay tied, as they were meant.
`share` joins equal tensors again. First states that are computed, but zero, are left out: that
is what an operator without them starts from.
"""

import onnx

from edgewright.model import all_graphs, array, initializers, reads

MOVES = ("Expand", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
MAX_FILLED = 1 << 16  # values of a tensor that is copied because all are equal


def untie(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose float vectors have one reader each; nodes and outputs keep their names."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    stored = initializers(graph)
    taken = {*stored, *(o for n in graph.node for o in n.output), *(v.name for v in graph.input)}
    # What a nested graph reads, or what is an output, keeps the name it is known by.
    held = {v.name for v in graph.output}
    held |= {name for g in list(all_graphs(graph))[1:] for n in g.node for name in n.input}
    seen: set[str] = set()
    forget_zero_states(graph)
    for node in graph.node:
        for k, name in enumerate(node.input):
            tensor = stored.get(name)
            if tensor is None or not is_plain(tensor):
                continue
            if name not in seen and name not in held:
                seen.add(name)
                continue
            count = 2
            while f"{name}_{count}" in taken:
                count += 1
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = f"{name}_{count}"
            taken.add(copy.name)
            node.input[k] = copy.name
    return result


def forget_zero_states(graph: onnx.GraphProto) -> None:
    """Drop first states of recurrent nodes that only repeat stored zeros, and what made them."""
    stored = initializers(graph)
    maker = {o: n for n in graph.node for o in n.output if o}

    def zero(name: str) -> bool:
        node = maker.get(name)
        if node is not None and node.op_type in MOVES:
            return zero(node.input[0])
        if node is not None and node.op_type == "ConstantOfShape":
            return not any(array(a.t).any() for a in node.attribute)
        return name in stored and not array(stored[name]).any()

    for node in graph.node:
        if node.op_type in ("LSTM", "GRU", "RNN"):
            for k in (5, 6):
                if k < len(node.input) and node.input[k] and zero(node.input[k]):
                    node.input[k] = ""
    outputs = {v.name for v in graph.output}
    while True:
        read = {name for node in graph.node for name in reads(node)} | outputs
        dead = [n for n in graph.node if not any(o in read for o in n.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)


def is_plain(tensor: onnx.TensorProto) -> bool:
    """Whether layers that share the tensor may have meant no more than equal values."""
    kinds = onnx.TensorProto
    if tensor.data_type not in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE):
        return False
    long = sum(d > 1 for d in tensor.dims)
    if long <= 1:
        return long == 1
    values = array(tensor)
    return values.size <= MAX_FILLED and bool((values == values.flat[0]).all())
