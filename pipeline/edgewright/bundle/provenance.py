"""Where the bundle's files come from: SLSA provenance v1 as an in-toto statement.

Claimed is SLSA Build level 1: the provenance exists and says how the files were built. Level 2
asks for a build service that signs it out of the user's reach, which a local build is not.
"""

from collections.abc import Sequence
from typing import Any

from edgewright import __version__, keys
from edgewright.bundle import manifest
from edgewright.recipe import Recipe
from edgewright.stage import Report
from edgewright.target import Target

Json = dict[str, Any]
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgewright:build:1"
BUILDER = "urn:edgewright:local-build"
LEVEL = "SLSA Build L1: made by the user's own machine, so no more than that is claimed"


def statement(
    recipe: Recipe,
    target: Target,
    files: Sequence[Json],
    sources: Sequence[tuple[str, str, str]],
    reports: dict[str, Report],
) -> bytes:
    """The statement over `files` (rows of the manifest). `sources`: use, file name, SHA-256."""
    return manifest.canonical(
        {
            "_type": STATEMENT,
            "subject": [descriptor(row["path"], row["sha256"]) for row in files],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"recipe": recipe.raw, "target": target.raw},
                    "internalParameters": {"level": LEVEL},
                    "resolvedDependencies": [
                        {**descriptor(name, sha256), "annotations": {"use": use}}
                        for use, name, sha256 in sources
                    ],
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": builder(recipe)},
                    "byproducts": [
                        {**descriptor("model.onnx", sha256), "annotations": {"stage": stage}}
                        for stage, sha256 in made(reports)
                    ],
                },
            },
        }
    )


def descriptor(name: str, sha256: str) -> Json:
    return {"name": name, "digest": {"sha256": sha256}}


def builder(recipe: Recipe) -> dict[str, str]:
    """Versions of all that computed, and the digest of this package's own code."""
    return {"edgewright": __version__, "code": keys.code_digest(), **keys.versions(recipe)}


def made(reports: dict[str, Report]) -> list[tuple[str, str]]:
    """The model that each stage left, by its digest: to see where two builds part."""
    found = ((stage, report.get("model")) for stage, report in reports.items())
    return [(stage, m["sha256"]) for stage, m in found if isinstance(m, dict) and "sha256" in m]
