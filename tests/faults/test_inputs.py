"""Faults of input files, labels, lists and datasets."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from pipeline.data.images import read_image
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import InputError
from pipeline.fundus.phantom import fundus_phantom
from pipeline.vesuvius.phantom import scroll_phantom, write_phantom_dataset

row = pytest.mark.row
IMAGE, LABEL = "train/image/phantom_001.png", "train/label/phantom_001.png"
SHAPE = (32, 36, 40)


@pytest.fixture
def data(shared_data: Path, tmp_path: Path) -> Path:
    """A labelled data folder to spoil."""
    return Path(shutil.copytree(shared_data, tmp_path / "data"))


def volume() -> np.ndarray:
    return scroll_phantom(0, SHAPE).image


def failures(results: Path) -> dict[str, tuple[str, str]]:
    """Return code and message of each rejected input."""
    with (results / "failures.csv").open(encoding="utf-8") as table:
        return {line["path"]: (line["code"], line["message"]) for line in csv.DictReader(table)}


def summary(results: Path) -> dict:
    return json.loads((results / "summary.json").read_text(encoding="utf-8"))


def assert_rejected(ended, results: Path, name: str, *texts: str) -> None:
    """Assert that one input was rejected and told of, and that the others are done."""
    ended.complained(3, name, *texts)
    found = failures(results)
    assert found.keys() == {name}
    assert found[name][0] == "3"
    assert all(text in found[name][1] for text in texts)
    assert summary(results)["exit_code"] == 3
    assert summary(results)["done"] == summary(results)["inputs"] - 1
    assert not list(results.rglob(f"{Path(name).stem}[._]*"))


@row(10, "truncated TIFF", "rejected, never read as its first page; the others are done", code=3)
def test_row_10_a_truncated_stack_is_no_image(door, tmp_path, assert_whole):
    folder = tmp_path / "volumes"
    for name in ("cut.tif", "sound.tif"):
        write_tiff(folder / name, volume())
    os.truncate(folder / "cut.tif", (folder / "cut.tif").stat().st_size * 2 // 3)
    results = tmp_path / "results"
    ended = door.predict(folder, results, bundle="vesuvius_surface")
    assert_rejected(ended, results, "cut.tif", "cut short")
    assert read_image(results / "sound.tif").shape == SHAPE
    assert_whole(results)


@row(
    11,
    "file that unfolds to far more than memory",
    "rejected by its header, before anything is decoded: under 0.1 s and 50 MB",
    code=3,
)
def test_row_11_a_bomb_is_rejected_by_its_header(door, photographs, tmp_path, assert_whole):
    tifffile.imwrite(
        photographs / "wide.tif", np.zeros((64, 64), np.uint8), metadata=None, compression="zlib"
    )
    with tifffile.TiffFile(photographs / "wide.tif", mode="r+b") as tiff:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(120_000)
    tracemalloc.start()
    began_s = time.process_time()
    with pytest.raises(InputError, match="needs 14,400 MB decoded"):
        read_image(photographs / "wide.tif")
    seconds = time.process_time() - began_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.1
    assert peak_bytes < 50e6
    results = tmp_path / "results"
    ended = door.predict(photographs, results)
    assert_rejected(ended, results, "wide.tif", "14,400 MB decoded", "LAMINA_MAX_DECODED_BYTES")
    nifti = bytearray(352)
    struct.pack_into("<i", nifti, 0, 348)
    struct.pack_into("<4h", nifti, 40, 3, 20000, 20000, 20000)
    struct.pack_into("<2h", nifti, 70, 4, 16)  # int16
    struct.pack_into("<f", nifti, 108, 352)
    nifti[344:348] = b"n+1\0"
    (tmp_path / "cubes").mkdir()
    (tmp_path / "cubes" / "plain.nii").write_bytes(nifti)
    (tmp_path / "cubes" / "packed.nii.gz").write_bytes(gzip.compress(nifti))
    ended = door.predict(tmp_path / "cubes", tmp_path / "cube", bundle="vesuvius_surface")
    ended.complained(3, "plain.nii: cut short: 352 bytes found", "packed.nii.gz: damaged")
    for folder in (results, tmp_path / "cube"):
        assert_whole(folder)


@row(
    12,
    "picture where a volume belongs, and a volume where a picture does",
    "rejected with the shape found and the axes expected",
    code=3,
)
def test_row_12_wrong_dimensions_are_told_with_the_shape(door, tmp_path, assert_whole):
    for name, array in (("flat.tif", volume()[0]), ("stack.tif", volume())):
        write_tiff(tmp_path / name, array)
    ended = door.predict(tmp_path / "flat.tif", tmp_path / "a", bundle="vesuvius_surface")
    ended.complained(3, "flat.tif", "(36, 40)", "(D, H, W)")
    ended = door.predict(tmp_path / "stack.tif", tmp_path / "b")
    ended.complained(3, "stack.tif", "(32, 36, 40)", "(H, W")
    assert_whole(tmp_path)


@row(
    13,
    "16-bit and float pixels",
    "taken over their full range, with the same result as 8 bits; the type stands in the sidecar",
    code=0,
)
def test_row_13_every_depth_gives_the_same_result(door, tmp_path, assert_whole):
    pixels = fundus_phantom(0, (96, 96)).image
    folder, results = tmp_path / "photographs", tmp_path / "results"
    write_png(folder / "eight.png", pixels)
    write_png(folder / "sixteen.png", pixels.astype(np.uint16) * 257)
    write_tiff(folder / "float.tif", (pixels / 255).astype(np.float32), photometric="rgb")
    door.predict(folder, results).went_well()
    maps = [read_image(results / f"{n}_vessels.png") for n in ("eight", "sixteen", "float")]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])
    said = {n: json.loads((results / f"{n}.json").read_text()) for n in ("eight", "sixteen")}
    assert said["eight"]["source_dtype"] == "uint8"
    assert said["sixteen"]["source_dtype"] == "uint16"
    assert_whole(results)


@row(
    14,
    "NaN or infinite voxels",
    "rejected with their number and the place of the first",
    code=3,
    otherwise="no setting fills such voxels in: what was not measured is not invented",
)
def test_row_14_values_that_are_not_finite_are_placed(door, tmp_path, assert_whole):
    array = volume().astype(np.float32)
    array[3, 4, 5], array[6, 7, 8] = np.nan, np.inf
    write_tiff(tmp_path / "spoilt.tif", array)
    ended = door.predict(tmp_path / "spoilt.tif", tmp_path / "out", bundle="vesuvius_surface")
    ended.complained(3, "spoilt.tif", "2 values are not finite", "(3, 4, 5)")
    assert_whole(tmp_path)


@row(
    15,
    "constant volume",
    "rejected by name, the others are done",
    code=3,
    otherwise="rejected instead of answered with background: an empty result would pass for a find",
)
def test_row_15_a_constant_volume_is_told(door, tmp_path, assert_whole):
    folder, results = tmp_path / "volumes", tmp_path / "results"
    write_tiff(folder / "constant.tif", np.full(SHAPE, 7, np.uint8))
    write_tiff(folder / "sound.tif", volume())
    ended = door.predict(folder, results, bundle="vesuvius_surface")
    assert_rejected(ended, results, "constant.tif", "every voxel is 7")
    assert_whole(results)


@row(16, "image and label of different sizes", "named with both sizes before training", code=3)
def test_row_16_sizes_that_differ_stop_training_before_it_starts(door, data, tmp_path):
    Image.fromarray(np.asarray(Image.open(data / LABEL))[:90]).save(data / LABEL)
    ended = door.train(data, tmp_path / "run")
    ended.complained(3, LABEL, "96x90", IMAGE, "96x96")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(17, "labels or files missing", "all of them listed at once, before training", code=3)
def test_row_17_all_missing_files_are_listed_at_once(door, data, tmp_path):
    for name in (LABEL, "val/label/phantom_000.png"):
        (data / name).unlink()
    ended = door.train(data, tmp_path / "run")
    ended.complained(3, "2 ", IMAGE, LABEL, "val/image/phantom_000.png", "no label")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    18,
    "unknown class ids",
    "named with the ids found and the setting that maps a mask of 0 and 255",
    code=3,
)
def test_row_18_unknown_ids_are_named_with_a_remedy(door, data, tmp_path):
    manifest = yaml.safe_load(door.manifest("vessel_pairs").read_text(encoding="utf-8"))
    manifest["labels"] = {"foreground": "> 0", "allowed": [0, 1]}
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(manifest))
    ended = door.train(data, tmp_path / "run", f"manifest={tmp_path / 'strict.yaml'}")
    ended.complained(3, LABEL, "{255} found, [0, 1] allowed", "labels.foreground: '> 127'")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    19,
    "image smaller than a patch or window",
    "padded and cut back: the result has the size of the input",
    code=0,
)
def test_row_19_small_images_are_padded_and_cut_back(door, data, trained, tmp_path, assert_whole):
    ended = door.train(data, tmp_path / "run", "patch_size=[112,112]", "max_epochs=1")
    ended.went_well()
    write_png(tmp_path / "tiny" / "eye.png", fundus_phantom(0, (96, 96)).image[10:70, 20:68])
    best = f"ckpt_path={trained / 'checkpoints' / 'best.pt'}"
    door.predict(tmp_path / "tiny", tmp_path / "results", best).went_well()
    assert read_image(tmp_path / "results" / "eye_vessels.png").shape == (60, 48)
    write_tiff(tmp_path / "thin" / "a.tif", volume()[:7, :9, :11])
    door.predict(tmp_path / "thin", tmp_path / "thin_out", bundle="vesuvius_surface").went_well()
    assert read_image(tmp_path / "thin_out" / "a.tif").shape == (7, 9, 11)
    assert_whole(tmp_path)


@row(20, "odd sizes", "padded to what the network divides and cut back", code=0)
def test_row_20_odd_sizes_come_back_as_they_are(door, tmp_path, assert_whole):
    write_png(tmp_path / "odd" / "eye.png", fundus_phantom(0, (97, 131)).image)
    door.predict(tmp_path / "odd", tmp_path / "results").went_well()
    assert read_image(tmp_path / "results" / "eye_vessels.png").shape == (97, 131)
    write_tiff(tmp_path / "odd_volume" / "a.tif", volume()[:19, :33, :27])
    results = tmp_path / "volume_results"
    door.predict(tmp_path / "odd_volume", results, bundle="vesuvius_surface").went_well()
    assert read_image(results / "a.tif").shape == (19, 33, 27)
    assert_whole(tmp_path)


@row(21, "empty folder", "named with the layout that was expected; nothing is run", code=3)
def test_row_21_an_empty_folder_is_no_success(door, tmp_path):
    (tmp_path / "empty").mkdir()
    ended = door.predict(tmp_path / "empty", tmp_path / "results")
    ended.complained(3, tmp_path / "empty", "no files matching")
    ended = door.train(tmp_path / "empty", tmp_path / "run")
    ended.complained(3, tmp_path / "empty", "expected layout")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    22,
    "equal names",
    "results keep their folders; where two would have one name, refused before anything is done",
    code="0; 2",
)
def test_row_22_results_of_equal_names_never_overwrite_each_other(door, tmp_path, assert_whole):
    folder, results = tmp_path / "photographs", tmp_path / "results"
    for seed, name in enumerate(("left/eye.png", "right/eye.png")):
        write_png(folder / name, fundus_phantom(seed, (96, 96)).image)
    door.predict(folder, results).went_well()
    maps = [(results / side / "eye_vessels.png").read_bytes() for side in ("left", "right")]
    assert maps[0] != maps[1]
    shutil.copy(folder / "left/eye.png", folder / "left/Eye.PNG")
    ended = door.predict(folder, tmp_path / "clash")
    ended.complained(2, "left/eye.png", "left/Eye.PNG", "one name", "rename")
    assert not list((tmp_path / "clash").rglob("*.png"))
    assert_whole(tmp_path)


@row(
    23,
    "accents, other scripts, blanks and names that Windows reserves",
    "kept in results, tables and report, in both Unicode spellings; so is a # or $ in a path",
    code=0,
)
def test_row_23_names_are_kept_as_they_are(door, shared_data, tmp_path, assert_whole):
    folder, results = tmp_path / "Größe 眼 #1 $x", tmp_path / "Ergebnis ü %20"
    names = [
        "Auge rechts.png",
        "眼/aux.png",
        "con/NUL.png",
        "e\u0301t\u00e9 & <b>.png",
        "a;b'c.png",
    ]
    for seed, name in enumerate(names):
        write_png(folder / name, fundus_phantom(seed, (96, 96)).image)
    door.predict(folder, results).went_well()
    for name in names:
        stem = name.removesuffix(".png")
        assert read_image(results / f"{stem}_vessels.png").shape == (96, 96)
        assert (results / f"{stem}.json").is_file()
    with (results / "per_image.csv").open(encoding="utf-8") as table:
        assert sorted(line["image"] for line in csv.DictReader(table)) == sorted(names)
    data = Path(shutil.copytree(shared_data, tmp_path / "données 1"))
    ended = door("data", "check", "vessel_pairs", data)
    ended.went_well()
    ended = door.train(data, tmp_path / "运行 1", "max_epochs=1")
    ended.went_well()
    assert_whole(tmp_path)


@row(
    24,
    "symbolic links",
    "followed inside the data folder, refused where they leave it; `--follow_symlinks` allows them",
    code="0; 2",
)
def test_row_24_links_that_leave_the_folder_are_refused_unless_allowed(
    door, data, photographs, tmp_path, assert_whole
):
    (photographs / "again.png").symlink_to("a.png")
    door.predict(photographs, tmp_path / "inside").went_well()
    outside = tmp_path / "outside.png"
    write_png(outside, fundus_phantom(3, (96, 96)).image)
    (photographs / "c.png").symlink_to(outside)
    ended = door.predict(photographs, tmp_path / "refused")
    ended.complained(2, "c.png", "a link that leaves", outside, "follow_symlinks")
    ended = door.predict(photographs, tmp_path / "allowed", "follow_symlinks=true")
    ended.went_well()
    assert read_image(tmp_path / "allowed" / "c_vessels.png").shape == (96, 96)
    shutil.move(data / IMAGE, tmp_path / "moved.png")
    (data / IMAGE).symlink_to(tmp_path / "moved.png")
    ended = door.train(data, tmp_path / "run", "max_epochs=1")
    ended.complained(2, IMAGE, "a link that leaves", "follow_symlinks")
    assert not (tmp_path / "run" / "checkpoints").exists()
    door.train(data, tmp_path / "run", "max_epochs=1", "follow_symlinks=true").went_well()
    assert_whole(tmp_path)


@row(25, "path that leaves the data folder in a list", "refused by name", code=2)
def test_row_25_a_path_out_of_the_folder_is_refused(door, data, tmp_path):
    (tmp_path / "secret.png").write_bytes((data / IMAGE).read_bytes())
    frozen = door.frozen(data, tmp_path / "frozen.yaml")
    text = frozen.read_text(encoding="utf-8")
    frozen.write_text(text.replace(IMAGE, "../secret.png"), encoding="utf-8")
    door("data", "check", frozen, data).complained(2, "../secret.png", "leaves dataset_dir")
    ended = door.train(data, tmp_path / "run", f"manifest={frozen}")
    ended.complained(2, "../secret.png", "leaves dataset_dir")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    26,
    "YAML with a tag, with aliases that multiply, or with a key twice",
    "refused with file and line, before anything is built",
    code=2,
)
def test_row_26_yaml_is_plain_or_refused(door, data, tmp_path):
    plain = door.manifest("vessel_pairs").read_text(encoding="utf-8")
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{other}: &{other} [{', '.join(['*' + one] * 10)}]\n"
    sign = tmp_path / "sign"
    texts = {
        "tag.yaml": (f"notes: !!python/object/apply:os.system ['touch {sign}']\n", "line 1"),
        "bomb.yaml": (bomb, "unfold"),
        "twice.yaml": (plain + "\nname: another\n", "key 'name' stands twice"),
    }
    for name, (text, message) in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        door("data", "check", tmp_path / name, data).complained(2, tmp_path / name, message)
        ended = door.train(data, tmp_path / "run", f"manifest={tmp_path / name}")
        ended.complained(2, tmp_path / name, message)
    assert not sign.exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    27,
    "file that is not the one that was frozen",
    "all of them listed before training; `--verify false` trains all the same",
    code="3; 0",
)
def test_row_27_changed_files_are_listed_before_training(door, data, tmp_path):
    frozen = door.frozen(data, tmp_path / "frozen.yaml")
    for name in (IMAGE, "val/image/phantom_000.png"):
        pixels = read_image(data / name).copy()
        pixels[40, 40] ^= 1
        write_png(data / name, pixels)
    door("data", "check", frozen, data).complained_of(3, IMAGE, "val/image/phantom_000.png")
    manifest = f"manifest={frozen}"
    ended = door.train(data, tmp_path / "run", manifest)
    ended.complained(3, IMAGE, "val/image/phantom_000.png", "changed", "verify")
    assert not (tmp_path / "run" / "checkpoints").exists()
    door.train(data, tmp_path / "run", manifest, "verify=false", "max_epochs=1").went_well()


@row(
    28,
    "one image or one subject in training and in test",
    "refused by name before training; folds never part a subject",
    code=3,
)
def test_row_28_a_leak_between_splits_stops_training(door, data, tmp_path):
    for role in ("image", "label", "fov"):
        shutil.copy(data / f"train/{role}/phantom_001.png", data / f"test/{role}/copy.png")
    ended = door.train(data, tmp_path / "run")
    ended.complained(3, "test/image/copy.png", IMAGE, "the same image as")
    for role in ("image", "label", "fov"):
        (data / f"test/{role}/copy.png").unlink()
    frozen = door.frozen(data, tmp_path / "frozen.yaml")
    content = yaml.safe_load(frozen.read_text(encoding="utf-8"))
    for record in content["records"]:
        record["subject"] = "one eye"
    frozen.write_text(yaml.safe_dump(content), encoding="utf-8")
    ended = door.train(data, tmp_path / "run", f"manifest={frozen}")
    ended.complained(3, "subject 'one eye' is in train and in val", "one side")
    assert not (tmp_path / "run" / "checkpoints").exists()


@row(
    38,
    "damaged entry of a cache",
    "deleted and built anew, with a line in the log",
    code=0,
)
def test_row_38_a_damaged_cache_entry_is_built_anew(door, tmp_path, assert_whole):
    write_phantom_dataset(tmp_path / "data", {"train": 2, "val": 1}, size_vx=32)
    cache = tmp_path / "cache"
    settings = {
        "max_epochs": 1,
        "patches_per_volume": 1,
        "batch_size": 2,
        "effective_batch_size": 2,
        "patch_size": "[16,16,16]",
        "roi_size": "[32,32,32]",
        "thresholds": "[0.5]",
        "threads": 1,
        "device": "cpu",
        "tune_allocator": "false",
        "tensorboard": "false",
        "dataset_dir": tmp_path / "data",
        "train::constants": cache,
    }
    words = ["train", "vesuvius_surface", *(f"--{key}={value}" for key, value in settings.items())]
    door(*words, f"--output_dir={tmp_path / 'one'}").went_well()
    entries = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    for path in entries:
        os.truncate(path, path.stat().st_size // 2)
    ended = door(*words, f"--output_dir={tmp_path / 'two'}")
    ended.went_well()
    assert all(f"{path}: damaged" in ended.out for path in entries)
    assert {path: path.read_bytes() for path in entries} == entries
    assert_whole(tmp_path)
