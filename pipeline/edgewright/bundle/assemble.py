"""Making a bundle: its files, the manifest that names them, the archive around them."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgewright import data, keys
from edgewright import model as models
from edgewright.bundle import (
    bom,
    evidence,
    formats,
    golden,
    manifest,
    packages,
    provenance,
    runner,
    tarball,
    transport,
)
from edgewright.errors import BadInput, IntegrityError, UsageError
from edgewright.recipe import expiry
from edgewright.runtime.launch import open_on_target
from edgewright.runtime.session import RUN_TIMEOUT_S
from edgewright.stage import Job, Report

MODE, PROGRAM_MODE = 0o644, 0o755
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----")
DATA = ("calibration", "evaluation")
QUANTIZING = re.compile(r"[Qq]uantize|Integer|^Q[A-Z]|NBits")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Golden inputs and outputs, how near is near enough, and what made them."""

    feeds: list[data.Feed]
    outputs: list[data.Feed]
    tolerances: list[dict[str, Any]]
    made_with: dict[str, Any]
    reason: str


def run(job: Job) -> Report:
    """Write the bundle into the job's folder; see `edgewright.bundle.run`."""
    time_stamp = epoch(os.environ.get("SOURCE_DATE_EPOCH", ""))
    path = job.input_model()
    model = load(path)
    proof = prove(job, path, model)
    others, more = formats.make(job, path, proof.feeds, proof.outputs, proof.tolerances)
    found = packages.packages(job.target)
    files: dict[str, bytes | Path] = {
        manifest.MODEL: path,
        manifest.GOLDEN_INPUTS: golden.write_npz(golden.stack(proof.feeds)),
        manifest.GOLDEN_OUTPUTS: golden.write_npz(golden.stack(proof.outputs)),
        manifest.LOCK: packages.lock(found),
        manifest.OPERATORS: operators_config(model),
        **licenses(job, found),
        **more,
    }
    verdict, gate = None, None
    if gate_report := job.reports.get("gate"):
        judged = manifest.canonical(evidence.public(gate_report))
        files[manifest.GATE_REPORT] = judged
        gate = json.loads(judged)  # as a rebuild reads it: 1.0 has become 1
        verdict = {"verdict": gate_report["verdict"], "report": manifest.GATE_REPORT}
    entries = completed({}, files)
    facts = describe(job, model, proof, verdict, time_stamp, entries)
    if others:
        facts["formats"] = others
    alone = runner.make(job, facts, files)
    if alone.row is not None:
        facts["runner"] = alone.row
        files |= alone.files
        entries = completed(entries, files)
    bench = evidence.benchmark(job.reports, {**facts["model"], "nodes": len(model.graph.node)})
    sources = [*read_by(job), *alone.tools]
    files[manifest.BENCHMARK] = manifest.canonical(bench)
    files[manifest.PAGE] = evidence.page(facts, bench, gate)
    files[manifest.SBOM] = bom.bom(
        facts,
        found,
        [row for row in sources if row[0] in DATA],
        job.reports,
        job.recipe.release.license,
        entries.get(manifest.RUNNER),
    )
    entries = completed(entries, files)
    # What may have other bytes another time would let the statement differ, too.
    may_differ = {row["path"] for row in others if not row["reproducible"]}
    subjects = [row for name, row in sorted(entries.items()) if name not in may_differ]
    files[manifest.PROVENANCE] = provenance.statement(
        job.recipe, job.target, subjects, sources, job.reports
    )
    settings = job.recipe.model
    out = job.folder / f"{settings.name}-{settings.version}-{job.target.name}.bundle.tar"
    digest, rows = archive(out, facts, files, entries)
    for source in more.values():
        if isinstance(source, Path):
            source.unlink()  # it is in the bundle
    sent = None
    if job.recipe.share is not None and job.recipe.share.compress:
        job.tell("compressing the bundle")
        packed = transport.compress(out)
        sent = {"bundle": packed.name, "bytes": packed.stat().st_size}
    return {
        "bundle": out.name,
        "sha256": digest,
        "bytes": out.stat().st_size,
        "compressed": sent,
        "files": rows,
        "formats": [{**row, "bytes": entries[row["path"]]["size"]} for row in others],
        "golden": {"count": len(proof.feeds), "tolerances": proof.tolerances},
        "notes": [*remarks(job, proof), *formats.remarks(others, entries), *alone.notes],
    }


def archive(
    out: Path,
    facts: manifest.Manifest,
    files: dict[str, bytes | Path],
    entries: dict[str, dict[str, Any]],
) -> tuple[str, list[dict[str, Any]]]:
    """Write the bundle of these facts and files; its SHA-256 and the manifest's list of files.

    entries: the lines of files that are hashed already.
    """
    refuse_keys(files)
    rows = [row for _, row in sorted(completed(entries, files).items())]
    text = manifest.dump({**facts, "files": rows})
    members: list[tuple[tarball.Member, bytes | Path, str]] = []
    for row in (entry(manifest.PATH, text), *rows):
        mode = int(row["mode"], 8)
        member = tarball.Member(row["path"], row["size"], mode, facts["source_date_epoch"])
        source = text if row["path"] == manifest.PATH else files[row["path"]]
        members.append((member, source, row["sha256"]))
    return tarball.write(out, members), rows


def completed(
    entries: dict[str, dict[str, Any]], files: dict[str, bytes | Path]
) -> dict[str, dict[str, Any]]:
    """The manifest's line of every file; only those that have none yet are hashed."""
    return {name: entries.get(name) or entry(name, source) for name, source in files.items()}


def entry(path: str, source: bytes | Path) -> dict[str, Any]:
    """A file's line in the manifest. Only the runner may be executed, see `files_fault`."""
    return {
        "path": path,
        "size": tarball.source_size(source),
        "sha256": tarball.source_digest(source),
        "mode": f"{PROGRAM_MODE if path == manifest.RUNNER else MODE:04o}",
    }


def load(path: Path) -> onnx.ModelProto:
    """The model to ship; BadInput where a part of it lies in another file."""
    bare = onnx.load(str(path), load_external_data=False)
    for graph in models.all_graphs(bare.graph):
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise BadInput(
                    f"{path.name} keeps weights in other files ('{tensor.name}')",
                    expected="one file that holds everything",
                    hint="take the model that the export stage writes",
                )
    return bare


def epoch(text: str) -> int:
    """The time stamp of every member: SOURCE_DATE_EPOCH, 0 where it is unset."""
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or int(text) > tarball.MAX_NUMBER:
        raise UsageError(
            "environment variable SOURCE_DATE_EPOCH",
            expected=f"whole seconds since 1970, 0 to {tarball.MAX_NUMBER}",
            found=ascii(text[:40]),
            hint="unset it, or set it with: export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)",
        )
    return int(text)


def prove(job: Job, path: Path, model: onnx.ModelProto) -> Proof:
    """Golden vectors: calibration samples through the target's own runtime."""
    # An emulated run can take seconds.
    most = golden.MIN_VECTORS if job.target.emulated else golden.MAX_VECTORS
    feeds = golden.choose(data.samples(job.recipe, models.input_specs(model), most), most)
    names = [value.name for value in model.graph.output]
    with open_on_target(path, job.target) as session:

        def outputs_of(feed: data.Feed) -> data.Feed:
            return dict(zip(names, session.run(feed), strict=True))

        outputs = []
        for k, feed in enumerate(feeds):
            job.tell("golden vectors", k, len(feeds))
            outputs.append(outputs_of(feed))
        again = outputs_of(feeds[0])
        runtime, flags = str(session.info["version"]), session.info["flags"]
    quantized = is_quantized(model)
    limits = golden.tolerances(outputs, quantized)
    exact = job.target.runtime.provider == "CPUExecutionProvider"
    for limit in limits:
        name = limit["output"]
        difference = golden.compare(again[name], outputs[0][name], limit)
        exact = exact and difference.equal
        if difference.fault:
            raise BadInput(
                f"output '{name}' changes from run to run",
                expected="the same output for the same input",
                found=difference.fault,
                hint="remove random operators; a device could not be proven against such a model",
            )
    share = golden.INT8_SHARE if quantized else golden.FLOAT_SHARE
    origin = golden.made_with(job.target, job.target.device.arch, runtime, flags)
    return Proof(
        feeds=feeds,
        outputs=outputs,
        tolerances=limits,
        made_with={**origin, "exact": exact},
        reason=golden.REASON.format(share=share),
    )


def remarks(job: Job, proof: Proof) -> list[dict[str, str]]:
    """What a reader of the report must know about this bundle."""
    texts = []
    if len(proof.feeds) < golden.MIN_VECTORS:
        count = len(proof.feeds)
        texts.append(f"golden vectors: {count}, as the calibration data holds no more samples")
    if job.target.runtime.provider == "CPUExecutionProvider" and not proof.made_with["exact"]:
        texts.append("two runs differ in the last bits, so golden outputs hold by tolerance only")
    if not job.recipe.release.license:
        texts.append("the model's licence is not known: the recipe has no release.license")
    if not job.reports.get("gate"):
        texts.append("bundled without a gate: nothing says that it may ship")
    return [{"level": "warning", "text": text} for text in texts]


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether any node computes with quantized values."""
    return any(QUANTIZING.search(node.op_type) for node in models.all_nodes(model.graph))


def licenses(job: Job, found: list[packages.Package]) -> dict[str, bytes]:
    """The licence texts of the model, where the recipe names one, and of what runs it."""
    texts = {name: text for one in found for name, text in one.texts.items()}
    if file := job.recipe.release.license_file:
        path = job.recipe.path(file)
        if not path.is_file():
            raise BadInput(f"release.license_file not found: {path}", hint="check the recipe")
        texts["model.txt"] = path.read_bytes()
    return {manifest.LICENSES + name: text for name, text in texts.items()}


def read_by(job: Job) -> list[tuple[str, str, str]]:
    """What the build read, as far as it is known here: use, file name, SHA-256."""
    settings = job.recipe.data
    wanted = [("calibration", settings.calibration)]
    if "export" in job.reports:
        wanted.append(("source", job.recipe.model.source))
    if "validate" in job.reports:
        wanted += [("evaluation", settings.evaluation), ("metric", settings.metric)]
    found = []
    for use, source in wanted:
        if source:
            digest, *beside = keys.content(job.recipe, source).splitlines()
            found.append((use, Path(source).name, digest))
            for line in beside:  # weights in other files
                name, _, digest = line.rpartition(":")
                found.append((use, name, digest))
    return found


def refuse_keys(files: dict[str, bytes | Path]) -> None:
    """IntegrityError where a file holds a private key: what ships is read by everyone."""
    for name, source in files.items():
        last = b""
        for block in tarball.source_blocks(source):
            if PRIVATE_KEY.search(last + block):
                raise IntegrityError(
                    f"{name} would carry a private key into the bundle",
                    hint="take the key out of what the recipe names, and use another key",
                )
            last = block[-64:]


def domain_name(domain: str) -> str:
    return domain or "ai.onnx"


def operators(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Operators by 'domain:version', those of nested graphs and of functions included."""
    versions = {domain_name(o.domain): o.version for o in model.opset_import}
    own = {(f.domain, f.name) for f in model.functions}
    nodes = list(models.all_nodes(model.graph))
    for function in model.functions:
        versions.update({domain_name(o.domain): o.version for o in function.opset_import})
        for node in function.node:
            nodes.append(node)
            for inner in models.subgraphs(node):
                nodes.extend(models.all_nodes(inner))
    table: dict[str, set[str]] = {}
    for node in nodes:
        if (node.domain, node.op_type) not in own:
            domain = domain_name(node.domain)
            table.setdefault(f"{domain}:{versions.get(domain, 1)}", set()).add(node.op_type)
    return {key: sorted(table[key]) for key in sorted(table)}


def operators_config(model: onnx.ModelProto) -> bytes:
    """ONNX Runtime's format for a reduced build: `domain;version;operator,operator` lines."""
    return operators_text(operators(model))


def operators_text(table: dict[str, list[str]]) -> bytes:
    """`operators` of one or of several models in that format."""
    lines = [f"{key.replace(':', ';')};{','.join(ops)}" for key, ops in table.items()]
    return ("\n".join(lines) + "\n").encode()


def describe(
    job: Job,
    model: onnx.ModelProto,
    proof: Proof,
    verdict: dict[str, str] | None,
    time_stamp: int,
    entries: dict[str, dict[str, Any]],
) -> manifest.Manifest:
    """The manifest of the bundle, its digest not yet added."""
    target, settings = job.target, job.recipe.model
    file = entries[manifest.MODEL]
    return {
        "schema": f"{manifest.FORMAT}/{manifest.MAJOR}",
        "name": settings.name,
        "version": settings.version,
        "target": target.name,
        "sequence": job.recipe.release.sequence,
        "source_date_epoch": time_stamp,
        "expires": expiry(day, "release.expires") if (day := job.recipe.release.expires) else None,
        "device": {"arch": target.device.arch, "isa": list(target.device.isa)},
        "compatible": list(target.device.compatible),
        "runtime": {
            "name": "onnxruntime",
            "exact": proof.made_with["runtime"],
            **version_range(proof.made_with["runtime"]),
            "provider": target.runtime.provider,
            "provider_options": dict(target.runtime.provider_options),
            "threads": target.runtime.threads,
            "session": dict(target.runtime.session),
            "operators": operators(model),
        },
        "model": {
            "path": manifest.MODEL,
            "sha256": file["sha256"],
            "bytes": file["size"],
            "opset": {domain_name(o.domain): o.version for o in model.opset_import},
            "ir_version": model.ir_version,
            "inputs": [models.value_facts(v) for v in models.real_inputs(model)],
            "outputs": [models.value_facts(v) for v in model.graph.output],
            "quantization": quantization(job.reports.get("quantize")),
        },
        "golden": {
            "inputs": manifest.GOLDEN_INPUTS,
            "outputs": manifest.GOLDEN_OUTPUTS,
            "count": len(proof.feeds),
            "tolerances": proof.tolerances,
            "made_with": proof.made_with,
            "reason": proof.reason,
        },
        "limits": limits(job),
        "gate": verdict,
        "files": [],
    }


def version_range(version: str) -> dict[str, str]:
    """The runtimes a device may use: nothing older than proven, nothing of the next major."""
    major, minor = version.split(".")[:2]
    return {"min": f"{major}.{minor}", "max": f"<{int(major) + 1}"}


def quantization(report: Report | None) -> dict[str, Any] | None:
    """What the quantize stage reports of the model, as plain facts."""
    if not report or not report.get("scheme"):
        return None
    placement = report.get("placement", [])
    runs_as = [row.get("runs_as") for row in placement]
    scope = report.get("scope")
    return {
        "scheme": {
            key: value
            for key, value in report["scheme"].items()
            if value is None or isinstance(value, (str, int, float, bool))
        },
        "scope": scope if scope is None or isinstance(scope, str) else ", ".join(scope),
        "int8_nodes": runs_as.count("int8"),
        "float_nodes": runs_as.count("float"),
    }


def limits(job: Job) -> dict[str, Any]:
    """What the device may give the model: budgets of profile and recipe, never measurements."""
    budget, wanted = job.target.budget, job.recipe.gate

    def lower(a: float | None, b: float | None) -> float | None:
        return min((v for v in (a, b) if v is not None), default=None)

    return {
        "max_threads": job.target.runtime.threads,
        "timeout_s": int(RUN_TIMEOUT_S),
        "max_memory_bytes": lower(budget.max_peak_memory_bytes, wanted.max_peak_memory_bytes),
        "max_model_bytes": lower(budget.max_size_bytes, wanted.max_size_bytes),
        "max_latency_ms": lower(budget.max_latency_ms, wanted.max_latency_ms),
    }
