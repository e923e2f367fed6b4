"""The command line: parse, call, print. Selection and work live elsewhere.

Results go to standard output, everything else to standard error. `main` is the one place that
turns errors into a message and an exit code.
"""

import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from edgewright import __version__
from edgewright.cache import Cache, open_cache
from edgewright.errors import (
    BadInput,
    EdgewrightError,
    EnvironmentMissing,
    IntegrityError,
    UsageError,
    from_os_error,
)
from edgewright.files import copy_atomic, write_atomic
from edgewright.process import Stopped, adopt_orphans, catch_signals, end_children
from edgewright.recipe import Recipe, load_recipe, parse_recipe
from edgewright.target import Target, load_target, target_names

# What computes is imported where it is used: a mistyped option must not wait for numpy.

Report = dict[str, Any]

VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}
WORST_FIRST = (5, 3, 6, 2, 1, 4, 0)
PATH = click.Path(path_type=Path)
SIGN_ANYWAY = "bundle without --sign, then: edgewright sign BUNDLE --any-verdict --key KEY"
KEPT = "finished stages are kept, the same command goes on from there"


def main() -> NoReturn:
    """Run the command line and leave with its exit code; no traceback passes this point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    adopt_orphans()
    catch_signals()
    code = guarded(lambda: cli.main(standalone_mode=False, prog_name="edgewright") or 0)
    end_children()
    sys.exit(code)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; every exception becomes one message and its code."""
    try:
        return work()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return say(f"usage: {error.format_message()} See `edgewright --help`.", 2)
    except Stopped as stop:
        return say(f"{stop.word}; {KEPT}", stop.code)
    except Exception as error:
        return explain(error)


def explain(error: Exception) -> int:
    """Print one message for an error; its exit code."""
    if isinstance(error, OSError):
        error = from_os_error(error, "running this command")
    if isinstance(error, EdgewrightError):
        return say(f"error: {error}", error.exit_code)
    with tempfile.NamedTemporaryFile(
        "w", prefix="edgewright-error-", suffix=".log", delete=False
    ) as log:
        traceback.print_exception(error, file=log)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return say(f"internal error: {text}. Please report it; details in {log.name}", 3)


def say(text: str, code: int = 0) -> int:
    """Print a message on standard error; the code, for the caller to return."""
    with suppress(BrokenPipeError):
        click.echo(f"edgewright: {printable(text)}", err=True)
    return code


def emit(text: str) -> None:
    """Print a result on standard output; a reader that has left changes no exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def emit_json(value: Any) -> None:
    """Print a result for machines."""
    emit(json.dumps(value, indent=1, sort_keys=True, default=str))


def emit_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns; the last one is not padded."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        emit(printable("  ".join([*cells, row[-1]]).rstrip()))


def printable(text: str) -> str:
    """Text that cannot steer a terminal, whatever a model's names hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def trust_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whose signatures count."""
    for option in (
        click.option("--no-clock", is_flag=True, help="Judge no dates: the clock here is wrong."),
        click.option(
            "--threshold",
            type=int,
            help="How many of the trusted keys must have signed. Default: 1.",
        ),
        click.option(
            "--trust",
            "trusted",
            type=PATH,
            multiple=True,
            help="A public key that must have signed (may be given repeatedly), or a trust file.",
        ),
    ):
        command = option(command)
    return command


def options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that several commands share, by name."""
    known: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
        "recipe": click.option(
            "--recipe", "recipe_path", type=PATH, required=True, help="The recipe (TOML)."
        ),
        "target": click.option(
            "--target",
            "target_name",
            default="cpu",
            show_default=True,
            help="A shipped target, or the path of a profile of your own.",
        ),
        "output": click.option(
            "-o", "--output", type=PATH, required=True, help="Where to write the result."
        ),
        "trust": trust_options,
        "sign": click.option(
            "--sign",
            "key_names",
            metavar="KEY",
            multiple=True,
            help="Sign what the gate passed: a key file, env:NAME or command:PROGRAM.",
        ),
        "json": click.option(
            "--json", "as_json", is_flag=True, help="Print the result as JSON, for machines."
        ),
    }

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = known[name](command)
        return command

    return decorate


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 PASS, 1 gate FAIL, 2 usage, 3 bad input, 4 gate INCONCLUSIVE, "
    "5 integrity, 6 environment, 130/143 interrupted.",
)
@click.version_option(__version__, prog_name="edgewright")
def cli() -> None:
    """Turn a trained model into a small, fast, proven bundle for a device.

    \b
    edgewright init model.onnx                    write a recipe to fill in
    edgewright build recipe.toml --target cpu     do everything
    edgewright doctor                             what this machine can run
    """


@cli.command()
@click.argument("recipe_path", metavar="RECIPE", type=PATH)
@click.option("--target", "names", multiple=True, required=True, help="May be given repeatedly.")
@click.option("--out", type=PATH, help="Folder of the results. Default: build/NAME.")
@click.option("--baseline", type=PATH, help="Bundle of an earlier release to compare with.")
@click.option("--no-cache", is_flag=True, help="Do all the work; read and keep nothing.")
@options("sign", "json")
def build(
    recipe_path: Path,
    names: tuple[str, ...],
    out: Path | None,
    baseline: Path | None,
    no_cache: bool,
    key_names: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run all stages of RECIPE for each target: the model, its evidence, a bundle, a verdict.

    \b
    edgewright build recipe.toml --target cpu
    edgewright build recipe.toml --target cpu --target arm --json > result.json
    edgewright build recipe.toml --target arm --baseline release-1.3.bundle.tar
    edgewright build recipe.toml --target arm --sign release
    """
    from edgewright import console
    from edgewright.report import text

    keys = signers(key_names)
    recipe = load_recipe(recipe_path)
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
    code = min((result["exit_code"] for result in results), key=WORST_FIRST.index)
    if as_json:
        emit_json({"exit_code": code, "targets": results})
    else:
        emit_table([(r["target"], r["verdict"], r["result"]) for r in results])
    return code


@cli.command()
@click.argument("recipe_path", metavar="RECIPE", type=PATH)
@click.option("--target", "target_name", required=True, help="One target.")
@click.option("--budgets", default="0.9,0.75,0.6,0.45", show_default=True, help="Shares to try.")
@click.option("--out", type=PATH, help="Folder of the results. Default: build/NAME-sweep.")
@options("json")
def sweep(
    recipe_path: Path, target_name: str, budgets: str, out: Path | None, as_json: bool
) -> None:
    """Build RECIPE at several pruning budgets and draw the metric against latency and size.

    The budget's kind and all other settings are those of the recipe's [prune]; without one it
    is a share of the multiply-accumulates, with compensation. Finished builds are kept: the
    same command goes on where it was stopped.

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
    table = {"budget": {"macs": 0.5}, **recipe.raw.get("prune", {})}
    of = next(iter(table["budget"]))
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
    ladder = []
    cache = open_cache(os.environ)
    for budget, one in recipes:
        name = "whole" if budget is None else f"{budget:g}"
        console.stderr.print(f"budget {name}", style="bold")
        ladder.append(ladders.row(budget, build_one(one, target, out / name, cache, None)))
    text = ladders.page(recipe.model.name, target.name, of, ladder)
    write_atomic(out / f"sweep-{target.name}.html", text.encode())
    found = {"target": target.name, "budget_of": of, "builds": ladder}
    write_atomic(out / f"sweep-{target.name}.json", (json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        emit_json(found)
    else:
        emit_table([ladders.HEADS, *(ladders.cells(one) for one in ladder)])
        say(f"page: {out / f'sweep-{target.name}.html'}")


def signers(names: Sequence[str]) -> list[Any]:
    """The keys of --sign and --key, before any work is done with them."""
    from edgewright import signing

    return [signing.signer(name, os.environ) for name in names]


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


def sign_built(folder: Path, keys: Sequence[Any]) -> list[str]:
    """Sign the bundle in a run folder, and its compressed form with it; the keyids."""
    from edgewright import signing
    from edgewright.bundle import transport

    (bundle,) = folder.glob("*.bundle.tar")
    names = signing.sign_bundle(bundle, keys).signers
    if bundle.with_name(bundle.name + transport.SUFFIX).exists():
        transport.compress(bundle)
    return names


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
    """Run stages on files; their reports. The last one's file `result` goes to `output`."""
    from edgewright.build import run_stages
    from edgewright.console import watching

    def keep(folder: Path) -> None:
        if output is not None:
            copy_atomic(next(folder.glob(result)), output)

    for path in models.values():
        if not path.exists():
            raise BadInput(f"model not found: {path}", hint="check the path")
    with watching(target.name) as watch:
        return run_stages(
            stages, recipe, target, models=models, reports=reports, watch=watch, keep=keep
        )


def show(recipe: Recipe, target: Target, reports: dict[str, Report], as_json: bool) -> None:
    """Print what stages found: tables on standard error, or JSON on standard output."""
    from rich.console import Group
    from rich.text import Text

    from edgewright.console import stderr
    from edgewright.report import tables, text

    if as_json:
        emit_json(reports)
        return
    report = {
        "name": recipe.model.name,
        "version": recipe.model.version,
        "target": target.name,
        "stages": [{"stage": k, "cached": False, "report": v} for k, v in reports.items()],
    }
    if "gate" in reports:
        stderr.print(text.summary({**report, "verdict": reports["gate"]["verdict"]}))
        return
    figures = [f"{t.label}: {t.value}  ({t.detail})" for t in tables.tiles(report) if t.known]
    stderr.print(
        Group(
            *(Text(line) for line in figures),
            text.stage_table(tables.stages(report)),
            text.note_lines(tables.notes(report)),
        )
    )


def settings(recipe_path: Path, target_name: str) -> tuple[Recipe, Target]:
    """The recipe and the target that a command names."""
    return load_recipe(recipe_path), load_target(target_name)


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


@cli.command()
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


@cli.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def simplify(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Fold and fuse MODEL without changing what it computes.

    \b
    edgewright simplify model.onnx --recipe recipe.toml -o simple.onnx
    """
    on_one("simplify", model, recipe_path, target_name, output, as_json)


@cli.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def prune(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Take out of MODEL what matters least, until the recipe's [prune] budget holds.

    \b
    edgewright prune simple.onnx --recipe recipe.toml -o pruned.onnx
    """
    on_one("prune", model, recipe_path, target_name, output, as_json)


@cli.command()
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


@cli.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def share(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Let the weights of MODEL share their values, as the recipe's [share] says.

    \b
    edgewright share simple.onnx --recipe recipe.toml -o shared.onnx
    """
    on_one("share", model, recipe_path, target_name, output, as_json)


@cli.command()
@click.argument("models", metavar="MODEL...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="A new folder to write.")
@options("json")
def pool(models: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Store the tensors that several MODELs have in common once.

    The folder holds each model and weights.bin, which all of them read.

    \b
    edgewright pool keyword.onnx speaker.onnx -o pool
    """
    from edgewright.build import pool as pooled
    from edgewright.console import watching

    named = {path.stem: path for path in models}
    if len(named) < len(models) or len(models) < 2:
        raise UsageError(
            "pool", expected="two models or more with different names", found=f"{len(models)}"
        )
    for path in models:
        if not path.exists():
            raise BadInput(f"model not found: {path}", hint="check the path")
    if output.exists():
        raise UsageError(f"{output} exists", expected="a new folder", hint="name another one")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"no folder {output.absolute().parent}", hint="make it first")
    target = load_target("cpu")
    with watching(target.name) as watch:
        report = pooled(named, target, output, watch)
    if as_json:
        emit_json(report)
        return
    saved = report["separate_bytes"] - report["pooled_bytes"]
    rows = [("model", "stored bytes", "of these shared", "tensors shared")]
    for row in report["models"]:
        numbers = (row["stored_bytes"], row["shared_bytes"], row["shared_tensors"])
        rows.append((row["model"], *(str(number) for number in numbers)))
    emit_table(rows)
    emit_table([("all together", f"{report['pooled_bytes']} bytes, {saved} fewer than apart")])


@cli.command()
@click.argument("model", type=PATH)
@options("recipe", "target", "output", "json")
def quantize(model: Path, recipe_path: Path, target_name: str, output: Path, as_json: bool) -> None:
    """Bring MODEL to int8 in the target's scheme, where it pays.

    \b
    edgewright quantize simple.onnx --recipe recipe.toml --target arm -o int8.onnx
    """
    on_one("quantize", model, recipe_path, target_name, output, as_json)


@cli.command()
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


@cli.command()
@click.argument("candidate", metavar="MODEL", type=PATH)
@click.argument("original", metavar="[OTHER]", type=PATH, required=False)
@options("recipe", "target", "json")
def bench(
    candidate: Path, original: Path | None, recipe_path: Path, target_name: str, as_json: bool
) -> None:
    """Measure MODEL on the target, taking turns with OTHER (default: with itself).

    The recipe's calibration inputs are what both are run on.

    \b
    edgewright bench int8.onnx model.onnx --recipe recipe.toml --target cpu
    """
    recipe, target = settings(recipe_path, target_name)
    models = {"newest": candidate, "export": original or candidate}
    show(recipe, target, on_files(["measure"], recipe, target, models), as_json)


@cli.command()
@click.option("--candidate", type=PATH, required=True, help="The model that would ship.")
@click.option("--baseline", type=PATH, required=True, help="The model it must not fall behind.")
@options("recipe", "target", "json")
def gate(
    candidate: Path, baseline: Path, recipe_path: Path, target_name: str, as_json: bool
) -> int:
    """Validate and measure one model file against another, and decide by the recipe's [gate].

    \b
    edgewright gate --candidate int8.onnx --baseline model.onnx --recipe recipe.toml
    """
    recipe, target = settings(recipe_path, target_name)
    models = {"newest": candidate, "export": baseline}
    reports = on_files(["validate", "measure", "gate"], recipe, target, models)
    show(recipe, target, reports, as_json)
    verdict = reports["gate"]["verdict"]
    if not as_json:
        emit(verdict)
    return VERDICT_CODES[verdict]


@cli.command()
@click.argument("model", type=PATH)
@click.option("--gate", "gate_path", type=PATH, help="What `edgewright gate --json` printed.")
@options("recipe", "target", "output", "sign", "json")
def bundle(
    model: Path,
    gate_path: Path | None,
    recipe_path: Path,
    target_name: str,
    output: Path,
    key_names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Pack MODEL with golden vectors and a manifest into a deterministic, self-testing bundle.

    \b
    edgewright bundle int8.onnx --recipe recipe.toml --target arm -o keyword.bundle.tar
    """
    recipe, target = settings(recipe_path, target_name)
    reports = {"gate": gate_report(gate_path)} if gate_path else {}
    keys = signers(key_names)
    if keys and (not reports or reports["gate"]["verdict"] != "PASS"):
        raise UsageError("--sign needs --gate with the verdict PASS", hint=SIGN_ANYWAY)
    models = {"newest": model, "export": model}
    found = on_files(
        ["bundle"],
        recipe,
        target,
        models,
        reports=reports,
        output=output,
        result="*.bundle.tar",
    )
    if keys:
        from edgewright import signing

        signing.sign_bundle(output, keys)
    show(recipe, target, found, as_json)
    if not as_json:
        emit(str(output))


def gate_report(path: Path) -> Report:
    """The gate's report in what `edgewright gate --json` printed."""
    found = read_json(path, "gate report")
    report = found.get("gate", found)
    if not isinstance(report, dict) or report.get("verdict") not in VERDICT_CODES:
        raise BadInput(f"gate report {path}", expected="what `edgewright gate --json` prints")
    return report


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}", hint="check the path") from None
    except ValueError as error:
        raise BadInput(f"{what} {path}", expected="JSON", found=str(error)) from None
    if not isinstance(value, dict):
        raise BadInput(f"{what} {path}", expected="a JSON object", found=type(value).__name__)
    return value


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=PATH)
@click.option(
    "--rebuild", "recipe_path", type=PATH, help="Build this recipe again and compare every byte."
)
@click.option("--target", "target_name", help="With --rebuild: the profile, where it is your own.")
@options("trust", "json")
def verify(
    bundle_path: Path,
    recipe_path: Path | None,
    target_name: str | None,
    trusted: tuple[Path, ...],
    threshold: int | None,
    no_clock: bool,
    as_json: bool,
) -> int:
    """Check that BUNDLE is whole, holds exactly what its manifest lists, and who signed it.

    \b
    edgewright verify keyword-1.4.0-arm.bundle.tar --trust release.pub
    edgewright verify keyword-1.4.0-arm.bundle.tar --rebuild recipe.toml
    """
    from edgewright.device.verify import verified

    trust = trust_from(trusted, threshold, no_clock)
    found = verified(bundle_path, trust)
    if recipe_path is not None:
        target = load_target(target_name or found.manifest["target"])
        return rebuilt(bundle_path, load_recipe(recipe_path), target, trust, as_json)
    manifest = found.manifest
    if as_json:
        emit_json({**manifest, "signers": found.signers, "trusted": trust is not None})
        return 0
    verdict = (manifest["gate"] or {}).get("verdict", "none")
    emit_table(
        [
            ("bundle", f"{manifest['name']} {manifest['version']} for {manifest['target']}"),
            ("gate", verdict if verdict == "PASS" else f"{verdict} (NOT for release)"),
            ("model", f"{manifest['model']['bytes']} bytes, sha256 {manifest['model']['sha256']}"),
            ("runtime", f"{manifest['runtime']['name']} {manifest['runtime']['exact']}"),
            ("signature", signature_text(found.signers, trust is not None)),
            ("files", f"{len(manifest['files'])}, every one as listed"),
        ]
    )
    return 0


def rebuilt(bundle: Path, recipe: Recipe, target: Target, trust: Any, as_json: bool) -> int:
    """Build again, say what differs; 5 where anything does."""
    from edgewright.console import watching
    from edgewright.rebuild import rebuild

    with watching(target.name) as watch:
        found = rebuild(bundle, recipe, target, trust, watch)
    if as_json:
        emit_json(found)
    elif found["identical"]:
        emit("identical: the recipe gives this very bundle, bit for bit")
    else:
        table = [("rebuilt", "not bit for bit; what differs (in the bundle, here):")]
        table.append(("first stage", found["stage"] or "none: every stage's model is the same"))
        for part in ("inputs", "settings", "versions", "stages", "files"):
            for row in found[part]:
                texts = [json.dumps(row[k], sort_keys=True)[:80] for k in ("there", "here")]
                table.append((f"{part}: {row['name']}", ", ".join(texts)))
        emit_table(table)
    return 0 if found["identical"] else IntegrityError.exit_code


@cli.command("explain")
@click.argument("bundle_path", metavar="BUNDLE", type=PATH)
@options("trust", "json")
def explain_bundle(
    bundle_path: Path,
    trusted: tuple[Path, ...],
    threshold: int | None,
    no_clock: bool,
    as_json: bool,
) -> None:
    """Say who signed BUNDLE, what it was built from, what its gate saw, what a device must have.

    \b
    edgewright explain keyword-1.4.0-arm.bundle.tar --trust release.pub
    """
    from edgewright.explain import explain, lines

    trust = trust_from(trusted, threshold, no_clock)
    found = explain(bundle_path, trust)
    if as_json:
        emit_json(found)
        return
    signed = ("signature", signature_text(found["signature"]["keys"], trust is not None))
    emit_table([signed, *lines(found)])


def trust_from(paths: Sequence[Path], threshold: int | None, no_clock: bool) -> Any:
    """The keys that the options name; None where they name none."""
    from edgewright.device import trust

    return trust.load(paths, threshold, None if no_clock else int(time.time()))


def signature_text(signers: Sequence[str], trusted: bool) -> str:
    """What is known of who signed, in one line."""
    if not signers:
        return "none: nothing says who made it"
    names = ", ".join(signers)
    if trusted:
        return f"good, by {names}"
    return f"signed by {names}, not checked against any key you trust (--trust)"


@cli.command()
@click.option("-o", "--output", type=PATH, required=True, help="The private key's file.")
def keygen(output: Path) -> None:
    """Make an Ed25519 key to sign bundles with; its public half goes to OUTPUT.pub.

    \b
    edgewright keygen -o release
    """
    from edgewright import signing

    public, name = signing.keygen(output)
    emit_table([("private", str(output)), ("public", str(public)), ("keyid", name)])


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=PATH)
@click.option(
    "--key",
    "key_names",
    multiple=True,
    help="A key file, env:NAME or command:PROGRAM; may be given repeatedly. "
    "Default: env:EDGEWRIGHT_SIGNING_KEY.",
)
@click.option(
    "--oms",
    "oms_key",
    type=PATH,
    metavar="KEY",
    help="A P-256 key: write BUNDLE.oms.sig for OpenSSF's model_signing. Alone: only that.",
)
@click.option("--any-verdict", is_flag=True, help="Sign also what the gate did not pass.")
def sign(
    bundle_path: Path, key_names: tuple[str, ...], oms_key: Path | None, any_verdict: bool
) -> None:
    """Add a signature to BUNDLE; those of other keys stay.

    A command keeps its key to itself: called with `public` it prints the public key (PEM), with
    `sign` it signs its standard input with Ed25519 and prints the signature.

    \b
    edgewright sign keyword-1.4.0-arm.bundle.tar --key release
    edgewright sign keyword-1.4.0-arm.bundle.tar --key command:./token-agent
    """
    from edgewright import oms, signing

    if key_names or oms_key is None:
        keys = signers(key_names or (f"env:{signing.VARIABLE}",))
        found = signing.sign_bundle(bundle_path, keys, any_verdict=any_verdict)
        emit(f"{bundle_path}: signed by {', '.join(found.signers)}")
    if oms_key is not None:
        data = oms.sign(bundle_path, oms_key, any_verdict=any_verdict)
        path = bundle_path.with_name(bundle_path.name + oms.SUFFIX)
        write_atomic(path, data)
        emit(str(path))


@cli.group()
def trust() -> None:
    """Make and replace trust files: which keys count, from when until when, how many must sign."""


@trust.command("write")
@click.option(
    "--key",
    "keys",
    metavar="PUB[=FROM..UNTIL]",
    multiple=True,
    required=True,
    help="A public key and, if it is limited, its days (2027-01-31; either may be left out).",
)
@click.option("--threshold", type=int, default=1, show_default=True, help="How many must sign.")
@click.option("--version", type=int, default=1, show_default=True, help="Grows with every file.")
@click.option(
    "--sign",
    "key_names",
    metavar="KEY",
    multiple=True,
    required=True,
    help="Who signs the file: a key file, env:NAME or command:PROGRAM.",
)
@options("output")
def trust_write(
    keys: tuple[str, ...],
    threshold: int,
    version: int,
    key_names: tuple[str, ...],
    output: Path,
) -> None:
    """Write a trust file, signed by --sign: for a first one its own keys, later the old ones, too.

    \b
    edgewright trust write --key a.pub --key b.pub --threshold 2 --sign a --sign b -o trust.json
    edgewright trust write --key b.pub --key c.pub --threshold 2 --version 2 \\
        --sign a --sign b --sign c -o next.json
    """
    from edgewright import signing

    write_atomic(output, signing.trust_file(keys, threshold, version, signers(key_names)))
    emit(str(output))


@trust.command("update")
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@click.option("--no-clock", is_flag=True, help="Judge no dates: the clock here is wrong.")
def trust_update(old: Path, new: Path, no_clock: bool) -> None:
    """Put NEW in the place of OLD if enough keys of OLD and of NEW itself signed it.

    \b
    edgewright trust update trust.json next.json
    """
    from edgewright.device import trust

    data = trust.read(new)
    files = (trust.parse(trust.read(old), str(old)), trust.parse(data, str(new)))
    trust.check_update(*files, None if no_clock else int(time.time()))
    write_atomic(old, data)
    emit(f"{old}: version {files[1].version}")


@cli.command("self-test")
@click.argument("bundle_path", metavar="[BUNDLE]", type=PATH, required=False)
@click.option("--target", "target_name", help="Run as this profile says. Default: as it fits.")
@click.option("--root", type=PATH, help="Test the release that is installed below this folder.")
@click.option("--rollback", is_flag=True, help="With --root: go back where it fails.")
@options("json")
def self_test(
    bundle_path: Path | None,
    target_name: str | None,
    root: Path | None,
    rollback: bool,
    as_json: bool,
) -> None:
    """Verify BUNDLE and run its golden vectors on this machine.

    \b
    edgewright self-test keyword-1.4.0-arm.bundle.tar
    edgewright self-test --root /opt/keyword --rollback
    """
    from edgewright.device import program
    from edgewright.device.selftest import self_test as tested

    if (bundle_path is None) == (root is None) or (root is None and rollback):
        raise UsageError("self-test", expected="either BUNDLE, or --root ROOT [--rollback]")
    if bundle_path is None:
        flags = [*(["--rollback"] if rollback else []), *(["--json"] if as_json else [])]
        emit(program.run(["self-test", "--root", str(root), *flags], "edgewright"))
        return
    report = tested(bundle_path, load_target(target_name) if target_name else None)
    if as_json:
        emit_json(report)
        return
    how = "to the last bit" if report["exact"] else f"largest difference {report['max_abs']:.3g}"
    emit(f"ok: {report['vectors']} golden vectors, {how}")


def on_device(name: str) -> None:
    """Add a command whose words go to the device program as they are: one parser for both."""
    settings = {"ignore_unknown_options": True, "help_option_names": []}

    @cli.command(name, context_settings=settings, add_help_option=False)
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def command(words: tuple[str, ...]) -> None:
        from edgewright.device import program

        emit(program.run([name, *words], "edgewright"))

    command.help = command.short_help = DEVICE_COMMANDS[name]


DEVICE_COMMANDS = {
    "install": "Verify, unpack and prove BUNDLE below --root, then let it be current.",
    "rollback": "Go back to the release before the current one.",
    "status": "Tell what is installed below --root, and what to go back to.",
    "start-check": "Before each start of what runs: count it, go back if need be.",
    "mark-good": "The current release runs well: stop counting its starts.",
}
for device_command in DEVICE_COMMANDS:
    on_device(device_command)


@cli.command()
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@options("output", "json")
def delta(old: Path, new: Path, output: Path, as_json: bool) -> None:
    """Write what changes from bundle OLD to bundle NEW, for devices that have OLD installed.

    \b
    edgewright delta keyword-1.3.0-arm.bundle.tar keyword-1.4.0-arm.bundle.tar -o keyword.delta
    edgewright install keyword.delta --delta --root /opt/keyword
    """
    from edgewright import delta as deltas

    sizes = deltas.make(old, new, output)
    if as_json:
        emit_json(sizes)
        return
    share = sizes["bytes"] / sizes["bundle"]
    emit(f"{output}: {sizes['bytes']} bytes, {share:.1%} of the bundle")


@cli.command("device-program")
@options("output")
def device_program(output: Path) -> None:
    """Write the device's side of this program as one file that needs Python alone.

    \b
    edgewright device-program -o edgewright-device.pyz
    python3 edgewright-device.pyz install BUNDLE --root /opt/model
    """
    from edgewright.device import pack

    write_atomic(output, pack.program())
    output.chmod(0o755)
    emit(str(output))


@cli.command()
@click.argument("folder", metavar="RUNFOLDER", type=PATH)
@options("json")
def report(folder: Path, as_json: bool) -> None:
    """Show the report of a finished build again, and write its page anew.

    \b
    edgewright report build/keyword/arm
    """
    from edgewright.build import REPORT, SCHEMA, write_report
    from edgewright.console import stderr
    from edgewright.report import text

    found = read_json(folder / REPORT, "report")
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{folder / REPORT}", expected=SCHEMA, found=repr(found.get("schema")))
    write_report(folder, found)
    if as_json:
        emit_json(found)
    else:
        stderr.print(text.summary(found))
        emit(str(folder / "report.html"))


@cli.command()
@click.argument("source", metavar="MODEL")
@click.option("-o", "--output", type=PATH, default=Path("recipe.toml"), show_default=True)
@click.option("--force", is_flag=True, help="Write over a recipe that is there.")
def init(source: str, output: Path, force: bool) -> None:
    """Write a recipe for MODEL (an ONNX file, or "train.py:build") with its inputs filled in.

    \b
    edgewright init model.onnx
    """
    from edgewright import scaffold

    if output.exists() and not force:
        raise UsageError(f"{output} exists", hint="name another file with -o, or give --force")
    inputs = []
    if ".py:" not in source:
        inputs = inspected(Path(source), "cpu")["inputs"]
    elif not Path(source.rpartition(":")[0]).is_file():
        raise BadInput(f"{source}: no such Python file", hint="check the path")
    relative = os.path.relpath(source, output.absolute().parent)
    write_atomic(output, scaffold.recipe_for(relative, inputs).encode())
    emit(str(output))
    say("fill in [data], then: edgewright build " + str(output) + " --target cpu")


@cli.command()
@click.argument("model", type=PATH)
@options("target", "json")
def inspect(model: Path, target_name: str, as_json: bool) -> None:
    """Say what is in MODEL, and what will hurt on the target, before any calibration.

    \b
    edgewright inspect model.onnx --target arm
    """
    from edgewright.console import stderr
    from edgewright.report.findings import findings_text

    facts = inspected(model, target_name)
    if as_json:
        emit_json(facts)
        return
    operators = ", ".join(f"{count} {name}" for name, count in facts["operators"].items())
    least = " or more" if facts["macs_unknown"] else ""
    emit_table(
        [
            *(("input", value_text(value)) for value in facts["inputs"]),
            *(("output", value_text(value)) for value in facts["outputs"]),
            (
                "opset",
                f"{facts['opset']} (IR {facts['ir_version']}), by {facts['producer'] or '?'}",
            ),
            ("size", f"{facts['bytes']} bytes, {facts['parameters']} stored values"),
            ("work", f"{facts['macs']} multiply-accumulates{least} with free dimensions at 1"),
            ("nodes", f"{facts['nodes']}: {operators}"),
        ]
    )
    emit("")
    emit(findings_text(facts["lint"], stderr.width))


def inspected(model: Path, target_name: str) -> Report:
    """What is in an untrusted model file."""
    from edgewright.build import inspect

    if not model.exists():
        raise BadInput(f"model not found: {model}", hint="check the path")
    return inspect(model, load_target(target_name))


def value_text(value: dict[str, Any]) -> str:
    """Name, type and shape of an input or output."""
    shape = ", ".join("?" if size is None else str(size) for size in value["shape"])
    return f"{value['name']}  {value['dtype']} [{shape}]"


@cli.command()
@click.option("--target", "target_name", help="Check this target only; exit 6 if it cannot run.")
@options("json")
def doctor(target_name: str | None, as_json: bool) -> None:
    """Say which targets this machine can run, and what the others lack.

    \b
    edgewright doctor
    edgewright doctor --target arm
    """
    from edgewright.runtime import doctor as doctors

    checks = [doctors.check(load_target(target_name))] if target_name else doctors.checks()
    host = doctors.host()
    if as_json:
        emit_json({"host": host, "targets": checks})
    else:
        versions = ", ".join(f"{k} {v or 'absent'}" for k, v in host["versions"].items())
        gib = host["memory_bytes"] / 2**30
        emit_table(
            [
                ("machine", f"{host['cpu']}, {host['cores']} cores, {gib:.0f} GiB"),
                ("versions", f"python {host['python']}, {versions}"),
                *((c["target"], ready_text(c)) for c in checks),
            ]
        )
    if target_name and not checks[0]["ready"]:
        raise EnvironmentMissing(
            f"target {checks[0]['target']} cannot run here: {checks[0]['reason']}",
            hint=checks[0]["next"],
        )


def ready_text(check: dict[str, Any]) -> str:
    """One target of the doctor's table."""
    if check["ready"]:
        return f"ready      {check['reason']}"
    return f"not ready  {check['reason']}" + (f". Next: {check['next']}" if check["next"] else "")


@cli.command()
@click.option("--target", "names", multiple=True, required=True, help="May be given repeatedly.")
def setup(names: tuple[str, ...]) -> None:
    """Install what emulated targets need; at once where it is there already.

    \b
    edgewright setup --target arm
    """
    from edgewright.runtime import emulator

    for target in [load_target(name) for name in names]:
        emulator.setup(target, lambda text: click.echo(text, err=True))


@cli.group()
def cache() -> None:
    """Look at the cache of finished stages, or empty it."""


@cache.command("show")
@options("json")
def cache_show(as_json: bool) -> None:
    """Say where the cache is and how full."""
    store = open_cache(os.environ)
    entries = store.entries()
    used = sum(size for _, size, _ in entries)
    if as_json:
        emit_json(
            {
                "folder": str(store.folder),
                "entries": len(entries),
                "bytes": used,
                "max_bytes": store.max_bytes,
            }
        )
    else:
        text = f"{len(entries)} stages, {used / 1e6:.1f} MB of {store.max_bytes / 1e6:.0f} MB"
        emit_table([("folder", str(store.folder)), ("holds", text)])


@cache.command("clear")
def cache_clear() -> None:
    """Remove every stage that no build is using."""
    count, size = open_cache(os.environ).clear()
    emit(f"removed {count} stages, {size / 1e6:.1f} MB")


@cli.command()
def targets() -> None:
    """List the shipped targets."""
    emit_table([(name, load_target(name).description) for name in target_names()])
