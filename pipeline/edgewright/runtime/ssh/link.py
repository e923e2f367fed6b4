"""This side of a device: how its sessions start, what it is, and who may use it meanwhile."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from edgewright.errors import DeviceUnavailable, EnvironmentMissing, from_wire
from edgewright.runtime import worker
from edgewright.runtime.guest import ORT_PACKAGES
from edgewright.runtime.session import RUN_TIMEOUT_S, Launch, address_space
from edgewright.runtime.ssh import answers
from edgewright.target import Target

OWNER = "EDGEWRIGHT_DEVICE_OWNER"  # in the environment of all processes of one build
END_S = 10.0
PROBE = (
    "import json, numpy, onnxruntime as o; "
    "print(json.dumps({'onnxruntime': o.__version__, 'providers': o.get_available_providers()}))"
)
Facts = dict[str, Any]  # what `facts.facts` says on the device
known: dict[str, Facts] = {}  # of the devices this process has seen, by profile


def launch(target: Target) -> Launch:
    """How a session on the device starts; nothing is connected yet."""
    if importlib.util.find_spec("asyncssh") is None:
        raise EnvironmentMissing(
            f"target {target.name} runs over SSH, which needs a library",
            found="no asyncssh",
            hint="pip install 'edgewright[ssh]'",
        )
    profile = json.dumps({"name": target.name, "run": asdict(target.run)})
    # Waiting is limited by the bridge and on the device; this only ends a bridge that hangs.
    whole = RUN_TIMEOUT_S + 4 * target.run.limit_s + target.run.reconnect_s
    return Launch(
        python=(sys.executable, "-s", "-P"),
        worker=("-m", "edgewright.runtime.ssh.bridge", profile),
        address_space=0 if target.emulated else address_space(target.runtime.provider),
        time_factor=whole / RUN_TIMEOUT_S,
        remote=True,
    )


class Link:
    """A bridge that runs no worker: for what concerns the device itself."""

    def __init__(self, target: Target) -> None:
        start = launch(target)
        self.name = target.name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the link
        self.process = subprocess.Popen(
            [*start.python, *start.worker, "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )

    def ask(self, header: dict[str, Any]) -> dict[str, Any]:
        """One request to the bridge: `facts` or `command`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            worker.send(self.process.stdin, header)
            answer, _ = worker.receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise DeviceUnavailable(
                f"the link to device {self.name} ended", found="".join(said) or "no message"
            ) from None
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer

    def run(self, files: dict[str, Path], words: list[str]) -> dict[str, Any]:
        """Run the device's Python with these words; "@/NAME" in them is one of the pushed files.

        {"status": the exit status or minus the signal, "out", "said": the end of standard error}.
        """
        names = {name: str(path.absolute()) for name, path in files.items()}
        return self.ask({"op": "command", "files": names, "words": words})

    def close(self) -> None:
        """Hang up and wait until the device is tidied up."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> "Link":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def look(target: Target) -> Facts:
    """How the device is doing now."""
    with Link(target) as link:
        known[target.name] = link.ask({"op": "facts"})["facts"]
    return known[target.name]


def facts(target: Target) -> Facts:
    """What the device is: as it was when this process first looked."""
    return known[target.name] if target.name in known else look(target)


def identity(target: Target) -> Facts:
    """What of the device decides the results of a build.

    With the digests of its packages, not their versions alone: another build of a version computes
    otherwise, and a bundle's lock names the digests, so a kept bundle would name the wrong ones.
    """
    kept = ("machine", "bits", "cpu", "flags", "board", "python", "packages")
    return {key: facts(target)[key] for key in kept}


@contextmanager
def held(target: Target) -> Iterator[None]:
    """Hold the device for a whole build, and check first that it is what the profile says.

    Every session opened meanwhile by this process or its children shares the lease. A link that
    drops is opened again as soon as the device lets it in (see `bridge.hold`). Nothing to do where
    one of its parents holds the device, and for targets that are not behind SSH.
    """
    if target.run.how != "ssh" or OWNER in os.environ:
        yield
        return
    os.environ[OWNER] = uuid.uuid4().hex
    try:
        with Link(target) as link:
            known[target.name] = link.ask({"op": "facts"})["facts"]
            check(target, known[target.name])
            yield
    finally:
        del os.environ[OWNER]


def check(target: Target, found: Facts) -> None:
    """EnvironmentMissing where the device is not what the profile promises."""
    device = target.device
    where = f"device {target.name} ({target.run.host})"
    if found["machine"] != device.arch or found["bits"] != 64:
        raise EnvironmentMissing(
            f"{where} is another kind of machine",
            expected=device.arch,
            found=f"{found['machine']}, Python of {found['bits']} bits",
            hint="correct device.arch in the profile, or set run.python to a 64-bit Python",
        )
    missing = [flag for flag in device.isa if flag not in found["flags"]]
    if missing:
        raise EnvironmentMissing(
            f"{where} lacks CPU features of the profile",
            expected=" ".join(device.isa),
            found="no " + " ".join(missing),
            hint="correct device.isa in the profile",
        )
    absent = [name for name in ("numpy", "onnxruntime") if package(found, name) is None]
    if absent:
        raise EnvironmentMissing(
            f"{where}: the Python there has no {' and no '.join(absent)}",
            hint=f"install it there, or set run.python to the Python that has it (it is "
            f"{target.run.python} now)",
        )
    allowed = set(found["allowed_cores"])
    if not set(target.run.pin) <= allowed:
        raise EnvironmentMissing(
            f"{where}: run.pin names cores that are not there",
            expected="some of " + ", ".join(map(str, sorted(allowed))),
            found=", ".join(map(str, target.run.pin)),
        )


def probe(target: Target) -> Facts:
    """What a doctor wants to know: facts, and the runtime as it imports there.

    {**facts, "onnxruntime", "providers"}. Raises what `check` does, and where importing fails.
    """
    with Link(target) as link:
        found = link.ask({"op": "facts"})["facts"]
        check(target, found)
        ended = link.run({}, ["-c", PROBE])
    where = f"device {target.name} ({target.run.host})"
    if ended["status"]:
        raise EnvironmentMissing(
            f"{where}: onnxruntime does not import there",
            found=ended["said"][-300:] or f"status {ended['status']}",
            hint="install it again in the Python that run.python names",
        )
    try:
        told = json.loads(ended["out"].strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise answers.odd(where, "no JSON in the last line of a Python's output") from None
    runtime = answers.check(told, answers.RUNTIME, where)
    if target.runtime.provider not in runtime["providers"]:
        raise EnvironmentMissing(
            f"{where}: its onnxruntime has no {target.runtime.provider}",
            found=", ".join(runtime["providers"]),
            hint="install an onnxruntime there that has it",
        )
    return {**found, **runtime}


def package(found: Facts, name: str) -> dict[str, Any] | None:
    """What the device tells of a package; of onnxruntime, whatever its variant.

    {"name", "version", "wheel", "record_sha256"} (see `facts.packages`).
    """
    for one in ORT_PACKAGES if name == "onnxruntime" else (name,):
        if (told := found["packages"].get(one.replace("-", "_"))) is not None:
            return {"name": one, **told}
    return None
