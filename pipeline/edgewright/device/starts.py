"""After an install: counting starts, going back by hand or by itself, telling how things stand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewright.bundle import manifest as manifests
from edgewright.device import install, store
from edgewright.errors import EdgewrightError, EnvironmentMissing, IntegrityError, UsageError

STARTS = 3  # how often a new release may be started without anyone saying that it is good


def start_check(root: Path, most: int = STARTS) -> dict[str, Any]:
    """Count a start of the current release; go back where it has failed, or is damaged.

    For a service manager, before each start. A release has failed after `most` starts of which
    none was followed by `mark_good`. Where there is nothing to go back to, the current one stays:
    a device that tries again is better than one that stands still.
    """
    if most < 1:
        raise UsageError(f"--starts {most}", expected="1 or more")
    store.existing(root)
    with store.changing(root) as state:
        current = store.linked(root)
        entry = next((r for r in state.releases if r.id == current), None)
        reason = ""
        if entry is None:
            reason = "no release is current"
        elif entry.failed:
            reason = entry.failed
        elif not entry.good and entry.starts >= most:
            reason = f"started {entry.starts} times, never marked good"
        elif not (root / store.RELEASES / current / manifests.PATH).is_file():
            reason = "damaged"
        if reason:
            found = store.roll_back(root, state, reason)
            if found:
                return {"action": "rolled back", "release": found, "reason": reason}
            if entry is None:
                raise nothing(root)
        assert entry is not None
        if not entry.good:
            entry.starts += 1
        store.write_state(root, state)
        return {
            "action": "kept, as there is no other" if reason else "start",
            "release": current,
            "reason": reason,
            "starts": entry.starts,
            "good": entry.good,
        }


def mark_good(root: Path) -> dict[str, Any]:
    """The current release runs well: stop counting its starts."""
    store.existing(root)
    with store.changing(root) as state:
        current = store.linked(root)
        entry = next((r for r in state.releases if r.id == current), None)
        if entry is None:
            raise nothing(root)
        if not entry.good or entry.failed:
            entry.good, entry.starts, entry.failed = True, 0, ""
            state.tell("good", current)
            store.write_state(root, state)
    return {"action": "good", "release": current}


def rollback(root: Path, reason: str = "by hand") -> dict[str, Any]:
    """Go back to the release before the current one; EnvironmentMissing where there is none."""
    store.existing(root)
    with store.installing(root), store.changing(root) as state:
        current = store.linked(root)
        found = store.roll_back(root, state, reason)
        if not found:
            raise EnvironmentMissing(
                f"nothing to go back to below {root}",
                expected="an earlier release that is whole and has not failed",
                hint="install a bundle; --allow-downgrade for an older one",
            )
    return {"action": "rolled back", "release": found, "from": current, "reason": reason}


def self_test(root: Path, go_back: bool = False, python: Sequence[str] = ()) -> dict[str, Any]:
    """Prove the golden vectors of the current release once more; what `prove` returns.

    `go_back`: where they fail, let the release before be current, and say so in the error.
    """
    store.existing(root)
    current = store.linked(root)
    if not current:
        raise nothing(root)
    try:
        content = store.check_release(root, current)
        return install.self_test(content, root / store.RELEASES / current, python)
    except EdgewrightError as error:
        if not go_back:
            raise
        with store.changing(root) as state:
            found = store.roll_back(root, state, "self-test failed")
        after = f"went back to {found}" if found else "there is nothing to go back to"
        raise type(error)(f"{error} Then {after}") from None


def nothing(root: Path) -> EnvironmentMissing:
    return EnvironmentMissing(
        f"no release is installed below {root}", hint="edgewright install BUNDLE --root ROOT"
    )


def status(root: Path, check: bool = False) -> dict[str, Any]:
    """What runs, what to go back to, and what happened. `check`: read and hash every file."""
    store.existing(root)
    state = store.read_state(root)
    current = store.linked(root)
    rows = [describe(root, release, check) for release in state.releases]
    following = store.behind(root, state)
    previous = next((r.id for r in following if r.id != current and not r.failed), "")
    return {
        "schema": store.SCHEMA,
        "root": str(root),
        "name": state.name,
        "target": state.target,
        "sequence": state.sequence,
        "time_floor": state.time_floor,
        "current": next((row for row in rows if row["id"] == current), None),
        "previous": next((row for row in rows if row["id"] == previous), None),
        "releases": rows,
        "events": state.events,
    }


def describe(root: Path, release: store.Release, check: bool) -> dict[str, Any]:
    """One release for `status`; "whole" is null where nobody looked."""
    folder = root / store.RELEASES / release.id
    facts: dict[str, Any] = {"version": None, "sequence": None, "model": None, "whole": None}
    try:
        content = (
            store.check_release(root, release.id)
            if check
            else manifests.check((folder / manifests.PATH).read_bytes())
        )
        facts = {
            "version": content["version"],
            "sequence": content["sequence"],
            "model": str(folder / content["model"]["path"]),
            "whole": True if check else None,
        }
    except (OSError, IntegrityError):
        facts["whole"] = False
    return {
        "id": release.id,
        "good": release.good,
        "starts": release.starts,
        "failed": release.failed,
        **facts,
    }
