"""Small graphs for unit tests, written as ONNX text with weights as arrays."""

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    """Standard normal values, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parsed(text: str, **stored: np.ndarray) -> onnx.ModelProto:
    """A model of operator set 17 from ONNX text; its nodes are called n0, n1, ..."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, value in stored.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return model
