"""Options for the images that a model takes, which override what its file implies."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec
from kdlib_faces.teachers.onnx.graph import Layout

__all__ = ["InputOptions", "inputs_of_models"]

AS_RECOGNIZED = "auto"


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Color order, normalization and layout of a model's input: `(pixel - mean) / scale` of pixels from 0 to 255.

    A field that is None is read from the file: from the layout of a checkpoint, or from the first operations of an ONNX graph.

    Attributes:
        color: `"rgb"` or `"bgr"`.
        mean: One value, or one per channel in the order of `color`.
        scale: One value, or one per channel, above 0.
        layout: `"bchw"` or `"bhwc"`, the order of the dimensions of an ONNX graph's input.

    Raises:
        ValueError, TypeError: A value is out of range.

    Examples:
        >>> InputOptions.parse("color=bgr,mean=104:117:124,scale=1")
        InputOptions(color='bgr', mean=(104.0, 117.0, 124.0), scale=1.0, layout=None)
    """

    color: Literal["rgb", "bgr"] | None = None
    mean: float | tuple[float, float, float] | None = None
    scale: float | tuple[float, float, float] | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_choice("InputOptions", "layout", self.layout, ("bchw", "bhwc"))
        self.applied_to(InputSpec())

    @classmethod
    def parse(cls, text: str) -> "InputOptions":
        """Parse `KEY=VALUE,...`; `"auto"` and an empty text leave every field None.

        Raises:
            InputError: The text has another form, an unknown key, or a value out of range.
        """
        values: dict[str, object] = {}
        for part in text.split(",") if text not in ("", AS_RECOGNIZED) else ():
            key, _, value = part.strip().partition("=")
            if key not in ("color", "mean", "scale", "layout") or key in values or not value:
                raise InputError(
                    f"--input must be 'auto' or some of color=rgb|bgr, mean=N or N:N:N, scale=N or N:N:N and layout=bchw|bhwc, "
                    f"separated by commas, got {text!r}"
                )
            values[key] = value if key in ("color", "layout") else _numbers(text, value)
        try:
            return cls(**values)  # type: ignore[arg-type]  # checked by the constructor
        except (ValueError, TypeError) as error:
            raise InputError(f"--input {text}: {error}") from error

    def __str__(self) -> str:
        """The text that `parse` reads."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        texts = {
            key: ":".join(map(repr, value)) if isinstance(value, tuple) else str(value) for key, value in given.items()
        }
        return ",".join(f"{key}={value}" for key, value in texts.items()) or AS_RECOGNIZED

    def applied_to(self, spec: InputSpec) -> InputSpec:
        """Return the specification with the fields that are not None replaced."""
        return spec.changed(color=self.color, mean=self.mean, scale=self.scale)


def _numbers(text: str, value: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(each) for each in value.split(":"))
    except ValueError:
        raise InputError(f"--input {text}: {value!r} must be a number, or three separated by colons") from None
    return numbers[0] if len(numbers) == 1 else numbers


def inputs_of_models(given: Sequence[str], count: int) -> list[InputOptions]:
    """Return the options of each of `count` models: none, one text for all of them, or one for each in order.

    Raises:
        InputError: There is another number of texts, or one cannot be parsed.

    Examples:
        >>> [str(each) for each in inputs_of_models(["auto", "color=bgr"], 2)]
        ['auto', 'color=bgr']
    """
    if given and not count:
        raise InputError("--input states the images of models, and no model is given")
    if len(given) not in (0, 1, count):
        raise InputError(f"--input must be given once, or once for each of the {count} models, got {len(given)}")
    options = [InputOptions.parse(text) for text in given] or [InputOptions()]
    return options * (count if len(options) == 1 else 1)
