"""Small bundles for the tests, and archives that an enemy would make of them."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import rfc8785

from edgewright import bundle
from edgewright.bundle import tarball
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import Target, parse_target

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
tiny (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ h = MatMul(x, w)  y = Relu(h) }
"""
RECIPE = {
    "model": {"name": "tiny", "version": "1.2.3", "source": "model.onnx"},
    "data": {"calibration": "calibration.npz"},
    "gate": {"max_size_bytes": 5000},
}


def here(**budget) -> Target:
    """A profile that fits whatever x86 or ARM machine runs the tests."""
    raw = {
        "name": "here",
        "description": "the machine of the tests",
        "device": {"arch": os.uname().machine, "compatible": ["linux"]},
        "budget": budget,
    }
    return parse_target(raw)


def make(folder: Path, text: str = MODEL, samples: int = 5, **facts) -> Path:
    """Build a bundle of a model in ONNX text below `folder`; its path."""
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    model = onnx.parser.parse_model(text)
    onnx.save(model, source / "model.onnx")
    rng = np.random.default_rng(1)
    np.savez(source / "calibration.npz", x=rng.normal(size=(samples, 4)).astype(np.float32))
    job = Job(
        recipe=parse_recipe(facts.pop("recipe", RECIPE), source),
        target=facts.pop("target", here()),
        folder=out,
        model=source / "model.onnx",
        **facts,
    )
    return out / bundle.run(job)["bundle"]


Members = list[tuple[str, bytes, int]]  # path, content, mode


def unpack(path: Path) -> Members:
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read(), m.mode) for m in archive.getmembers()]


def pack(members: Members, mtime: int = 0) -> bytes:
    """A well-formed archive of anything."""
    return b"".join(
        tarball.archive(
            (
                tarball.Member(path, len(content), mode, mtime),
                content,
                hashlib.sha256(content).hexdigest(),
            )
            for path, content, mode in members
        )
    )


def forged(path: Path, edit: Callable[[dict], None]) -> bytes:
    """The bundle with another manifest, its digest made right: what an attacker would send."""
    (name, text, mode), *rest = unpack(path)
    content = json.loads(text)
    edit(content)
    content.pop("digest", None)
    content["digest"] = hashlib.sha256(rfc8785.dumps(content)).hexdigest()
    return pack([(name, rfc8785.dumps(content), mode), *rest])
