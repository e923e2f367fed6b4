"""Findings about the file as a whole: operator set, stored types, free dimensions, sizes."""

from collections.abc import Iterator
from typing import Any

import onnx

from edgewright import model as graph
from edgewright.lint.finding import BIG_SHARE, FIRST, Finding
from edgewright.target import Target

OLD_OPSET = 13  # per-channel quantization needs it
NEW_OPSET = 21  # the newest whose static quantization the runtime supports
LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
QUANTIZED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger"),
    *("MatMulInteger", "QLinearConv", "QLinearMatMul"),
)
QUANTIZED_CONTRIB = (
    *("QGemm", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("DynamicQuantizeLSTM", "QAttention", "QLinearAdd", "QLinearMul", "QLinearSigmoid"),
    *("QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat"),
)
KINDS: dict[int, str] = {
    onnx.TensorProto.DOUBLE: "double",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
CONTROL = ("If", "Loop", "Scan")

Facts = dict[str, Any]


def findings(
    model: onnx.ModelProto, facts: Facts, target: Target, raised: str, left: int
) -> Iterator[Finding]:
    """All of this file. raised: why the operator set cannot be raised, "" where it can.

    left: how many If, Loop and Scan are still there after simplify's steps.
    """
    yield from limits(facts, target)
    yield from quantized(model)
    yield from contrib(model)
    yield from opset(model, raised)
    yield from types(model)
    yield from control(facts, left)
    yield from repeated(model, facts)
    if target.int8.saturates and target.int8.style == "static":
        yield Finding(
            "saturation",
            "info",
            f"{target.name} saturates 16-bit sums of two 8-bit products",
            "a sum of two products of 255 and 127 does not fit",
            "weights get head-room there",
            "quantize: weight scales",
        )
    if facts["macs_unknown"]:
        yield Finding("unknown-work", "info", facts["macs_unknown"])


def limits(facts: Facts, target: Target) -> Iterator[Finding]:
    """What the profile forbids."""
    budget = target.budget.max_size_bytes
    if budget is not None and facts["bytes"] > budget:
        yield Finding(
            "size",
            "warning",
            f"the file has {facts['bytes']} bytes, {target.name} takes {budget}",
            "an install would be refused",
            "int8 makes it about a quarter; prune what is still too much",
            "quantize" if target.int8.style == "static" else "",
        )
    if target.int8.style == "none":
        yield Finding(
            "no-int8-target",
            "warning",
            f"{target.name} has no int8 kernels: the model stays float there",
            "the profile says int8.style = 'none'",
            "build for a target with int8 kernels, or prune",
        )


def named(nodes: list[onnx.NodeProto]) -> tuple[str, ...]:
    """How to call the first few nodes."""
    return tuple(n.name or f"(makes {next(filter(None, n.output), '')})" for n in nodes[:FIRST])


def listed(nodes: list[onnx.NodeProto]) -> str:
    more = f" and {len(nodes) - FIRST} more" if len(nodes) > FIRST else ""
    return ", ".join(named(nodes)) + more


def of_nodes(kind: str, level: str, nodes: list[onnx.NodeProto], what: str, *rest: str) -> Finding:
    """A finding about nodes."""
    text = f"{len(nodes)} {what}: {listed(nodes)}"
    why, remedy, *by = rest
    return Finding(kind, level, text, why, remedy, "".join(by), named(nodes), len(nodes))


def quantized(model: onnx.ModelProto) -> Iterator[Finding]:
    """Nodes of an int8 model."""
    found = [
        n
        for n in graph.all_nodes(model.graph)
        if n.op_type in (QUANTIZED if n.domain in ("", "ai.onnx") else QUANTIZED_CONTRIB)
    ]
    if found:
        yield of_nodes(
            "quantized",
            "warning",
            found,
            "nodes of a model that is quantized already",
            "its scales are fixed, and layers with integer weights are no longer layers to us",
            "start from the float model",
        )
    axes = [n for n in found if n.op_type == "DequantizeLinear" and graph.opset(model) < OLD_OPSET]
    axes = [n for n in axes if any(a.name == "axis" for a in n.attribute)]
    if axes:
        yield of_nodes(
            "opset",
            "warning",
            axes,
            f"DequantizeLinear with an axis before operator set {OLD_OPSET}",
            "a scale per channel is not defined there: runtimes refuse or ignore it",
            f"export with operator set {OLD_OPSET} or later",
        )


def contrib(model: onnx.ModelProto) -> Iterator[Finding]:
    """Operators that only one runtime knows, of an optimizer that ran too early."""
    found = [
        n
        for n in graph.all_nodes(model.graph)
        if n.domain == "com.microsoft" and n.op_type not in QUANTIZED_CONTRIB
    ]
    names = sorted({n.op_type for n in found})
    if found:
        yield of_nodes(
            "contrib",
            "warning",
            found,
            f"operators of ONNX Runtime's own ({', '.join(names)})",
            "layers fused before quantizing have no int8 form, and shapes behind them are unknown",
            "start from the model before the transformers optimizer or an optimized session "
            "wrote it; the runtime fuses again when it loads",
        )


def opset(model: onnx.ModelProto, raised: str) -> Iterator[Finding]:
    """Operator sets and operators that the quantizer's writer or kernels do not take."""
    version = graph.opset(model)
    if version < OLD_OPSET:
        yield Finding(
            "opset",
            "warning" if raised else "info",
            f"opset {version}: int8 with a scale per channel needs {OLD_OPSET}",
            raised or "QuantizeLinear has no axis before",
            f"export with operator set {OLD_OPSET} or later" if raised else "raised to 17",
            "" if raised else "simplify: operator set",
        )
    if version > NEW_OPSET:
        yield Finding(
            "opset",
            "warning",
            f"opset {version} is newer than {NEW_OPSET}",
            "static quantization of the runtime is tested up to there",
            f"export with operator set 13 to {NEW_OPSET}",
        )
    old = [n for n in graph.all_nodes(model.graph) if deprecated(n, version)]
    if old:
        # A set above the one that dropped the operator is no valid model; below, it is raised.
        yield of_nodes(
            "opset",
            "warning" if raised else "info",
            old,
            "deprecated operators (" + ", ".join(sorted({n.op_type for n in old})) + ")",
            "newer operator sets no longer have them",
            "export with a newer operator set" if raised else "written in their new form",
            "" if raised else "simplify: operator set",
        )


def deprecated(node: onnx.NodeProto, version: int) -> bool:
    """Whether the operator is marked as deprecated in the set, or in a later one we raise to."""
    if node.domain not in ("", "ai.onnx"):
        return False
    newest = max(version, 17)
    try:
        return bool(onnx.defs.get_schema(node.op_type, newest, "").deprecated)
    except onnx.defs.SchemaError:
        return False


def types(model: onnx.ModelProto) -> Iterator[Finding]:
    """Layers whose weights are of a type that no int8 kernel takes."""
    stored: dict[str, int] = {}
    casts: dict[str, str] = {}
    for part in graph.all_graphs(model.graph):
        stored |= {t.name: t.data_type for t in part.initializer}
        for node in part.node:
            if node.op_type == "Constant":
                kinds = [a.t.data_type for a in node.attribute if a.name == "value"]
                stored[node.output[0]] = kinds[0] if kinds else 0
            elif node.op_type in ("Cast", "Identity"):
                casts[node.output[0]] = node.input[0]
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.all_nodes(model.graph):
        if node.op_type not in LAYERS or len(node.input) < 2:
            continue
        kind = stored.get(casts.get(node.input[1], node.input[1]), 0)
        if kind in KINDS:
            found.setdefault(KINDS[kind], []).append(node)
    for name, nodes in sorted(found.items()):
        yield of_nodes(
            "weight-type",
            "warning",
            nodes,
            f"layers with weights stored as {name}",
            "no int8 kernel takes those, and calibration expects float32 activations",
            "export the model in float32",
        )


def control(facts: Facts, left: int) -> Iterator[Finding]:
    """Control flow, and whether anything of it stays."""
    found = {op: facts["operators"][op] for op in CONTROL if facts["operators"].get(op)}
    if found:
        names = ", ".join(f"{count} {op}" for op, count in found.items())
        yield Finding(
            "control-flow",
            "info",
            f"{names}: {left} left where all that is known is computed",
            "bodies are compressed less, and run per call",
            "export for one fixed path, or fix the input that decides it" if left else "decided",
            "" if left else "simplify: shape arithmetic",
        )


def free_dimensions(
    model: onnx.ModelProto, facts: Facts, target: Target, nodes: tuple[int, int]
) -> Iterator[Finding]:
    """Inputs with free dimensions and what is lost by them.

    nodes: nodes left after folding with the dimensions free, and with them fixed.
    """
    free = [
        (i["name"], [k for k, d in enumerate(i["shape"] or ()) if not isinstance(d, int)])
        for i in facts["inputs"]
        if i["shape"] is None or not all(isinstance(d, int) for d in i["shape"])
    ]
    if not free:
        return
    names = ", ".join(f"{name} (axes {', '.join(map(str, axes)) or '?'})" for name, axes in free)
    lost = []
    if nodes[0] > nodes[1]:
        lost.append(f"{nodes[0] - nodes[1]} of {nodes[0]} nodes compute shapes at every run")
    lost.append("memory is planned anew for each new size")
    by = target.runtime.provider
    if by == "TensorrtExecutionProvider":
        lost.append("an engine is built for each new size, which takes minutes")
    elif by == "OpenVINOExecutionProvider":
        lost.append("the provider compiles general kernels, or again for each new size")
    yield Finding(
        "free-dimensions",
        "warning" if by == "TensorrtExecutionProvider" else "info",
        f"free dimensions in {names}",
        "; ".join(lost),
        "fix what the device fixes in [model.inputs]",
        "",
        tuple(name for name, _ in free[:FIRST]),
        len(free),
    )


def repeated(model: onnx.ModelProto, facts: Facts) -> Iterator[Finding]:
    """Tensors stored more than once."""
    double = repeated_bytes(model)
    if double > BIG_SHARE * facts["bytes"]:
        yield Finding(
            "duplicates",
            "info",
            f"{double} bytes are stored more than once",
            "the file is larger than it need be",
            "stored once",
            "simplify: duplicates",
        )


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
