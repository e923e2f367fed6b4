"""validate: scores, shares, paired differences and agreement, on models with known answers."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import RECIPE, write_tiny
from onnx import numpy_helper

from edgewright import validate
from edgewright.errors import BadInput
from edgewright.recipe import load_recipe
from edgewright.stage import Job
from edgewright.target import load_target


def job(recipe: Path, shipped: Path, **stages: Path) -> Job:
    original = recipe.with_name("model.onnx")
    return Job(
        recipe=load_recipe(recipe),
        target=load_target("cpu"),
        folder=recipe.parent,
        model=shipped,
        models={"export": original, **stages},
    )


def spoiled(recipe: Path, name: str, scale: float) -> Path:
    """The tiny model with its classifier's weights multiplied."""
    model = onnx.load(recipe.with_name("model.onnx"))
    head = next(t for t in model.graph.initializer if t.name == "head")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(scale), "head"))
    path = recipe.with_name(name)
    onnx.save(model, path)
    return path


def test_the_original_keeps_everything(tiny):
    report = validate.run(job(tiny, tiny.with_name("model.onnx")))
    metric, agreement = report["metric"], report["agreement"]
    assert metric["original"] == {"score": 1.0}
    assert metric["shipped"]["retained"] == 1.0
    assert metric["stages"] == {}
    assert metric["paired"]["worse"] == metric["paired"]["better"] == 0
    assert agreement["sqnr_db"] == {"scores": 200.0}
    assert agreement["top1"] == 1.0
    assert agreement["samples"] == 48


def test_a_spoiled_model_loses_and_the_stage_is_named(tiny):
    worse = spoiled(tiny, "worse.onnx", -1.0)
    simple = spoiled(tiny, "simple.onnx", 2.0)  # scores scale, the answers stay
    report = validate.run(job(tiny, worse, simplify=simple, quantize=worse))
    metric = report["metric"]
    assert metric["stages"]["simplify"] == {"score": 1.0, "retained": 1.0}
    assert metric["stages"]["quantize"]["retained"] == metric["shipped"]["retained"] == 0.0
    assert metric["paired"]["worse"] == 96
    assert metric["paired"]["sign_test_p"] < 1e-9
    assert report["agreement"]["top1"] == 0.0
    first, second = report["steps"]
    assert [first["stage"], second["stage"]] == ["simplify", "quantize"]
    # Scores twice as large: the difference is the signal itself. Turned round: twice the signal.
    assert first["sqnr_db"] == pytest.approx(0, abs=1e-4) and first["top1"] == 1.0
    assert second["sqnr_db"] == pytest.approx(-20 * math.log10(2), abs=1e-4)
    # 12x12 maps, then 6x6 and 3x3: by hand from the tiny model's shapes.
    macs = 144 * 16 * 9 + 36 * 32 * 16 * 9 + 9 * 32 * 32 * 9 + 288 * 10
    assert first["macs"] == first["original_macs"] == macs
    assert 0.3 < first["cpu_ratio"] < 3
    # the difference is twice the signal
    assert report["agreement"]["sqnr_db"]["scores"] == pytest.approx(-20 * math.log10(2), abs=1e-4)


def test_a_stage_that_changed_nothing_is_left_out(tiny):
    same = tiny.with_name("same.onnx")
    same.write_bytes(tiny.with_name("model.onnx").read_bytes())
    report = validate.run(job(tiny, same, simplify=same, quantize=same))
    assert report["metric"]["stages"] == {} and report["steps"] == []


def test_each_model_runs_once_per_sample(tiny):
    """Score and per-sample values ask for the same 96 runs; they are done once."""
    told: list[tuple[str, int, int]] = []
    work = job(tiny, tiny.with_name("model.onnx"))
    work = Job(**{**work.__dict__, "tell": lambda *event: told.append(event)})
    report = validate.run(work)
    assert report["metric"]["runs"] == 96
    assert any("on cpu" in text for text, _, _ in told)


def test_without_a_metric_only_outputs_are_compared(tmp_path):
    lines = RECIPE.splitlines()
    keep = [x for x in lines if not x.startswith(("evaluation", "metric", "per_sample"))]
    recipe = write_tiny(tmp_path / "bare", "\n".join(keep))
    report = validate.run(job(recipe, recipe.with_name("model.onnx")))
    assert report["metric"] is None
    assert report["agreement"]["top1"] == 1.0


def test_an_output_that_breaks_is_told(tiny):
    broken = spoiled(tiny, "broken.onnx", np.inf)
    report = validate.run(job(tiny, broken))
    assert any("NaN or Inf" in note["text"] for note in report["notes"])
    assert report["agreement"]["sqnr_db"]["scores"] == -200.0


def test_per_sample_values_must_be_as_many_as_before(tiny):
    score = tiny.with_name("score.py")
    text = score.read_text()
    picky = text.replace(
        "    return np.array([",
        "    keep = lambda v: v[: 5 if run({'x': data['x'][:1]})[0].max() "
        "> 100 else None]\n    return keep(np.array([",
    ).replace("for x, y in pairs])", "for x, y in pairs]))")
    score.write_text(picky)
    with pytest.raises(BadInput, match="per-sample metric"):
        validate.run(job(tiny, spoiled(tiny, "loud.onnx", 1e4)))


def test_powers_count_only_what_differs():
    nan, inf = float("nan"), float("inf")
    assert validate.powers(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == (5.0, 4.0)
    assert validate.powers(np.array([nan, -inf]), np.array([nan, -inf])) == (0.0, 0.0)
    assert validate.powers(np.array([1.0]), np.array([nan]))[1] == inf
    assert validate.sqnr_db(0.0, 0.0) == 200.0
    assert validate.sqnr_db(0.0, 1.0) == -200.0
    assert validate.sqnr_db(100.0, 1.0) == pytest.approx(20.0)


def test_remembered_outputs_are_safe_from_the_users_code():
    calls = []

    def plain(feeds):
        calls.append(1)
        return [feeds["x"] * 2]

    run = validate.remembering(plain)
    first = run({"x": np.ones(3)})
    first[0][:] = 7
    second = run({"x": np.ones(3)})
    second[0][:] = 8
    assert run({"x": np.ones(3)})[0].tolist() == [2, 2, 2]
    assert len(calls) == 1
    run({"x": np.ones((3, 1))})
    run({"x": np.ones(3, np.float32)})
    assert len(calls) == 3


def test_what_does_not_fit_into_memory_is_run_again(monkeypatch):
    monkeypatch.setattr(validate, "REMEMBERED_BYTES", 10)
    calls = []

    def plain(feeds):
        calls.append(1)
        return [feeds["x"]]

    run = validate.remembering(plain)
    for _ in range(2):
        run({"x": np.ones(1)})
        run({"x": np.ones(100)})
    assert len(calls) == 3
