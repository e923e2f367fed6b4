"""Real networks through the pruner: the kit's models, and a few of the zoo that torch exports."""

import sys
from pathlib import Path

import onnx
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
KIT = Path(__file__).resolve().parents[3] / "shared" / "kit"
MOST = 0.53  # silero-vad: its LSTM's states are inputs and outputs
# In float32, of the outputs' largest value, through up to 50 layers.
ROUNDING = 5e-5


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The benchmark's folder on the path, its modules imported by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in ("prune_reach", "zoo_prune"):
        sys.modules.pop(name, None)


@pytest.mark.kit
@pytest.mark.skipif(not KIT.is_dir(), reason="no measuring kit beside the repository")
@pytest.mark.parametrize("case", sorted(p.parent.name for p in KIT.glob("*/model.onnx")))
def test_half_of_a_kit_model(case):
    from prune_reach import reach, sample, simple

    row = reach(simple(onnx.load(KIT / case / "model.onnx")), sample(KIT / case))
    assert row["kept"] <= MOST
    assert row["error"] <= ROUNDING


@pytest.mark.parametrize(
    ("name", "most", "kinds"),
    [
        ("resnext", 0.27, {"channels"}),
        ("shufflenet-v2", 0.33, {"channels"}),
        ("groupnorm", 0.27, {"channels"}),
        ("vit-gqa", 0.28, {"channels", "heads"}),
        ("bilstm", 0.29, {"hidden"}),
        ("siamese", 0.27, {"channels"}),
    ],
)
def test_half_of_a_network_of_the_zoo(name, most, kinds):
    """`most`: parameters left; 0.25 where both sides of all weights could shrink."""
    from prune_reach import exported, reach, simple

    row = reach(simple(exported(name)), None)
    assert row["kept"] <= most
    assert set(row["kinds"]) == kinds
    assert row["error"] <= ROUNDING
