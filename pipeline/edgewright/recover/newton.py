"""Training on few samples: every step sees all of them, and its length needs no rate.

L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) in the coordinates of
`recover.coordinates`, where the loss curves about alike in all directions, with a line search that
only ever goes down. A compensated graph stands near a minimum: steps of AdamW on a few samples
each are mostly noise there and carry it away first, however small the rate.
"""

import io
import json
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewright.files import write_atomic
from edgewright.recover.coordinates import Coordinates
from edgewright.recover.ops import Tensor
from edgewright.recover.training import CHECKPOINT, Outcome, Schedule, Score
from edgewright.stage import Tell

HISTORY = 6  # pairs of steps and changes of the gradient that the curvature is known from
ARMIJO = 1e-4  # share of the promised gain that a step must keep
SHORTEST = 1e-3  # of a step, where the line search gives up
SHARES = (0.5, 0.75, 1.25)  # of the way from the start to the best place, tried at the end
BUSY = 20  # a checkpoint is written when the last one took less than 1/BUSY of the time since


@dataclass
class State:
    """Where a descent is. pairs: (step, change of the gradient), the oldest first."""

    place: Tensor
    loss: float
    slope: Tensor
    best: Tensor
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    passes: int = 1  # over all samples
    waited: int = 0


def descend(
    coordinates: Coordinates,
    gradient: Callable[[], float],
    measure: Callable[[], Score],
    schedule: Schedule,
    passes: int,
    *,
    digest: str,
    folder: Path | None = None,
    tell: Tell,
) -> Outcome:
    """Minimise a loss; at the end the weights are the best held-out ones, never worse.

    gradient: puts the gradient of the loss on all samples into the weights' `grad`, returns the
    loss. passes: over all samples at most. Of the schedule `patience` and `minutes` count;
    every step is checked on held-out data. digest, folder: see `training.fit`; the checkpoint
    stays, for what the caller does next.
    """
    begin = time.monotonic()
    path = folder / CHECKPOINT if folder else None
    start = measure()
    nothing = torch.zeros(coordinates.size)
    outcome = Outcome(start, start)
    before, written, cost = 0.0, begin, 0.0
    known = load_state(path, digest) if path and path.exists() else None
    if known:
        outcome, state = known
        outcome.start, outcome.resumed_at, before = start, outcome.steps, outcome.seconds
    else:
        state = State(nothing, *at(coordinates, gradient, nothing), best=nothing)
    if not math.isfinite(state.loss):
        outcome.stopped = "the loss was not finite at the start"
        passes = 0
    while state.passes < passes:
        tell("training", state.passes, passes)
        if not step(coordinates, gradient, state):
            outcome.stopped = "no step lowers the loss any further"
            break
        outcome.steps += 1
        score = measure()
        outcome.history.append({"step": outcome.steps, "loss": state.loss, **asdict(score)})
        state.waited += 1
        if score.distance < outcome.best.distance:
            outcome.best, outcome.best_step = score, outcome.steps
            state.best, state.waited = state.place, 0
        now = time.monotonic()
        outcome.seconds = before + now - begin
        if schedule.minutes and outcome.seconds > 60 * schedule.minutes:
            outcome.repeatable = False
            outcome.stopped = (
                f"the clock ended it after {state.passes} of {passes} passes over the samples; "
                "another run may end elsewhere"
            )
            break
        if state.waited >= schedule.patience:
            outcome.stopped = f"no gain on held-out data in {state.waited} checks"
            break
        if path and now - written >= BUSY * cost:
            save_state(path, digest, outcome, state)
            written = time.monotonic()
            cost = written - now
    else:
        if passes:
            outcome.stopped = f"all {passes} passes over the samples done"
    settle(coordinates, measure, state, outcome)
    outcome.seconds = before + time.monotonic() - begin
    return outcome


def follow(
    coordinates: Coordinates, gradient: Callable[[], float], steps: int, share: float, tell: Tell
) -> dict[str, float]:
    """Take a share of some steps down, unjudged; the steps taken and the loss before and after."""
    nothing = torch.zeros(coordinates.size)
    state = State(nothing, *at(coordinates, gradient, nothing), best=nothing)
    before, taken = state.loss, 0
    while taken < steps and math.isfinite(state.loss):
        tell("training with all samples", taken, steps)
        if not step(coordinates, gradient, state):
            break
        taken += 1
    after, _ = at(coordinates, gradient, share * state.place)
    return {"steps": taken, "loss before": before, "loss after": after}


def at(
    coordinates: Coordinates, gradient: Callable[[], float], place: Tensor
) -> tuple[float, Tensor]:
    """The loss and its gradient at a place; not finite counts as infinite."""
    coordinates.put(place)
    for weight in coordinates.weights.values():
        weight.grad = None
    loss = gradient()
    slope = coordinates.gradient()
    return (loss if math.isfinite(loss) and bool(slope.isfinite().all()) else math.inf), slope


def step(coordinates: Coordinates, gradient: Callable[[], float], state: State) -> bool:
    """One step down, in place; False where the line search finds none."""
    way = direction(state)
    promise = float(way @ state.slope)
    if promise >= 0:  # the curvature is not to be trusted any more
        state.pairs.clear()
        way = direction(state)
        promise = float(way @ state.slope)
    length = 1.0
    while length >= SHORTEST:
        place = state.place + length * way
        loss, slope = at(coordinates, gradient, place)
        state.passes += 1
        if loss <= state.loss + ARMIJO * length * promise:
            change, bend = place - state.place, slope - state.slope
            if float(change @ bend) > 1e-10 * float(bend @ bend):
                state.pairs = [*state.pairs, (change, bend)][-HISTORY:]
            state.place, state.loss, state.slope = place, loss, slope
            return True
        # The lowest point of the parabola through both ends, within bounds.
        excess = loss - state.loss - length * promise
        shorter = -promise * length / (2 * excess) if math.isfinite(loss) else 0.0
        length *= min(0.5, max(0.1, shorter))
    coordinates.put(state.place)
    return False


def direction(state: State) -> Tensor:
    """The way down: minus the gradient times what the pairs tell of the inverse curvature."""
    way = -state.slope
    if not state.pairs:  # as long as a straight line would need to get to a loss of 0
        return way * (state.loss / max(float(way @ way), 1e-30))
    shares = []
    for change, bend in reversed(state.pairs):
        shares.append(float(change @ way) / float(change @ bend))
        way = way - shares[-1] * bend
    change, bend = state.pairs[-1]
    way = way * (float(change @ bend) / float(bend @ bend))
    for (change, bend), share in zip(state.pairs, reversed(shares), strict=True):
        way = way + change * (share - float(bend @ way) / float(change @ bend))
    return way


def settle(
    coordinates: Coordinates, measure: Callable[[], Score], state: State, outcome: Outcome
) -> None:
    """Leave the weights at the best place, or at a share of the way there that does better."""
    found = state.best
    if outcome.best_step:
        for share in SHARES:
            coordinates.put(share * state.best)
            score = measure()
            if score.distance < outcome.best.distance:
                outcome.best, outcome.share, found = score, share, share * state.best
    coordinates.put(found)


def save_state(path: Path, digest: str, outcome: Outcome, state: State) -> None:
    facts: dict[str, Any] = {"digest": digest, "passes": state.passes, "waited": state.waited}
    facts |= {"loss": state.loss, "pairs": len(state.pairs), "outcome": asdict(outcome)}
    arrays = {"facts": np.array(json.dumps(facts)), "place": state.place.numpy()}
    arrays |= {"slope": state.slope.numpy(), "best": state.best.numpy()}
    for k, (change, bend) in enumerate(state.pairs):
        arrays |= {f"change{k}": change.numpy(), f"bend{k}": bend.numpy()}
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    write_atomic(path, stream.getvalue())


def load_state(path: Path, digest: str) -> tuple[Outcome, State] | None:
    """What a checkpoint holds, but for the start's figures; None where it is not ours."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            if facts["digest"] != digest:
                return None
            places = [torch.from_numpy(stored[n]) for n in ("place", "slope", "best")]
            pairs = [
                (torch.from_numpy(stored[f"change{k}"]), torch.from_numpy(stored[f"bend{k}"]))
                for k in range(facts["pairs"])
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    outcome = Outcome(**facts["outcome"])
    outcome.best = Score(**facts["outcome"]["best"])
    place, slope, best = places
    state = State(place, facts["loss"], slope, best, pairs, facts["passes"], facts["waited"])
    return outcome, state
