"""A session in this process: for models that `admit` let in, and for what the runtime knows.

Whoever runs an unchecked model uses `session.Session`, whose child can be stopped.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgewright.errors import BadInput
from edgewright.runtime.session import plain


class Local:
    """One ONNX Runtime session on this process's CPU; `inputs` and `outputs` are names."""

    def __init__(self, session: onnxruntime.InferenceSession, name: str) -> None:
        self.session = session
        self.name = name
        self.inputs = [v.name for v in session.get_inputs()]
        self.outputs = [v.name for v in session.get_outputs()]

    def run(self, feeds: Mapping[str, Any], outputs: list[str] | None = None) -> list[np.ndarray]:
        """Run once; the outputs in the model's order (or the order asked for)."""
        try:
            values: list[np.ndarray] = self.session.run(outputs, dict(feeds))
        except Exception as error:  # onnxruntime's errors share no base class
            raise BadInput(f"the runtime failed on {self.name}", found=said(error)) from None
        return values


def open_local(
    model: Path | bytes, *, threads: int = 1, optimize: bool = True, name: str = ""
) -> Local:
    """A session of a model file or of a serialised model; BadInput where it is refused.

    `optimize`: with all graph optimisations of the runtime, as on a device; without, every
    node runs as it is written. `name`: what messages call it; the file's name without.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    name = name or ("the model" if isinstance(model, bytes) else model.name)
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:
        raise BadInput(f"the runtime refused {name}", found=said(error)) from None
    return Local(session, name)


def said(error: Exception) -> str:
    """The runtime's message on one line, cut to a readable length."""
    return f"{type(error).__name__}: {plain(str(error))[:600]}"


@cache
def operators() -> dict[str, frozenset[str]]:
    """The operators compiled into this runtime, by domain ("" is ai.onnx)."""
    found: dict[str, set[str]] = {}
    for schema in native.get_all_operator_schema():
        found.setdefault(schema.domain, set()).add(schema.name)
    return {domain: frozenset(names) for domain, names in found.items()}
