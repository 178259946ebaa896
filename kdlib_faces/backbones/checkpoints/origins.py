"""Projects that share a layout but are identified by their wrappers."""

from dataclasses import dataclass, field

from kdlib_faces.backbones.checkpoints.unwrap import Unwrapped
from kdlib_faces.backbones.input_spec import SpecFields
from kdlib_faces.backbones.networks.base import Arguments

__all__ = ["Origin", "find_origin"]


@dataclass(frozen=True)
class Origin:
    """A project that is identified by how it wraps a shared layout."""

    about: str
    layouts: tuple[str, ...]
    prefixes: tuple[str, ...]
    when: Arguments = field(default_factory=dict)  # arguments that its networks have
    wrapper: str = "state_dict"
    around: str = ""  # another entry of the wrapper
    beside: str = ""  # a key of its margin head
    input: SpecFields = field(default_factory=SpecFields)
    arguments: Arguments = field(default_factory=dict)  # those that keys and shapes do not determine
    certain: bool = True  # whether no other known project uses the same wrapper


MAGFACE = SpecFields(color="bgr", mean=0.0, scale=255.0)
EVOLVE_KIND: Arguments = {"mid_norm": False, "affine": True}
ADAFACE_KIND: Arguments = {"mid_norm": True, "affine": False}


def _facex_zoo(layout: str, when: Arguments, normalized: bool) -> tuple[Origin, Origin]:
    """Return the origins with and without the entry `batch_id`, which identifies FaceX-Zoo with certainty."""
    fields = SpecFields(color="bgr", mean=127.5, scale=128.0, normalized=normalized)
    return (
        Origin("FaceX-Zoo", (layout,), ("backbone.",), when=when, around="batch_id", input=fields),
        Origin("FaceX-Zoo", (layout,), ("backbone.",), when=when, input=fields, certain=False),
    )


ORIGINS = (
    Origin(
        "MagFace",
        ("insightface_iresnet",),
        ("features.module.", "module.features."),
        input=MAGFACE,
        arguments={"norm_eps": 2e-5},
    ),
    Origin("AdaFace", ("ir",), ("model.",), when=ADAFACE_KIND, beside="head.kernel", input=SpecFields(color="bgr")),
    *_facex_zoo("mobilefacenet", {}, normalized=False),
    *_facex_zoo("ir", EVOLVE_KIND, normalized=True),
    Origin("bubbliiiing", ("insightface_iresnet",), ("arcface.",), wrapper="", input=SpecFields(normalized=True)),
)


def find_origin(layout: str, arguments: Arguments, unwrapped: Unwrapped) -> Origin | None:
    """Return the first project whose wrappers match the file."""
    return next(
        (
            origin
            for origin in ORIGINS
            if layout in origin.layouts
            and unwrapped.prefix in origin.prefixes
            and all(arguments.get(name) == value for name, value in origin.when.items())
            and (not origin.wrapper or origin.wrapper in unwrapped.wrappers)
            and (not origin.around or origin.around in unwrapped.around)
            and (not origin.beside or origin.beside in unwrapped.beside)
        ),
        None,
    )
