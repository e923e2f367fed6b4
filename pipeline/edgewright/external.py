"""External data of an untrusted ONNX file: read once, from beside the model only, then inlined.

A location in a model is an instruction to open a file, so it is followed component by component
without symbolic links, only to a regular file with one name, and every byte used later comes
from the one copy that was read and hashed here.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from onnx import helper

from edgewright.errors import BadInput
from edgewright.model import MAX_BYTES, all_graphs, subgraphs

KEYS = ("location", "offset", "length", "checksum")
PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
TensorProto = onnx.TensorProto


def shown(name: object, limit: int = 80) -> str:
    """A name from an untrusted file, in quotes, on one line, cut."""
    text = repr(name if isinstance(name, str) else str(name))
    return text if len(text) <= limit else f"{text[: limit - 4]}...'"


def node_label(node: onnx.NodeProto) -> str:
    """How messages name a node: its name, else what it writes."""
    return shown(node.name or next((o for o in node.output if o), "") or node.op_type)


def all_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every stored tensor with words for messages: initializers and attributes, nested and in
    functions too."""
    graphs = [model.graph]
    for function in model.functions:
        for node in function.node:
            yield from node_tensors(node)
            graphs.extend(subgraphs(node))
    for outer in graphs:
        for graph in all_graphs(outer):
            for tensor in graph.initializer:
                yield f"initializer {shown(tensor.name)}", tensor
            for node in graph.node:
                yield from node_tensors(node)


def node_tensors(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The tensors in a node's attributes."""
    for attribute in node.attribute:
        for tensor in attribute_tensors(attribute):
            yield f"attribute {shown(attribute.name)} of node {node_label(node)}", tensor


def attribute_tensors(attribute: onnx.AttributeProto) -> list[onnx.TensorProto]:
    """The tensors of one attribute."""
    return [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]


def byte_count(where: str, tensor: onnx.TensorProto) -> int:
    """Bytes that the tensor's dims and type call for; BadInput for impossible ones."""
    if any(d < 0 for d in tensor.dims):
        raise BadInput(
            f"{where}", expected="sizes of at least 0", found=f"dims {list(tensor.dims)}"
        )
    try:
        name = TensorProto.DataType.Name(tensor.data_type)
        itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (ValueError, KeyError):
        raise BadInput(
            f"{where} has the unknown data type {tensor.data_type}",
            hint="export the model again, or update onnx",
        ) from None
    count = 1
    for size in tensor.dims:
        count *= size  # Python's whole numbers do not overflow
    return -(-count * PACKED_BITS.get(name, 8 * itemsize) // 8)


def inline_external(model: onnx.ModelProto, folder: Path) -> list[dict[str, object]]:
    """Put the external data of all tensors into the model; what was read, per file.

    Raises BadInput for anything that is not a plain, unlinked file below `folder` that holds
    exactly the bytes the tensor needs.
    """
    outside = [(w, t) for w, t in all_tensors(model) if t.data_location == TensorProto.EXTERNAL]
    check_total(sum(byte_count(where, tensor) for where, tensor in outside))
    files: dict[tuple[str, ...], bytes] = {}
    for where, tensor in outside:
        fields = external_fields(where, tensor)
        parts = location_parts(where, fields["location"])
        if parts not in files:
            files[parts] = read_beside(where, folder, parts)
            check_total(sum(len(d) for d in files.values()))
        data = files[parts]
        if "checksum" in fields:
            digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            if digest != fields["checksum"].lower():
                raise BadInput(
                    f"{where}: external data file {shown('/'.join(parts))}",
                    expected=f"SHA-1 {shown(fields['checksum'])}",
                    found=digest,
                    hint="fetch the model and its data file again",
                )
        need = byte_count(where, tensor)
        offset = int(fields.get("offset", "0"))
        length = int(fields.get("length", need))
        if length != need:
            raise BadInput(
                f"{where}: length of its external data",
                expected=f"{need} bytes, as its dims and type say",
                found=str(length),
                hint="the model file is damaged or was made to mislead; export it again",
            )
        if offset + length > len(data):
            raise BadInput(
                f"{where}: external data past the end of {shown('/'.join(parts))}",
                expected=f"offset + length of at most {len(data)} bytes",
                found=str(offset + length),
                hint="the data file is truncated or belongs to another model",
            )
        tensor.raw_data = data[offset : offset + length]
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return [
        {"location": "/".join(k), "bytes": len(v), "sha256": hashlib.sha256(v).hexdigest()}
        for k, v in sorted(files.items())
    ]


def check_total(size: int) -> None:
    if size > MAX_BYTES:
        raise BadInput(
            "the model with its external data is too large for one ONNX file",
            expected="at most 2 GiB",
            found=f"{size / 2**30:.1f} GiB",
            hint="store the weights as float16, or split the model",
        )


def external_fields(where: str, tensor: onnx.TensorProto) -> dict[str, str]:
    """The external_data entries, checked: known keys, once each, numbers that are numbers."""
    fields: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in KEYS or entry.key in fields:
            raise BadInput(
                f"{where}: external_data key {shown(entry.key)}",
                expected="each of " + ", ".join(KEYS) + " at most once",
                hint="export the model again with the weights inside the file",
            )
        if not isinstance(entry.value, str):  # protobuf hands out bytes where UTF-8 is broken
            raise BadInput(f"{where}: {entry.key} of its external data is no valid UTF-8")
        fields[entry.key] = entry.value
    if not fields.get("location"):
        raise BadInput(f"{where} says its data is external but names no location")
    if tensor.HasField("raw_data") or tensor.data_type == TensorProto.STRING:
        raise BadInput(f"{where}", expected="data either inside or external, and numeric")
    for key in ("offset", "length"):
        if key in fields and not re.fullmatch(r"[0-9]{1,19}", fields[key]):
            raise BadInput(
                f"{where}: {key} of its external data",
                expected="a whole number of at least 0",
                found=shown(fields[key]),
            )
    return fields


def location_parts(where: str, location: str) -> tuple[str, ...]:
    """The components of a location below the model's folder; BadInput where it leads out."""
    windows = PureWindowsPath(location)
    if PurePosixPath(location).is_absolute() or windows.drive or windows.root:
        reason = "an absolute path"
    elif ".." in windows.parts:
        reason = "a path with '..'"
    elif "\\" in location or not location.isprintable():
        reason = "a backslash or a control character"
    else:
        parts = PurePosixPath(location).parts
        if parts:
            return parts
        reason = "a folder"
    raise BadInput(
        f"{where}: external data at {shown(location)} is refused",
        expected="a file name beside the model",
        found=reason,
        hint="put the data file beside the model and export again with its plain name",
    )


def read_beside(where: str, folder: Path, parts: tuple[str, ...]) -> bytes:
    """The bytes of a regular file with one name below `folder`, no link on the way to it."""
    name = shown("/".join(parts))
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            reason = unfit(os.stat(part, dir_fd=here, follow_symlinks=False), last)
            if reason:
                raise refused_file(where, name, reason)
            below = os.open(part, flags | (0 if last else os.O_DIRECTORY), dir_fd=here)
            os.close(here)
            here = below
        status = os.fstat(here)  # again, of what is open now: the name may have been swapped
        reason = unfit(status, last=True)
        if reason:
            raise refused_file(where, name, reason)
        check_total(status.st_size)
        with os.fdopen(os.dup(here), "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(
            f"{where}: external data file {name} is missing",
            expected=f"it beside the model in {folder}",
            hint="copy the data file there, under that name",
        ) from None
    except OSError as error:
        raise refused_file(where, name, error.strerror or str(error)) from None
    finally:
        os.close(here)


def unfit(status: os.stat_result, last: bool) -> str:
    """Why a path component cannot be trusted; empty where it can."""
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if not last:
        return "" if stat.S_ISDIR(mode) else "a file where a folder should be"
    if stat.S_ISDIR(mode):
        return "a folder"
    if not stat.S_ISREG(mode):
        return "a FIFO, socket or device"
    if status.st_nlink > 1:
        return f"a hard link (the file has {status.st_nlink} names)"
    return ""


def refused_file(where: str, name: str, reason: str) -> BadInput:
    return BadInput(
        f"{where}: external data file {name} is refused",
        expected="a regular file with one name, no links",
        found=reason,
        hint="replace it by a plain copy of the file",
    )


def data_type(tensor: onnx.TensorProto) -> str:
    return str(TensorProto.DataType.Name(tensor.data_type))
