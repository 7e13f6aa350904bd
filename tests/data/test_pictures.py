"""From an image file to uint8 pixels: each kind exactly, or refused by name."""

import numpy as np
import pytest
from helpers.images import png
from PIL import Image

from modeling.data.pictures import MAX_PIXELS, Rule, Unreadable, read_picture, suffixes

RULE = Rule(None, 3, "white")


@pytest.fixture
def read(tmp_path):
    """Writes an image, or the content of a file, and reads it."""

    def read(image, name="x.png", rule=RULE, **options):
        if isinstance(image, bytes):
            (tmp_path / name).write_bytes(image)
        else:
            image.save(tmp_path / name, **options)
        return read_picture(tmp_path / name, rule)

    return read


def grey(values):
    """[H, W] as it is expected: [H, W, 3] of uint8."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.ppm", "png-called.jpg"])
def test_plain_pixels_are_left_alone(read, name):
    options = {"format": "PNG"} if name == "png-called.jpg" else {}
    pixels, notes = read(Image.fromarray(NOISE), name, **options)
    assert np.array_equal(pixels, NOISE) and pixels.dtype == np.uint8 and notes == []


def test_modes_of_few_colours(read):
    levels = NOISE[..., 0]
    assert np.array_equal(read(Image.fromarray(levels)).pixels, grey(levels))
    bits = Image.fromarray(levels > 127)
    assert bits.mode == "1" and np.array_equal(read(bits).pixels, grey(255 * (levels > 127)))
    palette = Image.fromarray(NOISE[:2, :2]).quantize()
    assert palette.mode == "P" and np.array_equal(read(palette).pixels, np.asarray(palette.convert("RGB")))


# 16 bits


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
EIGHT = (2 * RAMP.astype(int) + 257) // 514  # RAMP / 257, rounded


@pytest.mark.parametrize(("name", "mode"), [("x.png", "I;16"), ("x.tif", "I;16"), ("x.pgm", "I"), ("big.tif", "I;16B")])
def test_grey_of_16_bits_is_scaled_by_257(read, tmp_path, name, mode):
    values = RAMP.astype(">u2") if mode == "I;16B" else RAMP.astype(np.int32) if mode == "I" else RAMP
    image = Image.frombytes(mode, (256, 256), values.tobytes())
    pixels, notes = read(image, name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
    assert np.array_equal(pixels, grey(EIGHT)) and notes == ["scaled from 16 to 8 bits", "grey"]


def test_colour_of_16_bits(read):
    values = np.random.default_rng(1).integers(0, 65536, (4, 5, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels, notes = read(png(5, 4, 2, 16, rows))
    assert np.abs(pixels - values / 257).max() < 1  # Pillow takes the upper byte
    assert notes == ["scaled from 16 to 8 bits"]


@pytest.mark.parametrize(("value", "found"), [(-1, "-1 to 0"), (70000, "0 to 70000")])
def test_integers_beyond_16_bits_are_refused(read, value, found):
    with pytest.raises(Unreadable, match=rf"x.tif cannot.*from {found}, allowed are integers of 16 bits"):
        read(Image.fromarray(np.array([[0, value]], np.int32)), "x.tif")


# Floats


def test_floats_in_0_to_1_are_scaled(read):
    values = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    pixels, notes = read(Image.fromarray(values), "x.tif")
    assert np.array_equal(pixels, grey(np.rint(values * 255))) and notes == ["scaled from [0, 1]", "grey"]


@pytest.mark.parametrize(("value", "found"), [(255.0, "0 to 255"), (-0.5, "-0.5 to 0"), (np.nan, "nan to nan")])
def test_other_floats_are_refused(read, value, found):
    with pytest.raises(Unreadable, match=rf"x.tif cannot.*from {found}, allowed are floats in \[0, 1\]"):
        read(Image.fromarray(np.array([[0, value]], np.float32)), "x.tif")


# Transparency


def over(image, alpha, background):
    alpha = alpha[..., None] / 255
    return image * alpha + (1 - alpha) * np.array(background)


@pytest.mark.parametrize(
    ("background", "rgb"),
    [("white", (255, 255, 255)), ("grey", (128, 128, 128)), ("black", (0, 0, 0)), ([1, 20, 200], (1, 20, 200))],
)
def test_what_lies_under_transparent_pixels(read, background, rgb):
    alpha = np.random.default_rng(2).choice([0, 0, 99, 255], NOISE.shape[:2]).astype(np.uint8)
    rule = RULE._replace(background=background)
    pixels, notes = read(Image.fromarray(np.dstack([NOISE, alpha])), rule=rule)
    assert np.abs(pixels - over(NOISE, alpha, rgb)).max() <= 1 and notes == [f"composed on {background}"]
    pixels, notes = read(Image.fromarray(np.dstack([NOISE[..., 0], alpha])), rule=rule)
    assert np.abs(pixels - over(grey(NOISE[..., 0]), alpha, rgb)).max() <= 1
    assert f"composed on {background}" in notes


def test_one_transparent_colour(read):
    image = Image.new("P", (2, 2))
    image.putpalette([9, 9, 9, 50, 60, 70, 1, 2, 3])
    image.putdata([0, 1, 2, 1])
    expected = [[[9, 9, 9], [255, 255, 255]], [[1, 2, 3], [255, 255, 255]]]
    for name in ("x.png", "x.gif"):
        pixels, notes = read(image, name, transparency=1)
        assert pixels.tolist() == expected and notes == ["composed on white"], name
    pixels, _ = read(Image.fromarray(np.array(expected, np.uint8)), transparency=(9, 9, 9))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 0].tolist() == [1, 2, 3]


def test_an_opaque_alpha_channel_is_no_change(read):
    pixels, notes = read(Image.fromarray(NOISE).convert("RGBA"))
    assert np.array_equal(pixels, NOISE) and notes == []


# Colour spaces, orientation, animations


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("LAB", "x.tif"), ("YCbCr", "x.tif")])
def test_other_colour_spaces_are_converted(read, mode, name):
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # Pillow 12 cannot read its own without
    pixels, notes = read(Image.new("RGB", (8, 8), (250, 130, 10)).convert(mode), name, **options)
    assert np.abs(pixels - np.array([250, 130, 10.0])).max() <= 4
    assert notes == [f"converted from {mode}"] or (mode == "YCbCr" and notes == [])  # and converts what it opens


UPRIGHT = {  # by the number in EXIF: what turns the stored pixels upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(read, orientation, name):
    image = Image.fromarray(NOISE)
    exif = image.getexif()
    exif[0x0112] = orientation
    pixels, notes = read(image, name, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    assert np.array_equal(pixels, UPRIGHT[orientation](NOISE))
    assert notes == ([] if orientation == 1 else ["turned upright"])


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_the_first_frame_of_an_animation(read, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    exact = {"lossless": True} if name == "x.webp" else {}
    pixels, notes = read(frames[0], name, save_all=True, append_images=frames[1:], **exact)
    assert (pixels == [255, 0, 0]).all() and notes == ["cut to the first frame"]


# Sizes and channels


def test_the_short_side_is_resized_and_the_centre_cut_out(read):
    stripes = np.zeros((24, 72, 3), np.uint8)
    stripes[:, :24, 0] = stripes[:, 24:48, 1] = stripes[:, 48:, 2] = 255
    rule = RULE._replace(image_size=12)
    for values in (stripes, stripes.swapaxes(0, 1)):
        pixels, notes = read(Image.fromarray(values), rule=rule)
        assert pixels.shape == (12, 12, 3) and notes == ["resized or cropped"]
        assert (pixels[2:-2, 2:-2] == [0, 255, 0]).all()
    assert read(Image.fromarray(stripes[:, 24:48]), rule=RULE._replace(image_size=24)).notes == []
    assert read(Image.fromarray(stripes), rule=RULE._replace(image_size=25)).notes == ["enlarged"]


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_resizing_is_antialiased(read, name):
    fine = grey(255 * (np.indices((512, 640)).sum(0) % 2))
    pixels, _ = read(
        Image.fromarray(fine), name, RULE._replace(image_size=8), **({"quality": 100} if "jpg" in name else {})
    )
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - 127).max() <= 2


def test_a_large_jpeg_is_resized_as_a_png_is(read):
    y, x = np.indices((512, 512)) / 512
    image = Image.fromarray(np.rint(255 * np.stack([x, y, x * y], 2)).astype(np.uint8))
    found = [read(image, name, RULE._replace(image_size=16)).pixels.astype(int) for name in ("x.png", "x.jpg")]
    assert np.abs(found[0] - found[1]).max() <= 3


def test_one_channel(read):
    rule = RULE._replace(channels=1)
    pixels, notes = read(Image.fromarray(NOISE), rule=rule)
    assert np.array_equal(pixels, np.asarray(Image.fromarray(NOISE).convert("L"))[..., None]) and notes == ["made grey"]
    pixels, notes = read(Image.fromarray(NOISE[..., 0]), rule=rule)
    assert np.array_equal(pixels, NOISE[..., :1]) and notes == ["grey"]


# What is no image


def test_what_is_too_large_is_not_decoded(read):
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(Unreadable, match=rf"it has {side} x {side} pixels, allowed are {MAX_PIXELS}"):
        read(png(side, side, 0, 8, b""))


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"]
)
def test_no_image_is_named(read, content):
    """Nor what Pillow hands to a program outside of it."""
    with pytest.raises(Unreadable, match=r"x\.png cannot be read as an image: cannot identify"):
        read(content)


def test_no_memory_is_no_fault_of_the_file(read, monkeypatch):
    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr("modeling.data.pictures._converted", fails)
    with pytest.raises(MemoryError):
        read(Image.fromarray(NOISE))


def test_endings_that_are_read():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm"} <= suffixes()
    assert not {".eps", ".pdf", ".heic", ".txt", ""} & suffixes()
