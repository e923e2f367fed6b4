"""`edgewright inspect`: what is in a model, and what will hurt on a target, before any calibration.

Runs as a stage of its own in a limited child: the model is admitted first.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from edgewright import model as graph
from edgewright.admit import admit
from edgewright.passes.branches import decide_branches
from edgewright.passes.constants import fold_constants
from edgewright.passes.shapes import infer, resolve_shapes
from edgewright.stage import Job, Report
from edgewright.target import Target

BIG_SHARE = 0.05  # of the work or bytes: below it is not worth a line
RECURRENT = ("LSTM", "GRU", "RNN")
CONTROL = ("If", "Loop", "Scan")
WORK = ("Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits", "LSTM", "GRU", "RNN")
NO_INT8 = ("ConvTranspose", *RECURRENT)  # operators with work that have no static int8 kernel
ROUNDS = 4  # what is computed in one may settle more in the next
OLD_OPSET = 13  # per-channel quantization needs it

Lint = dict[str, str]  # level: warning or info, text


def run(job: Job) -> Report:
    """Admit the model and describe it for the job's target."""
    notes = admit(job.input_model(), job.output_model())["notes"]
    model = graph.load(job.output_model())
    facts = describe(model)
    facts["bytes"] = job.input_model().stat().st_size
    return {**facts, "target": job.target.name, "lint": [*notes, *lint(model, facts, job.target)]}


def describe(model: onnx.ModelProto) -> Report:
    """Inputs, outputs, operators, sizes and work of a model."""
    macs, unknown = work(model)
    stored: dict[str, int] = {}
    for part in graph.all_graphs(model.graph):
        for tensor in part.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            stored[kind] = stored.get(kind, 0) + tensor.ByteSize()
    return {
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": graph.opset(model),
        "ir_version": model.ir_version,
        "inputs": [graph.value_facts(v) for v in graph.real_inputs(model)],
        "outputs": [graph.value_facts(v) for v in model.graph.output],
        "nodes": graph.count_nodes(model),
        "operators": graph.op_histogram(model),
        "parameters": graph.parameter_count(model),
        "stored_bytes": dict(sorted(stored.items())),
        "macs": sum(macs.values()),
        "macs_by_operator": dict(sorted(macs.items())),
        "macs_unknown": unknown,
    }


def work(model: onnx.ModelProto) -> tuple[dict[str, int], str]:
    """Multiply-accumulates per operator with every free dimension at 1, and what is not known.

    Both branches of an undecided If count, the body of a Loop counts once.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in graph.real_inputs(fixed):
        for dim in value.type.tensor_type.shape.dim:
            if not (dim.HasField("dim_value") and dim.dim_value > 0):
                dim.dim_value = 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    try:
        sized = with_sizes(fixed)
    except Exception as error:  # a description is no reason to refuse a model that runs
        return {}, f"sizes inside cannot be inferred: {type(error).__name__}"
    totals: dict[str, int] = {}
    unknown = 0
    for part in graph.all_graphs(sized.graph):
        shapes = known_shapes(part)
        for node in part.node:
            if node.op_type not in WORK:
                continue
            count = node_macs(node, shapes.get)
            if count is None:
                unknown += 1
            else:
                totals[node.op_type] = totals.get(node.op_type, 0) + count
    return totals, f"the work of {unknown} nodes is not known" if unknown else ""


def with_sizes(fixed: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every size that follows from its inputs: shape arithmetic computed."""
    inside = ir.from_proto(fixed)
    for _ in range(ROUNDS):
        infer(inside)
        if not resolve_shapes(inside) + fold_constants(inside) + decide_branches(inside):
            break
    return ir.to_proto(inside)


Shape = tuple[int, ...]


def known_shapes(part: onnx.GraphProto) -> dict[str, Shape]:
    """The shapes of a graph's tensors, as far as all their sizes are known."""
    shapes = {t.name: tuple(t.dims) for t in part.initializer}
    for value in [*part.input, *part.output, *part.value_info]:
        kind = value.type.tensor_type
        sizes = tuple(d.dim_value for d in kind.shape.dim)
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = sizes
    return shapes


def node_macs(node: onnx.NodeProto, shape: Callable[[str], Shape | None]) -> int | None:
    """Multiply-accumulates of one node, None where a shape is unknown."""
    if node.op_type in RECURRENT:
        x, w, r = (shape(name) for name in node.input[:3])
        if not (x and w and r):
            return None
        return x[0] * x[1] * (size(w) + size(r))
    first, second, out = shape(node.input[0]), shape(node.input[1]), shape(node.output[0])
    if first is None or second is None or out is None:
        return None
    if node.op_type == "Conv":  # weight: (out, in / groups, *kernel)
        return size(out) * size(second[1:])
    if node.op_type == "ConvTranspose":  # weight: (in, out / groups, *kernel)
        return size(first) * size(second[1:])
    inner = first[0] if transposed(node) else first[-1]
    return size(out) * inner


def transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm takes its first operand transposed."""
    return any(a.name == "transA" and a.i for a in node.attribute)


def size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def lint(model: onnx.ModelProto, facts: Report, target: Target) -> Iterator[Lint]:
    """What will hurt on the target, worst first where it matters."""

    def line(level: str, text: str) -> Lint:
        return {"level": level, "text": text}

    operators, macs = facts["operators"], facts["macs"]
    budget = target.budget.max_size_bytes
    if budget is not None and facts["bytes"] > budget:
        text = f"the file has {facts['bytes']} bytes, {target.name} takes {budget}"
        yield line("warning", f"{text}: int8 makes it about a quarter")
    if target.int8.style == "none":
        yield line("warning", f"{target.name} has no int8 kernels: the model stays float there")
    stuck = sum(facts["macs_by_operator"].get(op, 0) for op in NO_INT8)
    if macs and stuck / macs > BIG_SHARE:
        names = ", ".join(op for op in NO_INT8 if op in operators)
        yield line("warning", f"{stuck / macs:.0%} of the work is in {names}: stays float")
    for kind in ("double", "float16"):
        if kind in facts["stored_bytes"]:
            yield line("warning", f"weights are stored as {kind}: no int8 kernel takes those")
    if any(operators.get(op) for op in CONTROL):
        names = ", ".join(f"{operators[op]} {op}" for op in CONTROL if op in operators)
        yield line("info", f"{names}: their bodies are compressed less, and run per call")
    if target.int8.saturates and target.int8.style == "static":
        yield line("info", f"{target.name} saturates 8-bit sums: weights get 7 bits there")
    if facts["opset"] < OLD_OPSET:
        yield line("info", f"opset {facts['opset']}: raised before int8, which needs {OLD_OPSET}")
    free = [i["name"] for i in facts["inputs"] if not all(isinstance(d, int) for d in i["shape"])]
    if free:
        yield line(
            "info",
            f"free dimensions in {', '.join(free)}: fix what the device fixes in [model.inputs] "
            "(fixed sizes let more be folded)",
        )
    double = repeated_bytes(model)
    if double > BIG_SHARE * facts["bytes"]:
        yield line("info", f"{double} bytes are stored more than once: stored once in the bundle")
    if facts["macs_unknown"]:
        yield line("info", facts["macs_unknown"])
    if "QuantizeLinear" in operators or "DequantizeLinear" in operators:
        yield line("warning", "the model is quantized already: start from the float model")


def repeated_bytes(model: onnx.ModelProto) -> int:
    """Bytes of tensors that an equal tensor before them stores already."""
    seen: set[tuple[int, tuple[int, ...], str]] = set()
    total = 0
    for part in graph.all_graphs(model.graph):
        for tensor in part.initializer:
            key = (
                tensor.data_type,
                tuple(tensor.dims),
                graph.sha256(graph.array(tensor).tobytes()),
            )
            total += tensor.ByteSize() if key in seen else 0
            seen.add(key)
    return total
