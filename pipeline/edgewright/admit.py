"""Letting an untrusted ONNX file in: one clear refusal, or one checked, self-contained file.

The file and its external data are read once; hashing, parsing and every check work on that
copy, so nothing can be swapped in between. What passes is opened in a limited child process.
"""

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, inliner

from edgewright import model as models
from edgewright.errors import BadInput, EnvironmentMissing, from_os_error
from edgewright.external import (
    all_tensors,
    byte_count,
    data_type,
    inline_external,
    node_label,
    shown,
)
from edgewright.runtime.session import ADDRESS_SPACE, Launch, Session
from edgewright.soundness import (
    Note,
    check_finite,
    check_interface,
    check_operators,
    check_wiring,
    check_with_onnx,
    note,
)
from edgewright.stage import Job, Report

TRIAL_SECONDS = 120.0
MAX_NODES = 200_000
MAX_DEPTH = 64  # of model-local functions calling each other
MAX_NAME = 4096  # characters; names of exporters stay below a thousand
MAX_TEXT = 16 << 20  # bytes of metadata and doc strings together
OLDEST_IR = 3  # the first with operator-set imports

# How files that are no ONNX begin, and what to do about it.
STRANGERS = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model", "run `git lfs pull`"),
    (0, b"<!doctype", "an HTML page, not a model", "download the model again; check the address"),
    (0, b"<html", "an HTML page, not a model", "download the model again; check the address"),
    (0, b"<?xml", "an XML text, not a model", "download the model again; check the address"),
    (0, b"{", "a JSON text, not a model", "check the path of the model"),
    (0, b"pk\x03\x04", "a zip archive or PyTorch checkpoint", "export it to ONNX first"),
    (0, b"\x80\x02", "a pickle", "pickles are never loaded; export it to ONNX first"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"\x89hdf", "an HDF5 file", "export it to ONNX first"),
    (4, b"ortm", "an ORT-format model", "use the .onnx file it was made from"),
    (4, b"tfl3", "a TensorFlow Lite model", "export the original to ONNX"),
)

# What the runtime says of versions it does not support; the number is the newest it does.
NEWER_THAN_RUNTIME = (
    (r"till opset (\d+)", "opset", "opset_version"),
    (r"max supported IR version: (\d+)", "ir_version", "ir_version"),
)

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def run(job: Job) -> Report:
    """Admit the job's model, as a stage of its own in a limited child."""
    return admit(job.input_model(), job.output_model())


def admit(
    source: Path,
    out: Path,
    *,
    allow_nonfinite: bool = False,
    trial_seconds: float = TRIAL_SECONDS,
) -> dict[str, Any]:
    """Check the ONNX file `source` and write it to `out`, self-contained.

    Raises BadInput naming the file, the reason and the next step; then nothing is written.
    `allow_nonfinite` turns refusals of NaN and Inf into warnings. Returns {"sha256_source",
    "bytes_source", "external_files", "opset", "ir_version", "notes"}.
    """
    data = read_model(source)
    try:
        report = admit_bytes(
            data,
            out,
            folder=source.parent,
            name=source.name,
            allow_nonfinite=allow_nonfinite,
            trial_seconds=trial_seconds,
        )
    except BadInput as error:
        raise BadInput(f"model {source}: {error}") from None
    return {
        "sha256_source": hashlib.sha256(data).hexdigest(),
        "bytes_source": len(data),
        **report,
    }


def admit_bytes(
    data: bytes,
    out: Path,
    *,
    folder: Path,
    name: str,
    allow_nonfinite: bool = False,
    trial_seconds: float = TRIAL_SECONDS,
) -> dict[str, Any]:
    """As `admit`, for a model in memory; external data is looked for in `folder`.

    Messages name tensors and nodes only, for the caller to say which model they are in.
    """
    model = parse(data)
    notes: list[Note] = []
    check_size(model)
    check_versions(model)
    notes += drop_extras(model)
    check_names(model)
    files = inline_external(model, folder)
    if files:
        notes.append(note(f"external data of {len(files)} files is now inside the model"))
    check_tensors(model)
    model = inline_functions(model, notes)
    check_interface(model)
    notes += check_operators(model)
    notes += check_wiring(model.graph)
    notes += check_finite(model, allow_nonfinite)
    notes += check_with_onnx(model)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".admit-") as private:
        copy = Path(private) / "model.onnx"
        models.save(model, copy)
        with trial(copy, name, trial_seconds):
            pass
        copy.replace(out)
    return {
        "external_files": files,
        "opset": models.opset(model),
        "ir_version": model.ir_version,
        "notes": notes,
    }


def read_model(source: Path) -> bytes:
    """The bytes of the user's model file: a regular file, links allowed, at most 2 GiB."""
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadInput(
            f"model not found: {source}", hint="check model.source in the recipe"
        ) from None
    except OSError as error:
        raise from_os_error(error, "reading the model") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a FIFO, socket or device"
            raise BadInput(f"model {source}", expected="an ONNX file", found=kind)
        if status.st_size <= models.MAX_BYTES:
            with os.fdopen(os.dup(handle), "rb") as file:
                data = file.read(models.MAX_BYTES + 1)
            if len(data) <= models.MAX_BYTES:
                return data
    finally:
        os.close(handle)
    raise BadInput(
        f"model {source} is larger than an ONNX file can be",
        expected="at most 2 GiB",
        found=f"{status.st_size / 2**30:.1f} GiB",
        hint="store its weights as external data",
    )


def parse(data: bytes) -> onnx.ModelProto:
    """The model in `data`; BadInput that says what the file is instead."""
    if not data:
        raise BadInput(
            "the file is empty", expected="an ONNX model", hint="export or copy the model again"
        )
    head = data[:64].lstrip().lower() if data[:1].isspace() else data[:64].lower()
    for offset, mark, what, hint in STRANGERS:
        if head[offset:].startswith(mark):
            raise BadInput("not an ONNX file", found=what, hint=hint)
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise BadInput(
            "cannot be parsed as ONNX: truncated, damaged, or another kind of file",
            found=f"{len(data)} bytes ({' '.join(str(error).split())[:120]})",
            hint="export or copy the model again",
        ) from None
    if not model.HasField("graph") or not model.graph.node:
        raise BadInput(
            "holds no graph nodes",
            expected="an ONNX model with at least one operator",
            hint="check that this is the exported model",
        )
    return model


def check_size(model: onnx.ModelProto) -> None:
    """Caps on what later checks walk through."""
    nodes = sum(len(g.node) for g in every_graph(model)) + sum(len(f.node) for f in model.functions)
    if nodes > MAX_NODES:
        raise BadInput(
            "too many nodes", expected=f"at most {MAX_NODES}", found=str(nodes), hint="split it"
        )
    text = sum(sum(len(t) for t in texts(m)) for m in described(model))
    if text > MAX_TEXT:
        raise BadInput(
            "metadata and doc strings are too large",
            expected=f"at most {MAX_TEXT >> 20} MiB",
            found=f"{text / 2**20:.0f} MiB",
            hint="remove metadata_props and doc_string from the model",
        )


def every_graph(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """All graphs, those inside functions too."""
    yield from models.all_graphs(model.graph)
    for function in model.functions:
        for node in function.node:
            for inner in models.subgraphs(node):
                yield from models.all_graphs(inner)


def described(model: onnx.ModelProto) -> Iterator[Any]:
    """Every message that can carry a doc string or metadata, the model itself first."""
    yield model
    for function in model.functions:
        yield function
        yield from function.node
        yield from function.value_info
    for graph in every_graph(model):
        yield graph
        yield from graph.node
        yield from graph.initializer
        for values in (graph.input, graph.output, graph.value_info):
            yield from values


def texts(message: Any) -> Iterator[str]:
    """The doc string and metadata of a message."""
    yield message.doc_string
    for entry in message.metadata_props:
        yield entry.key
        yield entry.value


def strip_debug(model: onnx.ModelProto) -> int:
    """Remove doc strings and metadata of everything inside the model; how many messages had some.

    Exporters leave stack traces with paths of the machine there. What the model itself says
    (class names, for example) stays.
    """
    count = 0
    inside = described(model)
    next(inside)
    for message in inside:
        if message.doc_string or message.metadata_props:
            message.ClearField("doc_string")
            message.ClearField("metadata_props")
            count += 1
    return count


def drop_extras(model: onnx.ModelProto) -> list[Note]:
    """Refuse what inference cannot carry over, drop what it does not need."""
    for graph in every_graph(model):
        sparse = [s.values.name for s in graph.sparse_initializer]
        if sparse:
            raise BadInput(
                f"sparse initializer {shown(sparse[0])}",
                expected="dense initializers only",
                hint="store the tensor dense; zero weights are found again by the pruner",
            )
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    raise BadInput(
                        f"sparse attribute of node {node_label(node)}",
                        expected="dense constants only",
                        hint="store the tensor dense",
                    )
    notes = []
    if model.training_info:
        model.ClearField("training_info")
        notes.append(note("training information in the model was dropped"))
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        notes.append(note(f"{size - model.ByteSize()} bytes of unknown fields were dropped"))
    stripped = strip_debug(model)
    if stripped:
        notes.append(note(f"doc strings and debug metadata of {stripped} items were removed"))
    return notes


def check_versions(model: onnx.ModelProto) -> None:
    """IR and operator-set versions that the installed onnx knows."""
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        raise BadInput(
            f"unsupported ir_version {model.ir_version}",
            expected=f"{OLDEST_IR} to {onnx.IR_VERSION}",
            hint="export the model with other versions of the exporter or of onnx",
        )
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise BadInput(
                f"two versions of operator set {shown(domain or 'ai.onnx')}",
                expected="one",
                found=f"{versions[domain]} and {entry.version}",
            )
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= versions.get("", 1) <= newest:
        raise BadInput(
            f"needs opset {versions['']} of ai.onnx",
            expected=f"1 to {newest}, the newest that onnx {onnx.__version__} knows",
            hint="export the model with a lower opset_version, or update onnx and onnxruntime",
        )


def check_names(model: onnx.ModelProto) -> None:
    """Names are printable text of sane length. They are never used as paths."""
    for name in names(model):
        if not isinstance(name, str):
            raise BadInput(f"the name {shown(name)} is no valid UTF-8", hint="export it again")
        if len(name) > MAX_NAME:
            raise BadInput(
                f"the name {shown(name)} is too long",
                expected=f"at most {MAX_NAME} characters",
                found=str(len(name)),
            )
        if any(ord(c) < 32 or ord(c) == 127 for c in name):
            raise BadInput(f"the name {shown(name)} holds control characters")
    if not all(isinstance(text, str) for text in texts(model)):
        raise BadInput("the metadata or doc string is no valid UTF-8", hint="remove it")


def names(model: onnx.ModelProto) -> Iterator[Any]:
    """Every name in the model; bytes where one is no UTF-8."""
    for entry in model.opset_import:
        yield entry.domain
    for entry in model.metadata_props:
        yield entry.key
    nodes: list[Iterable[onnx.NodeProto]] = [f.node for f in model.functions]
    for function in model.functions:
        yield from (function.name, function.domain, function.overload)
        yield from function.input
        yield from function.output
    for graph in every_graph(model):
        yield graph.name
        nodes.append(graph.node)
        yield from (tensor.name for tensor in graph.initializer)
        for values in (graph.input, graph.output, graph.value_info):
            for value in values:
                yield value.name
                yield from (d.dim_param for d in value.type.tensor_type.shape.dim)
    for part in nodes:
        for node in part:
            yield from (node.name, node.op_type, node.domain)
            yield from node.input
            yield from node.output
            yield from (attribute.name for attribute in node.attribute)


def check_tensors(model: onnx.ModelProto) -> None:
    """Every stored tensor holds exactly the data that its dims and type call for."""
    for where, tensor in all_tensors(model):
        if tensor.HasField("segment"):
            raise BadInput(f"{where} is stored in segments, which no runtime reads")
        count = int(np.prod([int(d) for d in tensor.dims], dtype=object))
        need = byte_count(where, tensor)
        if tensor.HasField("raw_data"):
            have, unit = len(tensor.raw_data), "bytes"
        else:
            field = helper.tensor_dtype_to_field(tensor.data_type)
            have, unit = len(getattr(tensor, field)), "values"
            packed = need < count  # several per value of the field
            need = need if packed else count * (2 if "COMPLEX" in data_type(tensor) else 1)
        if have != need:
            raise BadInput(
                f"{where}",
                expected=f"{need} {unit} for dims {list(tensor.dims)[:8]} of {data_type(tensor)}",
                found=str(have),
                hint="the file is damaged or was made to mislead; export it again",
            )
        if tensor.external_data:
            tensor.ClearField("external_data")  # a left-over: the data is inside


def inline_functions(model: onnx.ModelProto, notes: list[Note]) -> onnx.ModelProto:
    """The model without model-local functions: every call replaced by the function's nodes."""
    if not model.functions:
        return model
    table = {(f.domain, f.name, f.overload): f for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(key: tuple[str, str, str], callers: tuple[tuple[str, str, str], ...]) -> int:
        if key in callers or len(callers) > MAX_DEPTH:
            raise BadInput(
                f"function {shown(f'{key[0]}:{key[1]}')} calls itself, or calls nest too deep",
                expected=f"functions without recursion, at most {MAX_DEPTH} deep",
                hint="export the model without local functions",
            )
        if key not in sizes:
            sizes[key] = total(table[key].node, (*callers, key))
        return sizes[key]

    def total(nodes: Iterable[onnx.NodeProto], callers: tuple[tuple[str, str, str], ...]) -> int:
        count = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            count += size(key, callers) if key in table else 1
            for inner in models.subgraphs(node):
                count += total(inner.node, callers)
        return count

    nodes = total(model.graph.node, ())
    if nodes > MAX_NODES:
        raise BadInput(
            "its functions unfold to too many nodes",
            expected=f"at most {MAX_NODES}",
            found=str(nodes),
        )
    try:
        plain = inliner.inline_local_functions(model, True)
    except Exception as error:  # onnx raises bare RuntimeError and its own kinds here
        raise BadInput(
            "its model-local functions cannot be unfolded",
            found=" ".join(str(error).split())[:200],
            hint="export the model without local functions",
        ) from None
    if plain.functions:
        left = plain.functions[0]
        raise BadInput(
            f"model-local function {shown(f'{left.domain}:{left.name}')} cannot be unfolded",
            hint="export the model without local functions",
        )
    notes.append(note(f"{len(table)} model-local functions were unfolded into the graph"))
    return plain


@contextmanager
def trial(path: Path, name: str, seconds: float) -> Iterator[Run]:
    """A way to run a model that is not trusted yet: in a child, at most `seconds` per call.

    Raises BadInput where the runtime refuses the model, crashes, needs more memory than this
    machine has, or takes too long.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    launch = Launch(address_space=min(ADDRESS_SPACE, memory))
    try:
        with Session(path, launch=launch, name=name, load_seconds=seconds) as session:
            yield lambda feeds: session.run(feeds, seconds=seconds)
    except EnvironmentMissing as error:
        # No emulator and no special provider is in play: only SIGILL and the system's own
        # SIGKILL are the machine's fault, any other death is the model's.
        died = re.search(r"died of (SIG\w+)", str(error))
        if not died or died[1] == "SIGILL":
            raise
        raise BadInput(
            f"{name} makes the runtime crash",
            found=died[1],
            hint="inspect the model; unusual sizes and integer arithmetic are usual causes",
        ) from None
    except BadInput as error:
        for pattern, what, setting in NEWER_THAN_RUNTIME:
            limit = re.search(pattern, str(error))
            if limit:
                raise BadInput(
                    f"has a newer {what} than the installed onnxruntime supports",
                    expected=f"{what} {limit[1]} or lower",
                    hint=f"export the model with {setting} <= {limit[1]}, or update onnxruntime",
                ) from None
        raise
