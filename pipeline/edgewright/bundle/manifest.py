"""The bundle's manifest: what it says, how it is spelt, how it is checked.

`schema/manifest.schema.json` is the format (JSON Schema 2020-12). Reading assumes an enemy:
size, nesting, duplicate keys, number range, canonical form and digest are checked before the
schema, and what the schema cannot say after it. All of it with the standard library alone, for
this runs on the device.
"""

import hashlib
import json
import pkgutil
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from edgewright import schema
from edgewright.bundle import canonical as jcs
from edgewright.bundle.tarball import paths_fault
from edgewright.errors import BadInput, IntegrityError

Manifest = dict[str, Any]

FORMAT = "edgewright-bundle"
MAJOR = 1
PATH = "manifest.json"
MODEL = "model/model.onnx"
GOLDEN_INPUTS = "model/golden/in.npz"
GOLDEN_OUTPUTS = "model/golden/out.npz"
ORT = "model/model.ort"  # on request: for runtimes without ONNX support
ORT_OPERATORS = "runtime/required_operators_and_types.config"
WEIGHTS = "model/weights.bin"  # in a bundle of several models: what they have in common
PLACES = "model/weights.json"
LOCK = "runtime/lock.txt"
OPERATORS = "runtime/required_operators.config"
GATE_REPORT = "report/gate.json"
RUNNER = "bin/edge-run"  # on request: for devices without Python
RUNNER_OPTIONS = "bin/edge-run.options"

# Places kept for what later versions add. The signature is the second member, right after the
# manifest it signs, so that a device refuses before it reads on; it is not in `files`, for it
# signs them. All others are ordinary files.
SIGNATURE = "manifest.dsse.json"
SBOM = "sbom.cdx.json"
PROVENANCE = "provenance.intoto.json"
LICENSES = "LICENSES/"
BENCHMARK = "report/bench.json"
PAGE = "report/report.html"

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
# Not by its path: in the device program this file lies in a zip.
SCHEMA: dict[str, Any] = json.loads(
    pkgutil.get_data("edgewright.bundle", "schema/manifest.schema.json") or b""
)
# A whole string, closed or not, or one bracket: linear in the input, whatever the input.
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes; BadInput where JSON has no spelling for a value."""
    try:
        return jcs.dumps(value)
    except ValueError as error:
        raise BadInput("the bundle cannot hold this value", found=str(error)) from None


def digest(manifest: Manifest) -> str:
    """SHA-256 of the manifest in canonical form without its own `digest`."""
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def dump(manifest: Manifest) -> bytes:
    """The bytes of a manifest, digest added; BadInput where it breaks its own format."""
    whole = {**manifest, "digest": digest(manifest)}
    if fault := manifest_fault(whole):
        raise BadInput(
            "this build does not fit the bundle format",
            found=fault,
            hint="change the name or value it speaks of, in the model, recipe or profile",
        )
    data = canonical(whole)
    if len(data) > MAX_BYTES:
        raise BadInput(
            "the manifest is too long", expected=f"{MAX_BYTES} bytes", found=str(len(data))
        )
    return data


def check(data: bytes) -> Manifest:
    """The manifest in these bytes, after every check that needs nothing but them.

    IntegrityError where it is not what this module writes; BadInput for another major format.
    """
    if len(data) > MAX_BYTES:
        refuse(f"at most {MAX_BYTES} bytes", str(len(data)))
    if depth(data) > MAX_DEPTH:
        refuse(f"at most {MAX_DEPTH} levels of nesting", "more")
    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=not_a_number)
        again = jcs.dumps(value)
    except ValueError as error:
        refuse("canonical JSON (RFC 8785)", " ".join(str(error).split())[:200])
    if again != data:
        refuse("canonical JSON (RFC 8785)", "another spelling")
    if not isinstance(value, dict):
        refuse("a JSON object", type(value).__name__)
    if isinstance(value.get("digest"), str) and value["digest"] != digest(value):
        refuse("the digest it states", "other content")
    check_major(value.get("schema"))
    if fault := manifest_fault(value):
        refuse(f"the format {FORMAT}/{MAJOR}", fault)
    return value


def refuse(expected: str, found: str) -> NoReturn:
    raise IntegrityError(
        "the bundle's manifest is refused",
        expected=expected,
        found=found,
        hint="fetch the bundle again, from the source you trust",
    )


def depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, at most one above the limit."""
    now = deepest = 0
    for token in TOKEN.finditer(data):
        if token[0] in (b"[", b"{"):
            now += 1
            deepest = max(deepest, now)
            if deepest > MAX_DEPTH:
                break
        elif token[0] in (b"]", b"}"):
            now -= 1
    return deepest


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key appears twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return value


def not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def check_major(schema: Any) -> None:
    """Refuse other formats by name, so that a device that is too old says so."""
    stated = re.fullmatch(rf"{FORMAT}/([0-9]{{1,9}})", schema) if isinstance(schema, str) else None
    if stated is not None and int(stated[1]) != MAJOR:
        raise IntegrityError(
            "this bundle has another format",
            expected=f"{FORMAT}/{MAJOR}",
            found=stated[0],
            hint="install the edgewright version that wrote the bundle, or build it again",
        )


def manifest_fault(manifest: Manifest) -> str:
    """The first thing that is wrong with the content; empty where nothing is."""
    # Before the schema: in Python's patterns `$` lets a line break at the end pass.
    for text in texts(manifest):
        if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
            return f"a control character in {text[:80]!r}"
    return schema.fault(manifest, SCHEMA, "manifest")[:200] or files_fault(manifest)


def texts(value: Any) -> Iterator[str]:
    """All strings and keys of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)


def files_fault(manifest: Manifest) -> str:
    """What is wrong between the list of files and the rest of the manifest."""
    files = {entry["path"]: entry for entry in manifest["files"]}
    paths = [entry["path"] for entry in manifest["files"]]
    if fault := paths_fault([PATH, SIGNATURE, *paths]):
        return f"files: {fault}"
    if paths != sorted(paths):
        return "files: not sorted by path"
    gate, pool = manifest["gate"], manifest.get("pool")
    named = [gate["report"]] if gate is not None else []
    parts = [manifest]
    if pool is not None:
        parts = pool["models"]
        if any(parts[0][key] != manifest[key] for key in ("model", "golden", "limits")):
            return "pool: its first model is not the one that the manifest speaks of"
        if len({part["name"].lower() for part in parts}) != len(parts):
            return "pool: two models have one name"
        named += [pool["weights"], pool["places"]]
    for row in manifest.get("formats", ()):
        named += [row["path"], row["config"]]
    for part in parts:
        named += [part["model"]["path"], part["golden"]["inputs"], part["golden"]["outputs"]]
    runner = manifest.get("runner")
    if runner is not None:
        named += [runner["path"], *runner["options"]]
        if len(runner["options"]) != len(parts):
            return "runner: not one file of options for each model"
    for path in named:
        if path not in files:
            return f"files: {path!r} is used but not listed"
    if len(set(named)) != len(named):
        return "files: one file has two uses"
    runnable = [path for path, entry in files.items() if entry["mode"] == "0755"]
    if runnable != ([runner["path"]] if runner is not None else []):
        return "files: mode 0755 is for the runner, and for it alone"
    for part in parts:
        if fault := model_fault(part["model"], part["golden"], files):
            return fault
    if manifest["runtime"]["threads"] > manifest["limits"]["max_threads"]:
        return "runtime: more threads than the limits allow"
    return ""


def model_fault(model: Manifest, golden: Manifest, files: dict[str, Manifest]) -> str:
    """What is wrong between a model, its golden vectors and the list of files."""
    entry = files[model["path"]]
    if (entry["sha256"], entry["size"]) != (model["sha256"], model["bytes"]):
        return "model: digest or size differs from the list of files"
    if [t["output"] for t in golden["tolerances"]] != [o["name"] for o in model["outputs"]]:
        return "golden: tolerances are not those of the model's outputs"
    for key in ("inputs", "outputs"):
        names = [value["name"] for value in model[key]]
        if len(set(names)) != len(names):
            return f"model: two {key} have one name"
    return ""
