"""Data of the demo from lists of real faces and two ONNX teachers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.functional import attention_map
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import CPU
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.demo.config import DemoConfig
from kdlib_faces.demo.data import DemoData, DemoModel
from kdlib_faces.demo.start import DemoStart
from kdlib_faces.demo.synthetic import align
from kdlib_faces.evaluation import check_identity_disjoint, identity_disjoint_split
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.progress import progress, say
from kdlib_faces.recipes.joint_target import prepare_student
from kdlib_faces.recipes.liaad import AGE, GENERAL, JOINT, features_read
from kdlib_faces.teachers import FusedTeacher, MappedTeacher, OnnxTeacher, cache_outputs, fit_age_map, read_outputs
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.teachers.onnx.inspect import describe_graph
from kdlib_faces.teachers.open import onnx_taps, open_onnx

__all__ = ["real_data"]

T = TypeVar("T")

TEACHER_SIZE = 112
_BLOCK = 512
_MIN_TEST_IDENTITIES = 4
_MIN_TEST_GAP = 10.0


def real_data(
    config: DemoConfig,
    work: Path,
    faces: Sequence[str],
    teachers: Sequence[str],
    taps: Sequence[str] = (),
    inputs: Sequence[str] = (),
    *,
    start: DemoStart | None = None,
    seed: int,
    quiet: bool,
    device: torch.device = CPU,
) -> DemoData:
    """Read face lists, split identities for the test, and cache the outputs of both teachers on the training images.

    Args:
        config: The configuration.
        work: Folder of the cached outputs; an interrupted run resumes from it.
        faces: Lists or folders, with ages or age groups.
        teachers: Two ONNX files, the general teacher first.
        taps: Tensor of each teacher that is its middle map; without any, one is chosen.
        inputs: Input options of the teachers, as `InputOptions.parse` reads them: one text for both, or one for each.
        start: The network of which the students start as a narrower copy; None for random weights.
        seed: Seed of the split and of the age map.
        quiet: Show no progress.
        device: Device of the teachers.

    Raises:
        InputError: Lists or teachers cannot be used, or too few identities have images of different ages.
    """
    if len(teachers) != 2:
        raise InputError(f"demo: two teachers must be given, the general one first, got {len(teachers)}")
    input_options = inputs_of_models(inputs, len(teachers))
    chosen = [{"embedding": None, "map": tap} for tap in taps] or [
        onnx_taps(path, layout=each.layout) for path, each in zip(teachers, input_options, strict=True)
    ]
    graphs = [
        open_onnx(path, tapped, input_options=each, resize=True, device=device)
        for path, tapped, each in zip(teachers, chosen, input_options, strict=True)
    ]
    face_list = read_faces(faces)
    if face_list.ages is None and face_list.age_groups is None:
        raise InputError(f"demo: the lists {', '.join(faces)} hold neither ages nor age groups; nothing to test by age")
    train_list, test_list = _split(face_list, config.test_fraction, seed)
    say(f"{len(train_list)} training and {len(test_list)} test images", quiet=quiet)

    def shown(items: Iterable[T], label: str) -> Iterable[T]:
        return progress(items, label, quiet=quiet)

    train_images = load_images(train_list, TEACHER_SIZE, progress=shown)
    test_images = load_images(test_list, TEACHER_SIZE, progress=shown)
    identities, codes = np.unique(train_list.identities, return_inverse=True)
    cached = []
    for number, (graph, path, role) in enumerate(zip(graphs, teachers, (GENERAL, AGE), strict=True)):
        reads = "map" in features_read(config.student)[role]
        targets = _StudentTargets(graph, map="attention" if role == AGE and reads else "grid" if reads else None)
        label, folder = f"outputs of {Path(path).stem}", work / f"teacher{number}"
        fingerprint = f"{graph.fingerprint} map: {targets.map}"
        cached.append(cache_outputs(targets, train_images, folder, fingerprint=fingerprint, label=label, quiet=quiet))
    age_map = _age_map(cached[1], train_list, codes, seed, quiet=quiet)
    age_outputs = MappedTeacher(cached[1], {"embedding": age_map})
    # A start has learned from color, and the joint target leaves nothing to learn from the list of an image.
    mixed = start is None and _mixes_gray_and_color(train_images)
    say(f"students see {'luminance' if mixed else 'the images as they are'}, {config.size} pixels", quiet=quiet)
    groups = test_list.age_groups
    data = DemoData(
        title="Two teachers, one light student: real faces, young against adult",
        train_images=_for_students(train_images, config.size, luminance=mixed),
        train_identities=codes,
        num_identities=len(identities),
        test_images=_for_students(test_images, config.size, luminance=mixed),
        test_identities=test_list.identities,
        test_ages=None if groups is not None else test_list.ages,
        test_groups=None if groups is None else np.asarray(test_list.group_names)[groups],
        teachers={
            "general_teacher": _teacher(graphs[0], teachers[0], test_images, None),
            "age_teacher": _teacher(graphs[1], teachers[1], test_images, age_map),
        },
        summary=DataSummary(
            name=", ".join(Path(source).stem for source in faces),
            train_images=len(train_list),
            train_identities=len(identities),
            test_images=len(test_list),
            test_identities=len(np.unique(test_list.identities)),
            notes=[
                "Identities are recognized by name across all lists; no identity of the test set is in the training set.",
                "The teachers may have been trained on some of these identities: compare the models with each other, not "
                "with published tables.",
                "Only the age map of the second teacher is trained with ages or age groups.",
                *(["Some lists are gray and some have color, so both students see luminance only."] if mixed else []),
            ],
        ),
    )
    if start is None:
        data.teacher_outputs = {AGE: age_outputs, GENERAL: align(cached[0], age_outputs, len(train_images))}
        return data
    recipe = replace(config.student, num_identities=len(identities), input_size=config.size, seed=seed)
    _, data.teacher_outputs, data.start = prepare_student(
        recipe, config.start, start.network, {GENERAL: cached[0], AGE: cached[1]}, train_list, data.train_images,
        folder=work, quiet=quiet,
    )  # fmt: skip
    data.teachers["joint_target"] = _joint_target(data, dict(zip((GENERAL, AGE), graphs, strict=True)), test_images)
    data.summary.notes += start.describe(data.start, config.start)
    return data


def _joint_target(data: DemoData, graphs: dict[str, nn.Module], test_images: Tensor) -> DemoModel:
    """Both teachers as one model, whose embedding the distilled student learns."""
    joint = data.teacher_outputs[JOINT]
    assert isinstance(joint, FusedTeacher)
    entries = [data.teachers[name].entry for name in ("general_teacher", "age_teacher")]
    entry = ModelEntry("teacher", backbone="both teachers")
    entry.parameters = joint.matrix.numel() + sum(each.parameters or 0 for each in entries)
    entry.macs = sum(each.macs or 0 for each in entries)
    return DemoModel(FusedTeacher(graphs, joint.matrix), TEACHER_SIZE, entry, test_images)


def _age_map(teacher: nn.Module, faces: FaceList, codes: NDArray[np.int64], seed: int, *, quiet: bool) -> Tensor:
    say("fitting the age map", quiet=quiet)
    plain, mirrored = (read_outputs(teacher, "embedding", torch.arange(len(faces)), view) for view in (0, 1))
    ages = None if faces.ages is None else torch.from_numpy(faces.ages)
    groups = None if faces.age_groups is None else torch.from_numpy(faces.age_groups)
    return fit_age_map(plain + mirrored, torch.from_numpy(codes), ages=ages, age_groups=groups, seed=seed)


def _teacher(graph: OnnxTeacher, path: str, test_images: Tensor, age_map: Tensor | None) -> DemoModel:
    info = describe_graph(path)
    entry = ModelEntry("teacher", backbone=Path(path).stem, parameters=info["parameters"], macs=info["macs"])
    if age_map is None:
        return DemoModel(graph, TEACHER_SIZE, entry, test_images, Path(path))
    parameters = info["parameters"] + age_map.numel()
    entry = replace(entry, backbone=f"{entry.backbone} + age map", parameters=parameters)
    return DemoModel(MappedTeacher(graph, {"embedding": age_map}), TEACHER_SIZE, entry, test_images, Path(path))


class _StudentTargets(nn.Module):
    """The outputs that the student's terms read: the embedding, and the map at 7 x 7 or one channel with its attention.

    The square of that channel, which is what the attention term computes, is the teacher's attention map.
    """

    def __init__(self, graph: OnnxTeacher, *, map: Literal["grid", "attention"] | None) -> None:
        super().__init__()
        self.graph, self.map = graph, map

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = dict(self.graph(images))
        if self.map is None:
            del features["map"]
        elif self.map == "attention":
            attention = attention_map(features["map"])
            scaled = attention / attention.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            features["map"] = scaled.sqrt().unsqueeze(1)
        else:
            features["map"] = F.adaptive_avg_pool2d(features["map"], 7)
        return features


def _split(faces: FaceList, fraction: float, seed: int) -> tuple[FaceList, FaceList]:
    """A share of the identities with images of different ages for the test; all other identities for training."""
    spread = []
    for identity in range(faces.num_identities):
        rows = np.flatnonzero(faces.identities == identity)
        if faces.age_groups is not None:
            cross_age = len(set(faces.age_groups[rows].tolist()) - {-1}) > 1
        else:
            years = np.asarray(faces.ages)[rows]
            gap = np.nanmax(years, initial=0.0) - np.nanmin(years, initial=200.0)
            cross_age = len(rows) > 1 and bool(gap >= _MIN_TEST_GAP)
        if cross_age:
            spread.append(identity)
    count = round(fraction * len(spread))
    if count < _MIN_TEST_IDENTITIES:
        needed = f"{_MIN_TEST_IDENTITIES} identities with images of different ages"
        raise InputError(f"demo: the test needs at least {needed}, got {count} of {len(spread)}")
    kept, _ = identity_disjoint_split(np.asarray(spread), (fraction, 1.0 - fraction), seed=seed)
    held = np.isin(faces.identities, np.asarray(spread)[kept])
    known = faces.age_groups >= 0 if faces.age_groups is not None else np.isfinite(np.asarray(faces.ages))
    train, test = faces.subset(np.flatnonzero(~held)), faces.subset(np.flatnonzero(held & known))
    names = [np.asarray(part.identity_names)[part.identities] for part in (train, test)]
    check_identity_disjoint(names[0], names[1])
    return train, test


def _mixes_gray_and_color(images: Tensor) -> bool:
    """Whether color reveals which list an image is from; a student would learn that instead of faces."""
    gray = sum(int((part == part[:, :1]).flatten(1).all(dim=1).sum()) for part in torch.split(images, _BLOCK))
    return 0.02 * len(images) < gray < 0.98 * len(images)


def _for_students(images: Tensor, size: int, *, luminance: bool) -> Tensor:
    """uint8 images in the student's size; with `luminance` (ITU-R 601), its value in all three channels."""
    if images.shape[-1] == size and not luminance:
        return images
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    weight = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    for start in range(0, len(images), _BLOCK):
        part = images[start : start + _BLOCK].float()
        if images.shape[-1] != size:
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
        if luminance:
            part = (part * weight).sum(1, keepdim=True)
        out[start : start + _BLOCK] = part.round_().clamp_(0, 255).to(torch.uint8)
    return out
