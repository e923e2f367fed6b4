"""The recipe: what to build, from which data, how good it must stay. Frozen once read."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgewright.errors import BadInput
from edgewright.settings import load_toml, parse


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """One model input: numbers fix a dimension, names stay free on the device."""

    shape: tuple[int | str, ...]
    typical: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """[model]: name, version and source of the model."""

    name: str
    version: str
    source: str
    inputs: dict[str, InputShape] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """[data]: calibration inputs, evaluation set and the user's own metric.

    `mean`, `std` and `scale` are used where calibration is a folder of pictures:
    (pixel * scale - mean) / std per channel, pixels 0..255.
    """

    calibration: str
    evaluation: str = ""
    metric: str = ""
    per_sample: str = ""
    higher_is_better: bool = True
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """[quantize]: how much becomes int8. Absent: the target's scheme, where it pays.

    scope: auto = int8 where it pays and the metric allows; full = every node the runtime has
    an int8 kernel for; off = stay float; a list of patterns = only the nodes whose name or
    operator type matches one (shell-style wildcards). exclude: patterns of nodes to keep float.
    corrections: try equalization, bias correction and rounding by output error, each kept only
    where it helps. max_samples: calibration samples to use, 0 for all. measure: let a clock
    drop what does not pay (scope auto, local targets); false: rules only, alike everywhere.
    """

    scope: Literal["auto", "full", "off"] | tuple[str, ...] = "auto"
    exclude: tuple[str, ...] = ()
    ranges: Literal["mse", "minmax", "moving-average", "percentile", "entropy"] = "mse"
    percentile: float = 99.99
    corrections: bool = True
    max_samples: int = 0
    measure: bool = True


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """[share]: weights that share their values. Absent: only equal tensors, as `simplify` does.

    codebook: values that all weights of one codebook take, 2 to 256; 0 for none. scope: a
    codebook per layer, or one for the model. max_drop: share of the metric that clustering may
    cost; where it costs more, the codebook is doubled, and given up beyond 256. compress: also
    write the bundle as NAME.bundle.tar.xz, entropy coded, for the way to the device.
    """

    codebook: int = 0
    scope: Literal["layer", "model"] = "layer"
    max_drop: float = 0.01
    compress: bool = False


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """[gate]: the thresholds of the release. A limit left out is not checked."""

    min_retained: float | None = 0.99
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None
    max_memory_ratio: float | None = None
    max_size_bytes: int | None = None
    max_peak_memory_bytes: int | None = None
    max_latency_ms: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a build; `folder` is what its relative paths start from."""

    model: ModelSettings
    data: DataSettings
    share: ShareSettings | None = None
    quantize: QuantizeSettings = QuantizeSettings()
    gate: GateSettings = GateSettings()
    folder: Path = Path()
    raw: dict[str, Any] = field(default_factory=dict)

    def path(self, text: str) -> Path:
        """A path of the recipe, relative to the recipe's folder."""
        return self.folder / text


LATER = ("prune", "recover")  # tables of DESIGN.md whose stages are not built yet


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file."""
    return parse_recipe(load_toml(path, "recipe"), path.resolve().parent, str(path))


def parse_recipe(raw: dict[str, Any], folder: Path, where: str = "recipe") -> Recipe:
    """Check the tables of a recipe; BadInput names the first key that is wrong."""
    for name in LATER:
        if name in raw:
            raise BadInput(
                f"[{name}] in {where}: this version has no stage '{name}' yet",
                hint=f"remove [{name}] from the recipe",
            )
    known = {k: v for k, v in raw.items() if k not in ("folder", "raw")}
    if len(known) != len(raw):
        extra = sorted(set(raw) - set(known))[0]
        raise BadInput(f"unknown key '{extra}' in {where}")
    recipe = parse(Recipe, known, where)
    check_recipe(recipe, where)
    return replace(recipe, folder=folder, raw=raw)


def check_recipe(recipe: Recipe, where: str) -> None:
    """What the types cannot say: names fit for file names, sizes above zero, shares in range."""
    for key in ("name", "version"):
        value = getattr(recipe.model, key)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", value) or ".." in value:
            raise BadInput(
                f"{where}: model.{key}",
                expected="letters, digits, '.', '_', '+' and '-' (it becomes a file name)",
                found=repr(value),
            )
    for name, item in recipe.model.inputs.items():
        if any(isinstance(d, int) and d < 1 for d in item.shape):
            raise BadInput(f"{where}: shape of input '{name}'", expected="sizes of at least 1")
        if item.typical is not None:
            if len(item.typical) != len(item.shape) or any(d < 1 for d in item.typical):
                raise BadInput(
                    f"{where}: typical size of input '{name}'",
                    expected=f"{len(item.shape)} numbers of at least 1",
                    found=str(list(item.typical)),
                )
            for size, fixed in zip(item.typical, item.shape, strict=True):
                if isinstance(fixed, int) and fixed != size:
                    raise BadInput(
                        f"{where}: typical size of input '{name}'",
                        expected=f"{fixed}, as in shape",
                        found=str(size),
                    )
    gate = recipe.gate
    for key in ("min_retained", "min_agreement"):
        share = getattr(gate, key)
        if share is not None and not 0 <= share <= 1:
            raise BadInput(f"{where}: gate.{key}", expected="0 to 1", found=str(share))
    for key in ("max_latency_ratio", "max_size_ratio", "max_memory_ratio", "max_latency_ms"):
        limit = getattr(gate, key)
        if limit is not None and limit <= 0:
            raise BadInput(f"{where}: gate.{key}", expected="above 0", found=str(limit))
    if recipe.share is not None:
        entries = recipe.share.codebook
        if entries != 0 and not 2 <= entries <= 256:
            raise BadInput(
                f"{where}: share.codebook", expected="0, or 2 to 256", found=str(entries)
            )
        if not 0 <= recipe.share.max_drop <= 1:
            raise BadInput(
                f"{where}: share.max_drop", expected="0 to 1", found=str(recipe.share.max_drop)
            )
    if not 50 < recipe.quantize.percentile <= 100:
        raise BadInput(
            f"{where}: quantize.percentile",
            expected="above 50, at most 100",
            found=str(recipe.quantize.percentile),
        )
    if recipe.data.metric and not recipe.data.evaluation:
        raise BadInput(
            f"{where}: data.metric without data.evaluation",
            hint="name the evaluation set the metric reads",
        )
    if recipe.data.per_sample and not recipe.data.metric:
        raise BadInput(f"{where}: data.per_sample without data.metric")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in one fixed spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
