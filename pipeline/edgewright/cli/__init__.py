"""The command line: parse, call, print. Selection and work live elsewhere.

`main` is the one place that turns errors into a message and an exit code. What computes is
imported where it is used: a mistyped option must not wait for numpy.
"""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

import click

from edgewright import __version__
from edgewright.cli import build, bundles, device, machine, registry, signing, stages
from edgewright.cli.terminal import explain, say
from edgewright.process import Stopped, adopt_orphans, catch_signals, end_children

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


COMMANDS: tuple[click.Command, ...] = (
    build.build,
    build.sweep,
    *(stages.export, stages.simplify, stages.prune, stages.recover, stages.share),
    *(stages.quantize, stages.validate, stages.bench, stages.gate),
    *(bundles.bundle, bundles.verify, bundles.explain_bundle, bundles.delta, bundles.pool),
    *(signing.keygen, signing.sign, signing.trust),
    *(registry.push, registry.pull),
    *(device.self_test, device.device_program, device.device_runner, device.deploy),
    *device.PASSED_ON,
    *(machine.init, machine.inspect, machine.report, machine.doctor, machine.setup),
    *(machine.cache, machine.targets),
)
for command in COMMANDS:
    cli.add_command(command)
