"""The earlier release that a new one must not fall behind: its bundle, re-run beside the new model.

What is compared are artefacts, never remembered numbers. A baseline that is missing or damaged
proves nothing, so the verdict is INCONCLUSIVE at best; one of another model or target is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.device.verify import extract
from edgewright.errors import BadInput, IntegrityError
from edgewright.recipe import Recipe
from edgewright.stage import Report
from edgewright.target import Target

PREFIX = "baseline_"
WORST_FIRST = ("FAIL", "INCONCLUSIVE", "PASS")


@dataclass(frozen=True)
class Baseline:
    """The model of an earlier release and what is known of it, or why there is none."""

    model: Path | None
    facts: dict[str, Any]
    fault: str = ""


def open_baseline(bundle: Path, recipe: Recipe, target: Target, folder: Path) -> Baseline:
    """Verify a bundle and unpack it into the new folder `folder`."""
    if not bundle.exists():
        return Baseline(None, {}, f"the baseline {bundle} does not exist")
    try:
        manifest = extract(bundle, folder)
    except IntegrityError as error:
        return Baseline(None, {}, f"the baseline {bundle} is not to be trusted: {error}")
    wanted = (recipe.model.name, target.name)
    found = (manifest["name"], manifest["target"])
    if found != wanted:
        raise BadInput(
            f"baseline {bundle}",
            expected=f"a bundle of {wanted[0]} for {wanted[1]}",
            found=f"one of {found[0]} for {found[1]}",
            hint="name the bundle of an earlier release of this very model and target",
        )
    if "pool" in manifest:
        raise BadInput(
            f"baseline {bundle} holds several models",
            expected="the bundle of one",
            hint="name the earlier bundle of this model alone",
        )
    model = manifest["model"]
    facts = {"version": manifest["version"], "model_sha256": model["sha256"]}
    return Baseline(folder / model["path"], facts)


def nothing_to_compare(fault: str) -> Report:
    """The gate's report on a baseline that cannot be used."""
    check = {"name": "comparison", "limit": None, "value": None, "low": None, "high": None}
    return {
        "verdict": "INCONCLUSIVE",
        "checks": [{**check, "verdict": "INCONCLUSIVE", "reason": fault}],
        "notes": [{"level": "warning", "text": fault}],
    }


def merged(report: Report, against: Report, prefix: str = PREFIX) -> Report:
    """One gate report of the comparisons with the original and with the baseline."""
    checks = [{**check, "name": prefix + check["name"]} for check in against["checks"]]
    return {
        **report,
        "verdict": min(report["verdict"], against["verdict"], key=WORST_FIRST.index),
        "checks": [*report["checks"], *checks],
        "notes": [*report["notes"], *against["notes"]],
    }
