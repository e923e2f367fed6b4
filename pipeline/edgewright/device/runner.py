"""The C runner for a device without Python, and its options for one bundle.

The runner proves no signature and installs nothing: that is the device program's work, which
needs Python. It runs a model that is already there, checks the golden vectors, and times it.
"""

import tempfile
from pathlib import Path

from edgewright.bundle import manifest as manifests
from edgewright.bundle.runner import options
from edgewright.device.verify import extract
from edgewright.errors import BadInput
from edgewright.files import write_atomic
from edgewright.runtime import toolchain
from edgewright.runtime.providers import CPU


def write_runner(bundle: Path, folder: Path) -> list[Path]:
    """Write the runner of a bundle and its options into `folder`; the paths, the runner first.

    Those that the bundle holds; where it holds none, compiled for its architecture. The options
    name files by their place in the bundle, so the runner starts in an unpacked one:
    `cd /opt/keyword/current && edge-run @edge-run.options`. EnvironmentMissing where one is to
    be compiled and there is no compiler for the architecture.
    """
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch, "bundle")
        manifest = extract(bundle, unpacked)
        files = inside(manifest, unpacked) or made(manifest, bundle)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    paths = [folder / name for name in files]
    paths[0].chmod(0o755)
    return paths


def inside(manifest: manifests.Manifest, folder: Path) -> dict[str, bytes]:
    """The runner and options in an unpacked bundle, by their names; nothing where it has none."""
    row = manifest.get("runner")
    paths = [row["path"], *row["options"]] if row is not None else []
    return {Path(path).name: (folder / path).read_bytes() for path in paths}


def made(manifest: manifests.Manifest, bundle: Path) -> dict[str, bytes]:
    """The same for a bundle without one; BadInput where the runner cannot run what it holds."""
    if "pool" in manifest:
        raise BadInput(
            f"{bundle} holds several models",
            expected="the bundle of one, or one that holds the runner",
            hint="build one of them with release.runner = true and pool them again",
        )
    if (provider := manifest["runtime"]["provider"]) != CPU:
        raise BadInput(
            f"{bundle} is for {provider}", expected=f"{CPU}, which is all the C runner has"
        )
    program = toolchain.runner(manifest["device"]["arch"]).read_bytes()
    names = [Path(path).name for path in (manifests.RUNNER, manifests.RUNNER_OPTIONS)]
    return dict(zip(names, (program, options(manifest)), strict=True))
