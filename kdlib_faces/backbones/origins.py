"""Backbones room, private: projects that share a layout and wrap it in a way of their own. Touches names only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdlib_faces.backbones.unwrap import Unwrapped

__all__ = ["Origin", "find_origin"]


@dataclass(frozen=True)
class Origin:
    """A project that shares another's layout but wraps it in a way of its own, and what is known of it alone.

    Attributes:
        about: whose.
        layouts: those it shares.
        prefixes: what it puts before each key, one of these.
        when: arguments that its networks have.
        wrapper: the entry that holds the state dict, if any.
        around: an entry beside that.
        beside: a key of the head that it keeps beside the network.
        input: what its images are, in the words of `InputSpec`.
        arguments: those of the network that no key or shape tells.
        certain: whether no other project is known to wrap the layout so.
    """

    about: str
    layouts: tuple[str, ...]
    prefixes: tuple[str, ...]
    when: tuple[tuple[str, Any], ...] = ()
    wrapper: str = "state_dict"
    around: str = ""
    beside: str = ""
    input: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    certain: bool = True


MAGFACE = (("color", "bgr"), ("mean", 0.0), ("scale", 255.0))
FACEX_ZOO = (("color", "bgr"), ("mean", 127.5), ("scale", 128.0))
EVOLVE_KIND = (("mid_norm", False), ("affine", True))
ADAFACE_KIND = (("mid_norm", True), ("affine", False))


def _facex_zoo(layout: str, when: tuple[tuple[str, Any], ...], normalized: bool) -> tuple[Origin, Origin]:
    """Its own entry `batch_id` makes certain what `backbone.` alone leaves likely."""
    told = (*FACEX_ZOO, ("normalized", normalized))
    return (
        Origin("FaceX-Zoo", (layout,), ("backbone.",), when=when, around="batch_id", input=told),
        Origin("FaceX-Zoo", (layout,), ("backbone.",), when=when, input=told, certain=False),
    )


ORIGINS = (
    Origin(
        "MagFace",
        ("insightface_iresnet",),
        ("features.module.", "module.features."),
        input=MAGFACE,
        arguments=(("norm_eps", 2e-5),),
    ),
    Origin("AdaFace", ("ir",), ("model.",), when=ADAFACE_KIND, beside="head.kernel", input=(("color", "bgr"),)),
    *_facex_zoo("mobilefacenet", (), normalized=False),
    *_facex_zoo("ir", EVOLVE_KIND, normalized=True),
    Origin("bubbliiiing", ("insightface_iresnet",), ("arcface.",), wrapper="", input=(("normalized", True),)),
)


def find_origin(layout: str, arguments: Mapping[str, Any], unwrapped: Unwrapped) -> Origin | None:
    """The first project that wraps this layout as the file does."""
    return next(
        (
            origin
            for origin in ORIGINS
            if layout in origin.layouts
            and unwrapped.prefix in origin.prefixes
            and all(arguments.get(name) == value for name, value in origin.when)
            and (not origin.wrapper or origin.wrapper in unwrapped.wrappers)
            and (not origin.around or origin.around in unwrapped.around)
            and (not origin.beside or origin.beside in unwrapped.beside)
        ),
        None,
    )
