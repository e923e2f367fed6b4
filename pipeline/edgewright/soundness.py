"""Whether the graph of an admitted file is sound: interface, operators, wiring, finite weights.

Every check raises BadInput naming the tensor, node or operator, or returns notes for the report.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from edgewright import model as models
from edgewright.errors import BadInput
from edgewright.external import attribute_tensors, data_type, node_label, shown
from edgewright.runtime.local import operators
from edgewright.settings import suggestion

TensorProto = onnx.TensorProto
NUMERIC = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.BOOL,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.UINT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
    }
)
# Operators whose stored operands are weights: an infinite one makes every result meaningless.
# Elsewhere Inf is a mask, a limit or the start of a maximum, and stays.
WEIGHTED = frozenset(
    {
        "BatchNormalization",
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "DeformConv",
        "Einsum",
        "GRU",
        "Gather",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "MatMul",
        "MatMulInteger",
        "PRelu",
        "QLinearConv",
        "QLinearMatMul",
        "RMSNormalization",
        "RNN",
    }
)
# Operators that hand a tensor on: weights are looked for behind them.
CARRIERS = frozenset(
    {
        "Cast",
        "Concat",
        "DequantizeLinear",
        "Expand",
        "Flatten",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)

Note = dict[str, str]


def note(text: str, level: str = "info") -> Note:
    """An entry of a report's notes."""
    return {"level": level, "text": text}


def check_interface(model: onnx.ModelProto) -> None:
    """Inputs and outputs are numeric tensors, at least one of each, each name once."""
    inputs = models.real_inputs(model)
    for kind, values in (("input", inputs), ("output", list(model.graph.output))):
        if not values:
            raise BadInput(f"the model has no {kind}s", hint=f"export it with its {kind}s")
        seen: set[str] = set()
        for value in values:
            if value.name in seen:
                raise BadInput(f"{kind} {shown(value.name)} is listed twice")
            seen.add(value.name)
            tensor = value.type.HasField("tensor_type")
            if not tensor or value.type.tensor_type.elem_type not in NUMERIC:
                raise BadInput(
                    f"{kind} {shown(value.name)}",
                    expected="a tensor of numbers",
                    found=type_words(value.type),
                    hint="leave tokenizers and text processing outside the model",
                )
    models.input_specs(model)


def type_words(kind: onnx.TypeProto) -> str:
    """A type in words, for messages."""
    if kind.HasField("tensor_type"):
        try:
            return f"a tensor of {onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type)}"
        except ValueError:
            return "a tensor of an unknown type"
    return (kind.WhichOneof("value") or "no type").removesuffix("_type")


def check_operators(model: onnx.ModelProto) -> list[Note]:
    """Every operator is one that onnx or the runtime itself defines."""
    versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    extra: dict[str, int] = {}
    quantized = 0
    for node in models.all_nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        full = f"{domain or 'ai.onnx'}:{node.op_type}"
        if domain not in versions:
            raise BadInput(
                f"node {node_label(node)} uses {shown(full)}",
                expected=f"an opset import of {shown(domain or 'ai.onnx')}",
                found="none",
                hint="export the model again",
            )
        quantized += node.op_type == "QuantizeLinear"
        if domain == "" and not in_schema(node.op_type, versions[domain]):
            raise BadInput(
                f"unknown operator {shown(node.op_type)} of node {node_label(node)}",
                expected=f"an operator of ai.onnx opset {versions[domain]}",
                hint=other_opset(node.op_type),
            )
        if domain and node.op_type not in operators().get(domain, ()):
            raise BadInput(
                f"custom operator {shown(full)} of node {node_label(node)}",
                expected="operators of ai.onnx or built into onnxruntime",
                hint="replace it by standard operators before exporting; "
                "libraries of custom operators are not loaded",
            )
        if domain:
            extra[domain] = extra.get(domain, 0) + 1
    notes = [
        note(f"{count} nodes use operators of {domain}, which other runtimes may lack")
        for domain, count in sorted(extra.items())
    ]
    if quantized:
        notes.append(note(f"the model is quantized already: {quantized} QuantizeLinear nodes"))
    return notes


def in_schema(op: str, version: int) -> bool:
    """Whether the default operator set holds `op` in that version."""
    try:
        return not onnx.defs.get_schema(op, version, "").deprecated
    except onnx.defs.SchemaError:
        return False


def other_opset(op: str) -> str:
    """Where an operator that an opset lacks can be found."""
    known = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    if op not in known:
        return suggestion(op, sorted(known)) if len(op) < 60 else "check the exporter"
    if onnx.defs.get_schema(op, "").deprecated:
        return f"{op} was removed from newer opsets; export the model again"
    return f"{op} exists from opset {onnx.defs.get_schema(op, '').since_version} at the latest"


def check_wiring(graph: onnx.GraphProto, outer: tuple[set[str], ...] = ()) -> list[Note]:
    """Every name is written once and before it is read, here and in nested graphs.

    `outer`: the names of each graph around this one. Nodes in a wrong order are sorted; cycles,
    dangling reads and double outputs are refused.
    """
    given = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    writers: dict[str, int] = {}
    for k, node in enumerate(graph.node):
        outputs = [name for name in node.output if name]
        if not outputs:
            raise BadInput(f"node {node_label(node)} ({shown(node.op_type)}) has no outputs")
        for name in outputs:
            if name in writers or name in given or any(name in scope for scope in outer):
                raise BadInput(
                    f"tensor {shown(name)} is written twice, the second time by node "
                    f"{node_label(node)}",
                    expected="each name written once",
                    hint="the file was edited wrongly; export it again",
                )
            writers[name] = k
    reads = [node_reads(node) for node in graph.node]
    scopes = (*outer, given | writers.keys())
    for node, wanted in zip(graph.node, reads, strict=True):
        for name in sorted(wanted):
            if not any(name in scope for scope in scopes):
                raise BadInput(
                    f"node {node_label(node)} ({shown(node.op_type)}) reads {shown(name)}, "
                    "which nothing writes",
                    hint="the file was edited wrongly; export it again",
                )
    for value in graph.output:
        if not any(value.name in scope for scope in scopes):
            raise BadInput(f"output {shown(value.name)} is written by no node")
    needs = [{writers[name] for name in wanted if name in writers} for wanted in reads]
    order = topological(graph, needs)
    notes = []
    if order != list(range(len(order))):
        rank = {next(o for o in graph.node[k].output if o): r for r, k in enumerate(order)}
        graph.node.sort(key=lambda node: rank[next(o for o in node.output if o)])
        notes.append(note("nodes were not in order of computation and have been sorted"))
    for node in graph.node:
        for inner in models.subgraphs(node):
            notes += check_wiring(inner, scopes)
    return notes


def node_reads(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those its nested graphs take from around it included."""
    wanted = {name for name in node.input if name}
    for graph in models.subgraphs(node):
        inner = {v.name for v in graph.output}
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        for part in graph.node:
            inner |= node_reads(part)
            own.update(part.output)
        wanted |= inner - own
    return wanted


def topological(graph: onnx.GraphProto, needs: list[set[int]]) -> list[int]:
    """Node numbers so that each comes after those it needs, else in the given order."""
    if all(all(j < k for j in wanted) for k, wanted in enumerate(needs)):
        return list(range(len(needs)))
    waiting = [len(wanted) for wanted in needs]
    readers: list[list[int]] = [[] for _ in needs]
    for k, wanted in enumerate(needs):
        for j in wanted:
            readers[j].append(k)
    order = [k for k, count in enumerate(waiting) if count == 0]
    for k in order:  # grows while it is walked
        for reader in readers[k]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                order.append(reader)
    if len(order) < len(needs):
        left = set(range(len(needs))) - set(order)
        path: list[int] = []
        met: dict[int, int] = {}
        here = min(left)
        while here not in met:  # back along what is needed, until a node comes up again
            met[here] = len(path)
            path.append(here)
            here = min(needs[here] & left)
        circle = [here, *path[met[here] :][::-1]]
        labels = " -> ".join(node_label(graph.node[k]) for k in circle[:6])
        raise BadInput(
            f"the graph has a cycle: {labels}{' -> ...' if len(circle) > 6 else ''}",
            expected="a graph without cycles",
            hint="the file was edited wrongly; export it again",
        )
    return order


def check_finite(model: onnx.ModelProto, allow: bool) -> list[Note]:
    """No NaN in any stored number, no Inf in a weight; other Inf (masks, limits) are noted."""
    notes = []
    for where, owner, values in stored_floats(model):
        nan = int(np.isnan(values).sum())
        inf = int(np.isinf(values).sum())
        if not nan and not inf:
            continue
        weighed = None if nan else weighted_reader(model, owner)
        found = f"{nan or inf} {'NaN' if nan else 'Inf'} of {values.size} values"
        if (nan or weighed) and not allow:
            use = f", an operand of {weighed}" if weighed else ""
            raise BadInput(
                f"{where}{use}",
                expected="finite numbers",
                found=found,
                hint="the training diverged or the file is damaged; export a sound model",
            )
        level = "warning" if nan or weighed else "info"
        notes.append(note(f"{where} holds {found}", level))
    return notes


def stored_floats(model: onnx.ModelProto) -> Iterator[tuple[str, str, np.ndarray]]:
    """Every stored float array: words for messages, name of the tensor it defines, values."""
    for graph in models.all_graphs(model.graph):
        for tensor in graph.initializer:
            if is_float(tensor):
                yield f"initializer {shown(tensor.name)}", tensor.name, floats(tensor)
        for node in graph.node:
            owner = node.output[0] if node.op_type == "Constant" and node.output else ""
            for attribute in node.attribute:
                where = f"attribute {shown(attribute.name)} of node {node_label(node)}"
                if owner:
                    where = f"constant {shown(owner)}"
                for tensor in attribute_tensors(attribute):
                    if is_float(tensor):
                        yield where, owner, floats(tensor)
                numbers = [*([attribute.f] if attribute.HasField("f") else []), *attribute.floats]
                if numbers:
                    yield where, owner, np.asarray(numbers, np.float32)


def is_float(tensor: onnx.TensorProto) -> bool:
    return data_type(tensor).startswith(("FLOAT", "DOUBLE", "BFLOAT", "COMPLEX"))


def floats(tensor: onnx.TensorProto) -> np.ndarray:
    """The values in a type that numpy itself can test."""
    values = numpy_helper.to_array(tensor)
    return values if values.dtype.kind in "fc" else values.astype(np.float32)


def weighted_reader(model: onnx.ModelProto, name: str) -> str:
    """The operator that uses the tensor `name` as a weight, "" where none does."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in models.all_nodes(model.graph):
        for read in node.input:
            readers.setdefault(read, []).append(node)
    seen, queue = {name}, [name] if name else []
    while queue:
        for node in readers.get(queue.pop(), ()):
            if node.op_type in WEIGHTED:
                return f"{node.op_type} {node_label(node)}"
            if node.op_type in CARRIERS:
                queue += [o for o in node.output if o and o not in seen]
                seen.update(node.output)
    return ""


def check_with_onnx(model: onnx.ModelProto) -> list[Note]:
    """onnx's own checker with full type and shape inference."""
    try:
        onnx.checker.check_model(model, full_check=True)
        return []
    except Exception as error:  # ValidationError, InferenceError; bare ones for odd protobufs
        first = error
    if model.graph.value_info:
        # Wrong notes on intermediate shapes harm no runtime; they are inferred anew later.
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        for graph in models.all_graphs(bare.graph):
            graph.ClearField("value_info")
        try:
            onnx.checker.check_model(bare, full_check=True)
        except Exception as error:
            first = error
        else:
            model.CopyFrom(bare)
            return [
                note(
                    "stored intermediate shapes contradicted the graph and were dropped "
                    f"({one_line(first)})",
                    "warning",
                )
            ]
    raise BadInput(
        "onnx's checker refuses the graph",
        found=one_line(first),
        hint="export it again; a file edited by hand often breaks this way",
    )


def one_line(error: Exception) -> str:
    """A library's message without line breaks, source positions or trailing context."""
    text = " ".join(str(error).split("==> Context:")[0].split()) or type(error).__name__
    return text[:300]
