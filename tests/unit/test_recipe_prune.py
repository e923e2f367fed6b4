"""[prune], [recover] and [share] of a recipe: what cannot be is refused, by the key's name.

And where a recipe is looked for.
"""

from pathlib import Path
from typing import Any

import pytest

from edgewright.errors import BadInput
from edgewright.recipe import load_recipe, parse_recipe

BASE: dict[str, Any] = {
    "model": {"name": "m", "version": "1", "source": "m.onnx"},
    "data": {"calibration": "c.npz"},
}
HALF = {"budget": {"macs": 0.5}}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"prune": {"budget": {"macs": 0.0}}}, "prune.budget.macs"),
        ({"prune": {"budget": {"macs": 1}}}, "above 0 and below 1"),
        ({"prune": {"budget": {"macs": 1.5}}}, "above 0 and below 1"),
        ({"prune": {"budget": {"macs": 0.5, "size": 0.5}}}, "one of macs, params, size"),
        ({"prune": {"budget": {}}}, "one of macs, params, size and latency"),
        ({"prune": {}}, "or name groups in [prune.ratios]"),
        ({"prune": {"ratios": {"w*": 0}}}, "prune.ratios.w*"),
        ({"prune": {"ratios": {"w*": 1}}}, "above 0 and below 1"),
        ({"prune": {"ratios": {"w*": 1.5}}}, "above 0 and below 1"),
        ({"prune": {**HALF, "ratios": {"w": 0.5}, "zero": "2:4"}}, "prune.zero with prune.ratios"),
        ({"prune": {"ratios": {"w": 0.5}, "zero": "2:4"}}, "prune.zero without prune.budget"),
        ({"prune": {**HALF, "criterion": "l3"}}, "'l2'"),
        ({"prune": {**HALF, "steps": 0}}, "prune.steps"),
        ({"prune": {**HALF, "samples": 1}}, "prune.samples"),
        ({"prune": {**HALF, "max_drop": 0}}, "prune.max_drop"),
        ({"prune": {**HALF, "zero": "2-4"}}, "N:M"),
        ({"prune": {**HALF, "zero": "0x4"}}, "blocks of outputs"),
        ({"prune": {**HALF, "zero": "4:2"}}, "0 < N < M"),
        ({"prune": {**HALF, "ratio": 0.5}}, "unknown key 'ratio'"),
        ({"prune": {**HALF, "soft": "hard"}}, "prune.soft"),
        ({"prune": {**HALF, "train": {"steps": 10}}}, "prune.train without prune.soft"),
        ({"prune": {**HALF, "soft": "grow", "steps": 2}}, "prune.soft with prune.steps"),
        ({"prune": {**HALF, "soft": "grow", "zero": "2:4"}}, "prune.soft with prune.zero"),
        ({"prune": {"budget": {"latency": 0.5}, "soft": "regrow"}}, "latency budget"),
        ({"prune": {**HALF, "soft": "grow", "train": {"rate": 0}}}, "prune.train.rate"),
        ({"recover": {"method": "hope"}}, "recover.method"),
        ({"recover": {"samples": 1}}, "recover.samples"),
        ({"share": {"codebook": 300}}, "0, or 2 to 256"),
        ({"share": {"codebook": 16, "max_drop": 2}}, "share.max_drop"),
    ],
)
def test_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_recipe({**BASE, **tables}, Path())
    assert said in str(caught.value)


def test_read() -> None:
    recipe = parse_recipe({**BASE, "prune": HALF, "recover": {}, "share": {}}, Path())
    assert recipe.prune is not None and recipe.prune.budget.named() == ("macs", 0.5)
    assert recipe.recover is not None and recipe.share is not None
    assert parse_recipe(BASE, Path()).prune is None


def test_a_folder_stands_for_the_recipe_in_it(tmp_path):
    text = '[model]\nname = "m"\nversion = "1"\nsource = "m.onnx"\n[data]\ncalibration = "c.npz"\n'
    with pytest.raises(BadInput, match=r"recipe not found: .*/recipe\.toml"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path) == load_recipe(tmp_path / "recipe.toml")
    assert load_recipe(tmp_path).folder == tmp_path.resolve()
