"""Pictures for a report: pairs of faces, and attention maps over faces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from kdlib_faces._checks import report_key
from kdlib_faces.report.numbers import shorten
from kdlib_faces.report.schema import PICTURE_NAME

__all__ = ["Picture", "attention_picture", "pairs_picture"]

Pixels = NDArray[np.uint8]
_PAPER, _INK, _MUTED = (255, 255, 255), (27, 35, 48), (90, 102, 117)
_SIDE = 112
_SCALE = 2
_MAX_PAIRS = 48
# Black, violet, red, orange, pale yellow: rises evenly in lightness, so that it is readable in gray as well.
_HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float64)


def _image(image: Image.Image | Pixels, owner: str, side: int | None = None) -> Image.Image:
    """The image in RGB, in its own size or as a square of `side` pixels."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
            raise report_key(owner, "a PIL image or an (h, w, 3) uint8 array", f"{array.shape} {array.dtype}")
        image = Image.fromarray(array)
    rgb = image.convert("RGB")
    return rgb if side is None else rgb.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Picture:
    """A picture for the report.

    Args:
        name: File name without extension: letters, digits, `_` and `-`.
        title: Heading.
        caption: A sentence or two below it.
        image: PIL image or (h, w, 3) uint8 array.

    Raises:
        InputError: The name or the image cannot be used.

    Examples:
        >>> Picture("faces", "Faces", "A gray rectangle.", np.full((8, 16, 3), 128, np.uint8)).pixels.size
        (16, 8)
    """

    name: str
    title: str
    caption: str
    image: Image.Image | Pixels

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not PICTURE_NAME.fullmatch(self.name):
            raise report_key("Picture.name", "1 to 64 letters, digits, _ or -", self.name)
        self.pixels.load()

    @property
    def pixels(self) -> Image.Image:
        """The image in RGB."""
        return _image(self.image, f"Picture {self.name!r} image")


def _font() -> ImageFont.FreeTypeFont:
    # Matplotlib ships this font, so text is the same on every machine.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 11 * _SCALE)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels, cut with an ellipsis; its line breaks are kept."""
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


def pairs_picture(
    pairs: Sequence[tuple[Image.Image | Pixels, Image.Image | Pixels, str]], *, columns: int = 3
) -> Image.Image:
    """Pairs of faces with a line or two of text below each.

    Args:
        pairs: (left image, right image, caption), images as in `Picture`; at most 48 are drawn.
        columns: Pairs per row.

    Returns:
        An RGB image.

    Raises:
        InputError: There is no pair, or an image cannot be used.

    Examples:
        >>> face = np.zeros((112, 112, 3), np.uint8)
        >>> pairs_picture([(face, face, "4 and 31 years, score 0.21")]).mode
        'RGB'
    """
    if not pairs or columns < 1:
        raise report_key("pairs_picture", "at least one pair and one column", (len(pairs), columns))
    pairs = pairs[:_MAX_PAIRS]
    columns = min(columns, len(pairs))
    gap, side, font = 16 * _SCALE, _SIDE * _SCALE, _font()
    wide, tall = 2 * side + 2 * _SCALE, side + 40 * _SCALE
    rows = -(-len(pairs) // columns)
    page = Image.new("RGB", (columns * (wide + gap) + gap, rows * (tall + gap // 2) + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    for index, (left, right, caption) in enumerate(pairs):
        x = gap + index % columns * (wide + gap)
        y = gap + index // columns * (tall + gap // 2)
        page.paste(_image(left, f"pairs_picture pair {index} left", side), (x, y))
        page.paste(_image(right, f"pairs_picture pair {index} right", side), (x + side + 2 * _SCALE, y))
        for row, line in enumerate(_fit(draw, caption, font, wide, 2)):
            draw.text((x, y + side + (5 + 15 * row) * _SCALE), line, font=font, fill=_INK if row == 0 else _MUTED)
    return page


def _overlay(image: Image.Image, attention: NDArray[np.float64]) -> Image.Image:
    low, high = float(attention.min()), float(attention.max())
    levels = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    big = Image.fromarray(levels.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(big, dtype=np.float64), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    heat = np.stack([np.interp(level, stops, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    gray = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    share = (0.25 + 0.5 * level)[..., None]
    return Image.fromarray(np.clip((1 - share) * gray + share * heat, 0, 255).astype(np.uint8))


def attention_picture(images: Sequence[Image.Image | Pixels], maps: Mapping[str, ArrayLike]) -> Image.Image:
    """Attention maps of several models: one row per model, one column per face.

    Args:
        images: n faces as in `Picture`.
        maps: Model name to finite attention maps (n, h, w); each map is scaled to its own range.

    Returns:
        An RGB image: the faces in the first row, then the maps of each model over the faces in gray.

    Raises:
        InputError: There is no image, or the maps do not fit the images.

    Examples:
        >>> face = np.zeros((112, 112, 3), np.uint8)
        >>> attention_picture([face, face], {"student": np.random.default_rng(0).random((2, 7, 7))}).mode
        'RGB'
    """
    gap, side, label, font = 6 * _SCALE, _SIDE * _SCALE, 108 * _SCALE, _font()
    faces = [_image(image, f"attention_picture image {index}", side) for index, image in enumerate(images)]
    if not faces:
        raise report_key("attention_picture images", "at least one image", "none")
    rows = {"input": faces}
    for name, values in maps.items():
        stack = np.asarray(values, dtype=np.float64)
        if stack.ndim != 3 or len(stack) != len(faces) or 0 in stack.shape or not np.isfinite(stack).all():
            raise report_key(f"attention_picture maps[{name!r}]", f"finite ({len(faces)}, h, w)", f"{stack.shape}")
        rows[name] = [_overlay(face, attention) for face, attention in zip(faces, stack, strict=True)]
    page = Image.new("RGB", (label + len(faces) * (side + gap) + gap, len(rows) * (side + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    for row, (name, tiles) in enumerate(rows.items()):
        y = gap + row * (side + gap)
        lines = _fit(draw, name.replace("_", " "), font, label - 2 * gap, 3)
        for number, line in enumerate(lines):
            draw.text((gap, y + side / 2 + (number - len(lines) / 2) * 15 * _SCALE), line, font=font, fill=_INK)
        for column, tile in enumerate(tiles):
            page.paste(tile, (label + column * (side + gap), y))
    return page
