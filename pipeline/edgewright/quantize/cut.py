"""The cheapest choice between int8 and float for units that pay where neighbours differ.

Costs of single units and of unlike neighbours form a minimum cut: Greig, Porteous and Seheult,
Exact maximum a posteriori estimation for binary images, JRSS B 51 (1989), section 2. Found by
shortest augmenting paths (Edmonds and Karp 1972); a model has some hundred units at most.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

EPSILON = 1e-9


def cheapest(
    floats: Sequence[float], int8s: Sequence[float], borders: Mapping[tuple[int, int], float]
) -> set[int]:
    """The units to run in float so that the sum of all costs is least.

    floats, int8s: cost of each unit, none negative. borders: (a, b) -> cost of a in float beside
    b in int8. Of several cheapest choices it is the one with the fewest units in float.
    """
    source, sink = len(floats), len(floats) + 1
    room: list[dict[int, float]] = [{} for _ in range(len(floats) + 2)]

    def edge(a: int, b: int, cost: float) -> None:
        room[a][b] = room[a].get(b, 0.0) + cost
        room[b].setdefault(a, 0.0)

    # On the source's side a unit is in float: what leads from there to the sink's side is cut.
    for k, (in_float, in_int8) in enumerate(zip(floats, int8s, strict=True)):
        edge(source, k, in_int8)
        edge(k, sink, in_float)
    for (a, b), cost in borders.items():
        edge(a, b, cost)
    while True:
        came = {source: source}
        queue = deque([source])
        while queue and sink not in came:
            a = queue.popleft()
            for b, free in room[a].items():
                if free > EPSILON and b not in came:
                    came[b] = a
                    queue.append(b)
        if sink not in came:
            return {k for k in came if k < len(floats)}
        path = [sink]
        while path[-1] != source:
            path.append(came[path[-1]])
        least = min(room[a][b] for b, a in pairwise(path))
        for b, a in pairwise(path):
            room[a][b] -= least
            room[b][a] += least
