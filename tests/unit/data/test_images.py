from __future__ import annotations

import contextlib
import gzip
import io
import logging
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import IMAGE_SUFFIXES, image_stem, read_header, read_image
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import InputError

GRAY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (5, 7), dtype=np.uint16)
DEEP_RGB = np.random.default_rng(3).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
STACK = np.random.default_rng(4).integers(0, 256, (8, 32, 48), dtype=np.uint8)
BITS = np.random.default_rng(5).random((5, 7)) > 0.5


def encoded(array: NDArray[Any] | Image.Image, kind: str, **kw: Any) -> bytes:
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(stream, format=kind, **kw)
    return stream.getvalue()


def as_tiff(array: NDArray[Any], **kw: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **{"photometric": "minisblack", **kw})
    return stream.getvalue()


def page_by_page(stack: NDArray[Any]) -> bytes:
    """Write each page by a call of its own, as a loop over slices does."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for page in stack:
            writer.write(page, photometric="minisblack", compression="lzw")
    return stream.getvalue()


def palette_image(palette: list[int]) -> Image.Image:
    image = Image.fromarray((GRAY > 100).astype(np.uint8), "L")
    image = image.convert("P")
    image.putpalette(palette)
    indices = Image.fromarray((GRAY > 100).astype(np.uint8))
    image.paste(indices)
    return image


GRAY_PALETTE = [0, 0, 0, 255, 255, 255]
COLOUR_PALETTE = [0, 0, 0, 255, 0, 0]
COLOURED = np.where((GRAY > 100)[..., None], np.uint8([255, 0, 0]), np.uint8([0, 0, 0]))

CASES: dict[str, tuple[bytes, NDArray[Any]]] = {
    "gray.png": (encoded(GRAY, "PNG"), GRAY),
    "rgb.png": (encoded(RGB, "PNG"), RGB),
    "rgba.png": (encoded(RGBA, "PNG"), RGBA),
    "gray16.png": (encoded(DEEP, "PNG"), DEEP),
    "rgb16.png": (imagecodecs.png_encode(DEEP_RGB), DEEP_RGB),
    "one_bit.png": (encoded(Image.fromarray(BITS), "PNG"), np.uint8(255) * BITS),
    "gray_palette.png": (encoded(palette_image(GRAY_PALETTE), "PNG"), np.uint8(255) * (GRAY > 100)),
    "colour_palette.png": (encoded(palette_image(COLOUR_PALETTE), "PNG"), COLOURED),
    "gray.gif": (encoded(GRAY, "GIF"), GRAY),
    "mask.gif": (encoded(palette_image(GRAY_PALETTE), "GIF"), np.uint8(255) * (GRAY > 100)),
    "rgb.bmp": (encoded(RGB, "BMP"), RGB),
    "one_bit.bmp": (encoded(Image.fromarray(BITS), "BMP"), np.uint8(255) * BITS),
    "rgb.ppm": (encoded(RGB, "PPM"), RGB),
    "gray.pgm": (encoded(GRAY, "PPM"), GRAY),
    "comment.pgm": (b"P5\n# made by hand\n7 5\n# again\n255\n" + GRAY.tobytes(), GRAY),
    "gray16.pgm": (b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(), DEEP),
    "rgb16.ppm": (b"P6 7 5 65535\n" + DEEP_RGB.astype(">u2").tobytes(), DEEP_RGB),
    "twelve_bits.pgm": (b"P5 7 5 4095\n" + (DEEP >> 4).astype(">u2").tobytes(), DEEP >> 4),
    "text.pgm": (b"P2 3 2 255\n0 1 2\n3 4 255\n", np.uint8([[0, 1, 2], [3, 4, 255]])),
    "one_bit.pbm": (encoded(Image.fromarray(BITS), "PPM"), np.uint8(255) * BITS),
    "gray.tif": (as_tiff(GRAY), GRAY),
    "rgb.tif": (as_tiff(RGB, photometric="rgb"), RGB),
    "rgba.tif": (as_tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGBA),
    "planar.tif": (
        as_tiff(np.moveaxis(RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"),
        RGB,
    ),
    "gray16.tif": (as_tiff(DEEP), DEEP),
    "big_endian.tif": (as_tiff(DEEP, byteorder=">"), DEEP),
    "float.tif": (as_tiff(DEEP.astype(np.float32)), DEEP.astype(np.float32)),
    "one_bit.tif": (as_tiff(BITS), np.uint8(255) * BITS),
    "white_is_zero.tif": (as_tiff(GRAY, photometric="miniswhite"), 255 - GRAY),
    "palette.tif": (
        as_tiff(
            (GRAY > 100).astype(np.uint8),
            photometric="palette",
            colormap=np.tile(np.uint16([0, 65535] + [0] * 254), (3, 1)),
        ),
        np.uint8(255) * (GRAY > 100),
    ),
    "stack.tif": (as_tiff(STACK), STACK),
    "stack_lzw.tif": (as_tiff(STACK, compression="lzw"), STACK),
    "stack_without_metadata.tif": (as_tiff(STACK, metadata=None), STACK),
    "stack_page_by_page.tif": (page_by_page(STACK), STACK),
    "stack_of_four.tif": (as_tiff(STACK[:4]), STACK[:4]),
    "stack_of_three_wide.tif": (as_tiff(STACK[..., :3]), STACK[..., :3]),
    "imagej.tif": (as_tiff(STACK, imagej=True, metadata={"axes": "ZYX"}), STACK),
    "stack.ome.tif": (as_tiff(STACK, ome=True, metadata={"axes": "ZYX"}), STACK),
    "big.tif": (as_tiff(STACK, bigtiff=True), STACK),
    "rgb_stack.tif": (
        as_tiff(np.stack([RGB, RGB[::-1]]), photometric="rgb"),
        np.stack([RGB, RGB[::-1]]),
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_read_as_stored(folder: Path, name: str, gzipped: bool) -> None:
    content, expected = CASES[name]
    path = folder / (f"{name}.gz" if gzipped else name)
    path.write_bytes(gzip.compress(content, 1) if gzipped else content)
    array = read_image(path)
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == expected.dtype
    assert array.flags.c_contiguous


@pytest.mark.parametrize("name", CASES)
def test_header_announces_what_reading_gives(folder: Path, name: str) -> None:
    content, expected = CASES[name]
    (folder / name).write_bytes(content)
    header = read_header(folder / name)
    assert header.shape == expected.shape
    assert header.dtype == expected.dtype
    assert header.decoded_bytes == expected.nbytes
    stack = name.startswith(("stack", "imagej", "big.", "rgb_stack"))
    assert header.pages == (expected.shape[0] if stack else 1)
    pixels = expected[0] if stack else expected
    assert header.channels == (pixels.shape[2] if pixels.ndim == 3 else 1)
    assert header.size == pixels.shape[:2]


def test_jpeg_is_close_in_rows_and_columns(folder: Path) -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[:, :, 0] = np.arange(60) * 4
    ramp[:, :, 1] = np.arange(40)[:, None] * 6
    (folder / "a.jpg").write_bytes(encoded(ramp, "JPEG", quality=95, subsampling=0))
    array = read_image(folder / "a.jpg")
    assert array.shape == (40, 60, 3)
    assert np.abs(array.astype(int) - ramp).max() < 12


def test_cmyk_becomes_rgb(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG"))
    array = read_image(folder / "a.jpg")
    assert array.shape == (4, 6, 3)
    assert array[0, 0, 0] > 200 > 100 > array[0, 0, 2]


def test_content_and_not_the_name_tells_the_kind(folder: Path) -> None:
    (folder / "a.png").write_bytes(as_tiff(STACK))
    np.testing.assert_array_equal(read_image(folder / "a.png"), STACK)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        st.one_of(
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 4])),
        ),
    )
)
def test_png_round_trip_returns_the_array(tmp_path: Path, array: NDArray[Any]) -> None:
    read = read_image(write_png(tmp_path / "a.png", array))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=9),
        elements=st.integers(0, 100),
    )
)
def test_tiff_round_trip_returns_the_array(tmp_path: Path, array: NDArray[Any]) -> None:
    read = read_image(write_tiff(tmp_path / "a.tif", array))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "text.pgm"]
)  # "255" is cut to "2"
def test_file_cut_short_is_refused_or_complete_in_its_pixels(
    folder: Path, name: str, gzipped: bool
) -> None:
    content, expected = CASES[name]
    whole = gzip.compress(content, 1) if gzipped else content
    path = folder / (f"{name}.gz" if gzipped else name)
    for length in np.linspace(0, len(whole) - 1, 16).astype(int):
        path.write_bytes(whole[:length])
        if not gzipped and length > 0.9 * len(whole):
            # The last bytes may be a remark or an end mark; the pixels must not be fewer.
            with contextlib.suppress(InputError):
                np.testing.assert_array_equal(read_image(path), expected)
            continue
        with pytest.raises(InputError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_header_alone_shows_a_compressed_tiff_cut_short(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    content = as_tiff(noise, compression="lzw", metadata=None)
    (folder / "a.tif").write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"cut short: \d+ bytes found, at least \d+ expected"):
        read_header(folder / "a.tif")


def test_jpeg_cut_short_is_refused(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(noise, "JPEG")
    for length in np.linspace(0, len(content) - 64, 12).astype(int):
        (folder / "a.jpg").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.jpg"):
            read_image(folder / "a.jpg")


def test_flipped_bit_in_a_png_is_refused(folder: Path) -> None:
    content = bytearray(CASES["rgb.png"][0])
    content[60] ^= 1
    (folder / "a.png").write_bytes(bytes(content))
    with pytest.raises(InputError, match="wrong checksum in PNG chunk b'IDAT'"):
        read_image(folder / "a.png")


def test_flipped_bit_in_gzip_data_is_refused(folder: Path) -> None:
    content = bytearray(gzip.compress(CASES["rgb.ppm"][0]))
    content[-6] ^= 1  # the checksum at the end
    (folder / "a.ppm.gz").write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"a\.ppm\.gz: damaged"):
        read_image(folder / "a.ppm.gz")


def test_tiff_with_pages_of_different_sizes_is_refused(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        for size in (4, 4, 5, 4, 4):
            writer.write(np.zeros((size, 6), np.uint8), contiguous=False, metadata=None)
    with pytest.raises(InputError, match=r"a\.tif: pages that differ"):
        read_image(folder / "a.tif")


def test_reduced_copies_in_a_tiff_do_not_count_as_pages(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        writer.write(GRAY, metadata=None, photometric="minisblack")
        writer.write(GRAY[::2, ::2], metadata=None, photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(read_image(folder / "a.tif"), GRAY)


def test_tiff_with_two_outer_axes_is_refused(folder: Path) -> None:
    stack = np.zeros((2, 3, 4, 5), np.uint8)
    tifffile.imwrite(folder / "a.tif", stack, photometric="minisblack", metadata={"axes": "TZYX"})
    with pytest.raises(InputError, match="axes TZYX"):
        read_image(folder / "a.tif")


def test_animation_is_refused(folder: Path) -> None:
    frames = [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="2 frames, expected one picture"):
        read_image(folder / "a.gif")


def test_second_picture_in_a_pnm_is_not_dropped(folder: Path) -> None:
    (folder / "a.pgm").write_bytes(CASES["gray.pgm"][0] * 2)
    with pytest.raises(InputError, match="several pictures"):
        read_image(folder / "a.pgm")


def test_errors_that_tifffile_only_logs_are_raised_and_not_printed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = CASES["stack_lzw.tif"][0]
    (folder / "a.tif").write_bytes(content[: len(content) // 5])
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError, match=r"a\.tif"):
        read_image(folder / "a.tif")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert not logging.getLogger("tifffile").filters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "no image: it begins with b'not an i'"),
        (b"\x89PNG\r\n\x1a\n", "damaged, cut short"),
        (gzip.compress(b""), "the file is empty"),
        (gzip.compress(b"text"), "no image"),
    ],
    ids=["empty", "text", "signature alone", "empty gzip", "text gzip"],
)
def test_what_is_no_image_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "a.png").write_bytes(content)
    for read in (read_header, read_image):
        with pytest.raises(InputError, match=r"a\.png") as caught:
            read(folder / "a.png")
        assert message in str(caught.value)
        assert caught.value.exit_code == 3


def test_missing_file_and_folder_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: not found"):
        read_image(folder / "none.png")
    with pytest.raises(InputError, match="is a folder"):
        read_image(folder)


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 20), 9)
    ends = chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


def tiff_bomb(side: int) -> bytes:
    """A header of a few hundred bytes that announces `side` squared pixels."""
    small = as_tiff(np.zeros((2, 2), np.uint8), metadata=None)
    content = bytearray(small)
    with tifffile.TiffFile(io.BytesIO(small)) as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tag = tiff.pages[0].tags[name]
            size = {3: 2, 4: 4}[int(tag.dtype)]
            value = min(side, 2 ** (8 * size) - 1)
            content[tag.valueoffset : tag.valueoffset + size] = value.to_bytes(size, "little")
    return bytes(content)


BOMBS = {
    "a.png": png_bomb(120_000),
    "b.bmp": encoded(GRAY, "BMP")[:18] + struct.pack("<ii", 120_000, 120_000)
    + encoded(GRAY, "BMP")[26:],
    "c.ppm": b"P6 120000 120000 255\n" + bytes(100),
    "d.tif": tiff_bomb(60_000),
    "e.ppm.gz": gzip.compress(b"P6 120000 120000 255\n" + bytes(1 << 20)),
    "f.ppm.gz": gzip.compress(b"P6 10 10 255\n" + bytes(1 << 26)),
    "g.png.gz": gzip.compress(png_bomb(120_000)),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_from_its_header(folder: Path, name: str) -> None:
    (folder / name).write_bytes(BOMBS[name])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(InputError, match=name):
        read_image(folder / name, limit=1 << 30)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 50 << 20


def test_limit_holds_for_what_is_decoded_and_not_for_the_file(folder: Path) -> None:
    path = write_png(folder / "a.png", np.zeros((100, 100), np.uint8))
    assert read_image(path, limit=10_000).shape == (100, 100)
    with pytest.raises(InputError, match="at most 0 MB are allowed"):
        read_image(path, limit=9_999)


def test_gzipped_tiff_is_not_unpacked_beyond_the_limit(folder: Path) -> None:
    (folder / "a.tif.gz").write_bytes(gzip.compress(as_tiff(np.zeros((200, 200), np.uint8))))
    assert read_image(folder / "a.tif.gz", limit=50_000).shape == (200, 200)
    with pytest.raises(InputError, match="unpacks to more than"):
        read_image(folder / "a.tif.gz", limit=30_000)


def test_variable_limits_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(folder / "a.png", np.zeros((100, 100), np.uint8))
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "100")
    with pytest.raises(InputError, match="LAMINA_MAX_DECODED_BYTES"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("im0001.ppm.gz", "im0001"),
        ("im0001.ah.ppm.gz", "im0001.ah"),
        ("eye_1.5.png", "eye_1.5"),
        ("01_dr.JPG", "01_dr"),
        ("aux.png", "aux"),
        ("späte Ähre.tif", "späte Ähre"),
        ("scan.nii.gz", "scan"),
        ("plain", "plain"),
        (".png", ".png"),
    ],
)
def test_stem_loses_the_image_suffix_alone(name: str, stem: str) -> None:
    assert image_stem(Path("folder") / name) == stem


def test_every_suffix_comes_gzipped_too() -> None:
    plain = {suffix for suffix in IMAGE_SUFFIXES if not suffix.endswith(".gz")}
    assert {f"{suffix}.gz" for suffix in plain} == set(IMAGE_SUFFIXES) - plain
