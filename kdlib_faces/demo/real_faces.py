"""Recipes room: the demo's material on real faces. Splits people, runs two ONNX teachers once, fits the age map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.functional import attention_map
from kdlib_faces._checks import InputError
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.demo.stages import DemoData, Model
from kdlib_faces.demo.synthetic import aligned
from kdlib_faces.evaluation import check_identity_disjoint, identity_disjoint_split
from kdlib_faces.progress import progress, say
from kdlib_faces.recipes.liaad import AGE, GENERAL
from kdlib_faces.teachers import MappedTeacher, OnnxTeacher, cache_outputs, fit_age_map, read_outputs
from kdlib_faces.teachers.onnx.inspect import describe_graph
from kdlib_faces.teachers.open import onnx_taps

__all__ = ["real_data"]

TEACHER_SIZE = 112


def real_data(
    config: Any,
    work: Path,
    faces: Sequence[str],
    teachers: Sequence[str],
    taps: Sequence[str] = (),
    *,
    seed: int,
    quiet: bool,
) -> DemoData:
    """Read lists, keep some people apart for the test, and let both teachers look at all others once."""
    if len(teachers) != 2:
        raise InputError(f"demo: two teachers must be given, the general one first, got {len(teachers)}")
    chosen = [{"embedding": None, "map": tap} for tap in taps] or [onnx_taps(path) for path in teachers]
    graphs = [OnnxTeacher(path, each, resize=True) for path, each in zip(teachers, chosen, strict=True)]
    everyone = read_faces(faces)
    if everyone.ages is None and everyone.age_groups is None:
        raise InputError(f"demo: the lists {', '.join(faces)} hold neither ages nor age groups; nothing to test by age")
    train_list, test_list = _split(everyone, config.test_fraction, seed)

    def shown(items: Any, label: str) -> Any:
        return progress(items, label, quiet=quiet)

    say(f"{len(train_list)} training and {len(test_list)} test images", quiet=quiet)
    big = load_images(train_list, TEACHER_SIZE, progress=shown)
    test_big = load_images(test_list, TEACHER_SIZE, progress=shown)
    people, codes = np.unique(train_list.identities, return_inverse=True)
    recorded = [
        cache_outputs(
            _Smaller(graph, attention=number == 1),
            big,
            work / f"teacher{number}",
            fingerprint=f"{graph.fingerprint} {number}",
            label=f"outputs of {Path(path).stem}",
            quiet=quiet,
        )
        for number, (graph, path) in enumerate(zip(graphs, teachers, strict=True))
    ]
    say("fitting the age map", quiet=quiet)
    samples = torch.arange(len(big))
    plain, mirrored = (read_outputs(recorded[1], "embedding", samples, view) for view in (0, 1))
    ages = None if train_list.ages is None else torch.from_numpy(train_list.ages)
    groups = None if train_list.age_groups is None else torch.from_numpy(train_list.age_groups)
    age_map = fit_age_map(plain + mirrored, torch.from_numpy(codes), ages=ages, age_groups=groups, seed=seed)
    age_teacher = MappedTeacher(recorded[1], {"embedding": age_map})
    turned = aligned(recorded[0], age_teacher, len(big))

    def through(matrix: Tensor | None, graph: OnnxTeacher) -> Any:
        def embed(images: Tensor) -> Tensor:
            out = graph(_sized(images, TEACHER_SIZE))["embedding"]
            moved: Tensor = out if matrix is None else F.normalize(out, dim=1) @ matrix
            return moved

        return embed

    models = {}
    for name, graph, path, matrix in (
        ("general_teacher", graphs[0], teachers[0], None),
        ("age_teacher", graphs[1], teachers[1], age_map),
    ):
        about = describe_graph(path)
        models[name] = Model(
            embed=through(matrix, graph),
            maps=_maps(graph),
            role="teacher",
            backbone=Path(path).stem + ("" if matrix is None else " + age map"),
            parameters=int(about["parameters"]) + (0 if matrix is None else matrix.numel()),
            macs=about["macs"],
            input_size=TEACHER_SIZE,
            test_images=test_big,
        )
    mixed = _mixes_gray_and_color(big)
    students_see = "luminance" if mixed else "what the files hold"
    say(f"students see {students_see}, {config.size} pixels", quiet=quiet)
    return DemoData(
        title="Two teachers, one light student: real faces, young against adult",
        train_images=_for_students(big, config.size, luminance=mixed),
        train_identities=codes,
        num_identities=len(people),
        test_images=_for_students(test_big, config.size, luminance=mixed),
        test_identities=test_list.identities,
        test_ages=None if test_list.age_groups is not None else test_list.ages,
        test_groups=test_list.age_groups,
        group_names=test_list.group_names,
        teachers=models,
        recorded={AGE: age_teacher, GENERAL: turned},
        data={
            "name": ", ".join(Path(source).stem for source in faces),
            "train_images": len(train_list),
            "train_identities": len(people),
            "test_images": len(test_list),
            "test_identities": len(np.unique(test_list.identities)),
            "notes": [
                "People are told apart by name across all lists; no person of the test is in the training.",
                "The teachers may have seen any of these people: compare the models with each other, not with published tables.",
                "Ages or age groups are read by the age map of the second teacher alone.",
                *(["Some lists are gray and some have color: both students see luminance alone."] if mixed else []),
            ],
        },
    )


def _maps(graph: OnnxTeacher) -> Any:
    return lambda images: graph(_sized(images, TEACHER_SIZE))["map"]


class _Smaller(nn.Module):
    """What the student's terms read of the middle stage: where the age teacher looks, or the general one's map at 7 x 7."""

    def __init__(self, graph: OnnxTeacher, *, attention: bool) -> None:
        super().__init__()
        self.graph, self.attention = graph, attention

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = dict(self.graph(images))
        if self.attention:
            looks = attention_map(features["map"])
            features["map"] = looks / looks.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        else:
            features["map"] = F.adaptive_avg_pool2d(features["map"], 7)
        return features


def _split(everyone: FaceList, fraction: float, seed: int) -> tuple[FaceList, FaceList]:
    """Of the people seen at far ages, some are for the test; all others, and all people of unknown age, are for training."""
    spread = []
    for person in range(everyone.num_identities):
        rows = np.flatnonzero(everyone.identities == person)
        if everyone.age_groups is not None:
            far = len(set(everyone.age_groups[rows].tolist()) - {-1}) > 1
        else:
            years = np.asarray(everyone.ages)[rows]
            far = len(rows) > 1 and bool(np.nanmax(years, initial=0.0) - np.nanmin(years, initial=200.0) >= 10)
        if far:
            spread.append(person)
    tested = round(fraction * len(spread))
    if tested < 4:
        raise InputError(
            f"demo: the test needs at least 4 people with images of different ages, got {tested} of {len(spread)}"
        )
    kept, _ = identity_disjoint_split(np.asarray(spread), (fraction, 1.0 - fraction), seed=seed)
    chosen = np.asarray(spread)[kept]
    held = np.isin(everyone.identities, chosen)
    known = everyone.age_groups >= 0 if everyone.age_groups is not None else np.isfinite(np.asarray(everyone.ages))
    train, test = everyone.subset(np.flatnonzero(~held)), everyone.subset(np.flatnonzero(held & known))
    names = [np.asarray(part.identity_names)[part.identities] for part in (train, test)]
    check_identity_disjoint(names[0], names[1])
    return train, test


def _sized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _mixes_gray_and_color(images: Tensor) -> bool:
    """Whether color tells where an image came from: a student would learn that in place of faces."""
    counted = torch.zeros((), dtype=torch.int64)
    for part in torch.split(images, 512):
        counted += (part == part[:, :1]).flatten(1).all(dim=1).sum()
    return 0.02 * len(images) < int(counted) < 0.98 * len(images)


def _for_students(images: Tensor, size: int, *, luminance: bool) -> Tensor:
    """uint8 images at the student's size, their three channels equal where luminance (ITU-R 601) is all it may see."""
    if images.shape[-1] == size and not luminance:
        return images
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    weight = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    for start in range(0, len(images), 512):
        part = _sized(images[start : start + 512].float(), size)
        if luminance:
            part = (part * weight).sum(1, keepdim=True)
        out[start : start + 512] = part.round_().clamp_(0, 255).to(torch.uint8)
    return out
