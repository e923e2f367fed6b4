"""The commands that run every stage of a recipe."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgewright.cache import Cache, open_cache
from edgewright.cli.evidence import Evidence, evidence_options
from edgewright.cli.options import PATH, options, settings, signers
from edgewright.cli.stages import VERDICT_CODES
from edgewright.cli.terminal import emit_json, emit_table, explain, say
from edgewright.decision import only_warns
from edgewright.errors import UsageError
from edgewright.files import check_writable, write_atomic
from edgewright.recipe import Recipe, load_recipe, parse_recipe
from edgewright.target import Target, load_target

WORST_FIRST = (5, 3, 6, 2, 1, 4, 0)


@click.command()
@click.argument("recipe_path", metavar="RECIPE", type=PATH)
@click.option("--target", "names", multiple=True, required=True, help="May be given repeatedly.")
@click.option("--out", type=PATH, help="Folder of the results. Default: build/NAME.")
@click.option("--baseline", type=PATH, help="Bundle of an earlier release to compare with.")
@click.option("--no-cache", is_flag=True, help="Do all the work; read and keep nothing.")
@evidence_options
@options("sign", "json")
def build(
    recipe_path: Path,
    names: tuple[str, ...],
    out: Path | None,
    baseline: Path | None,
    no_cache: bool,
    key_names: tuple[str, ...],
    as_json: bool,
    **files: Any,
) -> int:
    """Run all stages of RECIPE for each target: the model, its evidence, a bundle, a verdict.

    RECIPE is the file, or a folder with a recipe.toml in it.

    \b
    edgewright build recipe.toml --target cpu
    edgewright build recipe.toml --target cpu --target arm --json > result.json
    edgewright build recipe.toml --target arm --baseline release-1.3.bundle.tar
    edgewright build recipe.toml --target arm --sign release
    edgewright build recipe.toml --target cpu --junit gate.xml --history verdicts.jsonl
    """
    from edgewright import console
    from edgewright.report import text

    evidence = Evidence(**files)
    evidence.prepare()
    keys, recipe = signers(key_names), load_recipe(recipe_path)
    targets = [load_target(name) for name in dict.fromkeys(names)]
    if len({target.name for target in targets}) < len(targets):
        raise UsageError("two of the targets have the same name", found=", ".join(names))
    out = out or Path("build") / recipe.model.name
    cache = None if no_cache else open_cache(os.environ)
    results = []
    for target in targets:
        results.append(build_one(recipe, target, out, cache, baseline, keys))
        if not as_json and results[-1]["report"]:
            console.stderr.print(text.summary(results[-1]["report"]))
    warned = [
        only_warns(recipe.gate.tolerance, target.tolerance) and not lost_baseline(result)
        for target, result in zip(targets, results, strict=True)
    ]
    for result, warns in zip(results, warned, strict=True):
        if result["verdict"] == "INCONCLUSIVE" and warns:
            result["exit_code"] = 0
            say(f"warning: {result['target']} is INCONCLUSIVE, and the policy only warns of that")
    reports = [judged(recipe, result) for result in results]
    past = evidence.write(reports, recipe.folder, only_warns=warned)
    for result in results:
        if result["target"] in past:
            draw_past(result, past[result["target"]])
    code = min((result["exit_code"] for result in results), key=WORST_FIRST.index)
    if as_json:
        emit_json({"exit_code": code, "targets": results})
    else:
        emit_table([(r["target"], r["verdict"], r["result"]) for r in results])
    return code


@click.command()
@click.argument("recipe_path", metavar="RECIPE", type=PATH)
@click.option("--target", "target_name", required=True, help="One target.")
@click.option("--budgets", default="0.9,0.75,0.6,0.45", show_default=True, help="Shares to try.")
@click.option("--out", type=PATH, help="Folder of the results. Default: build/NAME-sweep.")
@options("json")
def sweep(
    recipe_path: Path, target_name: str, budgets: str, out: Path | None, as_json: bool
) -> int:
    """Build RECIPE at several pruning budgets and draw the metric against latency and size.

    The budget's kind and all other settings are those of the recipe's [prune]; without one it
    is a share of the multiply-accumulates, with compensation. Finished builds are kept: the
    same command goes on where it was stopped. A build that an error ends is a row of the page,
    and the exit code; what the gates say is in the rows only.

    \b
    edgewright sweep recipe.toml --target cpu --budgets 0.8,0.6,0.4
    """
    from edgewright import console
    from edgewright.report import sweep as ladders

    try:
        shares = sorted({float(part) for part in budgets.split(",")}, reverse=True)
    except ValueError:
        raise UsageError("--budgets", expected="numbers like 0.8,0.6,0.4", found=budgets) from None
    recipe, target = settings(recipe_path, target_name)
    out = out or Path("build") / f"{recipe.model.name}-sweep"
    for name in ("html", "json"):
        check_writable(out / f"sweep-{target.name}.{name}", f"--out {out}")
    table = recipe.raw.get("prune", {})
    of = recipe.prune.budget.named()[0] if recipe.prune else "macs"
    rest = {k: v for k, v in recipe.raw.items() if k != "prune"}
    if "prune" not in recipe.raw:
        rest.setdefault("recover", {})
    # All are read before the first is built: a budget that cannot be must not wait for an hour.
    recipes: list[tuple[float | None, Recipe]] = [
        (None, parse_recipe({k: v for k, v in rest.items() if k != "recover"}, recipe.folder))
    ]
    for share in shares:
        raw = {**rest, "prune": {**table, "budget": {of: share}}}
        recipes.append((share, parse_recipe(raw, recipe.folder, str(recipe_path))))
    ladder, codes = [], []
    cache = open_cache(os.environ)
    for budget, one in recipes:
        name = "whole" if budget is None else f"{budget:g}"
        console.stderr.print(f"budget {name}", style="bold")
        result = build_one(one, target, out / name, cache, None)
        ladder.append(ladders.row(budget, result))
        codes += [result["exit_code"]] if result["verdict"] == "ERROR" else []
    text = ladders.page(recipe.model.name, target.name, of, ladder)
    write_atomic(out / f"sweep-{target.name}.html", text.encode())
    found = {"target": target.name, "budget_of": of, "builds": ladder}
    write_atomic(out / f"sweep-{target.name}.json", (json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        emit_json(found)
    else:
        emit_table([ladders.HEADS, *(ladders.cells(one) for one in ladder)])
        say(f"page: {out / f'sweep-{target.name}.html'}")
    return min(codes, key=WORST_FIRST.index, default=0)


def build_one(
    recipe: Recipe,
    target: Target,
    out: Path,
    cache: Cache | None,
    baseline: Path | None,
    keys: Sequence[Any] = (),
) -> dict[str, Any]:
    """Build one target and say how it went; an error ends this target only."""
    from edgewright.build import build
    from edgewright.console import watching

    folder = out / target.name
    result: dict[str, Any] = {"target": target.name, "folder": str(folder), "report": None}
    try:
        with watching(target.name) as watch:
            report = build(recipe, target, out, cache=cache, baseline=baseline, watch=watch)
        signed = sign_built(folder, keys) if keys and report["verdict"] == "PASS" else []
    except Exception as error:
        code = explain(error)
        return {
            **result,
            "exit_code": code,
            "verdict": "ERROR",
            "result": f"exit {code}",
            "error": str(error),
        }
    verdict = report["verdict"]
    bundles = " ".join(str(path) for path in sorted(folder.glob("*.bundle.tar*")))
    return {
        **result,
        "exit_code": VERDICT_CODES[verdict],
        "verdict": verdict,
        "result": bundles
        if verdict == "PASS"
        else f"{bundles} (NOT for release{', so not signed' if keys else ''})",
        "signers": signed,
        "report": report,
    }


def lost_baseline(result: dict[str, Any]) -> bool:
    """Whether a baseline was named and could not be used, which no policy may wave through."""
    return (result["report"] or {}).get("baseline") == {}


def draw_past(result: dict[str, Any], past: dict[str, Any]) -> None:
    """Write the page of a build once more, with the verdicts before it."""
    from edgewright.build import write_report

    write_report(Path(result["folder"]), result["report"], past)


def judged(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """The report of one target, or what is known of a build that an error ended."""
    known = {"name": recipe.model.name, "version": recipe.model.version}
    return result["report"] or {**known, "target": result["target"], "error": result["error"]}


def sign_built(folder: Path, keys: Sequence[Any]) -> list[str]:
    """Sign the bundle in a run folder, and its compressed form with it; the keyids."""
    from edgewright import signing
    from edgewright.bundle import transport

    (bundle,) = folder.glob("*.bundle.tar")
    names = signing.sign_bundle(bundle, keys).signers
    if bundle.with_name(bundle.name + transport.SUFFIX).exists():
        transport.compress(bundle)
    return names
