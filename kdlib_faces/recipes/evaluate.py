"""Recipe: evaluate models, or embeddings that another framework made, on lists of faces, and write a report.

Protocols: genuine pairs by age gap where ages or age groups are known, leave-one-out identification, and ten-fold pair
verification where a pairs file is given.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output, staged
from kdlib_faces.data.images import load_images, to_float
from kdlib_faces.data.listing import FaceList, read_faces
from kdlib_faces.data.pairs import PairList, read_pairs
from kdlib_faces.progress import progress as show
from kdlib_faces.progress import say

__all__ = ["EvaluateConfig", "embed", "embed_faces", "load_model", "protocols_for", "read_embeddings", "run"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are evaluated.

    Attributes:
        batch_size: images in one forward.
        input_size: side of the images, pixels; None takes the model's own.
        flip: add the embedding of the mirrored image before normalising.
        bins: lower edges of the bins of age gaps, years; the last is open.
        fars: false accept rates that TAR is told at.
        ranks: ranks of leave-one-out identification.
        threshold: of pair verification: `"grid"` as published figures have it, or `"exact"`.
        replicates: bootstrap replicates of the intervals.
        level: confidence of the intervals.
        seed: of the bootstrap.
    """

    batch_size: int = 64
    input_size: int | None = None
    flip: bool = True
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    fars: tuple[float, ...] = (1e-2, 1e-3)
    ranks: tuple[int, ...] = (1, 5)
    threshold: Literal["grid", "exact"] = "grid"
    replicates: int = 500
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("EvaluateConfig", "batch_size", self.batch_size, least=1, integer=True)
        if self.input_size is not None:
            check_number("EvaluateConfig", "input_size", self.input_size, least=8, integer=True)


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, int]:
    """A model file as a module in eval mode, and the side of its images in pixels (112 where the file leaves it free).

    `.onnx` is read as an ONNX graph, anything else as a backbone's weights.

    Raises:
        InputError: the file is missing, corrupt, of no known layout, or takes images that are not square.
    """
    model: nn.Module
    if Path(path).suffix.lower() == ".onnx":
        from kdlib_faces.teachers.onnx import OnnxTeacher

        model = OnnxTeacher(path)
    else:
        from kdlib_faces.backbones import load_backbone

        model = load_backbone(path)
    size: Any = getattr(model, "input_size", None)
    if isinstance(size, (tuple, list)):
        if len(set(size)) != 1:
            raise InputError(f"{path}: the model takes images of {size[0]} x {size[1]}, only square ones are evaluated")
        size = size[0]
    return model.eval(), 112 if size is None else int(size)


def embed(model: Callable[[Tensor], Any], images: Tensor, *, batch_size: int = 64, flip: bool = True) -> Tensor:
    """Unit embeddings of images; with `flip`, of the sum of the plain and the mirrored image's embeddings.

    The sum is of embeddings as the model gives them, normalised once at the end, as published figures have it.

    Args:
        model: `(b, 3, s, s)` in `[-1, 1]` to `(b, d)`, or to named features with one `"embedding"`.
        images: `(n, 3, s, s)` uint8.
        batch_size: images in one forward.
        flip: whether to add the mirrored image.

    Returns:
        `(n, d)` float32.

    Examples:
        >>> pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        >>> embed(lambda x: x.flatten(1), pixels, batch_size=2).norm(dim=1).round(decimals=3)
        tensor([1., 1., 1., 1., 1.])
    """
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            inputs = to_float(images[start : start + batch_size])
            embeddings = _embedding(model(inputs))
            if flip:
                embeddings = embeddings + _embedding(model(inputs.flip(-1)))
            parts.append(nn.functional.normalize(embeddings.float(), dim=1))
    return torch.cat(parts)


def _embedding(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = output["embedding"]
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"embed: the model must return embeddings (b, d), got {shape}")
    return output


def embed_faces(
    model: Callable[[Tensor], Any],
    faces: FaceList,
    size: int,
    *,
    batch_size: int = 64,
    flip: bool = True,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Unit embeddings `(n, d)` of a face list, decoded as they are needed, so that memory does not grow with the list."""
    parts = []
    starts = range(0, len(faces), max(batch_size, 64))
    with _eval_mode(model):
        for start in show(starts, f"embeddings of {len(faces)} images, batches", quiet=not progress):
            images = load_images(faces.paths[start : start + starts.step], size)
            parts.append(embed(model, images, batch_size=batch_size, flip=flip).numpy())
    return np.concatenate(parts)


class _eval_mode:  # reads as a function
    def __init__(self, model: object) -> None:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self.modes = [(module, module.training) for module in modules]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def read_embeddings(path: str | os.PathLike[str], count: int) -> NDArray[np.float32]:
    """Embeddings `(n, d)` from a `.npy` file, in the order of the face list.

    Raises:
        InputError: no such file, no array of numbers, pickled objects, another number of rows, or a row that is not
            finite.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"embeddings not found: {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a .npy file of numbers ({str(error).splitlines()[0]})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        shown = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{path}: embeddings must be (n, d) numbers, got {shown}")
    if len(array) != count:
        raise InputError(f"{path}: embeddings must have one row for each of the {count} images, got {len(array)}")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(f"{path}: embeddings must be finite, row {bad[0]} is not ({bad.size} rows in all)")
    return array.astype(np.float32)


def protocols_for(
    faces: FaceList, config: EvaluateConfig, pairs: PairList | None = None
) -> tuple[dict[str, tuple[Any, NDArray[np.int64]]], list[str]]:
    """The protocols that a face list can carry, each with the rows it takes, and notes on what was left out.

    Ages decide the breakdown where at least as many images have one as have an age group, otherwise groups do.
    """
    from kdlib_faces.evaluation import AgeGapProtocol, LeaveOneOutProtocol, PairProtocol

    rows = np.arange(len(faces))
    notes: list[str] = []
    chosen: dict[str, tuple[Any, NDArray[np.int64]]] = {}
    aged = rows[:0] if faces.ages is None else np.flatnonzero(np.isfinite(faces.ages))
    grouped = rows[:0] if faces.age_groups is None else np.flatnonzero(faces.age_groups >= 0)
    known = aged if len(aged) >= len(grouped) else grouped
    if len(known):
        by_age: dict[str, Any] = {}
        if known is aged and faces.ages is not None:
            by_age = {"ages": faces.ages[known], "bins": config.bins}
        elif faces.age_groups is not None:
            by_age = {"age_groups": np.asarray(faces.group_names)[faces.age_groups[known]]}
        protocol = AgeGapProtocol(
            faces.identities[known],
            fars=config.fars,
            replicates=config.replicates,
            seed=config.seed,
            level=config.level,
            **by_age,
        )
        chosen["age_gap"] = (protocol, known)
        if len(known) < len(faces):
            notes.append(f"age gap: {len(known)} of {len(faces)} images, the others have no known age")
    else:
        notes.append("no image has an age or an age group: no evaluation by age gap")
    if pairs is not None:
        pair = PairProtocol(
            pairs.left, pairs.right, pairs.same, pairs.fold_ids, threshold=config.threshold, fars=config.fars
        )
        chosen["verification"] = (pair, rows)
        if pairs.missing:
            notes.append(f"verification: {pairs.missing} pairs left out, their images are not in the list")
    if int(np.bincount(faces.identities).max()) > 1:
        chosen["leave_one_out"] = (LeaveOneOutProtocol(faces.identities, ranks=config.ranks), rows)
    else:
        notes.append("no identity has two images: no leave-one-out identification")
    return chosen, notes


def run(
    config: EvaluateConfig,
    *,
    output: Path,
    faces: Sequence[str | os.PathLike[str]],
    models: Sequence[str | os.PathLike[str]] = (),
    embeddings: Sequence[str | os.PathLike[str]] = (),
    pairs: str | os.PathLike[str] | None = None,
    progress: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate model files and embedding files on face lists, and write a report.

    Args:
        config: how.
        output: folder for report.json, report.md, report.html and figures; it is written when all is done.
        faces: lists, as `read_faces` takes them.
        models: `.onnx` or weight files.
        embeddings: `.npy` files `(n, d)`, rows in the order of the face lists.
        pairs: a pairs file in the format of LFW.
        progress: show how far it is.
        command: noted in the report.

    Returns:
        The content of report.json.

    Raises:
        InputError: any of the files is not usable, or there is nothing to evaluate.
    """
    from kdlib_faces import report
    from kdlib_faces.evaluation import evaluate

    if not models and not embeddings:
        raise InputError("evaluate: at least one model or one file of embeddings is needed, got none")
    check_output(output)
    listed = read_faces(faces)
    pair_list = None if pairs is None else read_pairs(pairs, listed)
    protocols, notes = protocols_for(listed, config, pair_list)
    if not protocols:
        raise InputError(f"evaluate: nothing can be measured on {', '.join(listed.sources)}: {'; '.join(notes)}")
    started = datetime.now(UTC)
    told: dict[str, dict[str, Any]] = {}
    for entry, array in _arrays(config, listed, models, embeddings, progress):
        name = Path(entry["label"]).stem
        name = name if name not in told else f"{name} ({len(told) + 1})"
        results = {}
        for kind, (protocol, rows) in protocols.items():
            result = evaluate(array[rows], protocol)
            results[kind] = result.to_dict()
            missing = result.unresolved() if hasattr(result, "unresolved") else []
            notes += [f"{name}: {line} resolves no such rate" for line in missing]
        told[name] = {**entry, "protocols": results}
    content = {
        "format": 1,
        "title": "Evaluation",
        "command": command,
        "created": started.isoformat(timespec="seconds"),
        "version": version("kdlib-torch"),
        "seeds": [config.seed],
        "config": asdict(config),
        "environment": _environment(),
        "data": {
            "name": ", ".join(Path(source).name for source in listed.sources),
            "test_images": len(listed),
            "test_identities": listed.num_identities,
            "notes": notes,
        },
        "level": config.level,
        "models": told,
    }
    with staged(output) as stage:
        report.write(stage, content)
    say(f"report: {output / 'report.html'}", quiet=not progress)
    return content


def _arrays(
    config: EvaluateConfig,
    faces: FaceList,
    models: Sequence[str | os.PathLike[str]],
    embeddings: Sequence[str | os.PathLike[str]],
    progress: bool,
) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
    """What the report says of each model, and its embeddings; every file is opened before any is run."""
    given = [(path, read_embeddings(path, len(faces))) for path in embeddings]
    loaded = [(path, *load_model(path)) for path in models]
    for path, model, own_size in loaded:
        size = config.input_size if config.input_size is not None else own_size
        begin = time.monotonic()
        array = embed_faces(model, faces, size, batch_size=config.batch_size, flip=config.flip, progress=progress)
        onnx = Path(path).suffix.lower() == ".onnx"
        entry: dict[str, Any] = {
            "role": "teacher" if onnx else "student",
            "label": Path(path).name,
            "backbone": "ONNX" if onnx else repr(model).split("(", 1)[0],
            "input_size": size,
            "embed_seconds": time.monotonic() - begin,
        }
        described = model.describe() if onnx else {}  # type: ignore[operator]  # an OnnxTeacher
        entry["parameters"] = described.get("parameters") if onnx else sum(p.numel() for p in model.parameters())
        entry["macs"] = described.get("macs")
        yield entry, array
    for path, array in given:
        yield {"role": "student", "label": Path(path).name, "backbone": "embeddings from a file"}, array


def _environment() -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
