"""The commands that look: at a model, a finished build, this machine and what it keeps."""

import os
from pathlib import Path
from typing import Any

import click

from edgewright.cache import open_cache
from edgewright.cli.options import PATH, options, read_json
from edgewright.cli.terminal import emit, emit_json, emit_table, say
from edgewright.errors import BadInput, EnvironmentMissing, UsageError
from edgewright.files import write_atomic
from edgewright.target import load_target, target_names


@click.command()
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


@click.command()
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


def inspected(model: Path, target_name: str) -> dict[str, Any]:
    """What is in an untrusted model file."""
    from edgewright.build import inspect

    if not model.exists():
        raise BadInput(f"model not found: {model}", hint="check the path")
    return inspect(model, load_target(target_name))


def value_text(value: dict[str, Any]) -> str:
    """Name, type and shape of an input or output."""
    shape = ", ".join("?" if size is None else str(size) for size in value["shape"])
    return f"{value['name']}  {value['dtype']} [{shape}]"


@click.command()
@click.option("--history", "history_path", type=PATH, help="Draw the trend from this file.")
@options("json")
@click.argument("folder", metavar="RUNFOLDER", type=PATH)
def report(folder: Path, history_path: Path | None, as_json: bool) -> None:
    """Show the report of a finished build again, and write its page anew.

    \b
    edgewright report build/keyword/arm
    edgewright report build/keyword/arm --history verdicts.jsonl
    """
    from edgewright.build import REPORT, SCHEMA, write_report
    from edgewright.console import stderr
    from edgewright.report import history, text, trend

    found = read_json(folder / REPORT, "report")
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{folder / REPORT}", expected=SCHEMA, found=repr(found.get("schema")))
    past = {}
    if history_path is not None:
        if not history_path.exists():
            raise BadInput(f"history not found: {history_path}", hint="check the path")
        past = trend.view(found, *history.read(history_path))
    write_report(folder, found, past)
    if as_json:
        emit_json(found)
    else:
        stderr.print(text.summary(found))
        emit(str(folder / "report.html"))


@click.command()
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


@click.command()
@click.option("--target", "names", multiple=True, required=True, help="May be given repeatedly.")
def setup(names: tuple[str, ...]) -> None:
    """Install what a target needs, an emulator or its provider; at once where it is there.

    \b
    edgewright setup --target arm
    edgewright setup --target openvino
    """
    from edgewright.runtime import emulator, providers

    for target in [load_target(name) for name in names]:
        local = target.run.how == "local" and target.runtime.provider != providers.CPU
        install = providers.setup if local else emulator.setup
        install(target, lambda text: click.echo(text, err=True))


@click.group()
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


@click.command()
def targets() -> None:
    """List the shipped targets."""
    emit_table([(name, load_target(name).description) for name in target_names()])
