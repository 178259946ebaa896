"""Recipes room: the demo's material on drawn faces. Draws three sets and trains the two teachers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdlib import StudentAdapter, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces.backbones import build_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.samplers import choose_samples_per_identity
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.stages import DemoData, fit, native
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import say
from kdlib_faces.recipes.age_teacher import build_age_teacher
from kdlib_faces.recipes.liaad import AGE, GENERAL, teacher_taps
from kdlib_faces.teachers import MappedTeacher, fit_rotation, read_outputs, record

__all__ = ["synthetic_data", "drawn_sets"]


def drawn_sets(config: Any, seed: int) -> tuple[SyntheticFaces, SyntheticFaces, SyntheticFaces]:
    """The general set of small age windows, the set with images from all over a life, and the test set: people apart."""
    size, base = config.size, 1000 * (seed + 1)
    return (
        SyntheticFaces(
            config.general_identities, config.general_images, size, base + 1, age_window=config.general_window
        ),
        SyntheticFaces(config.age_identities, config.age_images, size, base + 2),
        SyntheticFaces(config.test_identities, config.test_images, size, base + 3),
    )


def synthetic_data(config: Any, work: Path, *, seed: int, quiet: bool) -> DemoData:
    """Draw the sets, train the teachers, record what they say of the students' training images."""
    say(f"drawing faces (seed {seed})", quiet=quiet)
    size = config.size
    general, aged, test = drawn_sets(config, seed)
    general_images, aged_images = general.images(), aged.images()
    images = torch.cat([general_images, aged_images])
    identities = torch.cat([general.labels, aged.labels + general.identities]).numpy()
    ages = torch.cat([torch.full((len(general),), float("nan")), aged.ages]).numpy()

    arguments = {"width": config.teacher_width, "embedding_dim": config.student.embedding_dim, "input_size": size}
    network = build_backbone("iresnet18", seed=seed, **arguments)
    curves: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        head = CosFaceHead(config.student.embedding_dim, general.identities, 32.0, 0.2)
    terms = {"identity": Term(head, student="embedding", target="identity")}
    trainee = Distiller(StudentAdapter(network, teacher_taps(network, config.student.stage)), {}, Objective(terms))
    batches = FaceBatches(
        general_images, general.labels, batch_size=config.batch_size, seed=seed, augment=AugmentConfig()
    )
    curves["general_teacher"], general_seconds = fit(
        trainee,
        batches,
        work / "general_teacher",
        steps=config.general_steps,
        lr=config.teacher_lr,
        label="general teacher",
        seed=seed,
        quiet=quiet,
        amp="bfloat16",
    )

    start = build_backbone("iresnet18", seed=seed, **arguments)
    start.load_state_dict(network.state_dict())
    # New parts at full size, not small as beside a published network: this start has learnt for a minute.
    people = general.identities + aged.identities
    learner = build_age_teacher(start, config.age_teacher, num_identities=people, loaded=False, seed=seed)
    batches = FaceBatches(
        images,
        identities,
        batch_size=config.batch_size,
        seed=seed + 1,
        augment=AugmentConfig(),
        ages=ages,
        samples_per_identity=choose_samples_per_identity(config.batch_size, people)
        if "pairs" in learner.objective.terms
        else None,
        identity_age="age",
    )
    curves["age_teacher"], age_seconds = fit(
        learner,
        batches,
        work / "age_teacher",
        steps=config.age_steps,
        lr=config.teacher_lr / 2,
        label="age-invariant teacher",
        seed=seed,
        quiet=quiet,
        amp="bfloat16",
    )
    trained: Any = learner.student.model

    teachers, recorded = {}, {}
    for name, key, net, seconds, steps in (
        ("general_teacher", GENERAL, network, general_seconds, config.general_steps),
        ("age_teacher", AGE, trained.net, age_seconds, config.age_steps),
    ):
        adapter = TeacherAdapter(net, teacher_taps(net, config.student.stage))
        teachers[name] = native(net, adapter, size, role="teacher")
        teachers[name].train_seconds, teachers[name].train_steps = round(seconds, 1), steps
        recorded[key] = record(
            adapter,
            images,
            work / name / "outputs",
            label=f"outputs of the {name.replace('_', ' ')}",
            quiet=quiet,
        )
    return DemoData(
        title="Two teachers, one light student: drawn faces that age",
        train_images=images,
        train_identities=identities,
        num_identities=people,
        test_images=test.images(),
        test_identities=test.labels.numpy(),
        test_ages=test.ages.numpy(),
        teachers=teachers,
        recorded={AGE: recorded[AGE], GENERAL: aligned(recorded[GENERAL], recorded[AGE], len(images))},
        curves=curves,
        data={
            "name": "SyntheticFaces",
            "train_images": len(images),
            "train_identities": people,
            "test_images": len(test),
            "test_identities": test.identities,
            "notes": [
                f"{general.identities} people have images within {config.general_window:g} years of each other, "
                f"{aged.identities} have images from all over their lives; ages are read by the age-invariant teacher alone.",
                "No person of the test set is in a training set. The faces are drawings, and no claim about people.",
            ],
        },
    )


def aligned(general: nn.Module, age: nn.Module, count: int) -> MappedTeacher:
    """The general teacher turned onto the age-invariant teacher's sphere; its own cosines stay as they are."""
    samples = torch.arange(0, count, max(1, count // 20_000))
    first, second = (F.normalize(read_outputs(each, "embedding", samples), dim=1) for each in (general, age))
    return MappedTeacher(general, {"embedding": fit_rotation(first, second)})
