"""The shipped weights of vesuvius_surface on thin walls that they were never trained on.

    python benchmarks/surface_other_volumes.py [--dataset_dir $LAMINA_DATA/vesuvius]

They are trained on drawn scrolls alone. Here they meet the cell walls of an ovule (confocal
microscopy, PlantSeg) and cell membranes (electron microscopy, gala, whose membranes are dark: grey
values are inverted). Truth are the voxels between two labelled cells. Printed is SurfaceDice at a
tolerance of 2 voxels after the default repair, at the weights' own threshold.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from pipeline.bundles import find_bundle_root, load_bundle
from pipeline.data.volumes import open_volume
from pipeline.training.checkpoints import read_checkpoint
from pipeline.vesuvius.metrics import surface_dice
from pipeline.vesuvius.topology import postprocess


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    bundle = load_bundle("vesuvius_surface", options.ckpt_path)
    checkpoint = options.ckpt_path or find_bundle_root("vesuvius_surface") + "/models/model.pt"
    threshold = float(read_checkpoint(checkpoint)["threshold"])
    for name, image, walls in _volumes(options.dataset_dir):
        mask = postprocess(bundle(image)["pred"], threshold=threshold, frame=0, smoothing=1.0).mask
        print(f"{name:36s} SurfaceDice {surface_dice(mask, walls.astype(np.uint8)):.3f}")


def _volumes(root: Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]:
    ovule = root / "plantseg" / "sample_ovule.h5"
    walls = find_boundaries(open_volume(ovule, "label")[:])
    yield "cell walls of an ovule (plantseg)", open_volume(ovule, "raw")[:], walls
    cells = open_volume(root / "gala" / "train-gt.lzf.h5")[:]
    image = open_volume(root / "gala" / "train-image.h5")[:]
    yield "EM membranes (gala), inverted", 255 - image, cells == 0


def _options() -> argparse.Namespace:
    data = os.environ.get("LAMINA_DATA")
    default = Path(data) / "vesuvius" if data else None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset_dir", type=Path, default=default, required=default is None)
    parser.add_argument("--ckpt_path", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
