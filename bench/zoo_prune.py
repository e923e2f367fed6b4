"""Small networks of many families, to see how far the pruner reaches: torch, random weights.

`ZOO` maps a name to (a function that makes the module, shapes of its inputs). Integer inputs are
written as ("tokens", length).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


class Residual(nn.Module):
    """x + body(x), or skip(x) + body(x)."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None, act: bool = True) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.skip(x) + self.body(x)
        return F.relu(y) if self.act else y


def cba(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: Callable = nn.ReLU) -> nn.Module:
    """Convolution, normalisation, activation."""
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), act()
    )


def head(c: int, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def resnet_basic() -> nn.Module:
    def block(i: int, o: int, s: int) -> nn.Module:
        skip = cba(i, o, 1, s, act=nn.Identity) if s > 1 else None
        return Residual(nn.Sequential(cba(i, o, 3, s), cba(o, o, act=nn.Identity)), skip)

    return nn.Sequential(cba(3, 32), block(32, 32, 1), block(32, 64, 2), block(64, 96, 2), head(96))


def resnet_bottleneck(groups: int = 1) -> nn.Module:
    def block(i: int, m: int, o: int, s: int) -> nn.Module:
        skip = cba(i, o, 1, s, act=nn.Identity) if i != o else None
        body = [cba(i, m, 1), cba(m, m, 3, s, groups), cba(m, o, 1, act=nn.Identity)]
        return Residual(nn.Sequential(*body), skip)

    blocks = [block(32, 32, 128, 1), block(128, 32, 128, 1), block(128, 64, 256, 2)]
    return nn.Sequential(cba(3, 32), *blocks, head(256))


class Squeeze(nn.Module):
    def __init__(self, c: int, act: Callable = nn.Sigmoid) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1), act()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.act(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


def mbconv(act: Callable, gate: Callable) -> nn.Module:
    def block(i: int, o: int, k: int, s: int) -> nn.Module:
        m = 4 * i
        body = nn.Sequential(
            *(cba(i, m, 1, act=act), cba(m, m, k, s, m, act), Squeeze(m, gate)),
            cba(m, o, 1, act=nn.Identity),
        )
        return Residual(body, act=False) if i == o and s == 1 else body

    blocks = [block(16, 24, 3, 2), block(24, 24, 5, 1), block(24, 40, 5, 2), block(40, 40, 3, 1)]
    return nn.Sequential(cba(3, 16, 3, 2, act=act), *blocks, cba(40, 128, 1, act=act), head(128))


class Dense(nn.Module):
    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    layers: list[nn.Module] = [cba(3, 32)]
    c = 32
    for part in range(2):
        for _ in range(4):
            layers.append(Dense(c, 16))
            c += 16
        if part == 0:
            layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1), nn.AvgPool2d(2)]
            c //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU(), head(c))


class Shuffle(nn.Module):
    """ShuffleNet v2 unit: split, one half through convolutions, concat, channel shuffle."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.body = nn.Sequential(cba(h, h, 1), cba(h, h, 3, g=h, act=nn.Identity), cba(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.body(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleV1(nn.Module):
    """ShuffleNet v1 unit: grouped 1x1 convolutions with a shuffle between."""

    def __init__(self, c: int, g: int) -> None:
        super().__init__()
        self.g, self.a = g, cba(c, c, 1, g=g)
        self.b = nn.Sequential(cba(c, c, 3, g=c, act=nn.Identity), cba(c, c, 1, g=g))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, self.g, c // self.g, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.relu(x + self.b(y))


class UNet(nn.Module):
    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = cba(3, 16), cba(16, 32, s=2), cba(32, 64, s=2)
        if bilinear:
            self.u = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), cba(64, 32, 1))
            self.v = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), cba(32, 16, 1))
        else:
            self.u, self.v = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.d, self.e, self.out = cba(64, 32), cba(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        y = self.d(torch.cat([self.u(self.c(b)), b], 1))
        return self.out(self.e(torch.cat([self.v(y), a], 1)))


def espcn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5, padding=2), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(32, 32, 3, padding=1)),
        *(nn.PReLU(32), nn.PixelUnshuffle(2), nn.Conv2d(128, 48, 3, padding=1)),
        nn.PixelShuffle(4),
    )


def normed(norm: Callable[[int], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), norm(o), nn.SiLU()]
    return nn.Sequential(*layers, head(128))


class ConvNeXt(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
        self.a, self.b = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(torch.full((c,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.b(F.gelu(self.a(y)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 48, 4, 4), ConvNeXt(48), ConvNeXt(48), head(48))


class C2f(nn.Module):
    def __init__(self, i: int, o: int, n: int = 2) -> None:
        super().__init__()
        h = o // 2
        self.first, self.last = cba(i, o, 1, act=nn.SiLU), cba((2 + n) * h, o, 1, act=nn.SiLU)
        self.body = nn.ModuleList(
            Residual(nn.Sequential(cba(h, h, act=nn.SiLU), cba(h, h, act=nn.SiLU)), act=False)
            for _ in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for body in self.body:
            parts.append(body(parts[-1]))
        return self.last(torch.cat(parts, 1))


class CSP(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = cba(c, c // 2, 1), cba(c, c // 2, 1)
        self.body, self.out = Residual(cba(c // 2, c // 2)), cba(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.body(self.a(x)), self.b(x)], 1))


class YOLO(nn.Module):
    """C2f backbone, SPPF, a feature pyramid, two decoupled heads joined into one output."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU
        self.a = nn.Sequential(cba(3, 16, s=2, act=act), cba(16, 32, s=2, act=act), C2f(32, 32))
        self.b = nn.Sequential(cba(32, 64, s=2, act=act), C2f(64, 64))
        self.p, self.q = cba(64, 32, 1, act=act), cba(128, 64, 1, act=act)
        self.up = C2f(96, 32, 1)
        self.box = nn.ModuleList(
            nn.Sequential(cba(c, 32, act=act), nn.Conv2d(32, 16, 1)) for c in (32, 64)
        )
        self.cls = nn.ModuleList(
            nn.Sequential(cba(c, 32, act=act), nn.Conv2d(32, 4, 1)) for c in (32, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = self.p(self.b(a))
        pools = [y]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        b = self.q(torch.cat(pools, 1))
        a = self.up(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        outs = [
            torch.cat([box(y), torch.sigmoid(cls(y))], 1).flatten(2)
            for y, box, cls in zip((a, b), self.box, self.cls, strict=True)
        ]
        return torch.cat(outs, 2)


class Attention(nn.Module):
    """Heads from one packed projection, three projections, or torch's fused product."""

    def __init__(self, c: int, h: int, way: str, kv: int = 0) -> None:
        super().__init__()
        self.h, self.way, self.kv, self.d = h, way, kv or h, c // h
        if way == "packed":
            self.qkv = nn.Linear(c, 3 * c)
        else:
            self.q = nn.Linear(c, c)
            self.k, self.v = nn.Linear(c, self.kv * self.d), nn.Linear(c, self.kv * self.d)
        self.out = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        if self.way == "packed":
            q, k, v = self.qkv(x).view(n, t, 3, self.h, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(n, t, self.h, self.d).transpose(1, 2)
            k = self.k(x).view(n, t, self.kv, self.d).transpose(1, 2)
            v = self.v(x).view(n, t, self.kv, self.d).transpose(1, 2)
        if self.kv != self.h:
            k, v = (
                a[:, :, None].expand(n, self.kv, self.h // self.kv, t, self.d).flatten(1, 2)
                for a in (k, v)
            )
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class RMSNorm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, c: int, m: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(c, m), nn.Linear(c, m), nn.Linear(m, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x))


def mlp(c: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, m), nn.GELU(), nn.Linear(m, c))


class Block(nn.Module):
    """A transformer layer, normalised before or after."""

    def __init__(
        self,
        attention: nn.Module,
        feed: nn.Module,
        norm: Callable = nn.LayerNorm,
        c: int = 64,
        pre: bool = True,
    ) -> None:
        super().__init__()
        self.a, self.f, self.pre = attention, feed, pre
        self.n, self.m = norm(c), norm(c)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.a(self.n(x))
            return x + self.f(self.m(x))
        x = self.n(x + self.a(x))
        return self.m(x + self.f(x))


class ViT(nn.Module):
    def __init__(self, way: str, kv: int = 0, norm: Callable = nn.LayerNorm, glu: bool = False):
        super().__init__()
        c = 64
        self.patch = nn.Conv2d(3, c, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, c) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 65, c) * 0.02)
        feed = (lambda: SwiGLU(c, 128)) if glu else (lambda: mlp(c, 256))
        self.blocks = nn.Sequential(
            *(Block(Attention(c, 8, way, kv), feed(), norm, c) for _ in range(3))
        )
        self.norm, self.head = norm(c), nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.place
        return self.head(self.norm(self.blocks(y))[:, 0])


class BERT(nn.Module):
    def __init__(self, norm: Callable = nn.LayerNorm, module: bool = False) -> None:
        super().__init__()
        c = 64
        self.words, self.places = nn.Embedding(500, c), nn.Embedding(32, c)
        self.first = norm(c)
        if module:
            layer = nn.TransformerEncoderLayer(c, 8, 256, 0.0, batch_first=True)
            self.blocks: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.blocks = nn.Sequential(
                *(Block(Attention(c, 8, "split"), mlp(c, 256), norm, c, False) for _ in range(2))
            )
        self.pool, self.out = nn.Linear(c, c), nn.Linear(c, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.out(torch.tanh(self.pool(self.blocks(self.first(x))[:, 0])))


class ConvModule(nn.Module):
    """The convolution module of a Conformer: GLU, depthwise over time."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.d = nn.Conv1d(c, 2 * c, 1), nn.Conv1d(c, c, 7, padding=3, groups=c)
        self.n, self.b = nn.BatchNorm1d(c), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.a(x.transpose(1, 2)), 1)
        return self.b(F.silu(self.n(self.d(y)))).transpose(1, 2)


class Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = 64
        self.stem = nn.Conv1d(40, c, 3, 2, 1)
        self.a, self.b = mlp(c, 256), SwiGLU(c, 192)
        self.att, self.conv = Attention(c, 4, "split"), ConvModule(c)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(5))
        self.out = nn.Linear(c, 30)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).transpose(1, 2)
        y = y + 0.5 * self.a(self.norms[0](y))
        y = y + self.att(self.norms[1](y))
        y = y + self.conv(self.norms[2](y))
        y = y + 0.5 * self.b(self.norms[3](y))
        return self.out(self.norms[4](y))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module], bi: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.rnn = cell(32, 64, layers, batch_first=True, bidirectional=bi)
        self.out = nn.Linear(64 * (1 + bi), 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class CRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pools = nn.MaxPool2d(2), nn.MaxPool2d((2, 1)), nn.MaxPool2d((2, 1))
        convs = cba(1, 32), cba(32, 64), cba(64, 96)
        self.body = nn.Sequential(*(m for pair in zip(convs, pools, strict=True) for m in pair))
        self.rnn = nn.LSTM(96 * 2, 64, 2, bidirectional=True)
        self.out = nn.Linear(128, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(1, 2).permute(2, 0, 1)
        return self.out(self.rnn(y)[0])


class TCNBlock(nn.Module):
    def __init__(self, i: int, o: int, d: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(i, o, 3, dilation=d), nn.Conv1d(o, o, 3, dilation=d)
        self.skip, self.pad = nn.Conv1d(i, o, 1) if i != o else nn.Identity(), 2 * d

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(F.pad(x, (self.pad, 0))))
        return F.relu(self.skip(x) + F.relu(self.b(F.pad(y, (self.pad, 0)))))


class Mixer(nn.Module):
    def __init__(self, c: int = 64, t: int = 64) -> None:
        super().__init__()
        self.n, self.m = nn.LayerNorm(c), nn.LayerNorm(c)
        self.tokens, self.channels = mlp(t, 128), mlp(c, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.n(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.m(x))


class MixerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.body, self.out = nn.Conv2d(3, 64, 4, 4), Mixer(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def prelu_net() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.PReLU(o)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.PReLU(), nn.Linear(128, 64)
    )


def conv3d() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv3d(i, o, 3, 1, 1), nn.BatchNorm3d(o), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 8))


def audio1d() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv1d(1, 32, 16, 8)]
    for i, o in ((32, 64), (64, 96)):
        layers += [nn.BatchNorm1d(i), nn.ReLU(), nn.Conv1d(i, o, 5, 2, 2)]
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(96, 12)
    )


class MobileViT(nn.Module):
    """Patches unfolded into a sequence, attention over it, folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(cba(3, 32, s=2, act=nn.SiLU), cba(32, 64, s=2, act=nn.SiLU))
        self.block = Block(Attention(64, 4, "packed"), mlp(64, 128))
        self.out = nn.Sequential(cba(128, 64, act=nn.SiLU), head(64))

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        n, c, h, w = a.shape
        y = a.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1)
        y = self.block(y.reshape(n * 4, h * w // 4, c))
        y = y.reshape(n, 2, 2, h // 2, w // 2, c).permute(0, 5, 3, 1, 4, 2).reshape(n, c, h, w)
        return self.out(torch.cat([a, y], 1))


class Ghost(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b = cba(i, o // 2, 1), cba(o // 2, o // 2, 3, g=o // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([y, self.b(y)], 1)


class Rotary(Attention):
    """Heads whose halves are rotated by stored angles."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (
            p(x).view(n, t, self.h, self.d).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        half = self.d // 2
        angle = torch.arange(t)[:, None] / 100 ** (torch.arange(half)[None] / half)
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        q, k = (a * cos + torch.cat([-a[..., half:], a[..., :half]], -1) * sin for a in (q, k))
        y = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class Decoder(nn.Module):
    """A small language model: rotary attention, RMSNorm, SwiGLU, the embedding tied."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 64)
        self.blocks = nn.Sequential(
            *(Block(Rotary(64, 4, "split"), SwiGLU(64, 160), RMSNorm, 64) for _ in range(2))
        )
        self.norm = RMSNorm(64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(self.words(tokens))) @ self.words.weight.T


class Siamese(nn.Module):
    """One trunk on two inputs: every weight has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(cba(3, 32, s=2), cba(32, 64, s=2), head(64, 32))
        self.out = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.cat([self.trunk(a), self.trunk(b)], 1))


IMAGE, SEQUENCE = (1, 3, 32, 32), (1, 20, 32)
Entry = tuple[Callable[[], nn.Module], tuple[Shape | tuple[str, int], ...]]

ZOO: dict[str, Entry] = {
    "resnet-basic": (resnet_basic, (IMAGE,)),
    "resnet-bottleneck": (resnet_bottleneck, (IMAGE,)),
    "resnext": (lambda: resnet_bottleneck(4), (IMAGE,)),
    "mbconv-se": (lambda: mbconv(nn.SiLU, nn.Sigmoid), (IMAGE,)),
    "mbconv-hardswish": (lambda: mbconv(nn.Hardswish, nn.Hardsigmoid), (IMAGE,)),
    "densenet": (densenet, (IMAGE,)),
    "shufflenet-v2": (
        lambda: nn.Sequential(cba(3, 64, s=2), Shuffle(64), Shuffle(64), cba(64, 96, 1), head(96)),
        (IMAGE,),
    ),
    "shufflenet-v1": (
        lambda: nn.Sequential(cba(3, 64, s=2), ShuffleV1(64, 4), ShuffleV1(64, 4), head(64)),
        (IMAGE,),
    ),
    "unet-transpose": (UNet, (IMAGE,)),
    "unet-bilinear": (lambda: UNet(True), (IMAGE,)),
    "espcn-pixelshuffle": (espcn, (IMAGE,)),
    "groupnorm": (lambda: normed(lambda c: nn.GroupNorm(8, c)), (IMAGE,)),
    "instancenorm": (lambda: normed(lambda c: nn.InstanceNorm2d(c, affine=True)), (IMAGE,)),
    "convnext": (convnext, (IMAGE,)),
    "c2f": (
        lambda: nn.Sequential(
            cba(3, 32, s=2), C2f(32, 64), cba(64, 96, s=2), C2f(96, 96), head(96)
        ),
        (IMAGE,),
    ),
    "csp": (lambda: nn.Sequential(cba(3, 64, s=2), CSP(64), CSP(64), head(64)), (IMAGE,)),
    "yolo": (YOLO, (IMAGE,)),
    "ghost": (
        lambda: nn.Sequential(cba(3, 32, s=2), Ghost(32, 64), Ghost(64, 96), head(96)),
        (IMAGE,),
    ),
    "vit-packed": (lambda: ViT("packed"), (IMAGE,)),
    "vit-split": (lambda: ViT("split"), (IMAGE,)),
    "vit-fused": (lambda: ViT("fused"), (IMAGE,)),
    "vit-gqa": (lambda: ViT("split", 4), (IMAGE,)),
    "vit-rms-swiglu": (lambda: ViT("split", 0, RMSNorm, True), (IMAGE,)),
    "vit-torch-rms": (lambda: ViT("fused", 0, nn.RMSNorm, True), (IMAGE,)),
    "bert": (BERT, (("tokens", 16),)),
    "bert-torch-encoder": (lambda: BERT(module=True), (("tokens", 16),)),
    "decoder-rotary": (Decoder, (("tokens", 16),)),
    "conformer": (Conformer, ((1, 40, 64),)),
    "mobilevit": (MobileViT, (IMAGE,)),
    "bilstm": (lambda: Recurrent(nn.LSTM), (SEQUENCE,)),
    "bigru": (lambda: Recurrent(nn.GRU), (SEQUENCE,)),
    "lstm": (lambda: Recurrent(nn.LSTM, False, 1), (SEQUENCE,)),
    "rnn": (lambda: Recurrent(nn.RNN), (SEQUENCE,)),
    "crnn": (CRNN, ((1, 1, 16, 48),)),
    "tcn": (
        lambda: nn.Sequential(TCNBlock(16, 64, 1), TCNBlock(64, 64, 2), nn.Conv1d(64, 8, 1)),
        ((1, 16, 50),),
    ),
    "mlp-mixer": (MixerNet, (IMAGE,)),
    "prelu": (prelu_net, (IMAGE,)),
    "conv3d": (conv3d, ((1, 1, 8, 16, 16),)),
    "audio-1d": (audio1d, ((1, 1, 2000),)),
    "siamese": (Siamese, (IMAGE, IMAGE)),
}


def example(shape: Shape | tuple[str, int]) -> Tensor:
    """A random input of an entry of the zoo."""
    if shape[0] == "tokens":
        return torch.randint(0, 100, (1, int(shape[1])))
    return torch.randn(tuple(int(d) for d in shape))


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module, in evaluation mode and with its statistics moved off their start, and inputs."""
    torch.manual_seed(0)
    make, shapes = ZOO[name]
    module = make().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return module, tuple(example(shape) for shape in shapes)
