"""Sessions of several models that share their weights in memory.

The weights file is mapped once and handed to every session as it is. ONNX Runtime would make a
rearranged copy for its fastest kernels in each session; that is switched off here, or nothing
would be shared: less memory is bought with slower first kernels.

Needs numpy and onnxruntime only, so that an application on a device can do the same.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime

from edgewright.errors import BadInput
from edgewright.runtime.local import Local, said
from edgewright.runtime.worker import shared_tensors


def open_pooled(folder: Path, names: list[str], *, threads: int = 1) -> dict[str, Local]:
    """A session for each `NAME.onnx` in a folder that `pool` wrote; weights in memory once.

    `folder`: also `model/` of an installed bundle of several models. Raises BadInput where a
    tensor's place is not in the weights file.
    """
    weights = np.memmap(folder / "weights.bin", mode="r", dtype=np.uint8)
    places = json.loads((folder / "weights.json").read_bytes())
    sessions: dict[str, Local] = {}
    for name in names:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            values = list(shared_tensors(weights, places[name]))
        except ValueError as error:
            raise BadInput(f"{name}.onnx: {error}", expected="places in weights.bin") from None
        for tensor, value in values:
            options.add_initializer(tensor, value)
        try:
            session = onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadInput(f"the runtime refused {name}.onnx", found=said(error)) from None
        sessions[name] = Pooled(session, name, (values, weights))
    return sessions


class Pooled(Local):
    """A session that keeps what it borrows alive."""

    def __init__(self, session: onnxruntime.InferenceSession, name: str, borrowed: object) -> None:
        super().__init__(session, name)
        self.borrowed = borrowed
