"""Proving an unpacked bundle: golden vectors, memory and time, in a child process with limits.

Needs numpy and onnxruntime beside the standard library, so the device program holds it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.bundle import golden
from edgewright.bundle.manifest import Manifest
from edgewright.device.fit import check_runtime
from edgewright.errors import EnvironmentMissing, IntegrityError
from edgewright.runtime.session import RUN_TIMEOUT_S, Child, Launch, Session

if TYPE_CHECKING:
    from edgewright.target import Target

Report = dict[str, Any]
Arrays = dict[str, np.ndarray]
MEMORY_RUNS = 3  # the second run of a session may need more than the first


def prove(
    manifest: Manifest,
    folder: Path,
    launch: Launch,
    where: "Target | None" = None,
    child: Child | None = None,
) -> Report:
    """Run the golden vectors of the verified bundle in `folder` and compare.

    `where`: the profile that emulates the device; None: this machine is the device. `child`: a
    process that `launch` started before. Of several models every one is proven, opened with the
    weights that it shares.

    Returns {"ok", "vectors", "max_abs", "exact", "exact_expected", "runtime", "memory",
    "results"}, and for several models "models" with these of each. IntegrityError (exit 5) where
    outputs differ, EnvironmentMissing (exit 6) where this machine cannot run the bundle as it
    must be run.
    """
    pool = manifest.get("pool")
    if pool is None:
        return prove_one(manifest, folder, launch, where, child)
    places = read_places(folder / pool["places"])
    found = {}
    for part in pool["models"]:
        # By its name beside the model, as ONNX has it: on a remote device the folder is another.
        weights = Path(pool["weights"]).name
        shared = {"weights": weights, "places": places.get(part["name"], {})}
        one = {**manifest, **part}
        found[part["name"]] = prove_one(one, folder, launch, where, child, shared)
        child = None
    peaks = [row["memory"]["peak_bytes"] for row in found.values() if row["memory"]]
    return {
        **found[pool["models"][0]["name"]],
        "name": manifest["name"],
        "version": manifest["version"],
        "vectors": sum(row["vectors"] for row in found.values()),
        "max_abs": max(row["max_abs"] for row in found.values()),
        "exact": all(row["exact"] for row in found.values()),
        "exact_expected": all(row["exact_expected"] for row in found.values()),
        "memory": {"peak_bytes": max(peaks), "limit_bytes": None} if peaks else None,
        "models": found,
    }


def read_places(path: Path) -> dict[str, Report]:
    """Where each model's shared tensors lie; IntegrityError for anything but such a table."""
    try:
        table = json.loads(path.read_bytes())
        return {
            str(model): {
                str(name): (str(dtype), [int(n) for n in shape], int(offset))
                for name, (dtype, shape, offset) in rows.items()
            }
            for model, rows in table.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path.name} in the bundle", expected="places of tensors", found=ascii(str(error)[:99])
        ) from None


def prove_one(
    manifest: Manifest,
    folder: Path,
    launch: Launch,
    where: "Target | None",
    child: Child | None,
    shared: Report = {},
) -> Report:
    """Prove one model; `shared`: the weights' file and the places of its tensors there."""
    feeds = golden_vectors(manifest, folder, "inputs")
    outputs = golden_vectors(manifest, folder, "outputs")
    path = folder / manifest["model"]["path"]
    with open_session(manifest, path, launch, child, shared) as session:
        check_runtime(manifest, str(session.info["version"]))
        arch = manifest["device"]["arch"]
        version, flags = str(session.info["version"]), session.info.get("flags", ())
        here = golden.made_with(where, arch, version, flags)
        made_with = dict(manifest["golden"]["made_with"])
        exact_expected = made_with.pop("exact") and made_with == here
        results = [
            run_vector(manifest, session, feed, wanted, k, exact_expected)
            for k, (feed, wanted) in enumerate(zip(feeds, outputs, strict=True))
        ]
        memory = None if here["emulated"] else check_memory(manifest, session, feeds)
    formats = {
        row["format"]: prove_format(manifest, folder / row["path"], launch, feeds, outputs)
        for row in manifest.get("formats", ())
    }
    return {
        "ok": True,
        "name": manifest["name"],
        "version": manifest["version"],
        "target": manifest["target"],
        "vectors": len(results),
        "max_abs": max(row["max_abs"] for row in results),
        "exact": all(row["exact"] for row in results),
        "exact_expected": exact_expected,
        "runtime": {**here, "provider": manifest["runtime"]["provider"]},
        "memory": memory,
        "results": results,
        **({"formats": formats} if formats else {}),
    }


def prove_format(
    manifest: Manifest, path: Path, launch: Launch, feeds: list[Arrays], outputs: list[Arrays]
) -> Report:
    """The model in another format, with the same golden vectors; another graph, so by tolerance."""
    with open_session(manifest, path, launch, None, {}) as session:
        try:
            results = [
                run_vector(manifest, session, feed, wanted, k, exact=False)
                for k, (feed, wanted) in enumerate(zip(feeds, outputs, strict=True))
            ]
        except IntegrityError as error:
            raise IntegrityError(f"{path.name}: {error}") from None
    return {"vectors": len(results), "max_abs": max(row["max_abs"] for row in results)}


def open_session(
    manifest: Manifest, model: Path, launch: Launch, child: Child | None, shared: Report
) -> Session:
    """A session of the bundle's model with the bundle's own settings and limits."""
    runtime, limits = manifest["runtime"], manifest["limits"]
    factor = launch.time_factor * limits["timeout_s"] / RUN_TIMEOUT_S
    return Session(
        model,
        launch=replace(launch, time_factor=factor),
        child=child,
        name=f"{manifest['name']} {manifest['version']}",
        provider=runtime["provider"],
        provider_options=runtime["provider_options"],
        threads=runtime["threads"],
        session=runtime["session"],
        **shared,
    )


def golden_vectors(manifest: Manifest, folder: Path, key: str) -> list[Arrays]:
    """The golden "inputs" or "outputs" of the unpacked bundle, vector by vector."""
    facts = manifest["golden"]
    names = [value["name"] for value in manifest["model"][key]]
    return golden.unstack(golden.read_npz(folder / facts[key]), names, facts["count"])


def run_vector(
    manifest: Manifest, session: Session, feed: Arrays, wanted: Arrays, k: int, exact: bool
) -> Report:
    """Run one golden vector; IntegrityError with the figures where an output is too far off."""
    names = [value["name"] for value in manifest["model"]["outputs"]]
    found = dict(zip(names, session.run(feed, names), strict=True))
    worst, equal = 0.0, True
    for tolerance in manifest["golden"]["tolerances"]:
        name = tolerance["output"]
        difference = golden.compare(found[name], wanted[name], tolerance)
        fault = difference.fault
        if exact and not fault and not difference.equal:
            fault = f"max |difference| {difference.max_abs:.4g}, allowed none on this very CPU type"
        if fault:
            raise IntegrityError(
                f"self-test: golden vector {k + 1} of {manifest['golden']['count']}, "
                f"output {name!r}: {fault}",
                hint="do not use this bundle on this machine; compare `edgewright doctor` here "
                "with the machine that built it",
            )
        worst, equal = max(worst, difference.max_abs), equal and difference.equal
    return {"vector": k + 1, "max_abs": worst, "exact": equal}


def check_memory(manifest: Manifest, session: Session, feeds: list[Arrays]) -> Report:
    """Peak resident memory of the session's process against the bundle's limit."""
    session.keep_feeds(feeds[:1])
    peak = int(session.ask({"op": "memory", "runs": MEMORY_RUNS})[0]["peak_kib"]) * 1024
    limit = manifest["limits"]["max_memory_bytes"]
    if limit is not None and peak > limit:
        raise EnvironmentMissing(
            f"{manifest['name']} needs more memory on this machine than its bundle allows",
            expected=f"at most {limit} bytes",
            found=f"{peak}",
            hint="raise the budget in the target profile, or make the model smaller",
        )
    return {"peak_bytes": peak, "limit_bytes": limit}
