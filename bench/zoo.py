#!/usr/bin/env python3
"""Int8 against float on small nets of the families that quantizers make slower.

    python bench/zoo.py [NET ...] [--out DIR] [--quick] [--json]

Nets come out of torch's exporter with random weights (seed 0) and batch normalisation that has
seen data, so shapes, operators and ranges are those of the families; accuracy is not. Of each:
CPU time against the float original (interleaved, one thread) of int8 placed by rule, of int8
with measured prices, and of what the stage ships; SQNR in dB.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgewright import quantize, simplify
from edgewright.data import samples
from edgewright.model import input_specs, load
from edgewright.quantize import fidelity
from edgewright.recipe import parse_recipe
from edgewright.runtime.timing import cpu_ratio
from edgewright.stage import Job
from edgewright.target import load_target

SAMPLES = 8
OPSET = 18


def conv(
    i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), act()
    )


class Add(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Squeeze(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, c: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c, c // 4, 1),
            nn.ReLU(),
            nn.Conv2d(c // 4, c, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x)


def inverted(
    i: int, o: int, s: int, act: type[nn.Module], gate: type[nn.Module] | None
) -> nn.Module:
    """The MobileNet block, with squeeze-and-excite where there is a gate."""
    c = i * 4
    body = [conv(i, c, 1, act=act), conv(c, c, 5 if gate else 3, s, c, act)]
    body += [Squeeze(c, gate)] if gate else []
    body.append(conv(c, o, 1, act=nn.Identity))
    return Add(*body) if s == 1 and i == o else nn.Sequential(*body)


def mobile(act: type[nn.Module], gate: type[nn.Module] | None) -> nn.Module:
    widths, strides = (16, 24, 24, 40, 40, 80, 80, 80), (2, 1, 2, 1, 2, 1, 1)
    plan = zip(widths, widths[1:], strides, strict=False)
    blocks = [inverted(i, o, s, act, gate) for i, o, s in plan]
    return nn.Sequential(
        conv(3, 16, 3, 2, act=act), *blocks, conv(80, 320, 1, act=act),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 100),
    )  # fmt: skip


def residual(gate: type[nn.Module] | None) -> nn.Module:
    def block(c: int) -> nn.Module:
        body = [conv(c, c), conv(c, c, act=nn.Identity)]
        return nn.Sequential(Add(*body, *([Squeeze(c, gate)] if gate else [])), nn.ReLU())

    return nn.Sequential(
        conv(3, 32, 3, 2), block(32), conv(32, 64, 3, 2), block(64),
        conv(64, 128, 3, 2), block(128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100),
    )  # fmt: skip


class Detector(nn.Module):
    """CSP blocks with SiLU, a nearest-neighbour pyramid, boxes concatenated with scores."""

    def __init__(self) -> None:
        super().__init__()
        a = nn.SiLU
        self.stem = nn.Sequential(conv(3, 16, 3, 2, act=a), conv(16, 32, 3, 2, act=a))
        self.split, self.skip = conv(32, 16, 1, act=a), conv(32, 16, 1, act=a)
        self.inner = nn.Sequential(
            *[Add(conv(16, 16, 1, act=a), conv(16, 16, act=a)) for _ in range(2)]
        )
        self.merge, self.down = conv(32, 64, 1, act=a), conv(64, 64, 3, 2, act=a)
        self.deep = nn.Sequential(conv(64, 64, 3, 2, act=a), Add(conv(64, 64, act=a)))
        self.up, self.head = nn.Upsample(scale_factor=2), conv(128, 64, act=a)
        self.boxes, self.scores = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.merge(torch.cat([self.inner(self.split(x)), self.skip(x)], 1))
        x = self.down(x)
        x = self.head(torch.cat([self.up(self.deep(x)), x], 1))
        boxes, scores = self.boxes(x).flatten(2), self.scores(x).flatten(2)
        return torch.cat([boxes.exp() * 16, scores.sigmoid()], 1)


class Block(nn.Module):
    """A transformer block with GELU."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.a, self.b = nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.a(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(2, 3) * (d // self.heads) ** -0.5).softmax(3)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.b(x))


class Vision(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = (
            nn.Conv2d(3, 192, 16, 16),
            nn.Sequential(*[Block(192, 3) for _ in range(3)]),
        )
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Unet(nn.Module):
    """Encoder, decoder with transposed convolutions or bilinear upsampling, skip connections."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            conv(3, 16),
            conv(16, 32),
            nn.Sequential(conv(32, 64), conv(64, 64)),
        )
        self.pool = nn.MaxPool2d(2)
        if transposed:
            self.up1: nn.Module = nn.ConvTranspose2d(64, 32, 2, 2)
            self.up2: nn.Module = nn.ConvTranspose2d(32, 16, 2, 2)
        else:
            bilinear = {"scale_factor": 2, "mode": "bilinear"}
            self.up1 = nn.Sequential(conv(64, 32, 1), nn.Upsample(**bilinear))
            self.up2 = nn.Sequential(conv(32, 16, 1), nn.Upsample(**bilinear))
        self.d, self.e, self.out = conv(64, 32), conv(32, 16), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        c = self.c(self.pool(b))
        d = self.d(torch.cat([self.up1(c), b], 1))
        return self.out(self.e(torch.cat([self.up2(d), a], 1))).sigmoid()


class Dense(nn.Module):
    """A dense block: normalisation and activation in front, all outputs concatenated."""

    def __init__(self, c: int, grow: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(c + grow * k), nn.ReLU(),
                nn.Conv2d(c + grow * k, 4 * grow, 1, bias=False),
                nn.BatchNorm2d(4 * grow), nn.ReLU(), nn.Conv2d(4 * grow, grow, 3, 1, 1, bias=False),
            )
            for k in range(count)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def densenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 32, 3, 2), Dense(32, 16, 4), conv(96, 48, 1), nn.AvgPool2d(2), Dense(48, 16, 6),
        nn.BatchNorm2d(144), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(144, 100),
    )  # fmt: skip


class Last(nn.Module):
    """A module on channels last."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    def block(c: int) -> nn.Module:
        mlp = Last(nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        return Add(nn.Conv2d(c, c, 7, 1, 3, groups=c), mlp)

    return nn.Sequential(
        nn.Conv2d(3, 48, 4, 4), Last(nn.LayerNorm(48)), block(48), block(48),
        Last(nn.LayerNorm(48)), nn.Conv2d(48, 96, 2, 2), block(96), block(96),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 100),
    )  # fmt: skip


class Wave(nn.Module):
    """One-dimensional convolutions on audio, gated as in WaveNet or with ReLU."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(1, 64, 16, 8, 4), nn.ReLU(), nn.Conv1d(64, 64, 5, 2, 2), nn.ReLU()
        )
        wide = 128 if gated else 64
        self.gated = gated
        self.layers = nn.ModuleList(nn.Conv1d(64, wide, 3, 1, d, d) for d in (1, 2, 4, 8))
        self.mix = nn.ModuleList(nn.Conv1d(64, 64, 1) for _ in range(4))
        self.out = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for layer, mix in zip(self.layers, self.mix, strict=True):
            y = layer(x)
            y = y[:, :64].tanh() * y[:, 64:].sigmoid() if self.gated else y.relu()
            x = x + mix(y)
        return self.out(x.mean(2))


def shuffle() -> nn.Module:
    return nn.Sequential(
        conv(1, 48, 5), conv(48, 48), conv(48, 32), nn.Conv2d(32, 9, 3, 1, 1), nn.PixelShuffle(3)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: residual(None), (3, 96, 96)),
    "residual-se": (lambda: residual(nn.Sigmoid), (3, 96, 96)),
    "mobile-hardswish": (lambda: mobile(nn.Hardswish, None), (3, 128, 128)),
    "mobile-hardswish-se": (lambda: mobile(nn.Hardswish, nn.Hardsigmoid), (3, 128, 128)),
    "efficient-silu-se": (lambda: mobile(nn.SiLU, nn.Sigmoid), (3, 128, 128)),
    "mobile-relu-se": (lambda: mobile(nn.ReLU, nn.Hardsigmoid), (3, 128, 128)),
    "detector-silu": (Detector, (3, 160, 160)),
    "vision-gelu": (Vision, (3, 128, 128)),
    "convnext": (convnext, (3, 96, 96)),
    "unet-transposed": (lambda: Unet(True), (3, 96, 96)),
    "unet-bilinear": (lambda: Unet(False), (3, 96, 96)),
    "densenet": (densenet, (3, 64, 64)),
    "pixelshuffle": (shuffle, (1, 64, 64)),
    "wave": (lambda: Wave(False), (1, 8000)),
    "wave-gated": (lambda: Wave(True), (1, 8000)),
}


def export(name: str, folder: Path) -> None:
    """The net as source.onnx, its calibration inputs as calibration.npz."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make()
    for _ in range(3):  # normalisations see data
        net.train()(smooth(4, shape))
    net.eval()
    program = torch.onnx.export(
        net, (smooth(1, shape),), dynamo=True, opset_version=OPSET, verbose=False
    )
    assert program is not None
    program.save(folder / "source.onnx")
    key = input_specs(load(folder / "source.onnx"))[0].name
    np.savez(folder / "calibration.npz", **{key: smooth(SAMPLES, shape).numpy()})


def smooth(count: int, shape: tuple[int, ...]) -> Tensor:
    """Noise with more power in the low frequencies, as pictures and sound have."""
    x = torch.randn(count, *shape)
    kernel = 9 if len(shape) == 2 else (9, 9)
    pool = nn.functional.avg_pool1d if len(shape) == 2 else nn.functional.avg_pool2d
    return 4 * pool(x, kernel, 1, 4) + 0.3 * x  # type: ignore[operator]


def measure(name: str, folder: Path, corrections: bool) -> dict[str, Any]:
    """One row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "calibration.npz").exists():
        export(name, folder)
    tables: dict[str, Any] = {
        "model": {"name": name, "version": "1", "source": "source.onnx"},
        "data": {"calibration": "calibration.npz"},
    }
    row: dict[str, Any] = {"net": name}
    source = folder / "source.onnx"
    plain = stage(simplify, source, tables, folder)[0]
    feeds = list(samples(parse_recipe(tables, folder), input_specs(load(source)), 4))
    row["simplified"] = cpu_ratio(plain, source, feeds)
    for label, settings in (("rules", {"measure": False}), ("priced", {})):
        begin = time.monotonic()
        settings = {"corrections": corrections, **settings}
        made, report = stage(quantize, plain, {**tables, "quantize": settings}, folder)
        row[label] = {
            "ratio": cpu_ratio(made, source, feeds),
            "sqnr_db": sqnr(made, plain, feeds),
            "float": report["stayed_float"],
            "int8_nodes": sum(r["runs_as"] == "int8" for r in report["placement"]),
            "seconds": time.monotonic() - begin,
            "choices": report["choices"],
            "prices": report.get("prices"),
        }
    return row


def stage(
    module: Any, model: Path, tables: dict[str, Any], folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Run one stage in this process: its model and its report."""
    out = Path(tempfile.mkdtemp(dir=folder))
    recipe, target = parse_recipe(tables, folder), load_target("cpu")
    job = Job(recipe=recipe, target=target, folder=out, model=model)
    return job.output_model(), module.run(job)


def sqnr(candidate: Path, original: Path, feeds: list[Any]) -> float:
    """SQNR in dB of the outputs."""
    models: list[onnx.ModelProto] = [load(original), load(candidate)]
    judged = fidelity.judged_tensors(models[0])
    reference, values = (fidelity.values_of(m, judged, feeds) for m in models)
    return fidelity.sqnr_db(reference, values)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "nets", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("build/zoo"))
    parser.add_argument("--quick", action="store_true", help="without corrections")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if unknown := set(asked.nets) - set(NETS):
        parser.error(f"no such net: {', '.join(sorted(unknown))}")
    rows = []
    for name in asked.nets or NETS:
        row = measure(name, asked.out / name, not asked.quick)
        rows.append(row)
        cells = [f"{name:22}", f"simplified {row['simplified']:.2f}"]
        for label in ("rules", "priced"):
            r = row[label]
            kind = "float" if r["float"] else f"{r['int8_nodes']:3} int8"
            cells.append(
                f"{label} {r['ratio']:.2f} {r['sqnr_db']:5.1f} dB {kind} {r['seconds']:.0f} s"
            )
        print("  ".join(cells), file=sys.stderr, flush=True)
    if asked.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
