"""Whether a bundle can be made again bit for bit from its recipe, and if not, what differs.

Everything but what a clock saw is done anew, without the cache. Figures of time and memory are in
no bundle; the gate's verdict, which rests on them, is taken from the bundle that is checked.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from edgewright.build import BUNDLES, Line, Watch
from edgewright.bundle import manifest
from edgewright.device.envelope import Trust
from edgewright.device.verify import Verified
from edgewright.errors import BadInput
from edgewright.explain import documents
from edgewright.keys import runner_tools
from edgewright.recipe import Recipe
from edgewright.report.tables import find, rows, table
from edgewright.runtime.launch import launch_for
from edgewright.runtime.providers import need_provider
from edgewright.runtime.ssh.link import held
from edgewright.target import Target

Json = dict[str, Any]
MEASURED = ("measure", "gate")  # what no second run gives again


def rebuild(
    bundle: Path, recipe: Recipe, target: Target, trust: Trust | None, watch: Watch
) -> Json:
    """Build again and compare; see `compare`. BadInput where the recipe is for another bundle."""
    old, there = documents(bundle, trust)
    wanted = (old.manifest["name"], old.manifest["target"])
    if (recipe.model.name, target.name) != wanted:
        raise BadInput(
            "the recipe is for another bundle",
            expected=f"{wanted[0]} for {wanted[1]}",
            found=f"{recipe.model.name} for {target.name}",
        )
    launch_for(target)
    need_provider(target)
    runner_tools(recipe, target)
    gate = there.get(manifest.GATE_REPORT)
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = str(old.manifest["source_date_epoch"])
    try:
        with held(target), tempfile.TemporaryDirectory(prefix="edgewright-rebuild-") as name:
            folder, work = Path(name) / "out", Path(name) / "work"
            folder.mkdir()
            work.mkdir()
            told = {"gate": gate} if gate is not None else {}
            line = Line(recipe, target, folder, work, None, watch, told=told)
            for stage in line.stages():
                if stage not in MEASURED:
                    line.advance(stage)
            (made,) = (p for p in line.done["bundle"].folder.glob(BUNDLES) if p.suffix == ".tar")
            new, here = documents(made, None)
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
        else:
            os.environ["SOURCE_DATE_EPOCH"] = before
    return compare(old, there, new, here)


def compare(old: Verified, there: dict[str, Json], new: Verified, here: dict[str, Json]) -> Json:
    """{"identical", "as_declared", "stage", "files", "inputs", ...}: what differs of each.

    "stage" is the first one whose model differs, "" where all are equal; the others are rows of
    a name, what it was "there" (in the bundle) and what it is "here". "marked": the files that
    the bundle says are not reproducible; "as_declared": no other file differs.
    """
    stages = differing(*(by_name(d, "runDetails", "byproducts", "stage") for d in (there, here)))
    files = differing(*({f["path"]: f["sha256"] for f in v.manifest["files"]} for v in (old, new)))
    marked = [r["path"] for r in old.manifest.get("formats", ()) if not r["reproducible"]]
    identical = old.manifest_bytes == new.manifest_bytes
    return {
        "identical": identical,
        "as_declared": identical or (bool(files) and {row["name"] for row in files} <= {*marked}),
        "stage": stages[0]["name"] if stages else "",
        "stages": stages,
        "marked": marked,
        "files": files,
        "inputs": differing(
            *(by_name(d, "buildDefinition", "resolvedDependencies", "use") for d in (there, here))
        ),
        "settings": differing(
            *(
                table(find(predicate(d), "buildDefinition", "externalParameters"))
                for d in (there, here)
            )
        ),
        "versions": differing(
            *(table(find(predicate(d), "runDetails", "builder", "version")) for d in (there, here))
        ),
    }


def predicate(documents: dict[str, Json]) -> Json:
    return table(find(documents.get(manifest.PROVENANCE), "predicate"))


def by_name(documents: dict[str, Json], part: str, rows_of: str, label: str) -> Json:
    """Digests by what they are for, of a list of resource descriptors."""
    found = rows(find(predicate(documents), part, rows_of))
    return {f"{find(row, 'annotations', label)}": find(row, "digest", "sha256") for row in found}


def differing(there: Json, here: Json) -> list[Json]:
    """What is not the same in both, in the order of `there`."""
    names = [*there, *(name for name in here if name not in there)]
    return [
        {"name": name, "there": there.get(name), "here": here.get(name)}
        for name in names
        if there.get(name) != here.get(name)
    ]
