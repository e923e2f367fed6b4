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
FEWER = {"budget": {"params": 0.5}}
SOFT = {**HALF, "soft": "grow"}


def distill(**settings: Any) -> dict[str, Any]:
    return {"recover": {"method": "distill", "distill": settings}}


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
        ({"prune": {**FEWER, "ratios": {"w": 0.5}, "zero": "2:4"}}, "prune.zero with prune.ratios"),
        ({"prune": {"ratios": {"w": 0.5}, "zero": "2:4"}}, "prune.zero without prune.budget"),
        ({"prune": {**HALF, "criterion": "l3"}}, "'l2'"),
        ({"prune": {**HALF, "steps": 0}}, "prune.steps"),
        ({"prune": {**HALF, "samples": 1}}, "prune.samples"),
        ({"prune": {**HALF, "max_drop": 0}}, "prune.max_drop"),
        ({"prune": {**FEWER, "zero": "2-4"}}, "N:M"),
        ({"prune": {**FEWER, "zero": "0x4"}}, "blocks of outputs"),
        ({"prune": {**FEWER, "zero": "4:2"}}, "0 < N < M"),
        ({"prune": {**HALF, "zero": "magnitude"}}, "with a budget of macs"),
        ({"prune": {"budget": {"latency": 0.5}, "zero": "4x1"}}, "with a budget of latency"),
        ({"prune": {"budget": {"size": 0.3}, "zero": "2:4"}}, "expected 0.5, which is what"),
        ({"prune": {**FEWER, "zero": "2:4", "criterion": "l1"}}, "prune.zero with prune.criterion"),
        ({"prune": {**FEWER, "zero": "2:4", "exclude": ["w"]}}, "prune.zero with prune.exclude"),
        ({"prune": {**HALF, "seed": -1}}, "prune.seed"),
        ({"prune": {**SOFT, "train": {"seed": 2**32}}}, "prune.train.seed"),
        ({"prune": {**HALF, "ratio": 0.5}}, "unknown key 'ratio'"),
        ({"prune": {**HALF, "soft": "hard"}}, "prune.soft"),
        ({"prune": {**HALF, "train": {"steps": 10}}}, "prune.train without prune.soft"),
        ({"prune": {**HALF, "soft": "grow", "steps": 2}}, "prune.soft with prune.steps"),
        ({"prune": {**FEWER, "soft": "grow", "zero": "2:4"}}, "prune.soft with prune.zero"),
        ({"prune": {"budget": {"latency": 0.5}, "soft": "regrow"}}, "latency budget"),
        ({"prune": {**HALF, "soft": "grow", "train": {"rate": 0}}}, "prune.train.rate"),
        ({"recover": {"method": "hope"}}, "recover.method"),
        ({"recover": {"samples": 1}}, "recover.samples"),
        (distill(steps=0), "recover.distill.steps"),
        (distill(batch=0), "recover.distill.batch"),
        (distill(threads=0), "recover.distill.threads"),
        (distill(seed=-1), "recover.distill.seed"),
        (distill(temperature=0.0), "recover.distill.temperature; expected 0.1 to 100; found 0.0"),
        (distill(samples=4), "recover.distill.samples"),
        (distill(soft=0.0, feature=0.0), "recover.distill has no loss"),
        (distill(hard=0.2), "recover.distill.hard without recover.labels"),
        (distill(hard=0.4), "recover.distill.hard; expected 0 to 0.3"),
        ({"recover": {"distill": {"steps": 9}}}, "recover.distill without training"),
        ({"share": {"codebook": 8, "assignment": "soft", "train": {"seed": -1}}}, "train.seed"),
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
    zeros = {"budget": {"size": 0.33}, "zero": "1:3"}
    for tables in ({"prune": zeros}, {"prune": {**FEWER, "zero": "4x1"}}, distill(steps=1)):
        parse_recipe({**BASE, **tables}, Path())


def test_a_folder_stands_for_the_recipe_in_it(tmp_path):
    text = '[model]\nname = "m"\nversion = "1"\nsource = "m.onnx"\n[data]\ncalibration = "c.npz"\n'
    with pytest.raises(BadInput, match=r"recipe not found: .*/recipe\.toml"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path) == load_recipe(tmp_path / "recipe.toml")
    assert load_recipe(tmp_path).folder == tmp_path.resolve()
