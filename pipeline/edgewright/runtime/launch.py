"""How a process for a target is started here, and whether this machine can do it."""

import platform
from pathlib import Path
from typing import Any

from edgewright.errors import EnvironmentMissing
from edgewright.runtime import emulator
from edgewright.runtime.cpu import host_isa
from edgewright.runtime.providers import native_launch
from edgewright.runtime.session import NVIDIA, Launch, Session
from edgewright.runtime.ssh import link
from edgewright.target import Target


def host_cpu() -> str:
    """The CPU model name of this machine, as part of a measurement's identity."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def launch_for(target: Target) -> Launch:
    """The launch of a target's processes; EnvironmentMissing says what this machine lacks."""
    if target.run.how == "ssh":
        return link.launch(target)
    if target.run.how == "emulate":
        return emulator.launch(target)
    if platform.machine() != target.device.arch:
        raise EnvironmentMissing(
            f"target {target.name} runs natively",
            expected=target.device.arch,
            found=platform.machine(),
            hint="choose a target of this machine's architecture, or an emulated one",
        )
    missing = [flag for flag in target.device.isa if flag not in host_isa()]
    if missing:
        raise EnvironmentMissing(
            f"target {target.name} needs CPU features that this machine lacks",
            expected=" ".join(target.device.isa),
            found="no " + " ".join(missing),
            hint="choose a target that fits this CPU; `edgewright doctor` lists them",
        )
    return native_launch(target.runtime.provider, target.runtime.provider_options)


def session_options(target: Target) -> dict[str, Any]:
    """The options of a worker's `load` request for a target."""
    runtime = target.runtime
    return {
        "provider": runtime.provider,
        "provider_options": dict(runtime.provider_options),
        "threads": runtime.threads,
        "session": dict(runtime.session),
        "bind": ("cuda" if runtime.provider in NVIDIA else "cpu") if runtime.io_binding else "",
    }


def open_on_target(model: Path, target: Target, name: str = "") -> Session:
    """A session of the model through the target's own runtime."""
    return Session(model, launch=launch_for(target), name=name, **session_options(target))
