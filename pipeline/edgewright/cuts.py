"""[prune] of a recipe: what leaves the graph, by which criterion, and how that is trained."""

from dataclasses import dataclass, field
from typing import Literal

from edgewright.errors import BadInput
from edgewright.settings import SEEDS, check_limits
from edgewright.zeros import parse_pattern


@dataclass(frozen=True, kw_only=True)
class PruneBudget:
    """What may remain, as a share of the model that pruning starts from; at most one of these."""

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None

    def named(self) -> tuple[str, float]:
        """The one that is given; all of the work, where [prune.ratios] alone say what goes."""
        return next(((k, v) for k, v in vars(self).items() if v is not None), ("macs", 1.0))


@dataclass(frozen=True, kw_only=True)
class SoftTraining:
    """[prune.train]: the training of soft pruning, by the model's own answers, without labels.

    steps, batch, seed: of the optimiser. rate: the largest relative change of a weight tensor per
    step. strength: of lasso: what all steps together take from the norm of each unit, in means
    of its group; too strong, and all units go. every: steps between two choices of regrow.
    samples: calibration samples kept in memory. threads: the result's last bits depend on their
    number.
    """

    steps: int = 300
    rate: float = 0.02
    strength: float = 0.3
    every: int = 20
    batch: int = 16
    samples: int = 1024
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """[prune]: what leaves the graph itself. Absent: nothing.

    budget: what may remain. criterion: how much a unit matters; l1, l2, bn_gamma and random read
    the weights, activation and hessian the calibration inputs, taylor and fisher gradients on
    those inputs (they need torch), with `recover.labels` where these are given.
    allocation: global = where it costs least, uniform = the same share everywhere. multiple:
    what the widths that remain are rounded to, 0 for the target's. exclude: patterns of groups
    (named after their first weight) to leave whole. steps: rounds of scoring and cutting.
    samples: calibration samples to read. max_drop: share of the metric that prune and recover
    may cost together; where they cost more, less is pruned, found by bisection. Not given: no
    limit but the gate's. zero: instead of whole units, zero single weights in this pattern:
    "magnitude", "tensor", N:M such as "2:4", or blocks of outputs by inputs such as "4x1";
    smaller when compressed, as fast as before on most CPUs.
    soft: train before the cut (needs torch). grow: a growing decay empties the chosen units;
    lasso: group sparsity on all units, chosen from afterwards; regrow: the weakest units (by
    energy, whatever the criterion) are zeroed again and again, and may come back until the end.
    train: how. What was trained is not compensated afterwards: least squares start from the
    weights of the original.
    """

    budget: PruneBudget = PruneBudget()
    ratios: dict[str, float] = field(default_factory=dict)
    criterion: Literal[
        "l1", "l2", "bn_gamma", "activation", "hessian", "taylor", "fisher", "random"
    ] = "hessian"
    allocation: Literal["global", "uniform"] = "global"
    multiple: int = 0
    exclude: tuple[str, ...] = ()
    steps: int = 1
    samples: int = 64
    max_drop: float | None = None
    zero: str = ""
    soft: Literal["", "grow", "lasso", "regrow"] = ""
    train: SoftTraining = SoftTraining()
    seed: int = 0


def check_prune(prune: PruneSettings, where: str) -> None:
    """One budget or ratios, shares between 0 and 1; counts that can be."""
    given = {k: v for k, v in vars(prune.budget).items() if v is not None}
    if len(given) > 1 or not (given or prune.ratios):
        raise BadInput(
            f"{where}: prune.budget",
            expected="one of macs, params, size and latency",
            found=", ".join(given) or "none",
            hint="" if given else "say what may remain, or name groups in [prune.ratios]",
        )
    if prune.zero and not given:
        raise BadInput(
            f"{where}: prune.zero without prune.budget", hint="add budget = { size = 0.5 }"
        )
    shares = {f"budget.{k}": v for k, v in given.items()}
    for name, share in (shares | {f"ratios.{k}": v for k, v in prune.ratios.items()}).items():
        if not 0 < share < 1:
            raise BadInput(
                f"{where}: prune.{name}",
                expected="a share that may remain, above 0 and below 1 (0.65 keeps 65 %)",
                found=str(share),
                hint="name groups in exclude to keep all of them"
                if name.startswith("ratios")
                else "remove [prune] to keep everything",
            )
    for key, least in (("multiple", 0), ("steps", 1), ("samples", 2)):
        if getattr(prune, key) < least:
            raise BadInput(
                f"{where}: prune.{key}",
                expected=f"at least {least}",
                found=str(getattr(prune, key)),
            )
    if prune.max_drop is not None and not 0 < prune.max_drop <= 1:
        raise BadInput(
            f"{where}: prune.max_drop", expected="above 0, at most 1", found=str(prune.max_drop)
        )
    check_limits(prune, {"seed": SEEDS}, f"{where}: prune")
    if prune.zero:
        check_zero(prune, where)


def check_zero(prune: PruneSettings, where: str) -> None:
    """A pattern, a budget that zeros can meet, and nothing that is said of whole units."""
    kind, (kept, of) = parse_pattern(prune.zero, f"{where}: prune.zero")
    plain = PruneSettings()
    for key in ("ratios", "criterion", "allocation", "multiple", "exclude", "steps"):
        if getattr(prune, key) != getattr(plain, key):
            raise BadInput(
                f"{where}: prune.zero with prune.{key}",
                hint=f"remove {key}: it is of whole units, zeros are of single weights",
            )
    name, share = prune.budget.named()
    if name not in ("params", "size"):
        raise BadInput(
            f"{where}: prune.zero with a budget of {name}",
            expected="params or size: zeros leave work and latency as they are",
            hint=f"set budget = {{ params = {share:g} }}",
        )
    if kind == "N:M" and abs(share - kept / of) > 0.005:
        raise BadInput(
            f"{where}: prune.budget.{name} with zero = '{prune.zero}'",
            expected=f"{kept / of:g}, which is what this pattern keeps",
            found=str(share),
        )


def check_soft(prune: PruneSettings, where: str) -> None:
    """Training that something asks for, with numbers that can be, and nothing it cannot go with."""
    if not prune.soft:
        if prune.train != SoftTraining():
            raise BadInput(
                f"{where}: prune.train without prune.soft",
                hint='say how to train: soft = "grow", "lasso" or "regrow"',
            )
        return
    if prune.zero or prune.steps > 1:
        raise BadInput(
            f"{where}: prune.soft with prune.{'zero' if prune.zero else 'steps'}",
            hint="soft pruning cuts whole units, once, after its training",
        )
    if prune.soft == "regrow" and prune.budget.latency is not None:
        raise BadInput(
            f"{where}: prune.soft regrow with a latency budget",
            hint="it chooses while it trains, when nothing can be timed: give a budget of macs",
        )
    limits: dict[str, tuple[float, float]] = {
        "steps": (5, 10**7), "rate": (1e-6, 0.5), "strength": (0.001, 100), "every": (1, 10**6),
        "batch": (1, 4096), "samples": (5, 10**6), "threads": (1, 256), "seed": SEEDS,
    }  # fmt: skip
    check_limits(prune.train, limits, f"{where}: prune.train")
