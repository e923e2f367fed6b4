"""What of a build's reports goes into a bundle: only what the same inputs give again."""

from edgewright.stage import Report

# Checks whose values do not depend on the day.
DETERMINISTIC = (
    "min_retained",
    "min_agreement",
    "max_size_ratio",
    "max_size_bytes",
    "min_provider_share",
)


def public(report: Report) -> Report:
    """The part of a gate report that is the same for the same inputs: no times, no memory."""
    checks = []
    for check in report["checks"]:
        kept = {key: check[key] for key in ("name", "limit", "verdict")}
        if check["name"] in DETERMINISTIC:
            kept["value"] = check["value"]
        checks.append(kept)
    return {"verdict": report["verdict"], "checks": checks}
