"""Execution providers: what runs one here, with which options, and what to install where none does.

A provider is built into the installed onnxruntime, or its plug-in adds it, or a build of
onnxruntime that has it stands in a folder of its own (`builds`). None of it is a silent choice:
the version is part of every report and of every cache key.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgewright.errors import EnvironmentMissing
from edgewright.runtime.builds import BUILDS, build_folder, build_launch, install_build
from edgewright.runtime.session import NVIDIA, Launch, address_space
from edgewright.runtime.worker import PLUGINS, offer
from edgewright.target import Target

CPU = "CPUExecutionProvider"
# These replace many nodes by one of their own, and may do so again for every new size of input.
COMPILING = (
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "CoreMLExecutionProvider",
    "NnapiExecutionProvider",
)
# These compute on the cores of the process itself, so that its CPU time is the work.
ON_CPU = (CPU, "XnnpackExecutionProvider", "DnnlExecutionProvider", "ACLExecutionProvider")
INSTALL = {
    "CUDAExecutionProvider": "pip uninstall onnxruntime, then pip install onnxruntime-gpu",
    "TensorrtExecutionProvider": "pip uninstall onnxruntime, then pip install onnxruntime-gpu "
    "and the TensorRT libraries (pip install tensorrt)",
    "OpenVINOExecutionProvider": "edgewright setup --target openvino",
    "XnnpackExecutionProvider": "build onnxruntime with --use_xnnpack and install its wheel; "
    "those of PyPI do not have it",
}
PROBE_TIMEOUT_S = 120.0


def device_kind(options: Mapping[str, str]) -> str:
    """What a provider with several devices shall use: CPU, GPU or NPU."""
    return options.get("device_type", "CPU").partition(".")[0]


def on_host_cpu(target: Target) -> bool:
    """Whether the target's provider computes on the cores of its process."""
    runtime = target.runtime
    on_cpu = device_kind(runtime.provider_options) == "CPU"
    return runtime.provider in ON_CPU or (
        runtime.provider == "OpenVINOExecutionProvider" and on_cpu
    )


def native_launch(provider: str, options: Mapping[str, str]) -> Launch:
    """How the worker starts on this machine: with what runs the provider.

    Where nothing does, with the installed onnxruntime, which then says that it lacks it.
    """
    if provider in (CPU, *NVIDIA) or installed(provider, device_kind(options))["how"]:
        return Launch(address_space=address_space(provider))
    return build_launch(provider) or Launch()


@functools.cache
def installed(provider: str, kind: str) -> dict[str, Any]:
    """What the installed onnxruntime, with its plug-ins, says of a provider; see `worker.offer`.

    Where there is a plug-in, in a process of its own: it cannot be unloaded, and may end it.
    """
    if provider in PLUGINS and importlib.util.find_spec(PLUGINS[provider]) is not None:
        return probe(Launch(), provider, kind)
    return offer(provider, kind)


def probe(launch: Launch, provider: str, kind: str) -> dict[str, Any]:
    """The answer of a worker to `offer`."""
    try:
        done = subprocess.run(
            [*launch.python, *launch.worker, "offer", provider, kind],
            env=dict(launch.env) if launch.env is not None else None,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        return {"onnxruntime": "", "how": "", "reason": f"asking for {provider} ends a process"}
    return found


def need_provider(target: Target) -> None:
    """EnvironmentMissing unless something here runs the target's provider, with its driver.

    For targets that run natively; an emulated one has the runtime of its guest.
    """
    provider, options = target.runtime.provider, target.runtime.provider_options
    if provider == CPU or target.run.how != "local":
        return
    found = installed(provider, device_kind(options))
    if not found["how"] and build_launch(provider) is None:
        raise EnvironmentMissing(
            f"nothing here runs {provider}",
            found=found["reason"],
            hint=INSTALL.get(provider, "install an onnxruntime that has it"),
        )
    if provider in NVIDIA and not has_nvidia_driver():
        raise EnvironmentMissing(
            f"{provider} needs the NVIDIA driver",
            found="no libcuda.so.1",
            hint="install the driver, or run on a machine with an NVIDIA GPU",
        )


def has_nvidia_driver() -> bool:
    """Whether the driver's library loads; it starts nothing on the GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def runtime_packages(target: Target) -> tuple[str, ...]:
    """What runs the provider of a native target, as "package version"; () for plain CPU.

    The plug-in beside its onnxruntime, or the build in a folder of its own.
    """
    provider, options = target.runtime.provider, target.runtime.provider_options
    if provider == CPU or target.run.how != "local":
        return ()
    found = installed(provider, device_kind(options))
    runtime = f"onnxruntime {found['onnxruntime']}"
    if (package := plugin_package(target)) is not None:
        return (runtime, f"{package} {importlib.metadata.version(package)}")
    if found["how"]:
        return (runtime,)
    return (BUILDS[provider].replace("==", " "),) if own_build(target) else ()


def own_build(target: Target) -> Path | None:
    """The folder of the build that a native target runs with, None where it needs none."""
    provider, options = target.runtime.provider, target.runtime.provider_options
    if provider not in BUILDS or target.run.how != "local":
        return None
    if installed(provider, device_kind(options))["how"] or build_launch(provider) is None:
        return None
    return build_folder(provider)


def plugin_package(target: Target) -> str | None:
    """The package of the plug-in that a native target runs with."""
    provider, options = target.runtime.provider, target.runtime.provider_options
    if provider not in PLUGINS or target.run.how != "local":
        return None
    used = installed(provider, device_kind(options))["how"] == "plug-in"
    return PLUGINS[provider].replace("_", "-") if used else None


def setup(target: Target, tell: Callable[[str], None]) -> None:
    """Get what runs the provider of a native target, where a build of onnxruntime can be had.

    At once where something runs it already; EnvironmentMissing says what else to install.
    """
    provider, options = target.runtime.provider, target.runtime.provider_options
    found = installed(provider, device_kind(options))
    if not found["how"] and provider in BUILDS and build_launch(provider) is None:

        def fault(launch: Launch) -> str:
            answer = probe(launch, provider, device_kind(options))
            return "" if answer["how"] else str(answer["reason"])

        tell(f"{target.name}: {found['reason']}")
        install_build(provider, fault, tell)
    need_provider(target)
    tell(f"{target.name}: ready, {' and '.join(runtime_packages(target))}")
