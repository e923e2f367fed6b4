"""The device's command line: what `edgewright` and the single-file program both run.

Only the standard library is imported before a command needs more.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgewright import __version__
from edgewright.device import install as installs
from edgewright.device import starts
from edgewright.device import trust as trusts
from edgewright.device.verify import verified
from edgewright.errors import EdgewrightError, UsageError, from_os_error

Result = tuple[dict[str, Any], str]  # for machines, for people


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and leave with its exit code: one line for every error, no traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] == ["worker"]:  # the child that holds a model
            from edgewright.runtime import worker

            del sys.argv[1]
            worker.main()
            sys.exit(0)
        print(run(words), flush=True)
        code = 0
    except OSError as error:
        code = complain(from_os_error(error, "running this command"))
    except EdgewrightError as error:
        code = complain(error)
    except KeyboardInterrupt:
        code = complain("interrupted", 130)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        code = complain(f"internal error: {text}. Please report it", 3)
    sys.exit(code)


def complain(error: EdgewrightError | str, code: int = 0) -> int:
    """One printable line on standard error; the exit code."""
    text = f"error: {error}" if isinstance(error, EdgewrightError) else error
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    print(f"edgewright: {line}", file=sys.stderr)
    return error.exit_code if isinstance(error, EdgewrightError) else code


def run(words: Sequence[str], name: str = "edgewright-device") -> str:
    """Do what the words say; the text to print. Errors are EdgewrightErrors."""
    args = parser(name).parse_args(list(words))
    result, text = args.work(args)
    return json.dumps(result, indent=1, sort_keys=True) if args.json else text


class Parser(argparse.ArgumentParser):
    """Usage errors like all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def parser(name: str) -> argparse.ArgumentParser:
    """All commands and options of the device."""
    top = Parser(
        prog=name,
        description="Verify, install and prove Edgewright bundles on a device.",
        epilog="Exit codes: 0 done, 2 usage, 3 bad input, 5 integrity, 6 environment.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, work: Callable[[argparse.Namespace], Result], text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print the result for machines")
        one.set_defaults(work=work)
        return one

    one = command("verify", verify, "Check that BUNDLE is whole, and who signed it.")
    one.add_argument("bundle", type=Path, metavar="BUNDLE")
    trust_options(one)
    one = command("install", install, "Verify, unpack and prove BUNDLE, then let it be current.")
    one.add_argument("bundle", type=Path, metavar="BUNDLE")
    root_option(one)
    trust_options(one)
    one.add_argument("--allow-unsigned", action="store_true", help="take anybody's bundle")
    one.add_argument("--allow-downgrade", action="store_true", help="take an older release")
    one.add_argument(
        "--delta", action="store_true", help="BUNDLE is a delta against what is installed"
    )
    one.add_argument("--no-self-test", action="store_true", help="do not run the golden vectors")
    python_option(one)
    one = command("self-test", self_test, "Run the golden vectors of BUNDLE, or of what runs.")
    one.add_argument("bundle", type=Path, metavar="BUNDLE", nargs="?")
    root_option(one, required=False)
    one.add_argument(
        "--rollback", action="store_true", help="go back where the current release fails"
    )
    python_option(one)
    one = command("rollback", rollback, "Go back to the release before the current one.")
    root_option(one)
    one = command("status", status, "Tell what runs, and what to go back to.")
    root_option(one)
    one.add_argument("--check", action="store_true", help="read and hash every installed file")
    one = command("start-check", start_check, "Before each start: count it, go back if need be.")
    root_option(one)
    one.add_argument(
        "--starts",
        type=int,
        default=starts.STARTS,
        help="how many starts may fail (default %(default)s)",
    )
    one = command("mark-good", mark_good, "The current release runs well: stop counting starts.")
    root_option(one)
    one = command(
        "trust-update", trust_update, "Put NEW in OLD's place if enough keys of both signed it."
    )
    one.add_argument("old", type=Path, metavar="OLD", help="the device's trust file")
    one.add_argument("new", type=Path, metavar="NEW")
    clock_option(one)
    return top


def python_option(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--python",
        type=words_of,
        default=(),
        metavar="COMMAND",
        help="starts the self-test's child instead of this Python, as another user for one: "
        "'setpriv --reuid 65534 --clear-groups python3'",
    )


def words_of(text: str) -> list[str]:
    """A command's words, split as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def root_option(one: argparse.ArgumentParser, required: bool = True) -> None:
    one.add_argument(
        "--root", type=Path, required=required, help="the folder that holds the releases"
    )


def trust_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--trust",
        type=Path,
        action="append",
        default=[],
        help="a public key that must have signed (may be repeated), or a trust file",
    )
    one.add_argument("--threshold", type=int, help="how many of the keys must have signed")
    clock_option(one)


def clock_option(one: argparse.ArgumentParser) -> None:
    one.add_argument("--no-clock", action="store_true", help="the clock here is wrong")


def verify(args: argparse.Namespace) -> Result:
    now = None if args.no_clock else int(time.time())
    trust = trusts.load(args.trust, args.threshold, now)
    found = verified(args.bundle, trust)
    manifest = found.manifest
    who = ", ".join(found.signers) or "nobody"
    how = "good signatures" if trust else "not checked: signatures"
    text = f"whole: {manifest['name']} {manifest['version']} for {manifest['target']}; {how}: {who}"
    return {**manifest, "signers": found.signers, "trusted": trust is not None}, text


def install(args: argparse.Namespace) -> Result:
    wish = installs.Wish(
        trust=args.trust,
        threshold=args.threshold,
        clock=not args.no_clock,
        allow_unsigned=args.allow_unsigned,
        allow_downgrade=args.allow_downgrade,
        self_test=not args.no_self_test,
        delta=args.delta,
        python=args.python,
    )
    report = installs.install(args.bundle, args.root, wish)
    proof = report["self_test"]
    proven = f"{proof['vectors']} golden vectors proven" if proof else "no self-test"
    return report, f"{report['action']}: {report['release']}; {proven}"


def self_test(args: argparse.Namespace) -> Result:
    if (args.bundle is None) == (args.root is None) or (args.bundle and args.rollback):
        raise UsageError("self-test", expected="either BUNDLE, or --root ROOT [--rollback]")
    if args.bundle is None:
        report = starts.self_test(args.root, args.rollback, args.python)
    else:
        report = installs.self_test_bundle(args.bundle, args.python)
    return report, f"ok: {report['vectors']} golden vectors, difference {report['max_abs']:.3g}"


def rollback(args: argparse.Namespace) -> Result:
    return told(starts.rollback(args.root))


def start_check(args: argparse.Namespace) -> Result:
    return told(starts.start_check(args.root, args.starts))


def mark_good(args: argparse.Namespace) -> Result:
    return told(starts.mark_good(args.root))


def trust_update(args: argparse.Namespace) -> Result:
    found = trusts.update(args.old, args.new, None if args.no_clock else int(time.time()))
    return {"version": found.version}, f"{args.old}: version {found.version}"


def told(report: dict[str, Any]) -> Result:
    reason = f" ({report['reason']})" if report.get("reason") else ""
    return report, f"{report['action']}: {report['release']}{reason}"


def status(args: argparse.Namespace) -> Result:
    report = starts.status(args.root, args.check)
    model = f"{report['name']} for {report['target']}, sequence {report['sequence']}"
    lines = [f"model     {model if report['name'] else 'none'}"]
    for key in ("current", "previous"):
        row = report[key]
        fate = "none" if row is None else f"{row['id']}  {state_of(row)}"
        lines.append(f"{key:8}  {fate}")
    return report, "\n".join(lines)


def state_of(row: dict[str, Any]) -> str:
    """The fate of a release in a few words."""
    words = [f"failed: {row['failed']}" if row["failed"] else "good" if row["good"] else "on trial"]
    if row["whole"] is not None:
        words.append("whole" if row["whole"] else "damaged")
    return ", ".join(words)
