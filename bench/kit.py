#!/usr/bin/env python3
"""Build every case of the measuring kit and score the results with the kit's own tool.

    python bench/kit.py --kit ../shared/kit --target cpu [CASE ...] [--json]

Beside each of our results stand those of the peers (the kit's peers.json): metric kept at which
latency ratio. Our figures come from `kit.py compare`, never from our own report.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> int:
    """Command line; 0 unless a case could not be built or scored at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--kit", type=Path, default=Path("../shared/kit"))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/kit"))
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--no-cache", action="store_true", help="for honest build times")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if not (asked.kit / "kit.py").is_file():
        print(f"no measuring kit in {asked.kit}: nothing to do", file=sys.stderr)
        return 0
    known = sorted(path.parent.name for path in asked.kit.glob("*/recipe.toml"))
    if unknown := sorted(set(asked.cases) - set(known)):
        parser.error(f"no such case: {', '.join(unknown)} (there are {', '.join(known)})")
    peers = json.loads((asked.kit / "peers.json").read_text("utf-8"))["cases"]
    rows = []
    for case in asked.cases or known:
        row = one_case(case, asked)
        row["peers"] = peers.get(case, [])
        rows.append(row)
        if not asked.json:
            show(row)
    if asked.json:
        print(json.dumps(rows, indent=1))
    elif len(rows) > 1:
        overview(rows)
    return 1 if any("error" in row for row in rows) else 0


def one_case(case: str, asked: argparse.Namespace) -> Row:
    """Build one case and score it."""
    print(f"{case}: building", file=sys.stderr)
    recipe = asked.kit / case / "recipe.toml"
    begin = time.monotonic()
    command = [sys.executable, "-m", "edgewright", "build", recipe, "--target", asked.target]
    command += ["--out", asked.out / case, "--json", *(["--no-cache"] if asked.no_cache else [])]
    built = run(command)
    row: Row = {"case": case, "build_s": time.monotonic() - begin, "exit_code": built.returncode}
    try:
        result = json.loads(built.stdout)["targets"][0]
        report = result["report"]
        row["verdict"] = result["verdict"]
        stages = report["stages"]
        row["work_s"] = sum(stage["report"]["seconds"] for stage in stages)
        row["peak_rss_mib"] = max(stage["report"]["peak_rss_bytes"] for stage in stages) / 2**20
    except (ValueError, KeyError, TypeError):
        return {**row, "verdict": "ERROR", "error": f"build: exit {built.returncode}"}
    print(f"{case}: scoring", file=sys.stderr)
    model = Path(result["folder"]) / "model.onnx"
    command = [sys.executable, asked.kit / "kit.py", "compare", case, model, "--json"]
    scored = run([*command, "--root", asked.kit, "--pairs", asked.pairs])
    if scored.returncode:
        return {**row, "error": f"kit.py: exit {scored.returncode}"}
    found = json.loads(scored.stdout)
    for key in ("retained_percent", "score", "fp32_score", "cpu_ratio", "cpu_ratio_95"):
        row[key] = found[key]
    for key in ("wall_ratio", "sqnr_db", "bytes"):
        row[key] = found[key]
    row["run_rss_mib"] = found["peak_rss_mib"]
    row["size_ratio"] = found["bytes"]["candidate"] / found["bytes"]["fp32"]
    return row


def run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    """Run a command, its progress visible; what it printed."""
    texts = [str(part) for part in command]
    return subprocess.run(texts, stdout=subprocess.PIPE, text=True, check=False)


def figures(row: Row) -> str:
    """Our figures of one case on one line."""
    if "error" in row:
        return f"{row['case']:<20} {row['verdict']:<12} {row['error']}"
    low, high = row["cpu_ratio_95"]
    return (
        f"{row['case']:<20} {row['verdict']:<12} {row['retained_percent']:7.2f} % kept "
        f"@ {row['cpu_ratio']:.3f} [{low:.3f}, {high:.3f}]  size {row['size_ratio']:.3f}  "
        f"built in {row['build_s']:.0f} s (work {row['work_s']:.0f} s)  "
        f"peak {row['peak_rss_mib']:.0f} MiB"
    )


def show(row: Row) -> None:
    """One case: ours, then the peers from the fastest to the slowest."""
    print(figures(row))
    for peer in sorted(row["peers"], key=lambda p: p.get("cpu_ratio") or float("inf")):
        name = f"{peer['peer']} {peer['config']}"
        if peer.get("cpu_ratio") is None or peer.get("retained_percent") is None:
            print(f"    {name:<28} no result")
            continue
        kept, ratio = peer["retained_percent"], peer["cpu_ratio"]
        cost = f"{peer.get('quantize_s', '?')} s, {peer.get('peak_rss_mb', '?')} MB"
        print(f"    {name:<28} {kept:7.2f} % kept @ {ratio:.3f}  {cost}", flush=True)


def overview(rows: list[Row]) -> None:
    """All cases, one line each."""
    print()
    for row in rows:
        print(figures(row))


if __name__ == "__main__":
    sys.exit(main())
