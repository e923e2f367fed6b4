"""`edgewright inspect`: what is in a model, and what will hurt on a target, before any calibration.

Runs as a stage of its own in a limited child: the model is admitted first.
"""

from collections.abc import Iterator

import onnx

from edgewright import model as graph
from edgewright.admit import admit
from edgewright.stage import Job, Report
from edgewright.target import Target
from edgewright.work import RECURRENT, work

BIG_SHARE = 0.05  # of the work or bytes: below it is not worth a line
CONTROL = ("If", "Loop", "Scan")
NO_INT8 = ("ConvTranspose", *RECURRENT)  # operators with work that have no static int8 kernel
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
