"""The torch runner on whole models: what torch's exporter writes, and the measuring kit."""

import io
import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewright.runtime.local import open_local

torch = pytest.importorskip("torch")
nn = torch.nn

from edgewright.recover.executor import to_module  # noqa: E402

KIT = Path(__file__).parents[3] / "shared" / "kit"
# Largest difference over the largest output. Both add float32 numbers in their own order; det's
# sigmoid of a steep, nearly zero sum makes the most of it.
CLOSE = 2e-4


class Recurrent(nn.Module):
    """(2, 6, 5) -> (2, 3): LSTM both ways, then GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(14, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class UNet(nn.Module):
    """(1, 3, 16, 16) -> (1, 2, 16, 16): group norm, transposed convolution, Resize, Concat."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16), nn.GELU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(16, 8, 1))
        self.tail = nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        a = self.down(x)
        b = self.up(self.deep(a))
        return self.tail(self.head(torch.cat([a, b], 1))).clamp(-1, 1)


class Attention(nn.Module):
    """(1, 6) tokens -> (1, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)).mean(1))


MODELS = {
    "recurrent": (Recurrent, torch.zeros(2, 6, 5)),
    "unet": (UNet, torch.zeros(1, 3, 16, 16)),
    "attention": (Attention, torch.zeros(1, 6, dtype=torch.int64)),
}


def exported(build: type[nn.Module], example: torch.Tensor) -> onnx.ModelProto:
    torch.manual_seed(0)
    module = build().eval()
    for weight in module.parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # no zeros that the exporter could drop
    stream = io.BytesIO()
    program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
    program.save(stream)
    return onnx.load_from_string(stream.getvalue())


def compare(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> None:
    want = open_local(model.SerializeToString(), optimize=False).run(feed)
    with torch.no_grad():
        got = to_module(model)(feed)
    for value, right in zip(got, want, strict=True):
        assert value.shape == right.shape
        assert np.abs(value.numpy() - right).max() <= CLOSE * np.abs(right).max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_what_the_runtime_gives_and_trains(name):
    build, example = MODELS[name]
    model = exported(build, example)
    rng = np.random.default_rng(0)
    floats = example.is_floating_point()
    x = rng.normal(size=example.shape).astype("f") if floats else rng.integers(0, 20, (1, 6))
    feed = {model.graph.input[0].name: x}
    compare(model, feed)
    module = to_module(model)
    # All the weights of the torch module are trained, under whatever names the exporter chose.
    trained = sum(w.numel() for w in module.weights.values())
    assert trained >= sum(p.numel() for p in build().parameters())
    module(feed)[0].square().sum().backward()
    still = [n for n, w in module.weights.items() if w.grad is None or not w.grad.abs().max() > 0]
    assert not still


@pytest.mark.kit
@pytest.mark.parametrize("case", sorted(p.parent.name for p in KIT.glob("*/case.toml")))
def test_the_kits_models_give_what_the_runtime_gives(case, monkeypatch):
    monkeypatch.syspath_prepend(str(KIT))
    sys.modules.pop("kit", None)
    import kit

    (feed,) = itertools.islice(kit.feeds(case), 1)
    compare(onnx.load(str(KIT / case / "model.onnx")), feed)
