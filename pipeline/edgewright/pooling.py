"""Several built models in one bundle: what they have in common is stored, and signed, once.

Each model keeps its graph, its golden vectors and the evidence of its own bundle; nothing of it
is computed anew. The golden outputs are compared with the models as they will be opened, their
weights shared: that is another kernel now and then, so they hold by tolerance, not by the bit.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgewright.build import Watch
from edgewright.build import pool as pooled
from edgewright.bundle import assemble, bom, manifest, provenance, runner
from edgewright.bundle.manifest import Manifest
from edgewright.device.selftest import self_test
from edgewright.device.verify import extract
from edgewright.errors import UsageError
from edgewright.files import replacing
from edgewright.keys import code_digest
from edgewright.target import Target, load_target

Json = dict[str, Any]
ALIKE = ("target", "device", "compatible")  # of all bundles; the runtime aside from its operators
WORST_FIRST = ("FAIL", "INCONCLUSIVE", "PASS")
EVIDENCE = {manifest.PATH, manifest.SIGNATURE, manifest.PROVENANCE, manifest.SBOM}
EVIDENCE |= {manifest.GATE_REPORT, manifest.BENCHMARK, manifest.PAGE}
BUILD_TYPE = "urn:edgewright:pool:1"


@dataclass(frozen=True)
class Part:
    """One of the bundles, verified and unpacked."""

    folder: Path
    facts: Manifest

    @property
    def name(self) -> str:
        found: str = self.facts["name"]
        return found

    @property
    def manifest_digest(self) -> str:
        return hashlib.sha256((self.folder / manifest.PATH).read_bytes()).hexdigest()


def pool_bundles(
    bundles: Sequence[Path],
    target: Target | None,
    out: Path,
    *,
    name: str,
    version: str,
    sequence: int | None,
    watch: Watch,
) -> Json:
    """Write one bundle of the models of several, all or nothing; the pool's report.

    `target`: the profile where it is the user's own. `sequence` None: the sum of theirs, which
    grows with any of them. UsageError where they are not for one device and runtime.
    """
    with tempfile.TemporaryDirectory(prefix="edgewright-", dir=out.absolute().parent) as scratch:
        work = Path(scratch)
        parts = []
        for k, bundle in enumerate(bundles):
            facts = extract(bundle, folder := work / f"part-{k}")
            parts.append(Part(folder, facts))
        check_alike(parts)
        models = {part.name: part.folder / part.facts["model"]["path"] for part in parts}
        report = pooled(models, load_target("cpu"), work / "pool", watch)
        facts, files = contents(parts, work / "pool")
        facts |= {"name": name, "version": version}
        if sequence is not None:
            facts["sequence"] = sequence
        facts, files, entries = documents(facts, files, parts)
        with replacing(out) as temporary:
            digest, rows = assemble.archive(temporary, facts, files, entries)
            proof = self_test(temporary, target, folder=work)
        return {
            "bundle": str(out),
            "sha256": digest,
            "bytes": out.stat().st_size,
            "separate_bundle_bytes": sum(path.stat().st_size for path in bundles),
            "verdict": facts["gate"]["verdict"] if facts["gate"] else None,
            "files": rows,
            "self_test": {k: proof[k] for k in ("vectors", "max_abs")},
            **report,
            "notes": [*report["notes"], *(left_out(part) for part in parts if formats(part))],
        }


def check_alike(parts: Sequence[Part]) -> None:
    """UsageError unless all are for one device and runtime, and no two have one name."""
    names = [part.name for part in parts]
    if len({name.lower() for name in names}) != len(names):
        raise UsageError("pool", expected="bundles of different models", found=", ".join(names))
    for part in parts:
        if "pool" in part.facts:
            raise UsageError(
                f"{part.name} holds several models already",
                hint="pool the bundles that it was made of",
            )
        for key, ours, theirs in (
            *((key, parts[0].facts[key], part.facts[key]) for key in ALIKE),
            ("runtime", runtime(parts[0]), runtime(part)),
        ):
            if ours != theirs:
                raise UsageError(
                    f"{parts[0].name} and {part.name} cannot go in one bundle",
                    expected=f"the same {key}: {json.dumps(ours, sort_keys=True)[:200]}",
                    found=json.dumps(theirs, sort_keys=True)[:200],
                    hint="build them for one target, with one runtime",
                )
    files = [row for part in parts for row in part.facts["files"]]
    programs = {row["sha256"] for row in files if row["mode"] == "0755"}
    if len(programs) > 1:
        raise UsageError(
            "these bundles cannot go in one",
            expected=f"the same {manifest.RUNNER}",
            found=f"{len(programs)} of them",
            hint="build them with one compiler, or all but one without release.runner",
        )


def formats(part: Part) -> list[Json]:
    """Its formats beside ONNX."""
    found: list[Json] = part.facts.get("formats", [])
    return found


def left_out(part: Part) -> Json:
    names = ", ".join(row["path"] for row in formats(part))
    text = f"{part.name}: {names} is left out, as it keeps no weights in another file"
    return {"level": "warning", "text": text}


def runtime(part: Part) -> Json:
    """What a device needs to run it, whatever its operators."""
    return {k: v for k, v in part.facts["runtime"].items() if k != "operators"}


def contents(parts: Sequence[Part], made: Path) -> tuple[Manifest, dict[str, bytes | Path]]:
    """The manifest's facts, and the files of the bundle, evidence of the whole aside."""
    files: dict[str, bytes | Path] = {
        manifest.WEIGHTS: made / "weights.bin",
        manifest.PLACES: made / "weights.json",
    }
    operators: dict[str, set[str]] = {}
    rows = []
    for part in parts:
        name, facts = part.name, part.facts
        path = made / f"{name}.onnx"
        here = {"path": f"model/{name}.onnx", **digest_of(path)}
        golden = {key: f"model/golden/{name}/{key[:-4]}.npz" for key in ("inputs", "outputs")}
        files[here["path"]] = path
        for key in ("inputs", "outputs"):
            files[golden[key]] = part.folder / facts["golden"][key]
        for listed in (manifest.PATH, manifest.SIGNATURE, *(f["path"] for f in facts["files"])):
            if listed in EVIDENCE and (part.folder / listed).exists():
                files[f"models/{name}/{listed}"] = part.folder / listed
            elif listed.startswith(manifest.LICENSES):
                put_licence(files, listed, part)
        model = onnx.load(str(path), load_external_data=False)
        for key, names in assemble.operators(model).items():
            operators.setdefault(key, set()).update(names)
        # Weights that are shared are not rearranged: another kernel, another last bit.
        made_with = {**facts["golden"]["made_with"], "exact": False}
        rows.append(
            {
                "name": name,
                "version": facts["version"],
                "manifest": part.manifest_digest,
                "model": {**facts["model"], **here, "ir_version": model.ir_version},
                "golden": {**facts["golden"], **golden, "made_with": made_with},
                "limits": facts["limits"],
            }
        )
    table = {key: sorted(operators[key]) for key in sorted(operators)}
    alone = put_runner(files, parts, rows)
    files[manifest.LOCK] = parts[0].folder / manifest.LOCK
    files[manifest.OPERATORS] = assemble.operators_text(table)
    first = parts[0].facts
    ends = [e for part in parts if (e := part.facts["expires"]) is not None]
    sequences = [part.facts["sequence"] for part in parts]
    pool = {"weights": manifest.WEIGHTS, "places": manifest.PLACES, "models": rows}
    return {
        **{key: value for key, value in first.items() if key not in ("formats", "runner")},
        "sequence": sum(sequences) if all(sequences) else 0,
        "source_date_epoch": max(part.facts["source_date_epoch"] for part in parts),
        "expires": min(ends, default=None),
        "runtime": {**first["runtime"], "operators": table},
        **{key: rows[0][key] for key in ("model", "golden", "limits")},
        "pool": pool,
        **({"runner": alone} if alone else {}),
    }, files


def digest_of(path: Path) -> Json:
    """The model's digest and size as the manifest has them."""
    row = assemble.entry("", path)
    return {"sha256": row["sha256"], "bytes": row["size"]}


def put_runner(
    files: dict[str, bytes | Path], parts: Sequence[Part], rows: Sequence[Json]
) -> Json | None:
    """The runner that a part holds, and options for each model; the manifest's `runner`."""
    part = next((part for part in parts if "runner" in part.facts), None)
    if part is None:
        return None
    row = part.facts["runner"]
    files[manifest.RUNNER] = part.folder / row["path"]
    named = {f"bin/{one['name']}.options": {**part.facts, **one} for one in rows}
    files |= {path: runner.options(facts) for path, facts in named.items()}
    return {**row, "path": manifest.RUNNER, "options": list(named)}


def put_licence(files: dict[str, bytes | Path], listed: str, part: Part) -> None:
    """A licence text under its name, or where another one has that, under the model's."""
    source = part.folder / listed
    known = files.get(listed)
    if isinstance(known, Path) and known.read_bytes() != source.read_bytes():
        listed = f"{manifest.LICENSES}{part.name}-{listed.removeprefix(manifest.LICENSES)}"
    files[listed] = source


def documents(
    facts: Manifest, files: dict[str, bytes | Path], parts: Sequence[Part]
) -> tuple[Manifest, dict[str, bytes | Path], dict[str, Json]]:
    """The whole's own gate report, bill of materials and provenance, of what its parts say.

    Last, the manifest's lines of the files that are hashed.
    """
    facts = {**facts, "gate": None}
    if all(part.facts["gate"] for part in parts):
        report = gate(parts)
        files[manifest.GATE_REPORT] = manifest.canonical(report)
        facts["gate"] = {"verdict": report["verdict"], "report": manifest.GATE_REPORT}
    boms = [json.loads((part.folder / manifest.SBOM).read_bytes()) for part in parts]
    files[manifest.SBOM] = bom.merged(facts, [part.name for part in parts], boms)
    entries = assemble.completed({}, files)
    files[manifest.PROVENANCE] = provenance.document(
        [row for _, row in sorted(entries.items())],
        build_type=BUILD_TYPE,
        external={"name": facts["name"], "version": facts["version"]},
        sources=[("bundle", f"{part.name} manifest.json", part.manifest_digest) for part in parts],
        versions={"code": code_digest()},
    )
    return facts, files, entries


def gate(parts: Sequence[Part]) -> Json:
    """One report of all gates: the worst verdict, every check under its model's name."""
    verdicts, checks = [], []
    for part in parts:
        report = json.loads((part.folder / part.facts["gate"]["report"]).read_bytes())
        verdicts.append(part.facts["gate"]["verdict"])
        checks += [{**c, "name": f"{part.name} {c['name']}"} for c in report.get("checks", [])]
    return {"verdict": min(verdicts, key=WORST_FIRST.index), "checks": checks}
