"""deploy: install a bundle on a device behind SSH, by the device program, proven there."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.device import pack
from edgewright.errors import (
    BadInput,
    EnvironmentMissing,
    IntegrityError,
    UsageError,
    from_wire,
)
from edgewright.runtime.ssh import answers, link
from edgewright.schema import Schema
from edgewright.target import Target

PROGRAM = "edgewright-device.pyz"
BUNDLE = "new.bundle.tar"
REFUSALS = {kind.exit_code: kind for kind in (UsageError, BadInput, IntegrityError)}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `install` on the device is asked for; see `edgewright install --help`.

    trust: files here, sent along. Without any the device's own trust below `root` decides.
    """

    trust: Sequence[Path] = ()
    threshold: int | None = None
    clock: bool = True
    allow_unsigned: bool = False
    allow_downgrade: bool = False
    delta: bool = False


def deploy(bundle: Path, target: Target, root: str, wish: Wish) -> dict[str, Any]:
    """Send the device program and the bundle, install it below `root` there and prove it.

    What install says, with "self_test" of a bundle that was there already, too.

    Raises what the device refused, by its exit code; the release that ran before then still does.
    """
    if target.run.how != "ssh":
        raise UsageError(
            f"target {target.name} is not a device behind SSH",
            expected='run.how = "ssh"',
            found=repr(target.run.how),
            hint="install here with: edgewright install BUNDLE --root ROOT",
        )
    if not root.startswith("/"):
        raise UsageError("--root", expected="an absolute path on the device", found=repr(root))
    for path in (bundle, *wish.trust):
        if not path.is_file():
            raise BadInput(f"file not found: {path}", hint="check the path")
    with tempfile.TemporaryDirectory(prefix="edgewright-deploy-") as folder:
        program = Path(folder) / PROGRAM
        program.write_bytes(pack.program())
        keys = {f"trust-{k}": path for k, path in enumerate(wish.trust)}
        # A Python inside an emulator cannot start another by its own path.
        place = ["--root", root, "--json", "--python", target.run.python]
        words = [f"@/{PROGRAM}", "install", f"@/{BUNDLE}", *place]
        for name in keys:
            words += ["--trust", f"@/{name}"]
        if wish.threshold is not None:
            words += ["--threshold", str(wish.threshold)]
        for flag, wanted in (
            ("--no-clock", not wish.clock),
            ("--allow-unsigned", wish.allow_unsigned),
            ("--allow-downgrade", wish.allow_downgrade),
            ("--delta", wish.delta),
        ):
            words += [flag] * wanted
        with link.Link(target) as device:
            ended = device.run({PROGRAM: program, BUNDLE: bundle, **keys}, words)
            report = told(target, ended, answers.INSTALLED)
            if report.get("self_test") is None:
                ended = device.run({PROGRAM: program}, [f"@/{PROGRAM}", "self-test", *place])
                report["self_test"] = told(target, ended, answers.PROVEN)
    return report


def told(target: Target, ended: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The report of a program that ended well; the device's refusal as our error else."""
    where = f"device {target.name} ({target.run.host})"
    status, said = ended["status"], ended["said"]
    if status:
        kind = REFUSALS.get(status, EnvironmentMissing)
        text = said.rpartition("edgewright: error: ")[2] or f"the program ended with {status}."
        raise from_wire({"kind": kind.__name__, "text": f"{where}: {text}"})
    try:
        found = json.loads(ended["out"], parse_constant=answers.no_number)
    except ValueError:
        raise answers.odd(where, "a report that is no JSON") from None
    return answers.check(found, schema, where)
