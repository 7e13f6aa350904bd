"""Pictures for people: images in rows and columns, enlarged, with headings and a caption.

Plain grids, for machines, are in inference/images.py.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modeling.reliability.files import write_atomic

WIDTH = 640  # pixels that a picture has at least
LARGEST = 160  # pixels to which an image is enlarged at most
GAP = 6  # pixels between images
FONT = 15  # pixels
LINE = FONT + 5
INK = (32, 32, 32)


def save_picture(
    path: Path,
    images: Sequence[Sequence[Tensor | None]],
    caption: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
) -> None:
    """Writes rows of uint8 images [C, H, W], C = 1 or 3, as a PNG of at least WIDTH pixels, else raises UserError.

    None leaves a place empty. `rows` and `columns` are headings, `below` has a line of text for each image.
    """
    font = ImageFont.load_default(FONT)
    first = next(image for row in images for image in row if image is not None)
    _, height, width = first.shape
    count = max(map(len, images))
    left = GAP + max((math.ceil(font.getlength(name)) + GAP for name in rows), default=0)
    # Whole factors, so that every pixel of an image stays a square.
    scale = max(1, min(math.ceil(((WIDTH - left) / count - GAP) / width), LARGEST // width))
    widest = max((font.getlength(text) for text in (*columns, *(text for line in below for text in line))), default=0)
    scale = max(scale, math.ceil(widest / width))
    wide, high = width * scale + GAP, height * scale + GAP + (LINE if below else 0)
    total = max(left + count * wide, WIDTH)
    lines = textwrap.wrap(caption, int(total / font.getlength("n")))
    top = GAP + LINE * len(lines) + (LINE if columns else 0)
    canvas = Image.new("RGB", (total, top + high * len(images)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        draw.text((GAP, GAP + k * LINE), line, INK, font)
    for k, name in enumerate(columns):
        draw.text((left + k * wide + width * scale / 2, top - LINE), name, INK, font, "ma")
    for i, row in enumerate(images):
        y = top + i * high
        if rows:
            draw.text((left - GAP, y + height * scale / 2), rows[i], INK, font, "rm")
        for k, image in enumerate(row):
            if image is not None:
                canvas.paste(_enlarged(image, scale), (left + k * wide, y))
            if below:
                draw.text((left + k * wide + width * scale / 2, y + height * scale + 1), below[i][k], INK, font, "ma")
    content = io.BytesIO()
    canvas.save(content, format="PNG")
    write_atomic(path, content.getvalue())


def _enlarged(image: Tensor, scale: int) -> Image.Image:
    _, height, width = image.shape
    plain = Image.fromarray(image.cpu().permute(1, 2, 0).squeeze(2).numpy())
    return plain.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def in_rows(images: Tensor, num_rows: int) -> list[list[Tensor | None]]:
    """Samples 0 to N - 1, [N, C, H, W], as rows: sample k in row k modulo `num_rows`; 0 rows: as square as N allows."""
    if num_rows:
        return [list(images[k::num_rows]) for k in range(min(num_rows, len(images)))]
    columns = math.ceil(math.sqrt(len(images)))
    return [list(images[k : k + columns]) for k in range(0, len(images), columns)]
