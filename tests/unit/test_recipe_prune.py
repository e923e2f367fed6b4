"""[prune], [recover] and [share] of a recipe: what cannot be is refused, by the key's name."""

from pathlib import Path
from typing import Any

import pytest

from edgewright.errors import BadInput
from edgewright.recipe import parse_recipe

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
