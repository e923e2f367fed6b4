"""The self-test: does this machine get the outputs that the bundle was released with?"""

import os
import tempfile
from pathlib import Path

from edgewright.bundle.manifest import Manifest
from edgewright.device.prove import Report, prove
from edgewright.device.verify import extract
from edgewright.errors import EnvironmentMissing, UsageError
from edgewright.runtime.launch import host_isa, launch_for
from edgewright.runtime.providers import native_launch
from edgewright.runtime.session import Launch
from edgewright.target import Target, load_target, target_names


def self_test(bundle: Path, target: Target | None = None, *, folder: Path | None = None) -> Report:
    """Verify the bundle, unpack it aside, run its golden vectors and compare.

    `target`: run as this profile says. None: natively where this machine fits the bundle, else
    as the shipped profile of the bundle's own target says. `folder`: where to unpack for the
    time of the test; default the system's temporary folder.

    Returns what `prove` does. IntegrityError (exit 5) where bytes or outputs differ,
    EnvironmentMissing (exit 6) where this machine cannot run the bundle as it must be run.
    """
    with tempfile.TemporaryDirectory(prefix="edgewright-selftest-", dir=folder) as parent:
        unpacked = Path(parent) / "bundle"
        manifest = extract(bundle, unpacked)
        where, launch = choose_launch(manifest, target)
        return prove(manifest, unpacked, launch, where)


def choose_launch(manifest: Manifest, target: Target | None) -> tuple[Target | None, Launch]:
    """The profile to run by (None: this machine as it is) and how its processes start."""
    device = manifest["device"]
    if target is None:
        if device["arch"] == os.uname().machine:
            missing = sorted(set(device["isa"]) - host_isa())
            if missing:
                raise EnvironmentMissing(
                    "this machine lacks CPU features that the bundle needs",
                    expected=" ".join(device["isa"]),
                    found="no " + " ".join(missing),
                    hint="build a bundle for a target that fits this CPU",
                )
            runtime = manifest["runtime"]
            return None, native_launch(runtime["provider"], runtime["provider_options"])
        if manifest["target"] not in target_names():
            raise EnvironmentMissing(
                f"the bundle is for {device['arch']}, this machine is {os.uname().machine}",
                hint="name the target profile that emulates its device",
            )
        target = load_target(manifest["target"])
    if target.device.arch != device["arch"]:
        raise UsageError(
            f"target {target.name} cannot run this bundle",
            expected=device["arch"],
            found=target.device.arch,
            hint=f"use target {manifest['target']}",
        )
    return (target if target.run.how != "local" else None), launch_for(target)
