"""The commands on keys: who signs, and whose signatures count."""

import time
from pathlib import Path

import click

from edgewright.cli.options import PATH, options, signers
from edgewright.cli.terminal import emit, emit_table
from edgewright.files import write_atomic


@click.command()
@click.option("-o", "--output", type=PATH, required=True, help="The private key's file.")
def keygen(output: Path) -> None:
    """Make an Ed25519 key to sign bundles with; its public half goes to OUTPUT.pub.

    \b
    edgewright keygen -o release
    """
    from edgewright import signing

    public, name = signing.keygen(output)
    emit_table([("private", str(output)), ("public", str(public)), ("keyid", name)])


@click.command()
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


@click.group()
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

    found = trust.update(old, new, None if no_clock else int(time.time()))
    emit(f"{old}: version {found.version}")
