"""Room: report. Pictures that a caller adds to a report: pairs of faces, attention maps over faces. Pillow only.

Pictures are drawn on white paper whatever the page's theme, like photographs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdlib_faces._checks import report_key
from kdlib_faces.report.words import shorten

__all__ = ["Picture", "attention_picture", "pairs_picture"]

_PAPER, _INK, _MUTED = (255, 255, 255), (27, 35, 48), (90, 102, 117)
_SIDE = 112
_SCALE = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Black, violet, red, orange, pale yellow: rises evenly in lightness, so that it reads in gray as well.
_HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float64)


def _image(image: Any, owner: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise report_key(owner, "a PIL image or an (h, w, 3) uint8 array", f"{array.shape} {array.dtype}")
    return Image.fromarray(array)


@dataclass(frozen=True)
class Picture:
    """A picture for the report.

    Args:
        name: file name without ending: letters, digits, `_` and `-`.
        title: its heading.
        caption: a sentence or two below it.
        image: PIL image or (h, w, 3) uint8 array.

    Raises:
        InputError: an unusable name or image.

    Examples:
        >>> Picture("faces", "Faces", "Two gray squares.", np.full((8, 16, 3), 128, np.uint8)).pixels.size
        (16, 8)
    """

    name: str
    title: str
    caption: str
    image: Any

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise report_key("Picture.name", "1 to 64 letters, digits, _ or -", self.name)
        self.pixels.load()

    @property
    def pixels(self) -> Image.Image:
        """The image in RGB."""
        return _image(self.image, f"Picture {self.name!r} image")


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib ships this font, so text looks alike on every machine.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size * _SCALE)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines that fit `width` pixels, cut with an ellipsis; its own line breaks are kept."""
    out: list[str] = []
    parts = [shorten(part, 400).split() for part in text.splitlines()[:lines]]
    for number, rest in enumerate(parts):
        while rest and len(out) < lines:
            taken = 1
            while taken < len(rest) and draw.textlength(" ".join(rest[: taken + 1]), font=font) <= width:
                taken += 1
            line, rest = " ".join(rest[:taken]), rest[taken:]
            last = len(out) == lines - 1 and (rest or number < len(parts) - 1)
            if last or draw.textlength(line, font=font) > width:
                while len(line) > 1 and draw.textlength(line + "…", font=font) > width:
                    line = line[:-1]
                line += "…"
            out.append(line)
    return out


def _square(image: Image.Image) -> Image.Image:
    return image.resize((_SIDE * _SCALE, _SIDE * _SCALE), Image.Resampling.BICUBIC)


def pairs_picture(pairs: Sequence[tuple[Any, Any, str]], *, columns: int = 3) -> Image.Image:
    """Pairs of faces with a line or two of text below each.

    Args:
        pairs: (left image, right image, caption); images as in `Picture`. At most 48 are drawn.
        columns: pairs in a row.

    Returns:
        An RGB image.

    Raises:
        InputError: no pair, or something that is no image.

    Examples:
        >>> face = np.zeros((112, 112, 3), np.uint8)
        >>> pairs_picture([(face, face, "4 and 31 years, score 0.21")]).mode
        'RGB'
    """
    if not pairs or columns < 1:
        raise report_key("pairs_picture", "at least one pair and one column", (len(pairs), columns))
    pairs = pairs[:48]
    columns = min(columns, len(pairs))
    gap, text = 16 * _SCALE, 40 * _SCALE
    side, font = _SIDE * _SCALE, _font(11)
    wide, tall = 2 * side + 2 * _SCALE, side + text
    rows = -(-len(pairs) // columns)
    page = Image.new("RGB", (columns * (wide + gap) + gap, rows * (tall + gap // 2) + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    for index, (left, right, caption) in enumerate(pairs):
        x = gap + index % columns * (wide + gap)
        y = gap + index // columns * (tall + gap // 2)
        page.paste(_square(_image(left, f"pairs_picture pair {index} left")), (x, y))
        page.paste(_square(_image(right, f"pairs_picture pair {index} right")), (x + side + 2 * _SCALE, y))
        for row, line in enumerate(_fit(draw, caption, font, wide, 2)):
            draw.text((x, y + side + (5 + 15 * row) * _SCALE), line, font=font, fill=_INK if row == 0 else _MUTED)
    return page


def _heat(levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    place = np.linspace(0.0, 1.0, len(_HEAT))
    return np.stack([np.interp(levels, place, _HEAT[:, channel]) for channel in range(3)], axis=-1)


def _overlay(image: Image.Image, attention: np.ndarray[Any, Any]) -> Image.Image:
    low, high = float(attention.min()), float(attention.max())
    levels = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    big = Image.fromarray(levels.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(big, dtype=np.float64), 0.0, 1.0)
    gray = np.asarray(image.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=-1)
    share = (0.25 + 0.5 * level)[..., None]
    return Image.fromarray(np.clip((1 - share) * gray + share * _heat(level), 0, 255).astype(np.uint8))


def attention_picture(images: Sequence[Any], maps: Mapping[str, Any]) -> Image.Image:
    """Where each model looks: one row a model, one column a face.

    Args:
        images: n faces as in `Picture`.
        maps: model name -> attention maps (n, h, w), finite; each map is scaled to its own range.

    Returns:
        An RGB image: the faces in the first row, then each model's maps over the faces in gray.

    Raises:
        InputError: no image, or maps that do not fit the images.

    Examples:
        >>> face = np.zeros((112, 112, 3), np.uint8)
        >>> attention_picture([face, face], {"student": np.random.default_rng(0).random((2, 7, 7))}).mode
        'RGB'
    """
    faces = [_square(_image(image, f"attention_picture image {index}")) for index, image in enumerate(images)]
    if not faces:
        raise report_key("attention_picture images", "at least one image", "none")
    gap, side, label = 6 * _SCALE, _SIDE * _SCALE, 108 * _SCALE
    font = _font(11)
    rows: list[tuple[str, list[Image.Image]]] = [("input", faces)]
    for name, given in maps.items():
        stack = np.asarray(given, dtype=np.float64)
        if stack.ndim != 3 or len(stack) != len(faces) or 0 in stack.shape or not np.isfinite(stack).all():
            raise report_key(f"attention_picture maps[{name!r}]", f"finite ({len(faces)}, h, w)", f"{stack.shape}")
        rows.append((name, [_overlay(face, attention) for face, attention in zip(faces, stack, strict=True)]))
    page = Image.new("RGB", (label + len(faces) * (side + gap) + gap, len(rows) * (side + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    for row, (name, tiles) in enumerate(rows):
        y = gap + row * (side + gap)
        lines = _fit(draw, name.replace("_", " "), font, label - 2 * gap, 3)
        for line_number, line in enumerate(lines):
            shift = (line_number - len(lines) / 2) * 15 * _SCALE
            draw.text((gap, y + side / 2 + shift), line, font=font, fill=_INK)
        for column, tile in enumerate(tiles):
            page.paste(tile, (label + column * (side + gap), y))
    return page
