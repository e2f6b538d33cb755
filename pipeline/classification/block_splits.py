"""Splits of a video's blocks of frames, written down once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.atomic import write_csv
from pipeline.data.folds import shuffled
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.errors import ConfigurationError

__all__ = ["deal_blocks", "write_block_splits"]

SHARES = (0.65, 0.10, 0.25)


def deal_blocks(
    images: Mapping[int, int], seed: int, shares: Sequence[float] = SHARES, blocks: int = 300
) -> dict[int, str]:
    """Deal blocks into train, val and test.

    The blocks are put into an order that follows from the seed. Those of the first share of the
    images are for training, those of the next for validation, the rest for testing.

    Args:
        images: block -> its number of images; those without may be left out.
        seed: another seed deals differently.
        shares: of the images, for train, val and test.
        blocks: how many are dealt, empty ones as well: a fuller copy of the data may have images
            in them.

    Returns:
        Block, `0` to `blocks - 1` -> `train`, `val` or `test`.

    Raises:
        ConfigurationError: a block is `blocks` or beyond.

    Example:
        >>> deal_blocks({0: 1, 1: 1}, seed=0, shares=(0.5, 0.0, 0.5), blocks=2)
        {0: 'train', 1: 'test'}
    """
    if images and max(images) >= blocks:
        raise ConfigurationError(f"blocks is {blocks}, but there are images in {max(images)}")
    total = sum(images.values())
    dealt, before = {}, 0
    for block in map(int, shuffled(map(str, range(blocks)), seed)):
        place = before / max(total, 1)
        trained, validated = shares[0], shares[0] + shares[1]
        dealt[block] = "train" if place < trained else "val" if place < validated else "test"
        before += images.get(block, 0)
    return dict(sorted(dealt.items()))


def write_block_splits(
    manifest: str,
    dataset_dir: Path | str,
    output: Path | str,
    seeds: Sequence[int] = (0, 1, 2),
    blocks: int = 300,
) -> Path:
    """Write the table that a manifest with `folds.dealt: by_table` names.

    Args:
        manifest: name or path; its subjects are the numbers of the blocks.
        dataset_dir: the data, whose images are counted.
        output: the CSV file.
        seeds: one for each split.
        blocks: how many are dealt.

    Returns:
        The path written.

    Raises:
        InputError: there are no images.
        ConfigurationError: a subject is no number below `blocks`.
    """
    samples = find_samples(load_manifest(manifest), dataset_dir)
    if words := [sample.subject for sample in samples if not sample.subject.isdecimal()]:
        raise ConfigurationError(f"manifest {manifest}: subject {words[0]!r} is no block's number")
    images = Counter(int(sample.subject) for sample in samples)
    dealt = [deal_blocks(images, seed, blocks=blocks) for seed in seeds]
    rows = [
        {"subject": block, **{f"split_{k}": splits[block] for k, splits in enumerate(dealt)}}
        for block in range(blocks)
    ]
    return write_csv(output, rows)
