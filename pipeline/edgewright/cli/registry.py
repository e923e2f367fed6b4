"""The commands that bring bundles to an OCI registry and back."""

import os
from pathlib import Path
from typing import Any

import click

from edgewright.cli.bundles import signature_text
from edgewright.cli.options import PATH, options, trust_from
from edgewright.cli.terminal import emit, emit_json, emit_table

PLAIN = click.option(
    "--plain-http", is_flag=True, help="Without TLS: only to a registry on this machine."
)


def registry_at(reference: str, plain: bool) -> Any:
    """The repository that a reference names."""
    from edgewright.registry.connection import Registry
    from edgewright.registry.reference import parse

    return Registry(parse(reference), plain, os.environ)


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("reference", metavar="HOST/NAME:TAG")
@PLAIN
@options("json")
def push(bundle: Path, reference: str, plain_http: bool, as_json: bool) -> None:
    """Upload BUNDLE to an OCI registry as an artifact, a blob for each file.

    Files that the repository has already are not sent again. User and password:
    EDGEWRIGHT_REGISTRY_USER, EDGEWRIGHT_REGISTRY_PASSWORD.

    \b
    edgewright push keyword-1.4.0-arm.bundle.tar registry.example.com/models/keyword:1.4.0-arm
    """
    from edgewright.registry import artifact

    found = artifact.push(bundle, registry_at(reference, plain_http))
    if as_json:
        emit_json(found)
    else:
        emit(f"{found['reference']}: {found['sent']} of {found['bytes']} bytes sent")


@click.command()
@click.argument("reference", metavar="HOST/NAME:TAG[@sha256:DIGEST]")
@options("output", "trust", "json")
@PLAIN
def pull(
    reference: str,
    output: Path,
    trusted: tuple[Path, ...],
    threshold: int | None,
    no_clock: bool,
    as_json: bool,
    plain_http: bool,
) -> None:
    """Fetch a bundle from an OCI registry, verifying it on its way.

    \b
    edgewright pull registry.example.com/models/keyword:1.4.0-arm -o keyword.bundle.tar \\
        --trust release.pub
    """
    from edgewright.registry import artifact

    trust = trust_from(trusted, threshold, no_clock)
    found, digest = artifact.pull(registry_at(reference, plain_http), output, trust)
    facts = found.manifest
    if as_json:
        emit_json({"bundle": str(output), "digest": digest, "signers": found.signers})
        return
    emit_table(
        [
            ("bundle", f"{facts['name']} {facts['version']} for {facts['target']}: {output}"),
            ("artifact", digest),
            ("signature", signature_text(found.signers, trust is not None)),
        ]
    )
