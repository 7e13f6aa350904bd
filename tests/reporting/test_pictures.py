"""Pictures for people: every image where its headings say, enlarged by a whole factor."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.reporting.pictures import GAP, LARGEST, WIDTH, in_rows, save_picture


def blocks(path, size, scale):
    """The enlarged images of a picture without text, by place, uint8 [rows, columns, size, size, 3]."""
    pixels = np.asarray(Image.open(path))
    step = size * scale + GAP
    parts = [
        [pixels[y : y + size * scale, x : x + size * scale] for x in range(GAP, pixels.shape[1], step)]
        for y in range(GAP, pixels.shape[0], step)
    ]
    for row in parts:
        for part in row:
            assert np.array_equal(part, part[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
    return np.array([[part[::scale, ::scale] for part in row] for row in parts])


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_becomes_a_square(channels, tmp_path, generator):
    images = torch.randint(0, 255, (7, channels, 8, 8), dtype=torch.uint8, generator=generator)
    save_picture(tmp_path / "x.png", [[*images[:4]], [images[4], None, *images[5:]]], "")
    shown = blocks(tmp_path / "x.png", 8, LARGEST // 8)
    expected = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert np.array_equal(shown[0], expected[:4]) and np.array_equal(shown[1, [0, 2, 3]], expected[4:])
    assert (shown[1, 1] == 255).all()
    save_picture(tmp_path / "x.png", [[images[0]]], "")
    assert Image.open(tmp_path / "x.png").width == WIDTH


def test_headings_caption_and_values_take_room_of_their_own(tmp_path):
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def ink(**options):
        """The size, and the rows and columns with grey pixels, which only text has."""
        save_picture(tmp_path / "x.png", [[black, black]], options.pop("caption", ""), **options)
        pixels = np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(int)
        grey = (pixels > 0) & (pixels < 255)
        return pixels.shape, np.flatnonzero(grey.any(1)), np.flatnonzero(grey.any(0))

    plain, rows, _ = ink()
    assert not len(rows)
    (high, wide), rows, _ = ink(caption="steps " * 40)
    assert wide == plain[1] and rows.max() < high - plain[0] + GAP and high - plain[0] >= 3 * 20  # broken into lines
    _, _, columns = ink(rows=["a class with a long name"])
    assert columns.min() >= GAP and columns.max() < 250
    shape, rows, _ = ink(columns=["one", "two"], below=[["", "1.5"]])
    assert shape[0] == plain[0] + 40 and rows.min() < 30 and rows.max() > shape[0] - 30
    save_picture(tmp_path / "x.png", [[black] * 30], "", columns=["a long heading"] * 30)
    assert Image.open(tmp_path / "x.png").width > 30 * 90  # headings do not overlap


@pytest.mark.parametrize(("rows", "expected"), [(0, [[0, 1, 2], [3, 4, 5], [6]]), (2, [[0, 2, 4, 6], [1, 3, 5]])])
def test_samples_in_rows(rows, expected):
    images = torch.arange(7).reshape(7, 1, 1, 1)
    assert [[int(image) for image in row] for row in in_rows(images, rows)] == expected
    assert len(in_rows(images, 9)) == 7
