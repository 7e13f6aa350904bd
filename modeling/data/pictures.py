"""From an image file to uint8 pixels, with a word for everything that was done to them.

Pillow decodes, turns, converts and resizes. Nothing is guessed: values outside of [0, 1] in a float image, or beyond
16 bits in an integer one, are refused.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps

from modeling.reliability.errors import UserError, short

MAX_PIXELS = 1 << 26  # of one image, 8192 x 8192: a small file that unpacks to more is taken for an attack
# By content, whatever a file is called: Pillow would hand other formats, such as EPS, to programs outside of it.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
DRAFT = 4  # times the wanted size, at least, is what a larger JPEG is decoded to, which is much faster
GREY = "grey"  # said of an image whose channels are equal


class Unreadable(UserError):
    """A file that is no image, is damaged, or has values without a meaning here."""


class Rule(NamedTuple):
    """What is to become of every image."""

    image_size: int | None  # pixels: the short side is resized to it with antialiasing, and the centre is cut out
    channels: int  # 1 or 3
    background: str | list[int]  # under transparent pixels: a name, or red, green and blue


class Picture(NamedTuple):
    pixels: npt.NDArray[np.uint8]  # [H, W, C]
    notes: list[str]  # what was done to them, and GREY


@cache
def suffixes() -> frozenset[str]:
    """The endings of the names of files that can be read, in lower case."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in _formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a Pillow may be built without one


def read_picture(path: Path, rule: Rule) -> Picture:
    """The pixels of a file; Unreadable if it has none. Pillow's warnings are the caller's to silence."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return _converted(image, rule)
    except MemoryError:
        raise
    except Exception as error:  # what a decoder of hostile bytes raises is a long list, and none of it is our bug
        raise Unreadable(f"{path} cannot be read as an image: {short(error)}") from None


def _converted(file: ImageFile.ImageFile, rule: Rule) -> Picture:
    (width, height), size = file.size, rule.image_size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, allowed are {MAX_PIXELS} in all")
    notes = []
    if getattr(file, "is_animated", False):
        notes.append("cut to the first frame")
    if file.mode == "I" or re.search(r"(?<!BGR);16|65535", str(file.tile)):  # BGR;16 has 16 bits a pixel
        notes.append("scaled from 16 to 8 bits")
    if file.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        notes.append("turned upright")
    if size:
        file.draft(None, (DRAFT * size, DRAFT * size))
    ImageOps.exif_transpose(file, in_place=True)
    image = _rgb(file, rule.background, notes)
    if size and (width, height) != (size, size):
        notes.append("enlarged" if min(width, height) < size else "resized or cropped")
        image = ImageOps.fit(image, (size, size))  # bicubic, which Pillow antialiases
    pixels = np.asarray(image)
    grey = bool((pixels == pixels[..., :1]).all())
    if grey:
        notes.append(GREY)
    if rule.channels == 1:
        notes += [] if grey else ["made grey"]
        pixels = np.asarray(image.convert("L"))[..., None]
    return Picture(pixels, notes)


def _rgb(image: Image.Image, background: str | list[int], notes: list[str]) -> Image.Image:
    """Any mode of Pillow as RGB of 8 bits; `notes` gets what that changed."""
    if image.mode == "F":
        notes.append("scaled from [0, 1]")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("CMYK", "LAB", "YCbCr"):
        notes.append(f"converted from {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            colour = background if isinstance(background, str) else tuple(background)
            image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
            notes.append(f"composed on {background}")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of floats or of more than 8 bits as one of 8; ValueError if its range has no meaning."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    top, what = (1, "floats in [0, 1]") if image.mode == "F" else (65535, "integers of 16 bits")
    if not (low >= 0 and high <= top):  # nan is neither
        raise ValueError(f"its values go from {low:g} to {high:g}, allowed are {what}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
