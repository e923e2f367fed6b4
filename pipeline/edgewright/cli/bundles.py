"""The commands on bundles, from packing one to telling what is in it; and on pools of models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgewright.cli.options import PATH, options, read_json, settings, signers, trust_from
from edgewright.cli.stages import VERDICT_CODES, Report, on_files, show
from edgewright.cli.terminal import emit, emit_json, emit_table
from edgewright.errors import BadInput, IntegrityError, UsageError
from edgewright.recipe import Recipe, load_recipe
from edgewright.target import Target, load_target

BUNDLE = ".bundle.tar"
SIGN_ANYWAY = "bundle without --sign, then: edgewright sign BUNDLE --any-verdict --key KEY"


@click.command()
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


@click.command()
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

    if target_name and recipe_path is None:
        raise UsageError("--target without --rebuild", hint="name the recipe with --rebuild")
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
    """Build again, say what differs; 5 where a file does that the bundle does not say so of."""
    from edgewright.console import watching
    from edgewright.rebuild import rebuild

    with watching(target.name) as watch:
        found = rebuild(bundle, recipe, target, trust, watch)
    if as_json:
        emit_json(found)
    elif found["identical"]:
        emit("identical: the recipe gives this very bundle, bit for bit")
    else:
        but = "but for what is marked as not reproducible" if found["as_declared"] else ""
        table = [("rebuilt", f"not bit for bit {but}".rstrip() + "; what differs (there, here):")]
        table.append(("first stage", found["stage"] or "none: every stage's model is the same"))
        for part in ("inputs", "settings", "versions", "stages", "files"):
            for row in found[part]:
                texts = [json.dumps(row[k], sort_keys=True)[:80] for k in ("there", "here")]
                marked = "marked as not reproducible: " if row["name"] in found["marked"] else ""
                table.append((f"{part}: {row['name']}", marked + ", ".join(texts)))
        emit_table(table)
    return 0 if found["as_declared"] else IntegrityError.exit_code


@click.command("explain")
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


def signature_text(signers: Sequence[str], trusted: bool) -> str:
    """What is known of who signed, in one line."""
    if not signers:
        return "none: nothing says who made it"
    names = ", ".join(signers)
    if trusted:
        return f"good, by {names}"
    return f"signed by {names}, not checked against any key you trust (--trust)"


@click.command()
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


@click.command()
@click.argument("models", metavar="MODEL...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="A new folder, or a bundle.")
@click.option(
    "--name", help="Of bundles: what all together are called. Default: the output's name."
)
@click.option("--version", default="1", show_default=True, help="Of bundles: of all together.")
@click.option("--sequence", type=int, help="Of bundles. Default: the sum of theirs.")
@click.option("--target", "target_name", help="Of bundles: the profile, where it is your own.")
@options("sign", "json")
def pool(
    models: tuple[Path, ...],
    output: Path,
    name: str | None,
    version: str,
    sequence: int | None,
    target_name: str | None,
    key_names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Store the tensors that several MODELs have in common once.

    Of ONNX files: a folder with each model and weights.bin, which all of them read. Of bundles:
    one bundle that is signed, installed and proven like any other.

    \b
    edgewright pool keyword.onnx speaker.onnx -o pool
    edgewright pool keyword.bundle.tar speaker.bundle.tar -o voice.bundle.tar --sign release
    """
    if len(models) < 2:
        raise UsageError("pool", expected="two models or more", found=f"{len(models)}")
    for path in models:
        if not path.exists():
            raise BadInput(f"model not found: {path}", hint="check the path")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"no folder {output.absolute().parent}", hint="make it first")
    kinds = {BUNDLE in path.name for path in (*models, output)}
    if len(kinds) > 1:
        raise UsageError(
            "pool",
            expected="models and a folder, or bundles and a bundle (NAME.bundle.tar)",
            found=" ".join(path.name for path in (*models, output)),
        )
    if BUNDLE in output.name:
        name = name or output.name.split(BUNDLE)[0]
        facts = {"name": name, "version": version, "sequence": sequence}
        report = bundles_pooled(models, output, target_name, key_names, facts)
    elif name or sequence is not None or target_name or key_names:
        raise UsageError(
            "pool",
            expected="--name, --sequence, --target and --sign with bundles only",
            found="ONNX files",
        )
    else:
        report = models_pooled(models, output)
    if as_json:
        emit_json(report)
        return
    saved = report["separate_bytes"] - report["pooled_bytes"]
    rows = [("model", "stored bytes", "of these shared", "tensors shared")]
    for row in report["models"]:
        numbers = (row["stored_bytes"], row["shared_bytes"], row["shared_tensors"])
        rows.append((row["model"], *(str(number) for number in numbers)))
    emit_table(rows)
    difference = f"{abs(saved)} {'fewer' if saved >= 0 else 'more'} than apart"
    emit_table([("all together", f"{report['pooled_bytes']} bytes, {difference}")])
    if "bundle" in report:
        emit(f"{output}: {report['bytes']} bytes, apart {report['separate_bundle_bytes']}")


def models_pooled(models: Sequence[Path], output: Path) -> Report:
    """Pool ONNX files in a new folder."""
    from edgewright.build import pool as pooled
    from edgewright.console import watching

    named = {path.stem: path for path in models}
    if len(named) < len(models):
        raise UsageError("pool", expected="models with different names")
    if output.exists():
        raise UsageError(f"{output} exists", expected="a new folder", hint="name another one")
    target = load_target("cpu")
    with watching(target.name) as watch:
        return pooled(named, target, output, watch)


def bundles_pooled(
    bundles: Sequence[Path],
    output: Path,
    target_name: str | None,
    key_names: Sequence[str],
    facts: dict[str, Any],
) -> Report:
    """Pool bundles in a bundle, and sign it where all their gates said PASS."""
    from edgewright.console import watching
    from edgewright.pooling import pool_bundles

    keys = signers(key_names)
    target = load_target(target_name) if target_name else None
    with watching(facts["name"]) as watch:
        report = pool_bundles(bundles, target, output, watch=watch, **facts)
    if keys:
        from edgewright import signing

        signing.sign_bundle(output, keys)
    return report
