"""What comes after a tensor, as a function of one number.

A convolution's output that is only read through an activation (HardSwish, SiLU, GELU, Clip,
also written as several element-wise nodes) need not be exact where the activation is flat.
`responses` finds those tensors and tabulates the function, so that the range can be chosen by
the error after it. A squashing function that ends the model is left out: confident answers
must keep their order, so what goes into it is judged (see `fidelity`).
"""

import numpy as np
import onnx

from edgewright.calibration.statistics import Statistics
from edgewright.model import consumers, initializers
from edgewright.quantize.fidelity import judged_tensors
from edgewright.runtime.local import open_local

ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Clip", "Relu", "LeakyRelu", "HardSigmoid")
    + ("HardSwish", "Sigmoid", "Tanh", "Erf", "Gelu", "Elu", "Selu", "Softplus", "Softsign")
    + ("Abs", "Neg", "Sqrt", "Exp", "Log", "Identity")
)


def responses(
    model: onnx.ModelProto, tensors: list[str], statistics: dict[str, Statistics]
) -> dict[str, np.ndarray]:
    """For each tensor that is only read through a scalar function: its values at the bins."""
    stored, readers = initializers(model.graph), consumers(model.graph.node)
    outputs = {o.name for o in model.graph.output} | set(judged_tensors(model))
    found = {}
    for name in tensors:
        part = scalar_function(name, stored, readers, outputs)
        if part is None or name not in statistics:
            continue
        nodes, last = part
        found[name] = tabulate(model, name, nodes, last, statistics[name].centers())
    return found


def scalar_function(
    start: str,
    stored: dict[str, onnx.TensorProto],
    readers: dict[str, list[onnx.NodeProto]],
    outputs: set[str],
) -> tuple[list[onnx.NodeProto], str] | None:
    """The element-wise nodes after `start` and the one tensor that leaves them, or None.

    Every reader of `start` must lie inside, so that nobody else sees the tensor itself.
    outputs: tensors behind which no function is looked through.
    """
    inside = {start}
    nodes: list[onnx.NodeProto] = []
    grown = True
    while grown:
        grown = False
        for name in sorted(inside - outputs):
            for node in readers.get(name, []):
                if node in nodes or node.op_type not in ELEMENTWISE or node.output[0] in inside:
                    continue
                scalar = all(
                    i in inside or not i or (i in stored and np.prod(stored[i].dims) == 1)
                    for i in node.input
                )
                if scalar:
                    nodes.append(node)
                    inside.add(node.output[0])
                    grown = True
    leaving = [
        name
        for name in sorted(inside)
        if name in outputs or any(r not in nodes for r in readers.get(name, []))
    ]
    if not nodes or len(leaving) != 1 or leaving[0] == start:
        return None
    return nodes, leaving[0]


def tabulate(
    model: onnx.ModelProto, start: str, nodes: list[onnx.NodeProto], last: str, x: np.ndarray
) -> np.ndarray:
    """Values of the function at x: (n,) -> (n,); non-finite values (log of less than 0) as 0."""
    needed = {i for n in nodes for i in n.input}
    graph = onnx.helper.make_graph(
        nodes,
        "response",
        [onnx.helper.make_tensor_value_info(start, onnx.TensorProto.FLOAT, ["n"])],
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)],
        [t for t in model.graph.initializer if t.name in needed],
    )
    part = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    value = open_local(part.SerializeToString()).run({start: x.astype(np.float32)})[0]
    return np.nan_to_num(value.reshape(-1), nan=0.0, posinf=0.0, neginf=0.0)
