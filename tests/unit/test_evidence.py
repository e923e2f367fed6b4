"""What a verdict leaves behind: Markdown, JUnit XML, the history and its trend."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import bundles
import pytest
from markdown_it import MarkdownIt
from test_report import EVIL, check, full, visible

from edgewright.cli.evidence import Evidence
from edgewright.cli.stages import called
from edgewright.errors import BadInput, UsageError
from edgewright.report import history, html, junit, markdown, tables, trend

LINK = "https://evil.example/x www.evil.example @team #12 :smile: a|b ~~x~~ ![i](u) <b> $x$"


def judged(verdict: str, *checks: dict) -> dict:
    """A report whose gate found just this."""
    gate = {"verdict": verdict, "checks": list(checks), "notes": []}
    return {
        "name": "demo",
        "version": "1.4.0",
        "target": "cpu",
        "verdict": verdict,
        "stages": [{"stage": "gate", "cached": False, "report": gate}],
    }


def hostile() -> dict:
    """A report in which every text is an attack."""

    def spoilt(value):
        if isinstance(value, dict):
            return {key: spoilt(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoilt(inner) for inner in value]
        keep = ("gate", "validate", "measure", "PASS", "FAIL", "INCONCLUSIVE", "warning")
        return f"{EVIL} {LINK}" if isinstance(value, str) and value not in keep else value

    report = spoilt(judged("FAIL", check("min_retained", 0.99, 0.5, "FAIL", "x")))
    report["stages"][0]["report"]["notes"] = [{"level": "warning", "text": EVIL + LINK}]
    return report


# Markdown


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def test_markdown_tells_verdict_figures_and_checks():
    page = rendered(markdown.summary([full()]))
    assert "<h3>PASS: demo 1.4.0 for cpu</h3>" in page
    assert page.count("<table>") == 2
    shown = visible(page)
    for text in ("2.24× faster", "99.43 % kept", "≤ 4.00 MB", "not quiet", "quantize: a warning"):  # noqa: RUF001
        assert text in shown, text
    assert page.count("<tr>") == 2 + len(tables.tiles(full())) + len(tables.gate(full()))


def test_markdown_from_hostile_texts_is_inert():
    source = markdown.summary([hostile(), {**hostile(), "error": EVIL + LINK}])
    page = rendered(source)
    tags = set(re.findall(r"<(/?\w+)", page))
    allowed = {"h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert {tag.strip("/") for tag in tags} <= allowed, tags
    # One row per line of ours, so no cell was ended early; nothing is left to be linked later.
    assert page.count("<tr>") == 2 + len(tables.tiles(hostile())) + 1
    bare = re.sub(r"&#\d+;", "", source)
    assert not re.search(r"@\w|#\d|:smile|://|www\.", bare)
    assert "\x1b" not in source and "\u202e" not in source


def test_markdown_fits_a_comment():
    report = judged("FAIL", *(check(f"c{k}", 1, 2, "FAIL", "x" * 9000) for k in range(30)))
    notes = [{"level": "warning", "text": "y" * 9000} for _ in range(300)]
    report["stages"][0]["report"]["notes"] = notes
    text = markdown.summary([report])
    assert len(text) < 65536
    assert "280 more warnings" in text


def test_markdown_shows_the_last_verdicts():
    lines = [line(f"1.0.{k}", retained=0.9 + k / 100) for k in range(12)]
    lines.append({**line("9.9.9"), "target": "arm"})
    text = markdown.summary([full()], lines, [history.Fault(3, "cut | off")])
    assert text.index("1.0.11") < text.index("1.0.4")
    assert "1.0.3 " not in text and "9.9.9" not in text
    assert "101.00 %" in text
    assert "history line 3 cannot be read: cut &#124; off" in text


# JUnit XML. The rules are those of the schema of Ant's JUnit task, the strictest in use; what is
# written was also checked with an XSD validator against it and against that of Jenkins.

TOKEN = r"\S+( \S+)*"
ATTRIBUTES = {
    "testsuites": {},
    "testsuite": {
        **dict.fromkeys(("name", "package", "hostname"), TOKEN),
        **dict.fromkeys(("id", "tests", "failures", "errors"), r"\d+"),
        "timestamp": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d",
        "time": r"\d+(\.\d+)?",
    },
    "testcase": {"name": TOKEN, "classname": TOKEN, "time": r"\d+(\.\d+)?"},
    "property": {"name": TOKEN, "value": ".*"},
    **{key: {"message": ".*", "type": ".*"} for key in ("failure", "error", "skipped")},
}
CHILDREN = {
    "testsuites": r"(testsuite )*",
    "testsuite": r"properties (testcase )*system-out system-err ",
    "testcase": r"(failure |error |skipped )?",
    "properties": r"(property )*",
}


def checked_xml(data: bytes) -> ET.Element:
    """The document, if every element has what the schema says and the counts are right."""
    root = ET.fromstring(data)
    assert root.tag == "testsuites"
    for element in root.iter():
        wanted = ATTRIBUTES.get(element.tag, {})
        assert set(element.attrib) - {"skipped"} == set(wanted), element.tag
        for name, pattern in wanted.items():
            assert re.fullmatch(pattern, element.attrib[name], re.DOTALL), (name, element.attrib)
        order = "".join(f"{child.tag} " for child in element)
        assert re.fullmatch(CHILDREN.get(element.tag, ""), order), (element.tag, order)
    for count, suite in enumerate(root):
        assert suite.get("id") == str(count)
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            assert int(suite.get(key)) == len(list(suite.iter(tag)))
        assert int(suite.get("skipped")) == len(list(suite.iter("skipped")))
    return root


def outcomes(root: ET.Element) -> dict[str, str]:
    return {c.get("name"): c[0].tag if len(c) else "passed" for c in root.iter("testcase")}


def test_each_check_is_a_test_case():
    checks = [
        check("min_retained", 0.99, 0.9943),
        check("max_latency_ratio", 1.0, 1.2, "FAIL", "1.2 of the original"),
        check("max_latency_ms", 5.0, None, "NOT JUDGED", "not quiet"),
        check("max_memory_ratio", 1.0, None, "INCONCLUSIVE", "too few samples"),
    ]
    root = checked_xml(junit.xml([judged("FAIL", *checks)], ["error"]))
    assert list(outcomes(root).values()) == ["passed", "failure", "skipped", "error"]
    failure = root.find(".//failure")
    assert failure.get("type") == "FAIL"
    assert failure.get("message") == "latency, shipped / original: 1.2 of the original"
    assert "limit ≤ 1.000, value 1.200" in failure.text


@pytest.mark.parametrize("policy", ["error", "skipped", "failure"])
def test_what_inconclusive_is(policy):
    report = judged("INCONCLUSIVE", check("max_latency_ratio", 1, 1, "INCONCLUSIVE", "noise"))
    root = checked_xml(junit.xml([report], [policy]))
    assert outcomes(root) == {"max_latency_ratio": policy}


@pytest.mark.parametrize(
    "report, case",
    [
        (judged("INCONCLUSIVE"), {"verdict": "error"}),
        (judged("INCONCLUSIVE", check("runs", None, None)), {"runs": "passed", "verdict": "error"}),
        (judged("FAIL"), {"verdict": "failure"}),
        ({"name": "m", "version": "1", "target": "t", "stages": []}, {"verdict": "error"}),
        ({"name": "m", "version": "1", "target": "t", "error": "no model"}, {"build": "error"}),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skipped"])
def test_no_suite_passes_without_a_pass(report, case, policy):
    found = outcomes(checked_xml(junit.xml([report], [policy])))
    unsure = report.get("verdict") == "INCONCLUSIVE" and policy == "skipped"
    assert found == ({**case, "verdict": "skipped"} if unsure else case)


def test_several_targets_and_hostile_texts():
    data = junit.xml(
        [full(), hostile(), {**hostile(), "error": EVIL}], ["error"] * 3, epoch=1_700_000_000
    )
    root = checked_xml(data)
    assert [suite.get("timestamp") for suite in root] == ["2023-11-14T22:13:20"] * 3
    assert data == junit.xml(
        [full(), hostile(), {**hostile(), "error": EVIL}], ["error"] * 3, epoch=1_700_000_000
    )


# History


def line(version: str = "1.4.0", verdict: str = "PASS", **metrics: float) -> history.Entry:
    report = {**judged(verdict), "version": version}
    found = history.entry(report, commit="c" * 40, label=None, epoch=None)
    return {**found, "metrics": metrics}


def test_a_line_holds_the_figures_and_no_time():
    found = history.entry(full(), commit=None, label="nightly", epoch=None)
    assert found == {
        "schema": "edgewright-history/1",
        "name": "demo",
        "version": "1.4.0",
        "target": "cpu",
        "verdict": "PASS",
        "failed": [],
        "unsure": [],
        "commit": None,
        "label": "nightly",
        "metrics": {
            "retained": 0.9943,
            "score": 0.7139,
            "agreement": 0.9725,
            "latency_ratio": 0.4455,
            "latency_ratio_low": 0.4421,
            "latency_ratio_high": 0.4502,
            "memory_ratio": 0.81,
            "peak_bytes": 77_000_000,
            "size_ratio": 3.9 / 14,
            "size_bytes": 3_900_000,
            "check.min_retained": 0.9943,
            "check.max_latency_ratio": 0.4455,
            "check.max_size_bytes": 3_900_000,
            "check.baseline_max_latency_ratio": 0.98,
        },
    }
    assert history.entry(full(), commit=None, label=None, epoch=7)["epoch"] == 7
    failed = judged("FAIL", check("a", 1, 2, "FAIL"), check("b", 1, 2, "INCONCLUSIVE"))
    found = history.entry(failed, commit=None, label=None, epoch=None)
    assert (found["failed"], found["unsure"]) == (["a"], ["b"])


def test_the_file_only_grows(tmp_path):
    path = tmp_path / "new" / "verdicts.jsonl"
    assert history.read(path) == ([], [])
    history.append(path, [line("1")])
    before = path.read_bytes()
    history.append(path, [line("2"), line("3", "FAIL")])
    assert path.read_bytes().startswith(before)
    entries, faults = history.read(path)
    assert [one["version"] for one in entries] == ["1", "2", "3"]
    assert not faults


def test_a_line_that_was_cut_off_stays_and_is_told(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    history.append(path, [line("1"), line("2")])
    cut = path.read_bytes()[:-30]
    path.write_bytes(cut)
    history.append(path, [line("3")])
    assert path.read_bytes().startswith(cut + b"\n")
    entries, faults = history.read(path)
    assert [one["version"] for one in entries] == ["1", "3"]
    assert [fault.line for fault in faults] == [2]


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"\xff\xfe", "utf-8"),
        (b"null", "not a line of"),
        (b'{"schema": "edgewright-history/2"}', "not a line of"),
        (b"[" * 30_000, "nested too deep"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"x" * 70_000, "longer"),
        (json.dumps({**line(), "metrics": {"retained": "1"}}).encode(), "table of numbers"),
        (json.dumps({**line(), "metrics": {"retained": 10**400}}).encode(), "table of numbers"),
        (json.dumps({**line(), "metrics": {"retained": True}}).encode(), "table of numbers"),
        (json.dumps({**line(), "version": 4}).encode(), "version"),
        (json.dumps({**line(), "failed": 5}).encode(), "list of texts"),
    ],
)
def test_a_damaged_line_is_told_and_kept(tmp_path, text, reason):
    path = tmp_path / "verdicts.jsonl"
    history.append(path, [line("1")])
    whole = path.read_bytes() + text + b"\n"
    path.write_bytes(whole)
    history.append(path, [line("2")])
    entries, faults = history.read(path)
    assert [one["version"] for one in entries] == ["1", "2"]
    assert [fault.line for fault in faults] == [2]
    assert reason in faults[0].reason
    assert path.read_bytes().startswith(whole)


def many(path: Path, name: str) -> None:
    for k in range(40):
        history.append(path, [line(f"{name}.{k}")])


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with ProcessPoolExecutor(2) as pool:
        for done in [pool.submit(many, path, name) for name in "ab"]:
            done.result()
    entries, faults = history.read(path)
    assert not faults
    for name in "ab":
        mine = [one["version"] for one in entries if one["version"][0] == name]
        assert mine == [f"{name}.{k}" for k in range(40)]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="expected a file"):
        history.append(tmp_path / "pipe", [line()])
    with pytest.raises(BadInput, match="expected a file"):
        history.read(tmp_path / "pipe")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "verdicts.jsonl"
    history.append(path, [line("1")])
    before = path.read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        history.append(path, [line("2")])
    assert path.read_bytes() == before


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    ran = subprocess.run(
        ["git", "-C", str(folder), *name, *words], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    folder, aside = tmp_path / "model", tmp_path / "model" / "verdicts.jsonl"
    folder.mkdir()
    assert history.commit_of(folder, aside) is None
    git(tmp_path, "init", "-q")
    assert history.commit_of(folder, aside) is None
    (folder / "recipe.toml").write_text("1")
    aside.write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    history.append(aside, [line()])
    assert history.commit_of(folder, aside) == head
    assert history.commit_of(folder, Path("/elsewhere")) == head + "+changes"
    (folder / "recipe.toml").write_text("2")
    assert history.commit_of(folder, aside) == head + "+changes"


# Trend


def test_the_page_shows_the_trend():
    lines = [line(f"1.{k}", latency_ratio=0.5 + k / 100, retained=0.99) for k in range(5)]
    lines[3]["verdict"], lines[3]["failed"] = "FAIL", ["max_latency_ratio"]
    lines += [{**line("otherversion"), "name": "another"}, {**line("armversion"), "target": "arm"}]
    past = trend.view(full(), lines, [history.Fault(2, "cut off")])
    page = html.render(full(), past)
    assert page == html.render(full(), trend.view(full(), lines, [history.Fault(2, "cut off")]))
    assert [label for label, _ in past["plots"]] == [
        "latency, shipped / original",
        "metric kept, %",
    ]
    shown = visible(page)
    assert "5 verdicts" in shown and "history line 2 cannot be read" in shown
    assert "otherversion" not in shown and "armversion" not in shown
    assert "latency, shipped / original" in past["rows"][1][5]
    assert "Trend" not in visible(html.render(full()))


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Where the markers of a colour are, in points from the upper left corner."""
    found = re.findall(rf'<use[^>]* x="([\d.]+)" y="([\d.]+)" style="fill: var\({colour}\)', svg)
    return [(float(x), float(y)) for x, y in found]


def test_a_marker_for_each_verdict_where_it_belongs():
    lines = [line(str(k), latency_ratio=0.5 + k / 10) for k in range(5)]
    lines[4]["verdict"] = "FAIL"
    lines[3]["verdict"] = "INCONCLUSIVE"
    del lines[1]["metrics"]["latency_ratio"]
    svg = trend.plot("latency_ratio", "x", 1.0, lines)
    passed, failed, open_ = (marks(svg, c) for c in ("--shipped", "--fail", "--muted"))
    (x0, y0), (x2, y2) = passed
    (x4, y4), (x3, y3) = *failed, *open_
    assert (x4 - x0, y4 - y0) == pytest.approx((2 * (x2 - x0), 2 * (y2 - y0)), abs=0.01)
    assert (x3 - x2, y3 - y2) == pytest.approx(((x2 - x0) / 2, (y2 - y0) / 2), abs=0.01)
    assert x2 > x0 and y2 < y0  # later to the right, more further up
    assert trend.plot("latency_ratio", "x", 1.0, lines[:2]) == ""
    assert trend.plot("retained", "x", 1.0, lines) == ""


def test_hostile_lines_stay_text():
    evil = {**line(EVIL, retained=1e300), "label": EVIL, "commit": [EVIL], "failed": [EVIL, {}]}
    evil["metrics"] |= {"latency_ratio": -1e15, "latency_ratio_low": 1e308}
    report = {**full(), "name": evil["name"], "target": evil["target"]}
    page = html.render(report, trend.view(report, [evil, evil, line(retained=0.9)], []))
    assert "<script" not in page and "\u202e" not in page
    rendered(markdown.summary([report], [evil, evil], []))


# The options


def test_an_old_file_is_gone_before_the_work_begins(tmp_path):
    for name in ("a.md", "b.xml"):
        (tmp_path / name).write_text("old")
    evidence = Evidence(tmp_path / "a.md", tmp_path / "b.xml", None, None, None)
    evidence.prepare()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["markdown", "junit", "history"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    files = dict.fromkeys(("markdown", "junit", "junit_inconclusive", "history", "label"))
    with pytest.raises(UsageError, match=f"--{name} .*expected a file that can be written"):
        Evidence(**{**files, name: tmp_path / "file" / "below"}).prepare()
    Evidence(**{**files, name: tmp_path / "new" / "below"}).prepare()
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "kept"


def test_a_label_needs_its_history(tmp_path):
    with pytest.raises(UsageError, match="--history"):
        Evidence(None, None, None, None, "x").prepare()
    with pytest.raises(UsageError, match="200"):
        Evidence(None, None, None, tmp_path / "h", "x" * 201).prepare()


def test_files_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    names = [tmp_path / name for name in ("a.md", "b.xml", "h.jsonl")]
    evidence = Evidence(names[0], names[1], "skipped", names[2], "one")
    broken = {"name": "demo", "version": "1", "target": "arm", "error": "no emulator"}
    past = evidence.write([full(), broken], tmp_path, [False, False])
    assert list(past) == ["cpu"]
    names[2].write_bytes(names[2].read_bytes() + b"junk\n")
    evidence.write([full(), broken], tmp_path, [False, False])
    entries, faults = history.read(names[2])
    assert [(one["target"], one["label"]) for one in entries] == [("cpu", "one")] * 2
    assert len(faults) == 1
    assert "history line 2" in capsys.readouterr().err
    assert "ERROR: demo 1 for arm" in names[0].read_text()
    root = checked_xml(names[1].read_bytes())
    assert [suite.get("name") for suite in root] == ["demo 1.4.0 for cpu", "demo 1 for arm"]


@pytest.mark.parametrize(
    "given, only_warns, tag",
    [
        (None, False, "error"),
        (None, True, "skipped"),
        ("failure", True, "failure"),
        ("error", True, "error"),
    ],
)
def test_the_policy_says_what_an_open_verdict_is(tmp_path, given, only_warns, tag):
    report = judged("INCONCLUSIVE", check("max_latency_ratio", 1, 1, "INCONCLUSIVE", "noise"))
    evidence = Evidence(None, tmp_path / "a.xml", given, None, None)
    evidence.write([report], tmp_path, only_warns=[only_warns])
    found = outcomes(checked_xml((tmp_path / "a.xml").read_bytes()))
    assert found == {"max_latency_ratio": tag}


def test_what_is_judged_without_a_recipe_has_a_name(tmp_path):
    assert called(tmp_path / "int8.onnx") == {"name": "int8", "version": "0"}
    assert called(bundles.make(tmp_path)) == {"name": "tiny", "version": "1.2.3"}
