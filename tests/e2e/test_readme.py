"""The README's commands do what it says: each is run here, or by .ci/run and make by name."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import RECIPE, write_tiny

from edgewright.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
RUN_BY_CI = {"make target=arm", "make test", "make lint"}
NOT_HERE = {
    "make kit": "needs the measuring kit beside the repository",
    'export PATH="$PWD/.venv/bin:$PATH"': "the tests run in that environment",
    "make bench": "times, which no test asserts; tests/unit/test_bench_compare.py runs its parts",
    "make bench against=HEAD": "tests/unit/test_bench_compare.py runs it",
    "make race": "measures; `edgewright bench` is tested",
    "edgewright setup --target arm": "part of `make test` and of `make target=arm`",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of the README, comments dropped."""
    lines = [x for block in blocks("sh") for x in block.replace("\\\n", "").splitlines()]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def test_it_opens_with_the_two_commands():
    assert commands()[:2] == ["make target=arm", "make test"]
    assert README.index("```sh") < 40


def test_ci_runs_what_it_is_said_to_run():
    text = (ROOT / ".ci" / "run").read_text()
    for command in RUN_BY_CI:
        assert command in text, command


def test_every_make_goal_exists():
    for command in [c for c in commands() if c.startswith("make")]:
        words = ["make", "-n", "-C", str(ROOT), *shlex.split(command)[1:]]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


def test_every_command_of_the_readme_works(tmp_path):
    recipe = write_tiny(tmp_path)
    text = RECIPE.replace('"tiny"', '"keyword"').replace("1.0.0", "1.4.0")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    recipe.unlink()
    more = "[prune]\nbudget = { macs = 0.65 }\n[recover]\n[share]\ncodebook = 64\n"
    (tmp_path / "pruning.toml").write_text(text + more)
    ran = []
    for command in commands():
        if command in RUN_BY_CI or command in NOT_HERE:
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        # A busy machine may leave the comparison with the baseline open.
        allowed = (0, 4) if "--baseline keyword" in command else (0,)
        assert done.returncode in allowed, f"{command}\n{done.stderr}"
        ran.append(command.split()[1])
        if ran == ["init"]:
            assert recipe.exists()
            recipe.write_text(text)
        if ran[-1] == "self-test":
            bundle = next(tmp_path.glob("build/keyword/cpu/*.bundle.tar"))
            (tmp_path / bundle.name).write_bytes(bundle.read_bytes())
    assert len(ran) > 15


def test_the_recipe_is_one():
    for block in blocks("toml"):
        recipe = parse_recipe(tomllib.loads(block), Path())
        assert recipe.model.name == "keyword"


@pytest.mark.parametrize("word", ["https://", "http://"])
def test_no_hosts(word):
    assert word not in README
