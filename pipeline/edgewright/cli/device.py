"""The commands of the device's side, and the one that packs them for a device."""

from pathlib import Path

import click

from edgewright.cli.options import PATH, options
from edgewright.cli.terminal import emit, emit_json
from edgewright.errors import UsageError
from edgewright.files import write_atomic
from edgewright.target import load_target

DEVICE_COMMANDS = {
    "install": "Verify, unpack and prove BUNDLE below --root, then let it be current.",
    "rollback": "Go back to the release before the current one.",
    "status": "Tell what is installed below --root, and what to go back to.",
    "start-check": "Before each start of what runs: count it, go back if need be.",
    "mark-good": "The current release runs well: stop counting its starts.",
}


@click.command("self-test")
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
    if bundle_path is None and target_name:
        raise UsageError("--target with --root", expected="--target with BUNDLE only")
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


@click.command()
@click.argument("bundle_path", metavar="BUNDLE", type=PATH)
@click.option("--target", "target_name", required=True, help="The device: a profile over SSH.")
@click.option("--root", required=True, help="The folder on the device that holds the releases.")
@click.option(
    "--trust",
    type=PATH,
    multiple=True,
    help="A public key that must have signed (may be repeated), or a trust file.",
)
@click.option("--threshold", type=int, help="How many of the keys must have signed.")
@click.option("--no-clock", is_flag=True, help="The clock of the device is wrong.")
@click.option("--allow-unsigned", is_flag=True, help="Take anybody's bundle.")
@click.option("--allow-downgrade", is_flag=True, help="Take an older release.")
@click.option("--delta", is_flag=True, help="BUNDLE is a delta against what is installed there.")
@options("json")
def deploy(
    bundle_path: Path,
    target_name: str,
    root: str,
    trust: tuple[Path, ...],
    threshold: int | None,
    no_clock: bool,
    allow_unsigned: bool,
    allow_downgrade: bool,
    delta: bool,
    as_json: bool,
) -> None:
    """Install BUNDLE on a device behind SSH and prove its golden vectors there.

    \b
    edgewright deploy keyword-1.4.0-board.bundle.tar --target board.toml --root /opt/keyword
    """
    from edgewright import deploy as deploys

    wish = deploys.Wish(
        trust=trust,
        threshold=threshold,
        clock=not no_clock,
        allow_unsigned=allow_unsigned,
        allow_downgrade=allow_downgrade,
        delta=delta,
    )
    report = deploys.deploy(bundle_path, load_target(target_name), root, wish)
    if as_json:
        emit_json(report)
        return
    proof = report["self_test"]
    emit(f"{report['action']}: {report['release']}; {proof['vectors']} golden vectors proven")


def passed_on(name: str) -> click.Command:
    """A command whose words go to the device program as they are: one parser for both."""
    settings = {"ignore_unknown_options": True, "help_option_names": []}

    @click.command(name, context_settings=settings, add_help_option=False)
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def command(words: tuple[str, ...]) -> None:
        from edgewright.device import program

        emit(program.run([name, *words], "edgewright"))

    command.help = command.short_help = DEVICE_COMMANDS[name]
    return command


PASSED_ON = tuple(passed_on(name) for name in DEVICE_COMMANDS)


@click.command("device-program")
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


@click.command("device-runner")
@click.argument("bundle_path", metavar="BUNDLE", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The folder to write to.")
def device_runner(bundle_path: Path, output: Path) -> None:
    """Write edge-run, which runs BUNDLE's model on a device without Python, and its options.

    \b
    edgewright device-runner keyword-1.4.0-arm.bundle.tar -o bin
    cd /opt/keyword/current && bin/edge-run @bin/edge-run.options    # on the device
    """
    from edgewright.device.runner import write_runner

    for path in write_runner(bundle_path, output):
        emit(str(path))
