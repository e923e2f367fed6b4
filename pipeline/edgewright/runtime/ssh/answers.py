"""What a device may answer. Whatever it sends is data of a stranger: sizes and shapes of answers
are checked here before anything else looks at them, and nothing is ever unpickled."""

import math
from collections.abc import Mapping
from typing import Any

from edgewright import schema as schemas
from edgewright.errors import BadInput, DeviceUnavailable

HEADER_MAX = 64 << 20  # bytes of JSON
ARRAYS_MAX = 4 << 30  # bytes of all outputs of one run
FRAME_MAX = 4 << 30  # bytes of one message of the agent
TEXT = {"type": "string", "maxLength": 4000}
COUNT = {"type": "integer", "minimum": 0, "maximum": 1 << 62}
SECONDS = {"type": "number", "minimum": 0, "maximum": 1e9}
TIMES = {"type": "array", "items": SECONDS, "maxItems": 1_000_000}
WORDS = {"type": "array", "items": TEXT, "maxItems": 4096}
BY_NAME = {"type": "object", "additionalProperties": TEXT, "maxProperties": 4096}
# What onnxruntime's tensors become in numpy, as a little-endian device spells it.
DTYPES = (
    *("|b1", "|i1", "|u1", "<i2", "<u2", "<f2"),
    *("<i4", "<u4", "<f4", "<i8", "<u8", "<f8"),
)
RANK_MAX = 32  # numpy before 2.0 has no more
# Goes into the lock of a bundle, which pip reads: nothing that could end a line there.
WORD = {"type": "string", "pattern": r"^[A-Za-z0-9.!+_-]{1,64}\Z"}
WHEEL = {"type": "string", "pattern": r"^[A-Za-z0-9.!+_-]{0,255}\Z"}
SHA256 = {"type": ["string", "null"], "pattern": r"^[0-9a-f]{64}\Z"}


def table(required: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The schema of an object with these members; `check` drops all others."""
    properties = {**required, **more}
    return {"type": "object", "properties": properties, "required": sorted(required)}


def array_of(items: Any, most: int = 100_000) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most}


VALUE = table(
    {"name": TEXT, "type": TEXT, "shape": array_of({"type": ["integer", "string", "null"]}, 64)}
)
NODE = table(
    {
        "name": TEXT,
        "index": {"type": "integer"},
        "op": TEXT,
        "provider": TEXT,
        "types": WORDS,
        "elements": COUNT,
        "shapes": array_of(array_of({"type": "integer"}, 64), 4096),
        "us": {"type": "number", "minimum": 0},
    }
)
GROUP = table({"provider": TEXT, "nodes": array_of(table({"name": TEXT, "op": TEXT}), 1_000_000)})
WORKER: dict[str, dict[str, Any]] = {
    "load": table(
        {
            "inputs": array_of(VALUE),
            "outputs": array_of(VALUE),
            "providers": WORDS,
            "version": TEXT,
            "import_s": SECONDS,
            "load_s": SECONDS,
            "rss_before_load_kib": COUNT,
            "rss_after_load_kib": COUNT,
            "peak_after_load_kib": COUNT,
        },
        ready_s={"type": ["number", "null"], "minimum": 0},
        cores={"type": ["integer", "null"]},
        flags=WORDS,
    ),
    "run": table({}),
    "feeds": table({"count": COUNT}),
    "slice": table(
        {
            "wall_s": TIMES,
            "cpu_s": TIMES,
            "total_wall_s": SECONDS,
            "total_cpu_s": SECONDS,
            "run_queue_s": {"type": "number"},
            "involuntary_switches": {"type": "integer"},
            "steal_ticks": {"type": "integer"},
        }
    ),
    "warm": table({"wall_s": TIMES}),
    "memory": table(
        {"peak_kib": COUNT, "reset": {"type": "boolean"}, "first_run_s": SECONDS},
        device_bytes={"type": ["integer", "null"], "minimum": 0},
        device_reason=TEXT,
    ),
    "restart": table({"wall_s": SECONDS, "cpu_s": SECONDS}),
    "profile": table(
        {
            "nodes": array_of(NODE, 1_000_000),
            "runs": COUNT,
            "assigned": {**array_of(GROUP, 1_000_000), "type": ["array", "null"]},
        }
    ),
    "spin": table({"wall_s": SECONDS}),
}
ERROR = table({"error": table({"kind": TEXT, "text": TEXT})})
PACKAGE = {
    **table({"version": WORD, "wheel": WHEEL, "record_sha256": SHA256}),
    "additionalProperties": False,
}
FACTS = table(
    {
        "machine": TEXT,
        "bits": {"enum": [32, 64]},
        "system": TEXT,
        "kernel": TEXT,
        "python": TEXT,
        "board": TEXT,
        "cpu": TEXT,
        "flags": WORDS,
        "cores": {"type": "integer", "minimum": 1, "maximum": 65536},
        "allowed_cores": array_of({"type": "integer", "minimum": 0, "maximum": 65535}, 65536),
        "load_average": {"type": "array", "items": SECONDS, "minItems": 3, "maxItems": 3},
        "memory_kib": {"type": "object", "additionalProperties": COUNT, "maxProperties": 16},
        "steal_ticks": COUNT,
        "governors": BY_NAME,
        "frequency_limits": BY_NAME,
        "temperatures_c": {
            "type": "object",
            "additionalProperties": {"type": "number"},
            "maxProperties": 4096,
        },
        "throttled": BY_NAME,
        "packages": {
            "type": "object",
            "propertyNames": WORD,
            "additionalProperties": PACKAGE,
            "maxProperties": 64,
        },
        "free_bytes": COUNT,
    }
)
RUNTIME = table({"onnxruntime": TEXT, "providers": WORDS})
PROVEN = table(
    {"vectors": COUNT, "max_abs": {"type": "number"}, "exact": {"type": "boolean"}},
    runtime={"type": "object"},
    memory={"type": ["object", "null"]},
)
INSTALLED = table(
    {"action": TEXT, "release": TEXT},
    self_test={**PROVEN, "type": ["object", "null"]},
    signers=WORDS,
    before={"type": ["string", "null"]},
)
AGENT: dict[str, dict[str, Any]] = {
    "begin": FACTS,
    "facts": FACTS,
    "have": table({"have": {"type": "boolean"}}, folder=TEXT),
    "put": table({}),
    "keep": table({"folder": TEXT}),
    "start": table({"pid": COUNT}),
    "get": table({"found": {"type": "boolean"}}),
    "end": table({}),
    "exit": table(
        {"why": {"enum": ["", "late"]}, "status": {"type": "integer"}, "said": {"type": "string"}}
    ),
    "error": ERROR,
}


def check(answer: Any, schema: schemas.Schema, where: str) -> dict[str, Any]:
    """The answer without members that the schema does not name; DeviceUnavailable if it is odd."""
    if fault := schemas.fault(answer, schema, "answer"):
        raise odd(where, fault[:200])
    return {key: value for key, value in answer.items() if key in schema["properties"]}


def odd(where: str, found: str) -> DeviceUnavailable:
    """The error for an answer that no worker of ours gives."""
    return DeviceUnavailable(
        f"{where} gave an answer that makes no sense",
        found=found,
        hint="check that nothing on the device prints into SSH sessions, and that its disk and "
        "memory are sound",
    )


def no_number(word: str) -> float:
    """For NaN and Infinity, which JSON does not have and Python reads."""
    raise ValueError(word)


def array_bytes(rows: Any, where: str) -> int:
    """Bytes of the arrays that a header lists, after a check of every row."""
    if not isinstance(rows, list) or len(rows) > 100_000:
        raise odd(where, "a list of arrays that is none")
    total = 0
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"name", "dtype", "shape"}:
            raise odd(where, "an array without name, dtype and shape")
        name, dtype, shape = row["name"], row["dtype"], row["shape"]
        good = isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)
        if not good or len(name) > 4000 or dtype not in DTYPES or len(shape) > RANK_MAX:
            raise odd(where, f"an array of {printable(str(dtype))[:40]}")
        if not all(type(d) is int and 0 <= d < 1 << 40 for d in shape):
            raise odd(where, "an array with impossible sizes")
        size = int(dtype[2:])
        # numpy refuses an empty array, too, where the sizes that are not zero pass its integers.
        if math.prod(d or 1 for d in shape) * size >= 1 << 63:
            raise odd(where, "an array with impossible sizes")
        total += math.prod(shape) * size
    if total > ARRAYS_MAX:
        raise BadInput(
            f"{where} gave outputs of {total} bytes",
            expected=f"at most {ARRAYS_MAX}",
            hint="check the sizes in the model",
        )
    return total


def printable(text: str) -> str:
    """A device's words on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
