"""The start of a student: a teacher made narrower, with its last layer fitted to the distillation target."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number, check_type
from kdlib.cache import model_fingerprint
from kdlib.compression import ShrinkStep, shrink
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware
from kdlib_faces.backbones import Backbone, InputSpec, count_macs, count_parameters, load_backbone, save_backbone
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.backbones.input_statistics import input_statistics
from kdlib_faces.backbones.registry import build_backbone
from kdlib_faces.caching.teachers import targets_read
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.images import to_float
from kdlib_faces.progress import progress, say
from kdlib_faces.teachers.input_options import InputOptions
from kdlib_faces.teachers.open import load_pretrained

__all__ = [
    "StartConfig", "Target", "fit_last_layer", "load_start", "restore_norms", "shrink_teacher", "start_student",
]  # fmt: skip

Target: TypeAlias = Callable[[Tensor, int], Tensor]
"""Maps rows `(n,)` and a view, 1 for mirrored images, to the distillation target `(n, d)`."""

L = TypeVar("L", nn.Conv2d, nn.Linear)

ONE_PROCESS = Hardware()
_BATCH = 64
_RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
_HELD_OUT = 5  # every fifth image chooses the ridge parameter


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """A student that starts as a narrower copy of a teacher.

    Attributes:
        keep: Fraction of the channels that stay in every layer.
        last_grid: Channels of the last feature map, which a linear layer flattens; 0 for the fraction `keep`. In a
            light network this layer has most of the parameters.
        images: Images on which channels are chosen and layers are refitted.
        criterion: `"reconstruction"` or `"energy"`, as for `kdlib.compression.shrink`.
        norms: Train with a BatchNorm behind each convolution that had one before it was folded, see `restore_norms`. The student
            is more accurate after the same number of images.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    keep: float = 0.5
    last_grid: int = 32
    images: int = 2000
    criterion: str = "reconstruction"
    norms: bool = True

    def __post_init__(self) -> None:
        check_number("StartConfig", "keep", self.keep, above=0, max=1)
        check_number("StartConfig", "last_grid", self.last_grid, min=0, integer=True)
        check_number("StartConfig", "images", self.images, min=16, integer=True)
        check_choice("StartConfig", "criterion", self.criterion, ("reconstruction", "energy"))
        check_type("StartConfig", "norms", self.norms, bool, "true or false")


def load_start(
    start: str, inputs: Mapping[str, InputOptions] | None = None, *, size: int | None = None
) -> Backbone | None:
    """Read the network of `--start shrink:FILE`; None for `"scratch"`.

    Args:
        start: The option.
        inputs: Path of a teacher to its input options, which also apply where the start is that file.
        size: Side of the student's images, pixels; None for those of the network, which must be square.

    Returns:
        The network in eval mode, or None.

    Raises:
        InputError: The start is unknown, its file cannot be used, holds no backbone of this package, or takes other images
            than students do.
    """
    if start == "scratch":
        return None
    kind, _, path = start.partition(":")
    if kind != "shrink" or not path:
        raise InputError(f"--start must be 'scratch' or 'shrink:FILE', got {start!r}")
    network = load_pretrained(path, (inputs or {}).get(path, InputOptions()))
    if not isinstance(network, Backbone):
        raise InputError(f"--start shrink: the file must hold a backbone, got {type(network).__name__}")
    if network.input_spec.describe() != InputSpec(size=network.input_size).describe():
        raise InputError(
            f"--start shrink: the network must take RGB images as (pixel - 127.5) / 127.5, as students do; it takes "
            f"{network.input_spec.describe()}"
        )
    height, width = height_width("load_start", network.input_size)
    side = width if size is None else size
    if (height, width) != (side, side):
        raise InputError(
            f"--start shrink: the network takes images of {height} x {width} pixels, the student's have {side} x {side}"
        )
    return network


def start_student(
    network: Backbone,
    images: Tensor | FaceImages,
    config: StartConfig,
    *,
    folder: Path,
    seed: int,
    quiet: bool,
    hardware: Hardware = ONE_PROCESS,
    joint: nn.Module | None,
) -> Backbone:
    """Make the student of `--start shrink:FILE`, or read it from the folder of an interrupted run.

    Args:
        network: The network of `load_start`.
        images: The training images `(n, 3, h, w)` uint8.
        config: Channels to keep.
        folder: Folder of the run, where the start is stored.
        seed: Seed of the choice of images.
        quiet: Show no progress.
        hardware: The process of the run; the first one makes the start.
        joint: The joint teacher, to whose embeddings the last layer is fitted; None keeps the embedding of the file.

    Returns:
        The student.

    Raises:
        InputError: The folder cannot be written, or the network has no last linear layer.
    """
    parts = [model_fingerprint(network), repr(config), str(seed), str(tuple(images.shape))]
    parts += [] if joint is None else [model_fingerprint(joint)]
    saved = folder / f"start-{sha256(' '.join(parts).encode()).hexdigest()[:12]}.safetensors"
    if hardware.first and not saved.exists():
        say("making a narrower copy of the teacher", quiet=quiet)
        show = partial(say, quiet=quiet)
        student = shrink_teacher(network, images, config, seed=seed, on_step=lambda step: show(f"  {step}"))
        if joint is not None:
            fit = partial(progress, label="fitting the last layer", quiet=quiet)
            cosine = fit_last_layer(student, images, lambda rows, view: _target(joint, rows, view), progress=fit)
            say(f"start: cosine {cosine:.3f} to the joint target, without training", quiet=quiet)
        if config.norms:
            restore_norms(student, images[_calibration(len(images), config, seed)])
        folder.mkdir(parents=True, exist_ok=True)
        save_backbone(student, saved)
    hardware.wait_for_all()
    student = load_backbone(saved)
    say(
        f"start: {count_parameters(student):,} parameters, {count_macs(student, student.input_size) / 1e6:.0f} M multiply-adds",
        quiet=quiet,
    )
    return student


def _target(joint: nn.Module, rows: Tensor, view: int) -> Tensor:
    read = targets_read(joint, {"sample": rows, "view": torch.full_like(rows, view)})
    target: Tensor = joint(*read)["embedding"]
    return target


def shrink_teacher(
    network: Backbone,
    images: Tensor | FaceImages,
    config: StartConfig,
    *,
    seed: int,
    on_step: Callable[[ShrinkStep], None] | None = None,
) -> Backbone:
    """Make a narrower copy of a network that reproduces it on training images.

    Args:
        network: A backbone that takes the images as students do.
        images: `(n, 3, h, w)` uint8.
        config: Channels to keep.
        seed: Seed of the choice of images.
        on_step: Called after each layer.

    Returns:
        The narrow network in eval mode, with BatchNorms folded into the layers before them.

    Raises:
        InputError: The network has no convolution or no linear layer.
    """
    batches = [to_float(images[rows]) for rows in torch.split(_calibration(len(images), config, seed), _BATCH)]
    widths = {}
    (layer, last), (_, linear) = _last(network, nn.Conv2d), _last(network, nn.Linear)
    if config.last_grid and linear.in_features > last.out_channels > config.last_grid:
        widths[layer] = config.last_grid
    return shrink(
        network, batches, keep=config.keep, widths=widths, fold_norms=True, criterion=config.criterion, seed=seed, on_step=on_step
    )  # fmt: skip


def _calibration(count: int, config: StartConfig, seed: int) -> Tensor:
    """Return the rows of the images on which the network is measured."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: config.images]


@torch.no_grad()
def restore_norms(network: Backbone, images: Tensor) -> None:
    """Put a BatchNorm back behind each convolution whose BatchNorm was folded into it, without a change of the outputs.

    The running statistics are those of the convolution on the images, and weight and bias undo them, so that the network in
    eval mode stays the same. In training mode the values are normalized by the statistics of the batch.

    Args:
        network: A network with folded BatchNorms, in eval mode; changed in place.
        images: `(n, 3, h, w)` uint8.
    """
    with torch.device("meta"):
        full = build_backbone(network.family, **network.arguments)
    found = _folded_norms(network, full)
    folded = {norm: network.get_submodule(norm) for norm in found}
    batches = (to_float(batch) for batch in torch.split(images, _BATCH))
    statistics = input_statistics(network, list(folded.values()), batches)
    for norm, layer in found.items():
        mean, variance = statistics[folded[norm]]
        new = nn.BatchNorm2d(layer.out_channels).eval()
        new.weight.copy_((variance + new.eps).sqrt())
        new.bias.copy_(mean)
        shift = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
        new.load_state_dict({**new.state_dict(), "running_mean": mean - shift, "running_var": variance})
        layer.bias = None
        *parents, name = norm.split(".")
        setattr(network.get_submodule(".".join(parents)), name, new)


def _folded_norms(network: nn.Module, full: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the paths of folded BatchNorms, each with the convolution before it."""
    found: dict[str, nn.Conv2d] = {}
    layer: nn.Module | None = None
    for path, module in full.named_modules():
        if isinstance(module, nn.Conv2d):
            layer = network.get_submodule(path)
        elif isinstance(module, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
            if isinstance(network.get_submodule(path), nn.Identity):
                found[path] = layer
            layer = None
    return found


def _last(network: nn.Module, kind: type[L]) -> tuple[str, L]:
    """Return the path and the last layer of a kind; the last linear layer makes the embedding."""
    layers = [(path, each) for path, each in network.named_modules() if isinstance(each, kind)]
    if not layers:
        raise InputError(f"--start shrink: the network must have a {kind.__name__} layer, got none")
    return layers[-1]


@torch.no_grad()
def fit_last_layer(
    network: Backbone,
    images: Tensor | FaceImages,
    target: Target,
    *,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> float:
    """Replace the layer that makes the embedding by the ridge regression of its input on the target.

    Plain and mirrored images enter the regression. The ridge parameter is chosen by the mean cosine on every fifth image;
    the layer is then fitted on all.

    Args:
        network: A network whose last layer is linear; changed in place.
        images: `(n, 3, h, w)` uint8.
        target: The distillation target of rows and views.
        progress: Iterates over the batches of rows, to show progress.

    Returns:
        The mean cosine to the target on the held-out images.
    """
    path, linear = _last(network, nn.Linear)
    found: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    size = linear.in_features + 1
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in range(2)]
    products: list[Tensor] = []
    held: list[tuple[Tensor, Tensor]] = []
    parts = list(torch.split(torch.arange(len(images)), _BATCH))
    try:
        for rows in progress(parts):
            for view in (0, 1):
                found.clear()
                pixels = to_float(images[rows])
                network(pixels.flip(3) if view else pixels)
                x = torch.cat([found[0], torch.ones(len(rows), 1)], 1)
                y = target(rows, view).float()
                chosen = rows % _HELD_OUT == 0
                if not products:
                    products = [torch.zeros(size, y.shape[1], dtype=torch.float64) for _ in range(2)]
                held.append((x[chosen], y[chosen]))
                for number, mask in enumerate((~chosen, chosen)):
                    moments[number] += x[mask].double().T @ x[mask].double()
                    products[number] += x[mask].double().T @ y[mask].double()
    finally:
        handle.remove()
    inputs, targets = (torch.cat(each) for each in zip(*held, strict=True))
    scores = {}
    for ridge in _RIDGES:
        weight = _solve(moments[0], products[0], ridge).float()
        scores[ridge] = float(nn.functional.cosine_similarity(inputs @ weight, targets).mean())
    best = max(scores, key=lambda ridge: scores[ridge])
    weight = _solve(moments[0] + moments[1], products[0] + products[1], best).float().T
    new = nn.Linear(linear.in_features, weight.shape[0])
    new.weight.copy_(weight[:, :-1])
    new.bias.copy_(weight[:, -1])
    *parents, name = path.split(".")
    setattr(network.get_submodule(".".join(parents)), name, new)
    network.embedding_dim = weight.shape[0]
    return scores[best]


def _solve(moments: Tensor, products: Tensor, ridge: float) -> Tensor:
    """Solve the normal equations; the bias, the last entry, is not shrunk."""
    penalty = ridge * moments.diagonal()[:-1].mean()
    diagonal = torch.cat([penalty.expand(len(moments) - 1), torch.full((1,), 1e-9, dtype=moments.dtype)])
    solution: Tensor = torch.linalg.solve(moments + torch.diag(diagonal), products)
    return solution
