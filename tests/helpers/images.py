"""Image files that Pillow does not write, and the folder source read to its end."""

import struct
import zlib
from collections import Counter

import numpy as np
from PIL import Image

from helpers.configs import group
from modeling.data.folder import folder
from modeling.settings.keys import own_keys


def png(width, height, colour_type, bits, rows):
    """The content of a PNG with these header fields and these bytes for its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def write_images(path, *sizes, ending="png"):
    """Images in a folder, each of its own colour."""
    path.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 2 * i, 255 - i)).save(path / f"{i:03}.{ending}")


def source(path, **changes):
    """The folder source as conf/data/folder.yaml sets it up, with some keys changed."""
    return folder(**own_keys(group("data", "folder", path=str(path), **changes)))


def read_folder(path, threads=1, **changes):
    """Its two splits as arrays, its classes, and what was noted."""
    *splits, classes = source(path, **changes)
    notes = Counter()
    train, test = (tuple(map(np.concatenate, zip(*split(threads, notes), strict=True))) for split in splits)
    return train, test, classes, notes
