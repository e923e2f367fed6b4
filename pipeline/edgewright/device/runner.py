"""The C runner for a device without Python, and its options for one bundle.

The runner proves no signature and installs nothing: that is the device program's work, which
needs Python. It runs a model that is already there, checks the golden vectors, and times it.
"""

import tempfile
from pathlib import Path

from edgewright.device.verify import extract
from edgewright.errors import BadInput
from edgewright.files import write_atomic
from edgewright.runtime import toolchain

NAME, OPTIONS = "edge-run", "edge-run.options"


def write_runner(bundle: Path, folder: Path) -> list[Path]:
    """Write the runner for a bundle's architecture and its options into `folder`; both paths.

    The options name files by their place in the bundle, so the runner starts in an unpacked
    one: `cd /opt/keyword/current && edge-run @edge-run.options`. EnvironmentMissing where
    there is no compiler for the architecture.
    """
    with tempfile.TemporaryDirectory() as scratch:
        manifest = extract(bundle, Path(scratch, "bundle"))
    if "pool" in manifest:
        raise BadInput(
            f"{bundle} holds several models",
            expected="the bundle of one",
            hint="pack the model alone, or name the runner's options by hand",
        )
    runtime, golden = manifest["runtime"], manifest["golden"]
    if runtime["provider"] != "CPUExecutionProvider":
        raise BadInput(
            f"{bundle} is for {runtime['provider']}",
            expected="CPUExecutionProvider, which is all the C runner has",
        )
    words = ["--model", manifest["model"]["path"]]
    words += ["--inputs", golden["inputs"], "--expect", golden["outputs"]]
    for row in golden["tolerances"]:
        near = f"{row['atol']!r}:{row['rtol']!r}:{row['min_equal']!r}"
        words += ["--tolerance", f"{row['output']}={near}"]
    words += ["--threads", str(runtime["threads"])]
    for key, value in sorted(runtime["session"].items()):
        words += ["--config", f"{key}={value}"]
    program = toolchain.runner(manifest["device"]["arch"])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, program.read_bytes())
    (folder / NAME).chmod(0o755)
    write_atomic(folder / OPTIONS, "".join(f"{word}\n" for word in words).encode())
    return [folder / NAME, folder / OPTIONS]
