"""The commands that run one stage on files."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from edgewright.cli.evidence import Evidence, evidence_options
from edgewright.cli.options import PATH, options, settings
from edgewright.cli.terminal import emit, emit_json, emit_table
from edgewright.errors import BadInput
from edgewright.files import check_writable, copy_atomic
from edgewright.recipe import Recipe, load_recipe, parse_recipe
from edgewright.target import Target, load_target

Report = dict[str, Any]
VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}


def on_files(
    stages: Sequence[str],
    recipe: Recipe,
    target: Target,
    models: dict[str, Path],
    *,
    reports: dict[str, Report] = {},
    output: Path | None = None,
    result: str = "model.onnx",
) -> dict[str, Report]:
    """Run stages on files; their reports. The last one's file `result` goes to `output`.

    Beside it stands, while a training is at work, the folder of its checkpoint: a command that
    was stopped or killed leaves it there for the next one.
    """
    from edgewright.build import run_stages
    from edgewright.console import watching

    def keep(folder: Path) -> None:
        if output is not None:
            copy_atomic(next(folder.glob(result)), output)

    for path in models.values():
        if not path.exists():
            raise BadInput(f"model not found: {path}", hint="check the path")
    if output is not None:
        check_writable(output, f"-o {output}")
    unfinished = output.with_name(f"{output.name}.unfinished") if output is not None else None
    try:
        with watching(target.name) as watch:
            return run_stages(
                stages, recipe, target, models=models, reports=reports, watch=watch, keep=keep,
                unfinished=unfinished,
            )  # fmt: skip
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.rmdir()  # what trained to its end took its checkpoint away


def show(
    recipe: Recipe,
    target: Target,
    reports: dict[str, Report],
    as_json: bool,
    names: dict[str, str] = {},
) -> None:
    """Print what stages found: tables on standard error, or JSON on standard output.

    names: the name and version to show in place of the recipe's.
    """
    from rich.console import Group
    from rich.text import Text

    from edgewright.console import stderr
    from edgewright.report import tables, text

    if as_json:
        emit_json(reports)
        return
    report = as_build(recipe, target, reports) | names
    if "gate" in reports:
        stderr.print(text.summary(report))
        return
    figures = [f"{t.label}: {t.value}  ({t.detail})" for t in tables.tiles(report) if t.known]
    stderr.print(
        Group(
            *(Text(line) for line in figures),
            text.stage_table(tables.stages(report)),
            text.note_lines(tables.notes(report)),
        )
    )


def as_build(recipe: Recipe, target: Target, reports: dict[str, Report]) -> Report:
    """The reports of stages in the form of a build's."""
    return {
        "name": recipe.model.name,
        "version": recipe.model.version,
        "target": target.name,
        "verdict": reports.get("gate", {}).get("verdict"),
        "stages": [{"stage": k, "cached": False, "report": v} for k, v in reports.items()],
    }


def on_one(
    stage: str,
    model: Path,
    recipe_path: Path,
    target_name: str,
    output: Path,
    as_json: bool,
    original: Path | None = None,
) -> None:
    """Run one stage on one model and show its report; `original`: what is compared with."""
    recipe, target = settings(recipe_path, target_name)
    for table, hint in (("prune", "budget = { macs = 0.7 }"), ("share", "codebook = 64")):
        if stage == table and getattr(recipe, table) is None:
            raise BadInput(f"{recipe_path} has no [{table}]", hint=f"add [{table}] with {hint}")
    models = {"export": original or model, "newest": model}
    show(recipe, target, on_files([stage], recipe, target, models, output=output), as_json)


@click.command()
@click.argument("model", type=PATH, required=False)
@options("recipe", "target", "output", "json")
def export(
    model: Path | None, recipe_path: Path, target_name: str, output: Path, as_json: bool
) -> None:
    """Bring the recipe's model, or the ONNX file MODEL, into checked, self-contained ONNX.

    \b
    edgewright export --recipe recipe.toml -o model.onnx
    """
    recipe, target = settings(recipe_path, target_name)
    if model is not None:
        raw = {**recipe.raw, "model": {**recipe.raw["model"], "source": str(model.absolute())}}
        recipe = parse_recipe(raw, recipe.folder, str(recipe_path))
    show(recipe, target, on_files(["export"], recipe, target, {}, output=output), as_json)


@click.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def simplify(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Fold and fuse MODEL without changing what it computes.

    \b
    edgewright simplify model.onnx --recipe recipe.toml -o simple.onnx
    """
    on_one("simplify", model, recipe_path, target_name, output, as_json)


@click.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def prune(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Take out of MODEL what matters least, until the recipe's [prune] budget holds.

    \b
    edgewright prune simple.onnx --recipe recipe.toml -o pruned.onnx
    """
    on_one("prune", model, recipe_path, target_name, output, as_json)


@click.command()
@click.argument("model", type=PATH)
@click.option("--original", type=PATH, required=True, help="The model that was pruned.")
@options("recipe", "target", "output", "json")
def recover(
    model: Path,
    original: Path,
    recipe_path: Path,
    target_name: str,
    output: Path,
    as_json: bool,
) -> None:
    """Give the pruned MODEL back what it lost, from calibration inputs without labels.

    \b
    edgewright recover pruned.onnx --original simple.onnx --recipe recipe.toml -o repaired.onnx
    """
    on_one("recover", model, recipe_path, target_name, output, as_json, original)


@click.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def share(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Let the weights of MODEL share their values, as the recipe's [share] says.

    \b
    edgewright share simple.onnx --recipe recipe.toml -o shared.onnx
    """
    on_one("share", model, recipe_path, target_name, output, as_json)


@click.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def quantize(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Bring MODEL to int8 in the target's scheme, where it pays.

    \b
    edgewright quantize simple.onnx --recipe recipe.toml --target arm -o int8.onnx
    """
    on_one("quantize", model, recipe_path, target_name, output, as_json)


@click.command()
@click.argument("model", type=PATH)
@click.option("--original", type=PATH, help="Compare with this file. Default: the recipe's model.")
@options("recipe", "target", "json")
def validate(
    model: Path, original: Path | None, recipe_path: Path, target_name: str, as_json: bool
) -> None:
    """Say how much of the recipe's metric MODEL keeps on the target, sample by sample.

    \b
    edgewright validate int8.onnx --recipe recipe.toml --target arm
    """
    recipe, target = settings(recipe_path, target_name)
    models = {"newest": model, **({"export": original} if original else {})}
    stages = ["validate"] if original else ["export", "validate"]
    show(recipe, target, on_files(stages, recipe, target, models), as_json)


@click.command()
@click.argument("candidate", metavar="MODEL", type=PATH)
@click.argument("original", metavar="[OTHER]", type=PATH, required=False)
@click.option("--recipe", "recipe_path", type=PATH, help="The recipe, for its inputs.")
@options("target", "json")
def bench(
    candidate: Path,
    original: Path | None,
    recipe_path: Path | None,
    target_name: str,
    as_json: bool,
) -> None:
    """Measure MODEL on the target, taking turns with OTHER (default: with itself).

    Both run on the recipe's calibration inputs; without a recipe on the golden inputs of a
    bundle, or on random ones.

    \b
    edgewright bench int8.onnx model.onnx --recipe recipe.toml --target cpu
    """
    from edgewright.console import watching
    from edgewright.release import measured, named

    recipe = load_recipe(recipe_path) if recipe_path else None
    target = load_target(target_name)
    with watching(target.name) as watch:
        reports = measured(candidate, original, target, recipe=recipe, watch=watch)
    show(recipe or named(""), target, reports, as_json)
    if not as_json:
        from edgewright.report.bench import lines

        emit_table(lines(reports["measure"], alone=original is None))


@click.command()
@click.option("--candidate", type=PATH, required=True, help="The model or bundle that would ship.")
@click.option(
    "--baseline", type=PATH, required=True, help="The model or bundle it must not fall behind."
)
@click.option("--golden", type=PATH, help="A pinned release, against many small steps back.")
@click.option("--recipe", "recipe_path", type=PATH, help="The recipe: metric, inputs, limits.")
@click.option(
    "--inconclusive",
    type=click.Choice(["fail", "warn"]),
    help="Whether a verdict that stays open ends with 4 or, with a warning, 0. Default: fail.",
)
@evidence_options
@options("target", "json")
def gate(
    candidate: Path,
    baseline: Path,
    golden: Path | None,
    recipe_path: Path | None,
    inconclusive: str | None,
    target_name: str,
    as_json: bool,
    **files: Any,
) -> int:
    """Run a candidate beside a baseline and decide: PASS, FAIL or INCONCLUSIVE.

    A baseline bundle is an earlier release: nothing may be worse than it by more than the
    tolerances of recipe and profile. A baseline model with a recipe stands for the recipe's
    original and is judged by the recipe's [gate].

    \b
    edgewright gate --candidate new.bundle.tar --baseline old.bundle.tar --target cpu
    edgewright gate --candidate int8.onnx --baseline model.onnx --recipe recipe.toml
    edgewright gate --candidate int8.onnx --baseline model.onnx --recipe recipe.toml \\
        --markdown summary.md --junit gate.xml --history verdicts.jsonl
    """
    from edgewright.console import stderr, watching
    from edgewright.decision import Tolerances, only_warns
    from edgewright.release import judge, named

    evidence = Evidence(**files)
    evidence.prepare()
    recipe = load_recipe(recipe_path) if recipe_path else None
    target = load_target(target_name)
    with watching(target.name) as watch:
        reports = judge(candidate, baseline, target, recipe=recipe, pinned=golden, watch=watch)
    told = recipe or named("")
    names = {} if recipe else called(candidate)
    show(told, target, reports, as_json, names)
    warns = only_warns(recipe.gate.tolerance if recipe else Tolerances(), target.tolerance)
    warns = inconclusive == "warn" if inconclusive else warns
    report = as_build(told, target, reports) | names
    evidence.write([report], recipe.folder if recipe else Path(), only_warns=[warns])
    verdict = reports["gate"]["verdict"]
    if not as_json:
        emit(verdict)
    if verdict == "INCONCLUSIVE" and warns:
        stderr.print("warning: the verdict is INCONCLUSIVE, and the policy only warns of that")
        return 0
    return VERDICT_CODES[verdict]


def called(candidate: Path) -> dict[str, str]:
    """Name and version of what is judged without a recipe: its bundle's, or the file's name."""
    from edgewright.device.verify import verified

    if candidate.suffix in (".onnx", ".ort"):
        return {"name": candidate.stem, "version": "0"}
    manifest = verified(candidate).manifest
    return {"name": manifest["name"], "version": manifest["version"]}
