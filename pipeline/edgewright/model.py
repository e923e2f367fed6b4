"""ONNX files: load, save, hash, and small questions to a graph."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright.data import InputSpec
from edgewright.errors import BadInput
from edgewright.files import write_atomic

MAX_BYTES = (1 << 31) - 1  # the largest protobuf message


def load(path: Path) -> onnx.ModelProto:
    """Read a model that `admit` has already let in."""
    return onnx.load(str(path))


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model with fixed field order: the same model, the same bytes. Atomic."""
    if model.ByteSize() > MAX_BYTES:
        raise BadInput(
            "the model is too large for one ONNX file",
            expected="at most 2 GiB",
            found=f"{model.ByteSize() / 2**30:.1f} GiB",
        )
    write_atomic(path, model.SerializeToString(deterministic=True))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def opset(model: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def real_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Graph inputs that are not initializers (old files list both)."""
    stored = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in stored]


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Names, dtypes and shapes of the inputs; BadInput for inputs that are no tensors."""
    specs = []
    for value in real_inputs(model):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type == onnx.TensorProto.STRING:
            raise BadInput(
                f"model input '{value.name}'",
                expected="a numeric tensor",
                found=value.type.WhichOneof("value") or "no type",
            )
        if not kind.HasField("shape"):
            raise BadInput(f"model input '{value.name}' has no shape", hint="export it with one")
        shape = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in kind.shape.dim
        )
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        specs.append(InputSpec(value.name, dtype, shape))
    return specs


def value_facts(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and shape of a graph input or output; free dimensions by name, or None."""
    kind = value.type.tensor_type
    shape: list[int | str | None] | None = None
    if kind.HasField("shape"):
        shape = [
            (d.dim_value if d.dim_value > 0 else None)
            if d.HasField("dim_value")
            else (d.dim_param or None)
            for d in kind.shape.dim
        ]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return {"name": value.name, "dtype": dtype, "shape": shape}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node's attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs nested in it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, nested ones included."""
    for part in all_graphs(graph):
        yield from part.node


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, in place; names that are unique stay."""
    taken = {n.name for n in all_nodes(model.graph)}
    seen: set[str] = set()
    for k, node in enumerate(all_nodes(model.graph)):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{k}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def count_nodes(model: onnx.ModelProto) -> int:
    return sum(1 for _ in all_nodes(model.graph))


def op_histogram(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes per operator, sorted by name."""
    counts: dict[str, int] = {}
    for node in all_nodes(model.graph):
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def initializers(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in graph.initializer}


def array(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a stored tensor."""
    return numpy_helper.to_array(tensor)


def parameter_count(model: onnx.ModelProto) -> int:
    """Number of stored values, constants included."""
    total = 0
    for graph in all_graphs(model.graph):
        total += sum(int(np.prod(t.dims, dtype=np.int64)) for t in graph.initializer)
    return total


def consumers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """Nodes that read each tensor, those in nested graphs counted for the node around them."""
    table: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        names = set(node.input)
        for inner in subgraphs(node):
            for deep in all_graphs(inner):
                for inside in deep.node:
                    names.update(inside.input)
                names.update(o.name for o in deep.output)
        for name in sorted(names):
            if name:
                table.setdefault(name, []).append(node)
    return table


def summary(path: Path) -> dict[str, object]:
    """What a report says of a model file."""
    model = load(path)
    return {
        "sha256": sha256(path.read_bytes()),
        "bytes": path.stat().st_size,
        "nodes": count_nodes(model),
        "parameters": parameter_count(model),
        "opset": opset(model),
        "operators": op_histogram(model),
    }


def reads(node: onnx.NodeProto) -> list[str]:
    """All tensors a node reads, those read inside its subgraphs included."""
    names = [n for n in node.input if n]
    for inner in subgraphs(node):
        for deep in inner.node:
            names += reads(deep)
        names += [o.name for o in inner.output]
    return names


def topological(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes so that each stands behind what it reads; otherwise in the given order."""
    maker = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    waiting = [{maker[r] for r in reads(n) if r in maker} - {i} for i, n in enumerate(nodes)]
    followers: dict[int, list[int]] = {}
    for i, needs in enumerate(waiting):
        for j in needs:
            followers.setdefault(j, []).append(i)
    ready = [i for i, needs in enumerate(waiting) if not needs]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in followers.get(i, []):
            waiting[j].discard(i)
            if not waiting[j]:
                heapq.heappush(ready, j)
    if len(order) != len(nodes):
        raise BadInput("the graph of the model has a cycle")
    return [nodes[i] for i in order]
