"""What a bundle says of itself, in one place: who signed it, what it was built from, what it needs.

Everything is read from the bundle after every digest in it was checked. What is not signed by a
key the reader trusts is the bundle's own word, and is shown as such.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from edgewright.bundle import manifest
from edgewright.device import envelope
from edgewright.device.envelope import Trust
from edgewright.device.verify import Verified, naming, open_bundle, walk
from edgewright.errors import IntegrityError
from edgewright.report.tables import find, number, rows, table

Json = dict[str, Any]
MAX_BYTES = 8 << 20  # of a document that is read into memory
DOCUMENTS = (manifest.PROVENANCE, manifest.SBOM, manifest.GATE_REPORT, manifest.BENCHMARK)


def documents(
    bundle: Path, trust: Trust | None, paths: Sequence[str] = DOCUMENTS
) -> tuple[Verified, dict[str, Json]]:
    """The verified bundle and the JSON documents in it; one that it lacks is left out."""
    kept: dict[str, bytes] = {}

    @contextmanager
    def keep(path: str) -> Iterator[BinaryIO | None]:
        file = Bounded(path)
        yield file
        kept[path] = file.getvalue()

    def sink(path: str, mode: int) -> AbstractContextManager[BinaryIO | None]:
        return keep(path) if path in paths else nullcontext()

    with open_bundle(bundle) as stream, naming(bundle):
        found = walk(stream, sink, trust)
        return found, {path: parsed(path, data) for path, data in kept.items()}


class Bounded(io.BytesIO):
    """A document on its way into memory, of no more than MAX_BYTES."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_BYTES:
            raise IntegrityError(f"{self.path} is too long", expected=f"{MAX_BYTES} bytes")
        return super().write(data)


def parsed(path: str, data: bytes) -> Json:
    """A JSON object; IntegrityError for anything else, deep nesting included."""
    try:
        value = json.loads(data) if manifest.depth(data) <= manifest.MAX_DEPTH else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} in the bundle", expected="a JSON object")
    return value


def explain(bundle: Path, trust: Trust | None) -> Json:
    """All of it as data: "bundle", "signature", "built_from", "gate", "needs", "contents"."""
    found, parts = documents(bundle, trust)
    facts = found.manifest
    build = table(find(parts.get(manifest.PROVENANCE), "predicate", "buildDefinition"))
    run = table(find(parts.get(manifest.PROVENANCE), "predicate", "runDetails"))
    return {
        "bundle": {key: facts[key] for key in ("name", "version", "target", "sequence", "expires")},
        "signature": {"keys": found.signers, "trusted": trust is not None},
        "built_from": {
            "sources": [
                {
                    "use": find(row, "annotations", "use"),
                    "name": find(row, "name"),
                    "sha256": find(row, "digest", "sha256"),
                }
                for row in rows(build.get("resolvedDependencies"))
            ],
            "settings": table(find(build, "externalParameters", "recipe")),
            "stages": [
                {
                    "stage": find(row, "annotations", "stage"),
                    "sha256": find(row, "digest", "sha256"),
                }
                for row in rows(run.get("byproducts"))
            ],
            "versions": table(find(run, "builder", "version")),
            "level": find(build, "internalParameters", "level"),
        },
        "gate": parts.get(manifest.GATE_REPORT),
        "evidence": parts.get(manifest.BENCHMARK),
        "model": facts["model"],
        "pool": facts.get("pool"),
        "formats": facts.get("formats", []),
        "runner": facts.get("runner"),
        "needs": {
            "device": facts["device"],
            "compatible": facts["compatible"],
            "runtime": {k: v for k, v in facts["runtime"].items() if k != "operators"},
            "operators": facts["runtime"]["operators"],
            "limits": facts["limits"],
        },
        "contents": facts["files"],
    }


def lines(found: Json) -> list[tuple[str, str]]:
    """The same for people: pairs of a word and a text."""
    about, model, needs = found["bundle"], found["model"], found["needs"]
    out = [("bundle", f"{about['name']} {about['version']} for {about['target']}")]
    out.append(("sequence", str(about["sequence"] or "0: not set, going back is not prevented")))
    if about["expires"] is not None:
        out.append(("expires", envelope.day(about["expires"])))
    for source in found["built_from"]["sources"]:
        out.append((f"from {source['use']}", f"{source['name']}, sha256 {source['sha256']}"))
    for stage in found["built_from"]["stages"]:
        out.append((f"after {stage['stage']}", f"sha256 {stage['sha256']}"))
    if found["pool"]:
        for one in found["pool"]["models"]:
            size = f"{one['model']['bytes']} bytes, sha256 {one['model']['sha256']}"
            out.append(("model", f"{one['name']} {one['version']}: {size}"))
        weights = next(f for f in found["contents"] if f["path"] == found["pool"]["weights"])
        text = f"{weights['size']} bytes, sha256 {weights['sha256']}, of all models"
        out.append(("weights", text))
    else:
        out.append(("model", f"{model['bytes']} bytes, sha256 {model['sha256']}"))
    sizes = {file["path"]: file["size"] for file in found["contents"]}
    for row in found["formats"]:
        marked = (
            "" if row["reproducible"] else "; not reproducible, two builds may give other bytes"
        )
        what = f"{row['path']}: {sizes[row['path']]} bytes, version {row['version']}{marked}"
        out.append((f"as {row['format']}", what))
    if runner := found["runner"]:
        needed = f", glibc {runner['glibc']} or later" if runner["glibc"] else ""
        how = " or ".join(f"{runner['path']} @{options}" for options in runner["options"])
        out.append(("runs without Python", f"{how}: {sizes[runner['path']]} bytes{needed}"))
    if quantization := model["quantization"]:
        scheme = f"{quantization['int8_nodes']} nodes int8, {quantization['float_nodes']} float"
        out.append(("int8", scheme))
    for key, value in flat(found["built_from"]["settings"]):
        out.append((f"set {key}", value))
    versions = found["built_from"]["versions"]
    out.append(("versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))))
    out.append(("provenance", str(found["built_from"]["level"] or "none")))
    if metric := table(find(found["evidence"], "metric")):
        out.append(("metric", metric_text(metric)))
    gate = table(found["gate"])
    out.append(("gate", str(gate.get("verdict", "none: nothing says that it may ship"))))
    for check in rows(gate.get("checks")):
        limit = "" if check.get("limit") is None else f", limit {check['limit']}"
        value = f" {check['value']}" if "value" in check else ""
        out.append((f"gate {check.get('name')}", f"{check.get('verdict')}{value}{limit}"))
    runtime, limits = needs["runtime"], needs["limits"]
    device = " ".join([needs["device"]["arch"], *needs["device"]["isa"], *needs["compatible"]])
    out.append(("needs device", device))
    between = f"{runtime['min']} or later, {runtime['max']} (proven with {runtime['exact']})"
    out.append(("needs runtime", f"{runtime['name']} {between}, {runtime['provider']}"))
    bounds = [f"{k} {v}" for k, v in limits.items() if v is not None]
    out.append(
        ("needs room", f"{sum(f['size'] for f in found['contents'])} bytes; " + ", ".join(bounds))
    )
    return out


def metric_text(metric: Json) -> str:
    """The metric of what ships, how much of the original's it is, and the bounds of the loss."""
    text = f"{metric.get('name')}: {find(metric, 'shipped', 'score')}"
    if (kept := number(find(metric, "shipped", "retained"))) is not None:
        text += f", {kept:.2%} of the original's {find(metric, 'original', 'score')}"
    paired = table(metric.get("paired"))
    bounds = [number(paired.get(f"mean_loss{end}")) for end in ("", "_low", "_high")]
    if None not in bounds:
        mean, low, high = bounds
        text += f"; mean loss per sample {mean:.4g} ({low:.4g} to {high:.4g})"
    return text


def flat(settings: Json, above: str = "") -> Iterator[tuple[str, str]]:
    """The keys of nested tables as dotted names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", json.dumps(value)
