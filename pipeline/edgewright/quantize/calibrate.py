"""Calibration: statistics of activations over all samples, in one pass and bounded memory.

What is counted is in `calibration.statistics`, how one session is watched in
`calibration.observe`; here samples are numbered and shared out.
"""

import os
from collections.abc import Callable, Iterable, Iterator

import onnx

from edgewright.calibration.observe import Observer, Sample
from edgewright.calibration.statistics import Statistics
from edgewright.data import Feed
from edgewright.errors import BadInput, EdgewrightError
from edgewright.quantize.helpers import Failure, Helpers
from edgewright.quantize.rows import Rows
from edgewright.taps import fetch_groups

# Bytes of watched tensors that this process takes in alone: 0.5 to 2 s of work, as much as a
# helper's start costs. Whoever has spent that and has more to do hires helpers: never more than
# twice the work of the best choice, without knowing how many samples will come.
HIRE_AFTER = 1 << 30
MOST_PROCESSES = 4  # each holds the model; the one that reads the samples feeds no more of them


def collect(
    model: onnx.ModelProto,
    tensors: list[str],
    feeds: Callable[[], Iterable[Feed]],
    tell: Callable[[str, int, int], None] = lambda text, done, total: None,
    processes: int = 0,
) -> dict[str, Statistics]:
    """Statistics of the named float tensors of the main graph over all feeds.

    processes: how many may work on it, 0 for as many as there are cores; the result does not
    depend on it, nor on how samples are grouped in feeds. Raises BadInput with sample and
    tensor for NaN or Inf: of the first such sample.
    """
    missing = set(tensors) - known_tensors(model)
    if missing:
        raise BadInput(
            f"tensor '{min(missing)}' cannot be calibrated",
            expected="a tensor of the main graph",
            hint="tensors inside If, Loop and Scan stay float",
        )
    most = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    own = Observer(exposed(model, tensors), tensors)
    seen, index = 0, 0
    failures: list[Failure] = []
    with Helpers() as helpers:
        stream = numbered(model, feeds())
        while not helpers.failures:
            try:
                sample = next(stream, None)
                if sample is None:
                    break
                tell("calibrating", index, 0)
                if index == 0:
                    own.groups = fetch_groups(own.session, sample.feed, own.made)
                elif not helpers.processes and most > 1 and seen >= HIRE_AFTER:
                    helpers.hire(most - 1, exposed(model, tensors), tensors, own.groups)
                if not helpers.take(sample):
                    seen += own.observe(sample)
                index += 1
            except EdgewrightError as error:
                failures.append((index, error))
                break
        shards, others = helpers.finish()
    # Samples were handed out in order, so all before the first that failed have been looked at.
    if failures := sorted([*failures, *others], key=lambda f: f[0]):
        raise failures[0][1]
    for shard in shards:
        for name, part in zip(tensors, shard, strict=True):
            own.statistics[name].merge(part)
    return own.statistics


def numbered(model: onnx.ModelProto, feeds: Iterable[Feed]) -> Iterator[Sample]:
    """The rows of all feeds as samples, counted through."""
    rows, index = Rows(model), 0
    for k, feed in enumerate(feeds):
        parts = rows.split(feed)
        for r, part in enumerate(parts):
            yield Sample(index, f"sample {k}" + (f", row {r}," if len(parts) > 1 else ""), part)
            index += 1


def known_tensors(model: onnx.ModelProto) -> set[str]:
    """What the main graph takes in and makes."""
    return {v.name for v in model.graph.input} | {o for n in model.graph.node for o in n.output}


def exposed(model: onnx.ModelProto, tensors: list[str]) -> bytes:
    """The model, serialised, with the tensors as its outputs (graph inputs left out).

    Its outputs are changed for that moment only: a copy would hold all weights twice.
    """
    inputs = {v.name for v in model.graph.input}
    before = onnx.GraphProto()
    before.output.extend(model.graph.output)
    try:
        del model.graph.output[:]
        for name in tensors:
            if name not in inputs:
                model.graph.output.add().name = name
        return model.SerializeToString()
    finally:
        del model.graph.output[:]
        model.graph.output.extend(before.output)
