"""Builds of onnxruntime for one provider, each in a folder of its own below `home()`.

Two builds of onnxruntime cannot be installed side by side, and the one that this project pins
should not be replaced: so the worker of such a target finds another one first on its path.

    onnxruntime-openvino-V-cp311-x86_64/
        build.json   the package and the digest of its wheel
        site/        the wheel, for PYTHONPATH
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from edgewright.errors import EnvironmentMissing
from edgewright.files import sha256_of
from edgewright.runtime.guest import unpack_wheel
from edgewright.runtime.installing import Tell, command, home, os_errors, place_once
from edgewright.runtime.session import Launch

# The newest build whose provider takes any x86-64 CPU: the plug-in of OpenVINO refuses all but
# Intel's (microsoft/onnxruntime#31981).
BUILDS = {"OpenVINOExecutionProvider": "onnxruntime-openvino==1.24.1"}


def build_folder(provider: str) -> Path:
    """Where the build that has the provider stands, for this Python."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return home() / f"{BUILDS[provider].replace('==', '-')}-{python}-{platform.machine()}"


def build_launch(provider: str) -> Launch | None:
    """The launch with the build in its folder, None where there is none."""
    if provider not in BUILDS or not (build_folder(provider) / "build.json").is_file():
        return None
    return launch_of(build_folder(provider))


def launch_of(folder: Path) -> Launch:
    """The launch with what lies in `folder/site` before all that is installed."""
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    return Launch(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})


def install_build(provider: str, prove: Callable[[Launch], str], tell: Tell) -> None:
    """Download the pinned build, unpack and prove it, move it to its place.

    `prove` says what is wrong with it, "" for nothing. Safe to interrupt and to run twice.
    """
    with os_errors(f"setting up {BUILDS[provider]}"):
        place_once(
            build_folder(provider),
            "build.json",
            lambda work: fill(provider, work, prove, tell),
            tell,
        )


def fill(provider: str, work: Path, prove: Callable[[Launch], str], tell: Tell) -> None:
    """The pinned wheel in `work/site`; what else it imports is installed already."""
    wanted = BUILDS[provider]
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentMissing(
            f"this Python has no pip, which downloads {wanted}",
            hint=f"{sys.executable} -m ensurepip",
        )
    tell(f"downloading {wanted.replace('==', ' ')}")
    command(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        + ["-d", str(work / "wheels"), wanted],
        f"downloading {wanted}",
        hint="check the network and pip's index; the wheel must exist for this Python and CPU",
    )
    wheels = sorted((work / "wheels").glob("*.whl"))
    for wheel in wheels:
        unpack_wheel(wheel, work / "site")
    digests = {wheel.name: sha256_of(wheel) for wheel in wheels}
    shutil.rmtree(work / "wheels")
    if fault := prove(launch_of(work)):
        raise EnvironmentMissing(f"{wanted} does not run here", found=fault)
    text = json.dumps({"package": wanted, "sha256": digests}, indent=1)
    (work / "build.json").write_text(text + "\n")
