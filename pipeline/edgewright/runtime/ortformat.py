"""Models in ORT format, which runtimes without ONNX support read, and what such a build must hold.

The file is written by the target's own runtime (in its emulator, on its device): fusions depend on
the CPU, and what suits one may not even load on another.
"""

import logging
from pathlib import Path

from edgewright.errors import EnvironmentMissing
from edgewright.runtime.launch import launch_for, session_options
from edgewright.runtime.session import Session
from edgewright.target import Target

SAVE = "session.save_model_format"
# No layouts of one CPU's own kernels, which the next CPU of the same architecture may lack.
LEVEL = "ORT_ENABLE_EXTENDED"


def convert(model: Path, target: Target, out: Path) -> None:
    """Write the model in ORT format; EnvironmentMissing where the target's runtime does not."""
    options = session_options(target)
    options["session"][SAVE] = "ORT"
    with Session(
        model, launch=launch_for(target), optimized=str(out), level=LEVEL, **options
    ) as session:
        version = session.info["version"]
    if not out.is_file() or not out.stat().st_size:
        raise EnvironmentMissing(
            f"the runtime of target {target.name} writes no ORT format",
            expected="a full build of onnxruntime, with the CPU provider",
            found=f"onnxruntime {version}, {target.runtime.provider}",
            hint="take 'ort' out of release.formats",
        )


def format_version(path: Path) -> int:
    """The version of the format that a file in it states."""
    # The package puts its generated code on the path when it is imported.
    from onnxruntime.tools import ort_format_model  # noqa: F401
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    found = InferenceSession.GetRootAs(path.read_bytes(), 0).OrtVersion()
    return int(found or b"0")


def required(path: Path, scratch: Path) -> bytes:
    """Operators and the types they are used with, in the runtime's own notation for its build."""
    from onnxruntime.tools.ort_format_model.utils import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.ERROR)
    create_config_from_models([path], scratch, True)
    lines = scratch.read_text("utf-8").splitlines()
    scratch.unlink()
    # Its first lines name files of this machine.
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#")).encode()
