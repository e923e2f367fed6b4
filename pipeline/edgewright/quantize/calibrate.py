"""Calibration: statistics of activations over all samples, in one pass and bounded memory.

What is counted is in `calibration.statistics`, how one session is watched in
`calibration.observe`; here samples are numbered and shared out.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
MOST_PROCESSES = 4  # the one that reads the samples feeds no more of them
# Resident bytes beside model and activations, as measured: of this process with all that the
# quantizer imports, and of a helper.
OWN_BYTES, HELPER_BYTES = 130 * 10**6, 60 * 10**6
ROOM_BYTES = 300 * 10**6  # beside the model, for all processes together


def collect(
    model: onnx.ModelProto,
    tensors: list[str],
    feeds: Callable[[], Iterable[Feed]],
    tell: Callable[[str, int, int], None] = lambda text, done, total: None,
    processes: int = 0,
) -> dict[str, Statistics]:
    """Statistics of the named float tensors of the main graph over all feeds.

    processes: how many may work on it, 0 for as many as there are cores and room for; the result
    does not depend on it, nor on how samples are grouped in feeds. Raises BadInput with sample and
    tensor for NaN or Inf: of the first such sample.
    """
    missing = set(tensors) - known_tensors(model)
    if missing:
        raise BadInput(
            f"tensor '{min(missing)}' cannot be calibrated",
            expected="a tensor of the main graph",
            hint="tensors inside If, Loop and Scan stay float",
        )
    seen, index, most = 0, 0, processes
    failures: list[Failure] = []
    # A file without a name: nobody holds it in memory, and nothing is left of it afterwards.
    with tempfile.TemporaryFile() as file, Helpers() as helpers:
        file.write(exposed(model, tensors))
        file.flush()
        own = Observer(Path(f"/proc/self/fd/{file.fileno()}"), tensors)
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
                    helpers.hire(most - 1, file.fileno(), tensors, own.groups)
                if not helpers.take(sample):
                    seen += own.observe(sample)
                if index == 0 and not processes:
                    most = useful_processes(os.fstat(file.fileno()).st_size, seen)
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


def useful_processes(model: int, activations: int) -> int:
    """How many processes stay below ROOM_BYTES beside one model, and have a core each.

    model: bytes of the file, of which a process holds one to two copies. activations: bytes of
    the watched tensors of one sample; the runtime holds them all at once.
    """
    cores = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    room = ROOM_BYTES + model - (OWN_BYTES + 2 * model + activations)
    return max(1, min(cores, 1 + room // (HELPER_BYTES + 3 * model // 2 + activations)))


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
