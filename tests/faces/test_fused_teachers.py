"""Teachers that are fused by a projection of their joined embeddings."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, AngularDistillLoss, StudentAdapter, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._checks import InputError
from kdlib_faces.teachers import FusedTeacher, fit_fusion, join_embeddings
from tests.faces.small_networks import IMAGES, rng, small_backbone


class _Linear(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": x @ self.weight, "map": x[:, :, None, None]}


def test_two_complementary_teachers_are_better_fused_than_either() -> None:
    """Each teacher sees one half of the identity, in a space of its own, beside noise."""
    generator = rng()
    x = torch.randn(150, 16, generator=generator).repeat_interleave(6, 0)
    x = x + 0.6 * torch.randn(900, 16, generator=generator)
    x = torch.cat([x, 1.5 * torch.randn(900, 16, generator=generator)], 1)
    identities = torch.arange(150).repeat_interleave(6)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    dims = torch.arange(32)
    first, second = (((dims < 8) | (dims >= 16)).float().diag(), (dims >= 8).float().diag() @ rotation)
    teachers = {"a": _Linear(first), "b": _Linear(second)}
    outputs = [each(x)["embedding"].detach() for each in teachers.values()]
    seen = identities < 100
    settings = {"dim": 24, "l2_sp_weight": 0.1, "steps": 300, "lr": 1e-2, "batch": 128}
    fused = FusedTeacher(
        teachers, fit_fusion([e[seen] for e in outputs], identities[seen], **settings), pass_through="a"
    )

    def auc(rows: Tensor) -> float:
        unit = F.normalize(rows[~seen], dim=1)
        same = identities[~seen][:, None] == identities[~seen][None]
        upper = torch.ones_like(same).triu(1)
        scores = unit @ unit.T
        return float((scores[same & upper][:, None] > scores[~same & upper][None, ::7]).float().mean())

    out = fused(x)
    assert auc(out["embedding"]) > max(*map(auc, outputs), auc(join_embeddings(outputs))) + 0.03
    torch.testing.assert_close(out["embedding"].norm(dim=1), torch.ones(900))
    assert torch.equal(out["map"], x[:, :, None, None])


def test_a_fused_teacher_is_frozen_and_takes_the_place_of_a_teacher() -> None:
    adapters = {name: TeacherAdapter(small_backbone(seed), {"embedding": OUTPUT}) for seed, name in enumerate("ab")}
    fused = FusedTeacher(adapters, torch.eye(32)[:, :16]).train()
    assert not fused.training
    assert not any(each.requires_grad for each in fused.parameters())
    before = fused(IMAGES)["embedding"]
    term = Term(AngularDistillLoss(form="cosine"), student="embedding", teacher="embedding")
    student = StudentAdapter(small_backbone(7), {"embedding": OUTPUT})
    distiller = Distiller(student, {"fused": fused}, Objective({"angle": term}))
    distiller.train()
    distiller(IMAGES, {}).total.backward()
    assert torch.equal(before, fused(IMAGES)["embedding"])
    assert not before.requires_grad
    with pytest.raises(InputError, match="matrix must have the 32 rows"):
        FusedTeacher(adapters, torch.eye(8))(IMAGES)


def test_the_initial_projection_keeps_the_cosines() -> None:
    outputs = [torch.randn(60, 5, generator=rng()), torch.randn(60, 3, generator=rng(1))]
    rows = join_embeddings(outputs)
    projected = rows @ fit_fusion(outputs, torch.arange(60) // 2, dim=8, l2_sp_weight=1e6, steps=1, lr=1e-9)
    torch.testing.assert_close(projected @ projected.T, rows @ rows.T, atol=1e-4, rtol=1e-4)
    cosines = sum(F.normalize(each, dim=1) @ F.normalize(each, dim=1).T for each in outputs) / 2
    torch.testing.assert_close(rows @ rows.T, cosines, atol=1e-5, rtol=1e-5)


def test_embeddings_and_teachers_that_cannot_be_fused_are_refused() -> None:
    x, identities = torch.randn(6, 4, generator=rng()), torch.arange(6) // 2
    for arguments, dim, message in (
        (([], identities), 2, "at least one teacher"),
        (([x], torch.zeros(6, dtype=torch.int64)), 2, "at least two"),
        (([x, x[:3]], identities), 2, "identities"),
        (([x, x], identities), 9, "dim must be at most the 8"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_fusion(*arguments, dim=dim, steps=1)
    cached = _Linear(torch.eye(2))
    cached.inputs = ("sample", "view")
    one = _Linear(torch.eye(2))
    for teachers, options, message in (
        ({"a": one}, {"pass_through": "c"}, "pass_through must be one of a"),
        ({}, {}, "must hold at least one"),
        ({"a": one, "b": cached}, {}, "all read images"),
    ):
        with pytest.raises(InputError, match=message):
            FusedTeacher(teachers, torch.eye(2), **options)
