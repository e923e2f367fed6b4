"""What several commands take: their common options, and the files and keys that those name."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgewright.errors import BadInput
from edgewright.recipe import Recipe, load_recipe
from edgewright.target import Target, load_target

PATH = click.Path(path_type=Path)


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


def settings(recipe_path: Path, target_name: str) -> tuple[Recipe, Target]:
    """The recipe and the target that a command names."""
    return load_recipe(recipe_path), load_target(target_name)


def signers(names: Sequence[str]) -> list[Any]:
    """The keys of --sign and --key, before any work is done with them."""
    from edgewright import signing

    return [signing.signer(name, os.environ) for name in names]


def trust_from(paths: Sequence[Path], threshold: int | None, no_clock: bool) -> Any:
    """The keys that the options name; None where they name none."""
    from edgewright.device import trust

    return trust.load(paths, threshold, None if no_clock else int(time.time()))


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
