"""Reading a model's inner tensors: as added outputs, or by running it piece by piece."""

from collections.abc import MutableMapping, Sequence

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.model import reads
from edgewright.runtime.local import Local, open_local

FETCH_BYTES = 128 << 20  # tensors fetched from one run


def fetch_groups(session: Local, feed: Feed, names: list[str]) -> list[list[str]]:
    """Names in groups whose values together stay below FETCH_BYTES, judged on one sample."""
    sizes: dict[str, int] = {}
    for start in range(0, len(names), 16):
        part = names[start : start + 16]
        sizes |= {n: v.nbytes for n, v in zip(part, session.run(feed, part), strict=True)}
    groups: list[list[str]] = [[]]
    room = FETCH_BYTES
    for name in names:
        if sizes[name] > room and groups[-1]:
            groups.append([])
            room = FETCH_BYTES
        groups[-1].append(name)
        room -= sizes[name]
    return [g for g in groups if g]


def expose(model: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """A copy of the model whose outputs are the tensors (graph inputs left out)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inputs = {v.name for v in model.graph.input}
    del copy.graph.output[:]
    for name in tensors:
        if name not in inputs:
            copy.graph.output.add().name = name
    return copy


def last_uses(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    """Index of the last node that reads each tensor, readers inside subgraphs included."""
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in reads(node):
            last[name] = i
    return last


def run_piece(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    end: int,
    last_use: dict[str, int],
    live: Sequence[MutableMapping[str, np.ndarray]],
) -> None:
    """Run some nodes of the model on every sample; tensors no longer needed leave `live`."""
    made = {o for n in nodes for o in n.output if o}
    wanted = [o for n in nodes for o in n.output if o and last_use.get(o, -1) > end]
    wanted += [o for o in nodes[-1].output if o and o not in wanted]
    needed = {name for n in nodes for name in reads(n)}
    inputs = sorted((needed - made) & set(live[0]))
    graph = onnx.helper.make_graph(
        nodes,
        "piece",
        [
            onnx.helper.make_tensor_value_info(
                name,
                onnx.helper.np_dtype_to_tensor_dtype(live[0][name].dtype),
                [None] * live[0][name].ndim,
            )
            for name in inputs
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in wanted],
        [t for t in model.graph.initializer if t.name in needed],
    )
    piece = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    session = open_local(piece.SerializeToString(), threads=2, optimize=False)
    for alive in live:
        values = session.run({name: alive[name] for name in inputs}, wanted)
        alive.update(zip(wanted, values, strict=True))
        for name in [n for n in alive if last_use.get(n, -1) <= end and n not in wanted]:
            del alive[name]
