"""The examples, from recipe to an installed release, on this host and on an ARM device behind SSH.

    .venv/bin/python bench/installed.py [--examples digits,speech] [--out FOLDER]

For each example, with the C runner in its bundle: build for cpu and arm, signed; verify both;
install and prove the cpu bundle here with the single-file device program and plain Python; hold
that the arm bundle is refused here; and install and prove it on a device behind SSH whose Python is
the emulated ARM one (see tests/loopback.py), again by the device program. Both installed releases
then prove themselves once more without Python. Prints Markdown; ends with 1 where a row fails.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/stages")]

from loopback import loopback  # noqa: E402
from test_ssh_arm import PROFILE, interpreter  # noqa: E402

from edgewright.runtime import emulator, toolchain  # noqa: E402
from edgewright.target import load_target  # noqa: E402

EDGEWRIGHT = (sys.executable, "-m", "edgewright")


def run(*words: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, what was printed as JSON, and the last line of what was told."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    told = done.stderr.strip().splitlines()
    found = json.loads(done.stdout) if done.stdout.strip().startswith("{") else {}
    return done.returncode, found, told[-1] if told else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, sign, install and prove the examples.")
    parser.add_argument("--examples", default="digits,speech")
    parser.add_argument("--out", type=Path, help="Keep the builds here.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgewright-installed-") as scratch:
        folder = Path(scratch)
        bad = 0
        print("| example | step | exit | |\n|-|-|-|-|")
        for row in steps(options.examples.split(","), options.out or folder / "out", folder):
            name, step, code, wanted, text = row
            bad += code != wanted
            print(
                f"| {name} | {step} | {code}{'' if code == wanted else ' (!)'} | {text} |",
                flush=True,
            )
    return 1 if bad else 0


def steps(names: list[str], out: Path, folder: Path) -> Any:
    """Rows: example, step, exit code, the code that is wanted, what to know."""
    key, program = folder / "release", folder / "edgewright-device.pyz"
    run(*EDGEWRIGHT, "keygen", "-o", key)
    run(*EDGEWRIGHT, "device-program", "-o", program)
    public = f"{key}.pub"
    arm = load_target("arm")
    launch = emulator.launch(arm)
    with loopback(folder) as server:
        python = interpreter(folder / "arm", launch)
        board = server.write_profile(
            "board", PROFILE, python=str(python), emulated=True, limit_s=300
        )
        for name in names:
            recipe, built = with_runner(name, folder / f"{name}-recipe"), out / name
            targets = ("--target", "cpu", "--target", "arm")
            code, _, text = run(
                *EDGEWRIGHT, "build", recipe, *targets, "--out", built, "--sign", key, "--json"
            )
            yield name, "build for cpu and arm, sign", code, 0, text
            bundles = {t: next((built / t).glob("*.bundle.tar")) for t in ("cpu", "arm")}
            for target, bundle in bundles.items():
                code, _, text = run(*EDGEWRIGHT, "verify", bundle, "--trust", public)
                yield name, f"verify {target}", code, 0, f"{bundle.stat().st_size:,} bytes"
            here = (sys.executable, "-s", program, "install", "--trust", public, "--json", "--root")
            code, found, text = run(*here, folder / f"{name}-here", bundles["cpu"])
            yield name, "install cpu here", code, 0, proven(found) or text
            library = toolchain.host_library()
            code, text = without_python(folder / f"{name}-here", (), library)
            yield name, "run it there without Python", code, 0, text
            code, _, text = run(*here, folder / f"{name}-wrong", bundles["arm"])
            yield name, "install arm here: refused", code, 5, text.rpartition("tar: ")[2]
            code, found, text = run(
                *EDGEWRIGHT, "deploy", bundles["arm"], "--target", board, "--trust", public,
                "--root", folder / f"{name}-board", "--json",
            )  # fmt: skip
            yield name, "deploy arm over SSH", code, 0, proven(found) or text
            emulated, library = emulator.program(arm), emulator.library(arm)
            code, text = without_python(folder / f"{name}-board", emulated, library)
            yield name, "run it there without Python", code, 0, text
            yield name, "left running there", len(server.left()), 0, ""


def with_runner(name: str, folder: Path) -> Path:
    """A copy of the example whose recipe wants the C runner in the bundle; the recipe."""
    shutil.copytree(ROOT / "examples" / name, folder)
    recipe = folder / "recipe.toml"
    text = recipe.read_text()
    text += "" if "[release]" in text else "\n[release]\n"
    recipe.write_text(text.replace("[release]\n", "[release]\nrunner = true\n"))
    return recipe


def without_python(root: Path, before: tuple[str, ...], library: Path) -> tuple[int, str]:
    """Let the runner in the release below `root` prove it; its exit code, and what to know.

    before: the emulator, where it is for another architecture.
    """
    words = (*before, "bin/edge-run", "@bin/edge-run.options", "--library", str(library))
    done = subprocess.run(
        words, cwd=root / "current", env={}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.returncode, done.stderr.strip()
    found = json.loads(done.stdout)["checked"]
    size = (root / "current/bin/edge-run").stat().st_size
    return 0, f"{found['outputs']} golden outputs, {found['equal']} to the last bit; {size:,} bytes"


def proven(found: dict[str, Any]) -> str:
    """What an install proved, for people."""
    test = found.get("self_test")
    if not isinstance(test, dict):
        return ""
    how = "to the last bit" if test.get("exact") else "within the tolerance"
    arch = (test.get("runtime") or {}).get("arch", "")
    return f"{found.get('action')}, {test.get('vectors', '?')} golden vectors {how}, {arch}"


if __name__ == "__main__":
    sys.exit(main())
