"""Synthetic data of the demo, and training of its two teachers."""

from contextlib import closing
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from kdlib import StudentAdapter, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._hardware import CPU
from kdlib_faces.backbones import build_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.samplers import choose_samples_per_identity
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.config import DemoConfig
from kdlib_faces.demo.data import DemoData, native_model
from kdlib_faces.evaluation.summary import DataSummary
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import say
from kdlib_faces.recipes.age_teacher import build_age_teacher
from kdlib_faces.recipes.liaad import AGE, GENERAL
from kdlib_faces.teachers import (
    FrozenBatchNorm,
    MappedTeacher,
    cache_outputs,
    fit_rotation,
    read_outputs,
    save_teacher,
)
from kdlib_faces.teachers.open import stage_taps
from kdlib_faces.training import TrainingConfig, fit

__all__ = ["align", "synthetic_data", "synthetic_faces", "synthetic_sets"]

_MAX_ALIGNED = 20_000


def synthetic_sets(config: DemoConfig, seed: int) -> tuple[SyntheticFaces, SyntheticFaces, SyntheticFaces]:
    """The general set of small age ranges, the set with images of a lifetime, and the test set; no identity is shared."""
    size, base = config.size, 1000 * (seed + 1)
    return (
        SyntheticFaces(
            config.general_identities, config.general_images, size, base + 1, age_window=config.general_window
        ),
        SyntheticFaces(config.age_identities, config.age_images, size, base + 2),
        SyntheticFaces(config.test_identities, config.test_images, size, base + 3),
    )


def synthetic_faces(config: DemoConfig, seed: int) -> DemoData:
    """Training and test images of the demo, without teachers."""
    general, aged, test = synthetic_sets(config, seed)
    images = torch.cat([general.images(), aged.images()])
    identities = torch.cat([general.labels, aged.labels + general.identities]).numpy()
    return DemoData(
        title="Two teachers, one light student: synthetic faces that age",
        train_images=images,
        train_identities=identities,
        num_identities=general.identities + aged.identities,
        test_images=test.images(),
        test_identities=test.labels.numpy(),
        test_ages=test.ages.numpy(),
        alignment="synthetic faces are generated aligned",
        summary=DataSummary(
            name="SyntheticFaces",
            synthetic=True,
            train_images=len(images),
            train_identities=general.identities + aged.identities,
            test_images=len(test),
            test_identities=test.identities,
            notes=[
                f"{general.identities} training identities have images within {config.general_window:g} years of each other, "
                f"{aged.identities} have images of a lifetime. Only the age-invariant teacher is trained with ages.",
                "No identity of the test set is in a training set.",
            ],
        ),
    )


def synthetic_data(
    config: DemoConfig, work: Path, *, seed: int, quiet: bool, device: torch.device = CPU, workers: int = 0
) -> DemoData:
    """Generate the images, train both teachers, and cache their outputs on the students' training images.

    Args:
        config: The configuration.
        work: Folder of intermediate results; an interrupted run resumes from it.
        seed: Seed of images, weights and order.
        quiet: Show no progress.
        device: Device of the training.
        workers: As for `kdlib_faces.demo.run.run`.
    """
    say(f"generating synthetic faces (seed {seed})", quiet=quiet)
    data = synthetic_faces(config, seed)
    general, aged, _ = synthetic_sets(config, seed)
    ages = torch.cat([torch.full((len(general),), float("nan")), aged.ages])
    dim, size, stage = config.student.embedding_dim, config.size, config.student.stage

    arguments = {"width": config.teacher_width, "embedding_dim": dim, "input_size": size}
    network = build_backbone("iresnet18", seed=seed, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        head = CosFaceHead(dim, general.identities, 32.0, 0.2)
    terms = {"identity": Term(head, student="embedding", target="identity")}
    plain = Distiller(StudentAdapter(network, stage_taps(network, stage)), {}, Objective(terms))
    augment = AugmentConfig()
    batches = FaceBatches(
        data.train_images[: len(general)], general.labels, batch_size=config.batch_size, seed=seed, augment=augment,
        workers=workers,
    )  # fmt: skip
    with closing(batches):
        general_fit = fit(
            plain, batches, work / "general_teacher", steps=config.general_steps, lr=config.teacher_lr, seed=seed,
            label="general teacher", quiet=quiet, settings=TrainingConfig(amp="bfloat16"), device=device, workers=workers,
        )  # fmt: skip

    start = build_backbone("iresnet18", seed=seed, **arguments)
    start.load_state_dict(network.state_dict())
    # The start has been trained for a minute only, so the added parts have their full effect from the beginning.
    fine_tuned = build_age_teacher(
        start, config.age_teacher, num_identities=data.num_identities, pretrained=False, seed=seed
    )
    each = None
    if "pairs" in fine_tuned.objective.terms:
        each = choose_samples_per_identity(config.batch_size, data.num_identities)
    batches = FaceBatches(
        data.train_images, data.train_identities, batch_size=config.batch_size, seed=seed + 1, augment=augment, ages=ages,
        samples_per_identity=each, identity_age="age", workers=workers,
    )  # fmt: skip
    with closing(batches):
        age_fit = fit(
            fine_tuned, batches, work / "age_teacher", steps=config.age_steps, lr=config.teacher_lr / 2, seed=seed,
            label="age-invariant teacher", quiet=quiet, settings=TrainingConfig(amp="bfloat16"), device=device,
            workers=workers,
        )  # fmt: skip
    wrapper = fine_tuned.student.model
    assert isinstance(wrapper, FrozenBatchNorm)

    plain.to(CPU)
    fine_tuned.to(CPU)
    outputs = {}
    for name, key, net, result, steps in (
        ("general_teacher", GENERAL, network, general_fit, config.general_steps),
        ("age_teacher", AGE, wrapper.net, age_fit, config.age_steps),
    ):
        adapter = TeacherAdapter(net, stage_taps(net, stage))
        data.teachers[name] = native_model(net, adapter, size, "teacher", result.seconds, steps)
        data.teachers[name].file = work / name / "teacher.safetensors"
        save_teacher(net, work / name / "teacher.safetensors")
        data.curves[name] = result.curve
        label = f"outputs of the {name.replace('_', ' ')}"
        outputs[key] = cache_outputs(adapter, data.train_images, work / name / "outputs", label=label, quiet=quiet)
    general_outputs = align(outputs[GENERAL], outputs[AGE], len(data.train_images))
    data.teacher_outputs = {AGE: outputs[AGE], GENERAL: general_outputs}
    return data


def align(general: nn.Module, age: nn.Module, count: int) -> MappedTeacher:
    """The general teacher, its embeddings rotated onto those of the age-invariant teacher; its cosines do not change."""
    samples = torch.arange(0, count, max(1, count // _MAX_ALIGNED))
    source, target = (F.normalize(read_outputs(each, "embedding", samples), dim=1) for each in (general, age))
    return MappedTeacher(general, {"embedding": fit_rotation(source, target)})
