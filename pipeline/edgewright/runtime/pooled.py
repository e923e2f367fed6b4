"""Sessions of several models that share their weights in memory.

The weights file is mapped once and handed to every session as it is. ONNX Runtime would make a
rearranged copy for its fastest kernels in each session; that is switched off here, or nothing
would be shared: less memory is bought with slower first kernels.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from edgewright.errors import BadInput
from edgewright.runtime.local import Local, said

WHOLE_BYTES = ("FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "FLOAT16", "DOUBLE")


def open_pooled(folder: Path, names: list[str], *, threads: int = 1) -> dict[str, Local]:
    """A session for each `NAME.onnx` in a folder that `pool` wrote; weights in memory once.

    Raises BadInput where a model names a place that the weights file does not have.
    """
    weights = np.memmap(folder / "weights.bin", mode="r", dtype=np.uint8)
    values: dict[tuple[int, int, int, tuple[int, ...]], onnxruntime.OrtValue] = {}
    sessions: dict[str, Local] = {}
    for name in names:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        bare = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False)
        for tensor in bare.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(place["offset"]), int(place["length"])
            if offset < 0 or offset + length > weights.size:
                raise BadInput(
                    f"tensor '{tensor.name}' of {name}.onnx",
                    expected=f"a place within the {weights.size} bytes of weights.bin",
                    found=f"{length} bytes from {offset}",
                )
            if onnx.TensorProto.DataType.Name(tensor.data_type) not in WHOLE_BYTES:
                continue  # packed or rare types: each session reads its own
            key = (offset, length, tensor.data_type, tuple(tensor.dims))
            if key not in values:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                array = weights[offset : offset + length].view(dtype).reshape(tensor.dims)
                values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(tensor.name, values[key])
        try:
            session = onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadInput(f"the runtime refused {name}.onnx", found=said(error)) from None
        sessions[name] = Pooled(session, name, values, weights)
    return sessions


class Pooled(Local):
    """A session that keeps what it borrows alive."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        name: str,
        values: object,
        weights: np.ndarray,
    ) -> None:
        super().__init__(session, name)
        self.borrowed = (values, weights)
