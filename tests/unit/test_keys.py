"""Cache keys: what belongs to them, and what must not."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import RECIPE, tiny_model

from edgewright import keys
from edgewright.build import STAGES
from edgewright.errors import BadInput
from edgewright.recipe import load_recipe
from edgewright.target import load_target

# The recipe as a whole, which the bundle states, changes with everything.
NAMES = tuple(name for name in keys.FACTS if name != "recipe")


def facts(recipe: Path, names: tuple[str, ...] = NAMES) -> dict[str, object]:
    loaded, target = load_recipe(recipe), load_target("cpu")
    return {name: keys.FACTS[name](loaded, target) for name in names}


def changed(recipe: Path, old: str, new: str) -> set[str]:
    """The facts that differ once `old` in the recipe has become `new`."""
    before = facts(recipe)
    recipe.write_text(RECIPE.replace(old, new))
    after = facts(recipe)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ('version = "1.0.0"', 'version = "1.0.1"', {"release"}),
        ("typical = [1, 1, 12, 12]", "typical = [2, 1, 12, 12]", {"inputs"}),
        ("[gate]", "higher_is_better = false\n[gate]", {"evaluation"}),
        ("[gate]", "std = [2.0]\n[gate]", {"calibration"}),
        ("[gate]", '[quantize]\nranges = "minmax"\n[gate]', {"quantize"}),
        ("[gate]", "[quantize]\nprocesses = 2\n[gate]", set()),
        ("min_retained = 0.9", "min_retained = 0.8", {"gate", "min_retained"}),
        ("min_retained = 0.9", "min_retained = 0.9\nmax_latency_ratio = 1.0",
         {"gate", "max_latency_ratio"}),
        # the gate treats a limit that the recipe sets itself in another way than a default
        ("min_retained = 0.9", "min_retained = 0.99\n", {"gate", "min_retained"}),
        ("[gate]\nmin_retained = 0.9\n", "# nothing\n[gate]\nmin_retained = 0.9\n", set()),
    ],
)  # fmt: skip
def test_a_setting_changes_its_own_facts_only(tiny, old, new, names):
    assert changed(tiny, old, new) == names


def test_an_explicit_default_differs_for_the_gate_only(tiny):
    tiny.write_text(RECIPE.replace("min_retained = 0.9", ""))
    before = facts(tiny)
    tiny.write_text(RECIPE.replace("min_retained = 0.9", "min_retained = 0.99"))
    after = facts(tiny)
    assert {name for name in before if before[name] != after[name]} == {"gate"}


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("model.onnx", {"source"}),
        ("calibration.npz", {"calibration", "evaluation"}),  # score.py could read it
        ("score.py", {"evaluation"}),
        ("evaluation.npz", {"evaluation"}),
    ],
)
def test_a_file_changes_the_facts_that_read_it(tiny, name, fact):
    before = facts(tiny)
    with tiny.with_name(name).open("ab") as file:
        file.write(b" ")
    after = facts(tiny)
    assert {key for key in before if before[key] != after[key]} == fact


def test_times_and_places_of_files_are_no_facts(tiny, tmp_path):
    before = facts(tiny)
    for path in tiny.parent.iterdir():
        os.utime(path, (0, 0))
    assert facts(tiny) == before
    moved = tmp_path / "moved"
    shutil.copytree(tiny.parent, moved)
    assert facts(moved / "recipe.toml") == before


def test_external_weights_belong_to_the_source(tiny):
    model = tiny_model()
    path = tiny.with_name("model.onnx")
    path.unlink()
    onnx.save_model(
        model, path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert keys.external_data(path) == [tiny.with_name("weights.bin")]
    before = facts(tiny, ("source",))
    weights = bytearray(tiny.with_name("weights.bin").read_bytes())
    weights[100] ^= 1
    tiny.with_name("weights.bin").write_bytes(weights)
    assert facts(tiny, ("source",)) != before


def test_external_names_that_lead_outside_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("../secret", str(secret), "in/../../secret"):
        data = name.encode()
        (folder / "model.onnx").write_bytes(
            b"\x0a\x08location\x12" + bytes([len(data)]) + data + bytes(20)
        )
        assert keys.external_data(folder / "model.onnx") == []


def test_a_fifo_is_refused_without_opening_it(tiny):
    path = tiny.with_name("model.onnx")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match="FIFO"):
        facts(tiny, ("source",))


def test_every_need_of_a_stage_is_known():
    for name, needs in STAGES.items():
        assert set(needs.settings) <= set(keys.FACTS), name
        earlier = list(STAGES)[: list(STAGES).index(name)]
        assert set(needs.reports) <= set(earlier), name
        assert set(needs.models.values()) <= {*earlier, "newest", "baseline"}, name


def test_torch_counts_only_where_the_model_is_made_by_it(tiny):
    assert "torch" not in keys.versions(load_recipe(tiny))
    tiny.write_text(RECIPE.replace('"model.onnx"', '"model.py:build"'))
    assert "torch" in keys.versions(load_recipe(tiny))
    assert np.__version__ == keys.versions(load_recipe(tiny))["numpy"]
