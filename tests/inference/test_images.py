"""Normalisation and its inverse, grids, PNGs."""

import torch
from PIL import Image

from modeling.inference.images import image_grid, save_png, to_model, to_uint8


def test_every_byte_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model(pixels)
    assert x.min() == -1 and x.max() == 1 and abs(x.mean().item()) < 1e-6
    assert torch.equal(to_uint8(x), pixels)


def test_out_of_range_is_clipped():
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid_places_images_row_by_row():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2) * 10
    grid = image_grid(images, padding=1)
    assert grid.shape == (7, 7, 1)
    columns = image_grid(images, rows=3, padding=1)
    assert columns.shape == (10, 4, 1) and columns[[1, 4, 7], 1, 0].tolist() == [0, 10, 20]
    assert image_grid(images, rows=2, padding=1)[[1, 4, 1], [1, 1, 4], 0].tolist() == [0, 10, 20]
    assert grid[1, 1, 0] == 0 and grid[1, 4, 0] == 10 and grid[4, 1, 0] == 20 and grid[4, 4, 0] == 255


def test_png_round_trip(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB")):
        image = torch.randint(0, 256, (4, 5, channels), dtype=torch.uint8)
        save_png(tmp_path / "x.png", image)
        with Image.open(tmp_path / "x.png") as read:
            assert read.mode == mode and read.size == (5, 4)
            assert read.tobytes() == image.numpy().tobytes()
