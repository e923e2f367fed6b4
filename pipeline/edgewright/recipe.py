"""The recipe: what to build, from which data, how good it must stay. Frozen once read."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edgewright.codebooks import ShareSettings, check_share
from edgewright.cuts import PruneSettings, check_prune, check_soft
from edgewright.decision import Tolerances, check_tolerances
from edgewright.errors import BadInput
from edgewright.settings import SEEDS, check_limits, load_toml, parse


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
    where it helps; "bias": only what leaves the weights as they are, which is also what happens
    to weights that a codebook of [share] made. max_samples: calibration samples to use, 0 for
    all. measure: let a clock drop what does not pay (scope auto, local targets); false: rules
    only, alike everywhere.
    weights_only: int8 weights in the file, float arithmetic, in the layers of the scope; without
    calibration, and whether or not it is faster: a quarter of the size is what is asked for.
    processes: to calibrate in, 0 for as many as have a core each and 300 MB together beside the
    model.
    """

    scope: Literal["auto", "full", "off"] | tuple[str, ...] = "auto"
    exclude: tuple[str, ...] = ()
    ranges: Literal["mse", "minmax", "moving-average", "percentile", "entropy"] = "mse"
    percentile: float = 99.99
    corrections: bool | Literal["bias"] = True
    max_samples: int = 0
    measure: bool = True
    weights_only: bool = False
    processes: int = 0


FEW = 256  # samples up to which distillation sees all at every step, and makes varied ones
MOST_HARD = 0.3  # of the loss may come from true labels
HOLD = 5  # every fifth calibration sample is held out to judge training by


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """[recover.distill]: how the pruned model learns from the original.

    solver: "newton" (every step sees all samples, see `recover.newton`), "adam" (batches, see
    `recover.training`), or "auto": newton for at most FEW samples where no other setting speaks
    against it. steps, minutes, rate, patience, seed: see `recover.training.Schedule`; newton passes
    over the samples as often as that many batches would. batch: samples of a step.
    outputs: how outputs are compared: "auto" (by the node that makes them), "soft" (all are
    logits over the last axis) or "value" (squared error). temperature: softens distributions
    of outputs (N, classes); longer outputs, such as CTC's, are compared at 1. soft, feature,
    attention: weights of the losses; without soft, layers behind the features still learn from the
    outputs, and no others. hard: weight of the true labels where they are given, at
    most 0.3, taken from the others. features: names of tensors for the feature loss; empty:
    the one before the last pooling. mix: trains on mixtures of two samples as well, for inputs
    that are float32 (adam). vary: copies of each of at most FEW samples, changed as
    `recover.variants` says, that are learned from as well. wild: where none of them comes twice,
    they may be far from any sample. keep_zeros: weights that are zero stay
    zero. quantized: trains with weights and activations rounded as int8 will round them. samples:
    kept in memory.
    threads: of the training; the result's last bits depend on their number.
    """

    solver: Literal["auto", "newton", "adam"] = "auto"
    steps: int = 300
    minutes: float = 0.0
    rate: float = 0.0
    patience: int = 12
    batch: int = 16
    seed: int = 0
    outputs: Literal["auto", "soft", "value"] = "auto"
    temperature: float = 2.0
    soft: float = 1.0
    feature: float = 0.5
    attention: float = 0.0
    hard: float = 0.0
    features: tuple[str, ...] = ()
    mix: bool = True
    vary: int = 3
    wild: bool = True
    keep_zeros: bool = False
    quantized: bool = False
    samples: int = 1024
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """[recover]: how a pruned model gets back what it lost. Absent: not at all.

    method: compensate = least squares from calibration inputs, no labels, no torch; distill =
    that, then training by the original's own answers on the same inputs (needs torch). samples:
    calibration samples to read for the first. vary: changed copies of each (see
    `recover.variants`) that it is fitted on as well where there are at most FEW. labels: an .npy of
    whole numbers, one for each calibration sample; read where `distill.hard` is above 0, and by the
    criteria taylor and fisher.
    """

    method: Literal["compensate", "distill"] = "compensate"
    samples: int = 64
    vary: int = 3
    labels: str = ""
    distill: Distillation = Distillation()


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """[gate]: the thresholds of the release. A limit left out is not checked.

    max_instructions, max_instruction_ratio: of one inference, where the target is emulated.
    """

    min_retained: float | None = 0.99
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None
    max_memory_ratio: float | None = None
    max_size_bytes: int | None = None
    max_peak_memory_bytes: int | None = None
    max_latency_ms: float | None = None
    max_instruction_ratio: float | None = None
    max_instructions: int | None = None
    min_agreement: float | None = None
    # Against an earlier release, not against the original.
    tolerance: Tolerances = field(default_factory=Tolerances)


@dataclass(frozen=True, kw_only=True)
class ReleaseSettings:
    """[release]: what the bundle says of itself as one release among others.

    sequence: grows with every release of one name and target; a device that runs a later one
    refuses this one. 0: not set, so nothing protects from going back. expires: the day (UTC,
    "2027-06-30") from whose start on no device installs it. license: of the model, an SPDX
    expression; license_file: its text, which travels with the model. formats: what the model is
    shipped in beside ONNX; "ort" with the operators and types for a reduced build of the runtime.
    runner: with `bin/edge-run`, which runs the model and checks its golden vectors on a device
    without Python; takes a C compiler for the target's architecture.
    """

    sequence: int = 0
    expires: str = ""
    license: str = ""
    license_file: str = ""
    formats: tuple[Literal["ort"], ...] = ()
    runner: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a build; `folder` is what its relative paths start from."""

    model: ModelSettings
    data: DataSettings
    prune: PruneSettings | None = None
    recover: RecoverSettings | None = None
    share: ShareSettings | None = None
    quantize: QuantizeSettings = QuantizeSettings()
    gate: GateSettings = GateSettings()
    release: ReleaseSettings = ReleaseSettings()
    folder: Path = Path()
    raw: dict[str, Any] = field(default_factory=dict)

    def path(self, text: str) -> Path:
        """A path of the recipe, relative to the recipe's folder."""
        return self.folder / text


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file, or the recipe.toml of a folder."""
    path = path / "recipe.toml" if path.is_dir() else path
    return parse_recipe(load_toml(path, "recipe"), path.resolve().parent, str(path))


def parse_recipe(raw: dict[str, Any], folder: Path, where: str = "recipe") -> Recipe:
    """Check the tables of a recipe; BadInput names the first key that is wrong."""
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
    check_release(recipe.release, where)
    gate = recipe.gate
    for key in ("min_retained", "min_agreement"):
        share = getattr(gate, key)
        if share is not None and not 0 <= share <= 1:
            raise BadInput(f"{where}: gate.{key}", expected="0 to 1", found=str(share))
    for key in (
        "max_latency_ratio",
        "max_size_ratio",
        "max_memory_ratio",
        "max_latency_ms",
        "max_instruction_ratio",
        "max_instructions",
    ):
        limit = getattr(gate, key)
        if limit is not None and limit <= 0:
            raise BadInput(f"{where}: gate.{key}", expected="above 0", found=str(limit))
    check_tolerances(gate.tolerance, f"{where}: gate.tolerance")
    if recipe.prune is not None:
        check_prune(recipe.prune, where)
        check_soft(recipe.prune, where)
    if recipe.recover is not None:
        check_recover(recipe.recover, where)
    if recipe.share is not None:
        check_share(recipe.share, where)
    for key in ("max_samples", "processes"):
        if (count := getattr(recipe.quantize, key)) < 0:
            raise BadInput(f"{where}: quantize.{key}", expected="0 or more", found=str(count))
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


def check_recover(recover: RecoverSettings, where: str) -> None:
    """Numbers that can be, labels for what reads them, and no training that nobody asked for."""
    most = {"samples": (2, 10**6), "vary": (0, 100)}
    check_limits(recover, most, f"{where}: recover")
    train = recover.distill
    if recover.method != "distill" and train != Distillation():
        raise BadInput(
            f"{where}: recover.distill without training", hint='add method = "distill" to [recover]'
        )
    limits: dict[str, tuple[float, float]] = {
        "steps": (1, 10**7), "minutes": (0, 10**5), "rate": (0, 0.5), "patience": (1, 10**6),
        "batch": (1, 4096), "seed": SEEDS, "temperature": (0.1, 100), "soft": (0, 100),
        "feature": (0, 100), "attention": (0, 100), "hard": (0, MOST_HARD), "vary": (0, 100),
        "samples": (5, 10**6), "threads": (1, 256),
    }  # fmt: skip
    check_limits(train, limits, f"{where}: recover.distill")
    if train.soft + train.feature + train.attention == 0:
        raise BadInput(
            f"{where}: recover.distill has no loss",
            expected="soft, feature or attention above 0",
        )
    if train.hard > 0 and not recover.labels:
        raise BadInput(
            f"{where}: recover.distill.hard without recover.labels",
            hint="name an .npy with one whole number for each calibration sample",
        )


def check_release(release: ReleaseSettings, where: str) -> None:
    """A sequence that JSON can hold, a day of the calendar, a licence of one line."""
    if not 0 <= release.sequence < 2**53:
        raise BadInput(
            f"{where}: release.sequence", expected="0 to 2^53 - 1", found=str(release.sequence)
        )
    if release.expires:
        expiry(release.expires, f"{where}: release.expires")
    if not re.fullmatch(r"[A-Za-z0-9.+() -]{0,200}", release.license):
        raise BadInput(
            f"{where}: release.license",
            expected='an SPDX expression such as "Apache-2.0"',
            found=repr(release.license[:200]),
        )


def expiry(day: str, where: str) -> int:
    """Seconds since 1970 at which a day (UTC) begins; BadInput where it is none."""
    try:
        begin = datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC)
        if begin.year < 2000 or f"{begin:%Y-%m-%d}" != day:
            raise ValueError
    except ValueError:
        raise BadInput(
            where, expected='a day from 2000 on, such as "2027-06-30"', found=repr(day[:40])
        ) from None
    return int(begin.timestamp())


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in one fixed spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
