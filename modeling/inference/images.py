"""The one conversion between stored images (uint8, 0 to 255) and the model's ([-1, 1]), and grids of images.

Training, evaluation and every picture use these functions and no other constants.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling.reliability.files import write_atomic

PADDING = 2  # white pixels around each image of a grid


def to_model(images: Tensor) -> Tensor:
    """uint8 images, any shape, to float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> Tensor:
    """The inverse: [-1, 1] to uint8, rounded to the nearest and clipped at both ends."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, rows: int | None = None) -> Tensor:
    """Tiles uint8 images [N, C, H, W], C = 1 or 3, on white: uint8 [H', W', C].

    `rows` are filled column by column; by default the grid is as square as N allows and filled row by row.
    """
    n, c, height, width = images.shape
    columns = math.ceil(n / rows) if rows else math.ceil(math.sqrt(n))
    high, wide = height + PADDING, width + PADDING
    shape = (c, (rows or math.ceil(n / columns)) * high + PADDING, columns * wide + PADDING)
    grid = torch.full(shape, 255, dtype=torch.uint8)
    for k, image in enumerate(images.cpu()):
        row, column = (k % rows, k // rows) if rows else divmod(k, columns)
        grid[:, row * high :, column * wide :][:, PADDING:high, PADDING:wide] = image
    return grid.permute(1, 2, 0).contiguous()


def sample_grid(images: Tensor, num_classes: int) -> Tensor:
    """Samples 0 to N - 1, uint8 [N, C, H, W], as one picture; with one row a class for a class-conditional model."""
    return image_grid(images, rows=min(num_classes, len(images)) or None)


def cut_grid(path: Path, height: int, width: int) -> Tensor:
    """The images of a grid that image_grid has made and save_png has written, uint8 [rows, columns, C, H, W]."""
    with Image.open(path) as file:
        grid = torch.from_numpy(np.asarray(file).copy())
    tiles = grid.reshape(*grid.shape[:2], -1)[PADDING:, PADDING:]
    tiles = tiles.unfold(0, height + PADDING, height + PADDING).unfold(1, width + PADDING, width + PADDING)
    return tiles[..., :height, :width].contiguous()


def png_bytes(image: Tensor) -> bytes:
    """uint8 [H, W, C] (C = 1 or 3) as the content of a PNG."""
    content = io.BytesIO()
    Image.fromarray(image.cpu().squeeze(2).numpy()).save(content, format="PNG")
    return content.getvalue()


def save_png(path: Path, image: Tensor) -> None:
    """Writes uint8 [H, W, C] (C = 1 or 3) as a PNG, else raises UserError."""
    write_atomic(path, png_bytes(image))
