"""pool: several models whose equal tensors are stored once, beside them in one file.

Variants of a model and networks with a common trunk hold the same tensors. Here each model keeps
its graph and its small tensors; what is large lies in `weights.bin`, every content once, and is
named by place and length, as ONNX keeps external data. `weights.json` says the same where no ONNX
library is, so that the tensors can be in memory once, too: see `runtime.pooled`.
"""

import hashlib
import json
from typing import Any

import onnx

from edgewright import model as graph
from edgewright.files import write_atomic
from edgewright.stage import Job, Report

WEIGHTS, PLACES = "weights.bin", "weights.json"
# The element types that a device can take from the file as they lie there.
WHOLE_BYTES = ("FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "FLOAT16", "DOUBLE")
LEAST = 1024  # bytes: a smaller tensor stays in its model, its place costs as much to name
ALIGN = 64  # bytes: a cache line, and enough for every element type


def run(job: Job) -> Report:
    """Write `NAME.onnx` for each of the job's models and the weights' files into its folder.

    Report: bytes of the separate files and of the pool, and per model how much of it others
    hold as well.
    """
    store = Store()
    pooled = {}
    for name, path in job.models.items():
        job.tell(f"pooling {name}")
        pooled[name] = put_in(store, name, graph.load(path))
    write_atomic(job.folder / WEIGHTS, bytes(store.data))
    table = {name: places(model) for name, model in pooled.items()}
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    write_atomic(job.folder / PLACES, text.encode())
    for name, model in pooled.items():
        graph.save(model, job.folder / f"{name}.onnx")
    separate = sum(path.stat().st_size for path in job.models.values())
    written = [job.folder / WEIGHTS, *(job.folder / f"{name}.onnx" for name in pooled)]
    return {
        "notes": [],
        "separate_bytes": separate,
        "pooled_bytes": sum(path.stat().st_size for path in written),
        "models": [
            {"model": name, **store.shares(name), "sha256": graph.sha256(path.read_bytes())}
            for name, path in zip(pooled, written[1:], strict=True)
        ],
    }


class Store:
    """Contents, each once, in the order they came; who uses which."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.places: dict[bytes, int] = {}
        self.users: dict[bytes, set[str]] = {}
        self.sizes: dict[bytes, int] = {}

    def place(self, content: bytes, user: str) -> int:
        """Where the content lies, put there if it is new."""
        key = hashlib.sha256(content).digest()
        if key not in self.places:
            self.data.extend(bytes(-len(self.data) % ALIGN))
            self.places[key] = len(self.data)
            self.sizes[key] = len(content)
            self.data.extend(content)
        self.users.setdefault(key, set()).add(user)
        return self.places[key]

    def shares(self, user: str) -> dict[str, Any]:
        """Bytes of the store that a model uses, and how many of them others use, too."""
        mine = [key for key, users in self.users.items() if user in users]
        shared = [key for key in mine if len(self.users[key]) > 1]
        return {
            "stored_bytes": sum(self.sizes[key] for key in mine),
            "shared_bytes": sum(self.sizes[key] for key in shared),
            "shared_tensors": len(shared),
        }


def put_in(store: Store, name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model whose large tensors lie in the store."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.STRING:
            continue
        content = graph.array(tensor).tobytes()
        if len(content) < LEAST:
            continue
        offset = store.place(content, name)
        kind, dims, called = tensor.data_type, list(tensor.dims), tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type = called, kind
        tensor.dims.extend(dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
    return copy


def places(model: onnx.ModelProto) -> dict[str, list[Any]]:
    """Of each tensor in the store: NumPy's name of its type, its shape, its offset in bytes."""
    found = {}
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if tensor.data_location == onnx.TensorProto.EXTERNAL and kind in WHOLE_BYTES:
            offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            found[tensor.name] = [dtype.name, list(tensor.dims), offset]
    return found
