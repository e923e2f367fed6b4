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
Source = tuple[str, str, str]  # use, file name, SHA-256
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgewright:build:1"
BUILDER = "urn:edgewright:local-build"
LEVEL = "SLSA Build L1: made by the user's own machine, so no more than that is claimed"


def statement(
    recipe: Recipe,
    target: Target,
    files: Sequence[Json],
    sources: Sequence[Source],
    reports: dict[str, Report],
) -> bytes:
    """The statement over `files` (rows of the manifest) that a recipe's build made."""
    return document(
        files,
        build_type=BUILD_TYPE,
        external={"recipe": recipe.raw, "target": target.raw},
        sources=sources,
        versions={"code": keys.code_digest(), **keys.versions(recipe)},
        byproducts=[
            {**descriptor("model.onnx", sha256), "annotations": {"stage": stage}}
            for stage, sha256 in made(reports)
        ],
    )


def document(
    files: Sequence[Json],
    *,
    build_type: str,
    external: Json,
    sources: Sequence[Source],
    versions: dict[str, str],
    byproducts: Sequence[Json] = (),
) -> bytes:
    """The in-toto statement: `files` were built of `sources` by this package."""
    return manifest.canonical(
        {
            "_type": STATEMENT,
            "subject": [descriptor(row["path"], row["sha256"]) for row in files],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": build_type,
                    "externalParameters": external,
                    "internalParameters": {"level": LEVEL},
                    "resolvedDependencies": [
                        {**descriptor(name, sha256), "annotations": {"use": use}}
                        for use, name, sha256 in sources
                    ],
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": {"edgewright": __version__, **versions}},
                    "byproducts": list(byproducts),
                },
            },
        }
    )


def descriptor(name: str, sha256: str) -> Json:
    return {"name": name, "digest": {"sha256": sha256}}


def made(reports: dict[str, Report]) -> list[tuple[str, str]]:
    """The model that each stage left, by its digest: to see where two builds part."""
    found = ((stage, report.get("model")) for stage, report in reports.items())
    return [(stage, m["sha256"]) for stage, m in found if isinstance(m, dict) and "sha256" in m]
