"""The bill of materials: CycloneDX 1.6 with the model's card, in canonical JSON.

Written by hand, as the library has no model card yet and gives every document a random number;
the tests hold it against the library's own validator. Nothing here depends on the day: the serial
number follows from the content, and the time is SOURCE_DATE_EPOCH, or absent.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from edgewright import __version__
from edgewright.bundle import manifest
from edgewright.bundle.packages import Package
from edgewright.stage import Report

Json = dict[str, Any]
OWN_LICENSE = "Apache-2.0"  # of this package, as its metadata has it
SPDX_ID = re.compile(r"[A-Za-z0-9.+-]+")
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "application/vnd.edgewright.bundle")


def bom(
    facts: manifest.Manifest,
    packages: Sequence[Package],
    datasets: Sequence[tuple[str, str, str]],
    reports: dict[str, Report],
    license: str,
    runner: Json | None = None,
) -> bytes:
    """The document. `facts`: the manifest's; `datasets`: what for, file name, SHA-256.

    runner: the manifest's line of the C runner, where the bundle holds it.
    """
    libraries = [library(one) for one in packages]
    programs = [program(runner)] if runner is not None else []
    needed = [part["bom-ref"] for part in libraries if part["name"].startswith("onnxruntime")]
    data = [dataset(*row) for row in datasets]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": facts["name"],
        "version": facts["version"],
        "hashes": [hash_of(facts["model"]["sha256"])],
        **licenses(license),
        "modelCard": card(facts, data, reports),
        "properties": properties(
            {
                "target": facts["target"],
                "bytes": facts["model"]["bytes"],
                "opset": ", ".join(f"{k} {v}" for k, v in facts["model"]["opset"].items()),
                "gate": (facts["gate"] or {}).get("verdict", "none"),
            }
        ),
    }
    document: Json = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "edgewright", "version": __version__}
                ]
            },
            "component": model,
        },
        "components": [*libraries, *programs, *data],
        "dependencies": [
            {"ref": "model", "dependsOn": [part["bom-ref"] for part in (*libraries, *data)]},
            *({"ref": part["bom-ref"], "dependsOn": needed} for part in programs),
        ],
    }
    return sealed(document, facts)


def merged(facts: manifest.Manifest, names: Sequence[str], documents: Sequence[Json]) -> bytes:
    """The document of a bundle of several models, of theirs.

    Libraries and programs once, all else by the model's name.
    """
    models: list[Json] = []
    parts: dict[str, Json] = {}
    dependencies: dict[str, Json] = {}
    for name, document in zip(names, documents, strict=True):
        model = document["metadata"]["component"]

        def renamed(ref: str, name: str = name) -> str:
            return ref if ref.startswith("pkg:") else f"{name}:{ref}"

        for part in document["components"]:
            parts[renamed(part["bom-ref"])] = {**part, "bom-ref": renamed(part["bom-ref"])}
        given = model["modelCard"]["modelParameters"]
        datasets = [{"ref": renamed(row["ref"])} for row in given["datasets"]]
        card_ = {**model["modelCard"], "modelParameters": {**given, "datasets": datasets}}
        models.append({**model, "bom-ref": renamed("model"), "modelCard": card_})
        for row in document["dependencies"]:
            needed = [renamed(one) for one in row["dependsOn"]]
            dependencies[renamed(row["ref"])] = {"ref": renamed(row["ref"]), "dependsOn": needed}
    whole = {
        "type": "application",
        "bom-ref": "bundle",
        "name": facts["name"],
        "version": facts["version"],
        "properties": properties(
            {"target": facts["target"], "gate": (facts["gate"] or {}).get("verdict", "none")}
        ),
    }
    holds = {"ref": "bundle", "dependsOn": [model["bom-ref"] for model in models]}
    first = documents[0]
    document = {key: first[key] for key in ("bomFormat", "specVersion", "version")}
    document |= {
        "metadata": {"tools": first["metadata"]["tools"], "component": whole},
        "components": [*models, *parts.values()],
        "dependencies": [holds, *dependencies.values()],
    }
    return sealed(document, facts)


def sealed(document: Json, facts: manifest.Manifest) -> bytes:
    """The document's bytes, with its time and a serial number that follows from its content."""
    if facts["source_date_epoch"]:
        moment = time.gmtime(facts["source_date_epoch"])
        document["metadata"]["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
    content = hashlib.sha256(manifest.canonical(document)).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, content)}"
    return manifest.canonical(document)


def hash_of(sha256: str) -> Json:
    return {"alg": "SHA-256", "content": sha256}


def properties(values: Json) -> list[Json]:
    """Facts that CycloneDX has no field for."""
    return [{"name": f"edgewright:{k}", "value": str(v)} for k, v in sorted(values.items())]


def licenses(text: str) -> Json:
    """An SPDX expression, or the name that a package gives itself; nothing where none is known."""
    if not text:
        return {}
    words = text.replace("(", " ").replace(")", " ").split()
    is_spdx = len(words) % 2 and all(
        word in ("AND", "OR", "WITH") if k % 2 else SPDX_ID.fullmatch(word)
        for k, word in enumerate(words)
    )
    if is_spdx:
        return {"licenses": [{"expression": text}]}
    return {"licenses": [{"license": {"name": text}}]}


def library(one: Package) -> Json:
    """A package that the device needs."""
    part: Json = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{one.name}@{one.version}",
        "name": one.name,
        "version": one.version,
        "purl": f"pkg:pypi/{one.name}@{one.version}",
        **licenses(one.license),
    }
    if one.wheel_sha256:
        part["hashes"] = [hash_of(one.wheel_sha256)]
    known = {"wheel": one.wheel, "record-sha256": one.record_sha256}
    part["properties"] = properties({k: v for k, v in known.items() if v})
    return part


def program(entry: Json) -> Json:
    """The C runner: our own code, compiled for this bundle."""
    ref = f"pkg:generic/edge-run@{__version__}?checksum=sha256:{entry['sha256']}"
    return {
        "type": "application",
        "bom-ref": ref,
        "name": "edge-run",
        "version": __version__,
        "purl": ref,
        "hashes": [hash_of(entry["sha256"])],
        **licenses(OWN_LICENSE),
        "properties": properties({"path": entry["path"]}),
    }


def dataset(use: str, name: str, sha256: str) -> Json:
    """Data that the build read, by digest; it is no part of the bundle."""
    return {
        "type": "data",
        "bom-ref": f"data:{use}",
        "name": name,
        "hashes": [hash_of(sha256)],
        "scope": "excluded",
        "data": [{"type": "dataset", "name": use}],
    }


def card(facts: manifest.Manifest, data: Sequence[Json], reports: dict[str, Report]) -> Json:
    """The model card: what goes in and out, from which data, how good, within which bounds."""
    formats = {
        key: [
            {"format": f"{v['name']}: {v['dtype']} {shape_text(v['shape'])}"}
            for v in facts["model"][key]
        ]
        for key in ("inputs", "outputs")
    }
    quantization = facts["model"]["quantization"]
    made: Json = {"modelParameters": {**formats, "datasets": [{"ref": d["bom-ref"]} for d in data]}}
    if metrics := performance(reports.get("validate")):
        made["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    runtime = facts["runtime"]
    limits = [
        f"proven on {facts['target']} with onnxruntime {runtime['exact']}, {runtime['provider']}"
    ]
    if quantization is None:
        limits.append("float weights and arithmetic")
    else:
        limits.append(
            f"{quantization['int8_nodes']} nodes in int8, {quantization['float_nodes']} in float"
        )
    made["considerations"] = {"technicalLimitations": limits}
    return made


def shape_text(shape: list[Any] | None) -> str:
    """A shape to read: free dimensions by their names."""
    if shape is None:
        return "of any rank"
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def performance(report: Report | None) -> list[Json]:
    """The user's metric of what ships and of the original, its bounds where samples are paired."""
    metric = (report or {}).get("metric") or {}
    shipped, original = metric.get("shipped") or {}, metric.get("original") or {}
    rows: list[Json] = []
    for value, slice_ in ((shipped.get("score"), "shipped"), (original.get("score"), "original")):
        if value is not None:
            rows.append({"type": str(metric.get("name")), "value": repr(value), "slice": slice_})
    if shipped.get("retained") is not None:
        rows.append(
            {"type": "metric kept", "value": repr(shipped["retained"]), "slice": "of the original"}
        )
    paired = metric.get("paired") or {}
    if paired.get("mean_loss") is not None:
        row: Json = {"type": "mean loss per sample", "value": repr(paired["mean_loss"])}
        row["slice"] = f"{paired.get('samples')} samples, against the original"
        if paired.get("mean_loss_low") is not None and paired.get("mean_loss_high") is not None:
            row["confidenceInterval"] = {
                "lowerBound": repr(paired["mean_loss_low"]),
                "upperBound": repr(paired["mean_loss_high"]),
            }
        rows.append(row)
    return rows
