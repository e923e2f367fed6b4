"""`edgewright inspect`: what is in a model, and what will hurt on a target, before any calibration.

Runs as a stage of its own in a limited child: the model is admitted first.
"""

import onnx

from edgewright import model as graph
from edgewright.admit import admit
from edgewright.lint import lint
from edgewright.lint.finding import Finding
from edgewright.stage import Job, Report
from edgewright.work import work


def run(job: Job) -> Report:
    """Admit the model and describe it for the job's target."""
    notes = admit(job.input_model(), job.output_model())["notes"]
    model = graph.load(job.output_model())
    facts = describe(model)
    facts["bytes"] = job.input_model().stat().st_size
    told = [Finding("file", n["level"], n["text"]) for n in notes]
    found = [*told, *lint(model, facts, job.target)]
    return {**facts, "target": job.target.name, "lint": [f.facts() for f in found]}


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
