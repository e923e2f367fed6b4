"""`edgewright init`: a recipe for a model, to be filled in. Every line it leaves open says so."""

import json
import re
from pathlib import Path
from typing import Any

TEMPLATE = """\
# A recipe for edgewright. Paths are relative to this file.
[model]
name = {name}
version = "0.1.0"
source = {source}
{inputs}
[data]
# Real inputs without labels: an .npz (keys are input names, the first axis counts samples), a
# folder of .npy/.png/.jpg/.wav files, or "data.py:function" that yields feeds. 32 to 128 do.
calibration = "calibration.npz"
# The labelled set, and score(run, data) -> float; run(feeds: dict) -> list of arrays.
# Without a metric the gate cannot say how much of it is kept.
# evaluation = "evaluation.npz"
# metric = "score.py:score"
# per_sample = "score.py:per_sample"   # one number per sample: makes the comparison sharp
# higher_is_better = true

[gate]
min_retained = 0.99        # metric / original metric
max_latency_ratio = 1.0    # shipped / original, on the target
"""


def recipe_for(source: str, inputs: list[dict[str, Any]]) -> str:
    """The text of a recipe for the model `source` with these inputs (as `inspection` has them)."""
    return TEMPLATE.format(
        name=quoted(name_from(source)),
        source=quoted(source),
        inputs="".join(input_table(item) for item in inputs if needs_table(item)),
    )


def name_from(source: str) -> str:
    """A model name that fits the rules for names, made from the file's."""
    stem = Path(source.rpartition(":")[0] if ".py:" in source else source).stem
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).strip("-.")
    return re.sub(r"\.\.+", ".", name)[:100] or "model"


def needs_table(item: dict[str, Any]) -> bool:
    """Only an input with a free dimension has something to say."""
    return any(not isinstance(size, int) for size in item["shape"])


def input_table(item: dict[str, Any]) -> str:
    """[model.inputs.NAME]: the free dimensions by name, and a size to measure at."""
    shape = [
        size if isinstance(size, int) else size or f"free{k}"
        for k, size in enumerate(item["shape"])
    ]
    typical = [size if isinstance(size, int) else 1 for size in shape]
    return (
        f"\n[model.inputs.{quoted(item['name'])}]\n"
        f"shape = {json.dumps(shape)}\n"
        f"typical = {json.dumps(typical)}   # the size to measure at: put your own\n"
    )


def quoted(text: str) -> str:
    """A TOML basic string: JSON's spelling is one, DEL aside."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
