"""Normalisation and its inverse, grids, PNGs."""

import pytest
import torch
from PIL import Image

from modeling.inference.images import cut_grid, image_grid, save_png, to_model, to_uint8


def test_every_byte_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model(pixels)
    assert x.min() == -1 and x.max() == 1 and abs(x.mean().item()) < 1e-6
    assert torch.equal(to_uint8(x), pixels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("rows", "places"), [(None, [(0, 0), (0, 1), (1, 0)]), (2, [(0, 0), (1, 0), (0, 1)])])
def test_a_grid_is_filled_row_by_row_or_with_given_rows_column_by_column(rows, places):
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 3) * 10
    grid = image_grid(images, rows)
    expected = torch.full((10, 12, 1), 255, dtype=torch.uint8)  # two pixels of white around each
    for k, (row, column) in enumerate(places):
        expected[4 * row + 2 : 4 * row + 4, 5 * column + 2 : 5 * column + 5] = 10 * k
    assert torch.equal(grid, expected)
    assert image_grid(images, rows=3).shape == (14, 7, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_cut_into_its_images(channels, tmp_path, generator):
    images = torch.randint(0, 256, (6, channels, 2, 3), dtype=torch.uint8, generator=generator)
    save_png(tmp_path / "x.png", image_grid(images, rows=2))
    assert torch.equal(cut_grid(tmp_path / "x.png", 2, 3).transpose(0, 1).flatten(0, 1), images)


def test_png_round_trip(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB")):
        image = torch.randint(0, 256, (4, 5, channels), dtype=torch.uint8)
        save_png(tmp_path / "x.png", image)
        with Image.open(tmp_path / "x.png") as read:
            assert read.mode == mode and read.size == (5, 4)
            assert read.tobytes() == image.numpy().tobytes()
