"""A verdict as JUnit XML, valid by the schema of Ant's reports and by that of Jenkins.

A suite per target, a test case per check. FAIL is a failure, what cannot be judged on the target
is skipped, and INCONCLUSIVE is what the caller says. A verdict that no check explains, and a build
that has none, get a test case of their own: no suite passes where the gate did not say PASS.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import UTC, datetime

from edgewright.report import tables

TAGS = {"FAIL": "failure", "NOT JUDGED": "skipped", "ERROR": "error"}


def xml(reports: Sequence[tables.Report], inconclusive: Sequence[str], epoch: int = 0) -> bytes:
    """The file for build reports, or for what is left of one: name, version, target, `error`.

    inconclusive: for each, "error", "skipped" or "failure". epoch: the time stamp, which the
    schema wants.
    """
    root = ET.Element("testsuites")
    for count, (report, tag) in enumerate(zip(reports, inconclusive, strict=True)):
        suite(root, count, report, {**TAGS, "INCONCLUSIVE": tag}, epoch)
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def suite(
    root: ET.Element, count: int, report: tables.Report, tags: dict[str, str], epoch: int
) -> None:
    """One report as a suite."""
    model, version, target = (tables.plain(report.get(k)) for k in ("name", "version", "target"))
    cases = cases_of(report)
    found = [tags.get(verdict, "") for _, verdict, _, _ in cases]
    made = ET.SubElement(
        root,
        "testsuite",
        name=f"{model} {version} for {target}",
        package=f"edgewright.{target}",
        id=str(count),
        timestamp=datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        hostname="localhost",
        tests=str(len(cases)),
        failures=str(found.count("failure")),
        errors=str(found.count("error")),
        skipped=str(found.count("skipped")),
        time="0",
    )
    facts = ET.SubElement(made, "properties")
    verdict = "ERROR" if report.get("error") else tables.verdict(report)
    known = {"model": model, "version": version, "target": target, "verdict": verdict}
    for name, value in known.items():
        ET.SubElement(facts, "property", name=name, value=value)
    for (name, word, message, text), tag in zip(cases, found, strict=True):
        case = ET.SubElement(
            made, "testcase", name=name, classname=f"edgewright.{target}.{model}", time="0"
        )
        if tag:
            ET.SubElement(case, tag, type=word, message=message).text = text
    ET.SubElement(made, "system-out").text = "\n".join(
        f"{word}: {name}: {message}" for name, word, message, _ in cases
    )
    notes = tables.notes(report)
    ET.SubElement(made, "system-err").text = "\n".join(
        f"{note.level}: {note.stage}: {note.text}" for note in notes
    )


def cases_of(report: tables.Report) -> list[tuple[str, str, str, str]]:
    """Name, verdict, message and details of each test case."""
    if report.get("error"):
        return [("build", "ERROR", tables.plain(report["error"]), "")]
    cases = [
        (
            check.name,
            check.verdict,
            f"{check.label}: {check.reason or check.value}",
            f"limit {check.limit}, value {check.value}, bounds {check.bounds}",
        )
        for check in tables.gate(report)
    ]
    verdict = tables.verdict(report)
    if verdict != "PASS" and verdict not in {word for _, word, _, _ in cases}:
        word = "ERROR" if verdict == tables.NO_VERDICT else verdict
        cases.append(("verdict", word, f"{verdict}: {tables.explanation(report)}", ""))
    return cases
