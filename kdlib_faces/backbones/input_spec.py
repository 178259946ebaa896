"""Input specification of a network: size, channel order and normalization of its images."""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from kdlib._checks import check_choice, check_floating, check_number, check_shape

__all__ = ["InputSize", "InputSpec", "SpecFields", "Triple", "height_width"]

InputSize = int | tuple[int, int]
"""Side of square images, or (height, width), in pixels."""

Triple = float | tuple[float, float, float]
COLORS = ("rgb", "bgr")
FIELDS = ("color", "mean", "scale", "normalized")


class SpecFields(TypedDict, total=False):
    """Fields of `InputSpec` without the size."""

    color: Literal["rgb", "bgr"] | None
    mean: Triple | None
    scale: Triple | None
    normalized: bool | None
    assumed: tuple[str, ...]


def height_width(owner: str, input_size: InputSize) -> tuple[int, int]:
    """Return a size as (height, width), both from 1 to 4096 pixels."""
    pair = tuple(input_size) if isinstance(input_size, list | tuple) else (input_size, input_size)
    if len(pair) != 2:
        raise ValueError(f"{owner}: input_size must be a side or (height, width) in pixels, got {input_size!r}")
    for side in pair:
        check_number(owner, "input_size", side, min=1, max=4096, integer=True)
    return int(pair[0]), int(pair[1])


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Size, channel order and normalization of a network's images, and whether the original normalized its embeddings.

    For pixels from 0 to 255, the network expects `(pixel - mean) / scale` with channels in the order of `color`.
    Calling the specification converts images in the convention of this library, RGB and `(pixel - 127.5) / 127.5`.

    Args:
        size: side of the square images, or (height, width), in pixels.
        color: `"rgb"` or `"bgr"`.
        mean: one value, or one per channel in the order of `color`.
        scale: one value, or one per channel, above 0.
        normalized: whether the project that published the network normalizes the embedding; None if files of this
            layout differ. The networks of this library never do.
        assumed: names of fields that the file does not determine and that differ between files of its layout.

    Raises:
        ValueError: unknown color, size or scale not above 0, or unknown name in `assumed`.
        TypeError: a value has the wrong type.

    Examples:
        >>> import torch
        >>> spec = InputSpec(size=4, color="bgr", mean=0.0, scale=255.0)
        >>> images = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)  # red 255, green 127.5, blue 0
        >>> spec(images)[0, :, 0, 0]
        tensor([0.0000, 0.5000, 1.0000])
        >>> InputSpec(size=(112, 96))(torch.zeros(1, 3, 112, 112)).shape
        torch.Size([1, 3, 112, 96])
    """

    size: InputSize = 112
    color: Literal["rgb", "bgr"] = "rgb"
    mean: Triple = 127.5
    scale: Triple = 127.5
    normalized: bool | None = False
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = height_width("InputSpec", self.size)
        object.__setattr__(self, "size", size if isinstance(self.size, list | tuple) else size[0])
        check_choice("InputSpec", "color", self.color, COLORS)
        for name in ("mean", "scale"):
            value: Any = getattr(self, name)
            several = np.ndim(value) > 0 or isinstance(value, list | tuple)
            if several and len(value) != 3:
                raise ValueError(f"InputSpec: {name} must be one number or three, got {value!r}")
            for each in value if several else (value,):
                check_number("InputSpec", name, each, above=0 if name == "scale" else None)
            object.__setattr__(self, name, tuple(map(float, value)) if several else float(value))
        if self.normalized not in (True, False, None):
            raise TypeError(f"InputSpec: normalized must be True, False or None, got {self.normalized!r}")
        object.__setattr__(self, "assumed", tuple(self.assumed))
        for name in self.assumed:
            check_choice("InputSpec", "assumed", name, FIELDS)

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images to the input of the network.

        Args:
            images: `(b, 3, h, w)`, RGB, in [-1, 1]. Images of another size are scaled by one factor to cover `size` and
                center-cropped: aligned crops of 112 x 112 lose 8 columns on each side to become 112 x 96.

        Returns:
            `(b, 3, *size)` with the same dtype; `images` itself if nothing changes.
        """
        check_floating("InputSpec", images=images)
        check_shape("InputSpec", "images", images, "b c h w", c=3)
        images = self._sized(images)
        if self.color == "bgr":
            images = images.flip(1)
        if self.mean == 127.5 and self.scale == 127.5:
            return images
        # (127.5 x + 127.5 - mean) / scale
        scale, mean = (images.new_tensor(value).view(-1, 1, 1) for value in (self.scale, self.mean))
        return images * (127.5 / scale) + (127.5 - mean) / scale

    def _sized(self, images: Tensor) -> Tensor:
        height, width = height_width("InputSpec", self.size)
        rows, columns = images.shape[-2:]
        if (rows, columns) == (height, width):
            return images
        factor = max(height / rows, width / columns)
        cover = (max(height, round(rows * factor)), max(width, round(columns * factor)))
        if cover != (rows, columns):
            images = F.interpolate(images, cover, mode="bilinear", antialias=True, align_corners=False)
        top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
        return images[..., top : top + height, left : left + width]

    def changed(self, **fields: Unpack[SpecFields]) -> "InputSpec":
        """Return a copy with the given fields that are not None, which are then no longer assumed.

        Raises:
            ValueError: a value is invalid.
        """
        given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        return replace(self, **given, assumed=tuple(name for name in self.assumed if name not in given))

    def fields(self) -> dict[str, object]:
        """Return all fields but the size as plain values, for a file."""
        values = {name: getattr(self, name) for name in (*FIELDS, "assumed")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def describe(self) -> str:
        """Describe the specification on one line.

        Examples:
            >>> InputSpec(color="bgr", assumed=("color",)).describe()
            'BGR (assumed), (pixel - 127.5) / 127.5, 112 x 112'
        """

        def text(value: Triple) -> str:
            return f"{value:g}" if not isinstance(value, tuple) else f"({', '.join(f'{each:g}' for each in value)})"

        mark = {name: " (assumed)" if name in self.assumed else "" for name in FIELDS}
        height, width = height_width("InputSpec", self.size)
        values = "pixel" if self.mean == 0 else f"(pixel - {text(self.mean)})"
        values = f"{values} / {text(self.scale)}"
        assumed = mark["mean"] or mark["scale"]
        return f"{self.color.upper()}{mark['color']}, {values}{assumed}, {height} x {width}"
