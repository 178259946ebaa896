"""The lists of a folder of crops, and the sheet of the doubtful ones."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw

from kdlib._atomic import atomic_write
from kdlib_faces.alignment.photographs import AlignConfig, AlignedPhotograph, Crop, misfit_and_scale
from kdlib_faces.data.image_files import open_rgb

__all__ = ["DOUBTFUL", "FACES", "SHEET", "Photograph", "write_tables"]

FACES, DOUBTFUL, SHEET = "faces.csv", "doubtful.csv", "doubtful.png"
POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
COLUMNS = ("score", "faces", "left", "top", "right", "bottom", *(f"{name}_{axis}" for name in POINTS for axis in "xy"))
TILES, TILES_PER_ROW, TILE, CAPTION = 200, 10, 160, 28
ZOOM = 3
BOX_COLOR, POINT_COLOR = (255, 80, 0), (0, 200, 255)


@dataclass(frozen=True)
class Photograph:
    """A photograph of a run.

    Attributes:
        path: The file.
        name: Its path relative to the folder of photographs, with slashes.
        crop: Path of its crop in the output, without suffix.
        format: Suffix of the crops.
    """

    path: Path
    name: str
    crop: str
    format: str

    def crop_path(self, number: int) -> str:
        """Path of a crop in the output; the first is number 0."""
        return f"{self.crop}{f'_face{number + 1}' if number else ''}.{self.format}"

    @property
    def identity(self) -> str:
        """The first folder below the folder of photographs; empty for a photograph that is in none."""
        return PurePosixPath(self.name).parts[0] if "/" in self.name else ""


_Found = tuple[Photograph, AlignedPhotograph]


def write_tables(found: Sequence[_Found], output: Path, config: AlignConfig) -> tuple[int, int]:
    """Write `faces.csv`, `doubtful.csv` and `doubtful.png`; return the number of crops and of doubtful rows."""
    crops = [
        [photograph.crop_path(number), "" if number else photograph.identity, photograph.name, *_cells(photo, crop)]
        for photograph, photo in found
        for number, crop in enumerate(photo.crops)
    ]
    _write_csv(output / FACES, ("path", "identity", "source", *COLUMNS), crops)
    doubtful = [each for photograph, photo in found for each in _doubts(photograph, photo, config)]
    rows = [
        [at, photograph.name, reason, "" if crop is None else photograph.crop_path(number), *_cells(photo, crop)]
        for at, (photograph, photo, number, crop, reason) in enumerate(doubtful, 1)
    ]
    _write_csv(output / DOUBTFUL, ("number", "source", "reason", "path", *COLUMNS), rows)
    if doubtful:
        _draw_sheet(output / SHEET, doubtful[:TILES])
    else:
        (output / SHEET).unlink(missing_ok=True)
    return len(crops), len(doubtful)


def _cells(photo: AlignedPhotograph, crop: Crop | None) -> list[object]:
    if crop is None or not crop.points:
        return ["", photo.faces, *[""] * 14]
    return [f"{crop.score:.4f}", photo.faces, *(f"{value:.2f}" for value in (*crop.box, *crop.points))]


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with atomic_write(path, sole_writer=True) as file:
        file.write(text.getvalue().encode())


_Doubt = tuple[Photograph, AlignedPhotograph, int, Crop | None, str]


def _doubts(photograph: Photograph, photo: AlignedPhotograph, config: AlignConfig) -> Iterator[_Doubt]:
    if photo.error:
        yield photograph, photo, 0, None, "cannot be read"
    elif not photo.crops:
        yield photograph, photo, 0, None, "several faces" if photo.faces else "no face"
    for number, crop in enumerate(photo.crops):
        if not crop.points:
            yield photograph, photo, number, crop, "no face"
            continue
        misfit, scale = misfit_and_scale(crop, config.size)
        reasons = {
            f"score {crop.score:.2f}": crop.score < config.low_score,
            "several faces": config.several != "all" and crop.rival > config.max_rival,
            f"pose, misfit {misfit:.1f}": misfit > config.max_misfit,
            f"tiny, enlarged {scale:.1f} times": scale > config.max_scale,
        }
        if any(reasons.values()):
            reason = "; ".join(reason for reason, holds in reasons.items() if holds)
            yield photograph, photo, number, crop, reason


def _draw_sheet(path: Path, doubtful: Sequence[_Doubt]) -> None:
    """Draw the photographs with boxes and points, numbered as the rows of `doubtful.csv`."""
    rows = -(-len(doubtful) // TILES_PER_ROW)
    columns = min(len(doubtful), TILES_PER_ROW)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for at, (photograph, photo, _, crop, reason) in enumerate(doubtful):
        x, y = at % TILES_PER_ROW * TILE, at // TILES_PER_ROW * (TILE + CAPTION)
        if not photo.error:
            sheet.paste(_tile(photograph, crop, whole="several" in reason), (x, y))
        name = photograph.name if len(photograph.name) <= 24 else f"...{photograph.name[-21:]}"
        text = f"{at + 1} {name}\n{reason}".encode("latin-1", "replace").decode("latin-1")
        draw.multiline_text((x + 3, y + TILE + 2), text[:60], fill="black", spacing=1)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    with atomic_write(path, sole_writer=True) as file:
        file.write(stream.getvalue())


def _tile(photograph: Photograph, crop: Crop | None, whole: bool) -> Image.Image:
    """The photograph, or the surroundings of its face, with the box and the points."""
    image = open_rgb(photograph.path, photograph.name)
    window = (0.0, 0.0, *map(float, image.size))
    if crop is not None and crop.points and not whole:
        left, top, right, bottom = crop.box
        x, y, half = (left + right) / 2, (top + bottom) / 2, ZOOM * max(right - left, bottom - top) / 2
        window = (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height))
    left, top, right, bottom = (round(side) for side in window)
    scale = (TILE - 4) / max(right - left, bottom - top)
    inner = (max(1, round(scale * (right - left))), max(1, round(scale * (bottom - top))))
    tile = image.resize(inner, Image.Resampling.BILINEAR, (left, top, right, bottom))
    if crop is not None and crop.points:
        draw = ImageDraw.Draw(tile)
        draw.rectangle([scale * (value - (left, top)[at % 2]) for at, value in enumerate(crop.box)], outline=BOX_COLOR)
        for x, y in zip(crop.points[::2], crop.points[1::2], strict=True):
            x, y = scale * (x - left), scale * (y - top)
            draw.rectangle([x - 1, y - 1, x + 1, y + 1], fill=POINT_COLOR)
    return tile
