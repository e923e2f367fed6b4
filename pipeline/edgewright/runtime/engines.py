"""Where engines that a provider builds for one GPU are kept, for as long as one measurement."""

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgewright.files import sha256_of
from edgewright.runtime.session import Launch
from edgewright.target import Target

BUILDERS = ("onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13")
DRIVER = Path("/proc/driver/nvidia")


@contextmanager
def engine_folder(launch: Launch) -> Iterator[Launch]:
    """The launch with a folder for engines that is gone afterwards; none on a remote device."""
    if launch.remote:
        yield launch
        return
    with tempfile.TemporaryDirectory(prefix="edgewright-engines-") as folder:
        yield replace(launch, engines=Path(folder))


def engine_options(target: Target, model: Path, folder: Path) -> dict[str, str]:
    """Provider options that keep engines in a folder below `folder`; none where none are built.

    The runtime names engines after the graph: weights, driver and version do not show in it. So
    the folder is named after the bytes of the model, the GPUs with their driver, and the versions
    of what builds.
    """
    if target.runtime.provider != "TensorrtExecutionProvider":
        return {}
    facts = [sha256_of(model), gpus(), *versions()]
    place = folder / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(place),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(place),
    }


def gpus() -> str:
    """The driver and the GPUs as the driver lists them; empty without one."""
    try:
        files = [DRIVER / "version", *sorted(DRIVER.glob("gpus/*/information"))]
        return "\n".join(path.read_text() for path in files)
    except OSError:
        return ""


def versions() -> list[str]:
    """The installed packages that build engines, with their versions."""
    found = []
    for name in BUILDERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
