"""Make the held-out scores that `mmpipe calibrate quickstart` certifies in seconds.

    python examples/products/scores.py configs/quickstart/scores.safetensors

makes 4,000 items of a seed that nothing else uses, runs quickstart over their files with every exit held shut, and
writes what the head says of each set of modalities. About a minute on two cores. The scores are of the models as
they are now: another model refuses them, so run this again after training.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from make import make
from photos import DEBIAN_FOLDER, load_photos

ITEMS = 4_000
SEED = 20_026  # of the test split; train.py and the figures have others


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="safetensors file to write")
    parser.add_argument("--n", type=int, default=ITEMS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--split", default="test")
    parser.add_argument("--photos", type=Path, default=DEBIAN_FOLDER, help="folder with the Fashion-MNIST .gz files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "media"
        part = "t10k" if options.split == "test" else "train"
        make(media, options.n, options.split, options.seed, load_photos(part, options.photos), options.jobs)
        from mmpipe import Pipeline
        from mmpipe.calibrating.scores import with_truth, write_scores
        from mmpipe.calibrating.shadow import shadow
        from mmpipe.truth import read_truth

        with Pipeline.load("quickstart", overrides=["fusion.exits=[]"]) as pipeline:
            scores, ids = shadow(pipeline, pipeline.find(media).samples)
            truth = read_truth(media.with_name("media.labels.csv"), pipeline.labels)
        write_scores(options.out, with_truth(scores, ids, truth))
    print(f"{scores.count:,} items of seed {options.seed} in {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
