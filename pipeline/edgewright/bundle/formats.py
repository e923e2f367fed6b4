"""The model in other formats beside ONNX, on request (`release.formats` of the recipe).

They are proven here and on the device with the golden vectors of the model itself. The runtime
that writes them may give other bytes another time, so they are marked: who builds again gets all
else bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewright.bundle import golden, manifest
from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.runtime import ortformat
from edgewright.runtime.launch import open_on_target
from edgewright.stage import Job
from edgewright.target import Target

Json = dict[str, Any]


def make(
    job: Job, model: Path, feeds: Sequence[Feed], outputs: Sequence[Feed], limits: Sequence[Json]
) -> tuple[list[Json], dict[str, bytes | Path]]:
    """What the manifest says of each format, and the files.

    feeds, outputs, limits: golden vectors and tolerances. BadInput where a format computes
    something else.
    """
    rows: list[Json] = []
    files: dict[str, bytes | Path] = {}
    if "ort" in job.recipe.release.formats:
        job.tell("writing the ORT format")
        path = job.folder / "model.ort"
        ortformat.convert(model, job.target, path)
        check(path, job.target, feeds, outputs, limits)
        files[manifest.ORT] = path
        files[manifest.ORT_OPERATORS] = ortformat.required(path, job.folder / "operators.config")
        rows.append(
            {
                "format": "ort",
                "version": ortformat.format_version(path),
                "path": manifest.ORT,
                "config": manifest.ORT_OPERATORS,
                "reproducible": False,
            }
        )
    return rows, files


def remarks(rows: Sequence[Json], entries: dict[str, Json]) -> list[Json]:
    """What the formats cost, for the report; `entries`: the manifest's rows by path."""
    onnx = entries[manifest.MODEL]["size"]
    return [
        {
            "level": "info",
            "text": f"{row['path']}: {entries[row['path']]['size']} bytes, as ONNX {onnx}; "
            "not reproducible: two builds may give other bytes",
        }
        for row in rows
    ]


def check(
    path: Path,
    target: Target,
    feeds: Sequence[Feed],
    outputs: Sequence[Feed],
    limits: Sequence[Json],
) -> None:
    """BadInput unless the file gives the golden outputs on the target."""
    with open_on_target(path, target) as session:
        for feed, wanted in zip(feeds, outputs, strict=True):
            found = dict(zip(wanted, session.run(feed), strict=True))
            for limit in limits:
                name = limit["output"]
                if fault := golden.compare(found[name], wanted[name], limit).fault:
                    raise BadInput(
                        f"the model in the format of {path.name}",
                        expected="the outputs of the ONNX file",
                        found=f"output '{name}': {fault}",
                        hint="take it out of release.formats",
                    )
