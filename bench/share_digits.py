"""What do trained codebooks gain over k-means, at few entries?

    python bench/share_digits.py [--models cnn] [--seeds 0,1,2] [--entries 4,8,16] [--steps 300]

The nets of distil_digits.py, every weight one of N values of its layer: test accuracy with the
values by k-means, and after training assignment and values on the unlabelled training pictures.
Prints Markdown, mean and standard deviation over the seeds, and each seed's gain.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from distil_digits import SPLIT, X, accuracy, trained

from edgewright import share
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import load_target


def clustered(model: onnx.ModelProto, entries: int, **settings: object) -> onnx.ModelProto:
    """What the stage `share` makes of the model."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        onnx.save(model, folder / "float.onnx")
        np.savez(folder / "calibration.npz", x=X[:SPLIT])
        raw = {
            "model": {"name": "digits", "version": "1", "source": "float.onnx"},
            "data": {"calibration": "calibration.npz"},
            "share": {"codebook": entries, **settings},
        }
        (folder / "out").mkdir()
        work = Job(recipe=parse_recipe(raw, folder), target=load_target("cpu"),
                   folder=folder / "out", model=folder / "float.onnx")  # fmt: skip
        share.run(work)
        return onnx.load(work.output_model())


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--models", default="cnn")
    words.add_argument("--seeds", default="0,1,2")
    words.add_argument("--entries", default="4,8,16")
    words.add_argument("--steps", type=int, default=300)
    given = words.parse_args()
    torch.set_num_threads(1)
    seeds = [int(s) for s in given.seeds.split(",")]
    print("| net | values | k-means | trained | gain of each seed |\n|-|-|-|-|-|")
    for name in given.models.split(","):
        whole = [trained(name, seed) for seed in seeds]
        first = np.array([accuracy(model) for model in whole])
        print(f"| {name} | original | {first.mean():.2f} +- {first.std(ddof=1):.2f} | | |")
        for entries in map(int, given.entries.split(",")):
            hard, soft = [], []
            for seed, model in zip(seeds, whole, strict=True):
                train = {"steps": given.steps, "seed": seed, "threads": 1}
                hard.append(accuracy(clustered(model, entries)))
                one = clustered(model, entries, assignment="soft", train=train)
                soft.append(accuracy(one))
            cells = [f"{np.mean(v):.2f} +- {np.std(v, ddof=1):.2f}" for v in (hard, soft)]
            gains = ", ".join(f"{b - a:+.2f}" for a, b in zip(hard, soft, strict=True))
            print(f"| {name} | {entries} | {cells[0]} | {cells[1]} | {gains} |", flush=True)


if __name__ == "__main__":
    main()
