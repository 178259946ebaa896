"""Invalid arguments of losses: each error names the function or Module, the argument, what was expected and given."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import kdlib.functional
from kdlib import (
    ActivationBoundaryLoss,
    AngularDistillLoss,
    AttentionTransferLoss,
    AttentiveSimilarityLoss,
    ContrastiveRepresentationLoss,
    CorrelationCongruenceLoss,
    DarkRankLoss,
    DecoupledKDLoss,
    DISTLoss,
    FactorTransferLoss,
    HierarchicalContextLoss,
    MaskedGenerativeLoss,
    OverhaulLoss,
    ReviewKDLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SemCKDLoss,
    SoftTargetLoss,
    VariationalInformationLoss,
)  # fmt: skip
from kdlib.functional import (
    activation_boundary,
    angular_distill,
    attention_map,
    attention_transfer,
    attentive_similarity,
    channel_attention_map,
    contrastive_representation,
    correlation_congruence,
    dark_rank,
    decoupled_kd,
    dist,
    hierarchical_context,
    overhaul,
    overhaul_margin,
    rkd_angle,
    soft_target,
    variational_information,
)  # fmt: skip
from tests.core.loss_inputs import LEARNED, LOSSES, RELATIONS, each_loss


@each_loss
def test_common_arguments(name: str) -> None:
    case = LOSSES[name]
    student, teacher = case.sides(dtype=torch.float32)
    targets, module = case.targets(5), case.module.__name__
    owner = module if name in LEARNED else name.split(",")[0]
    reduction = "'mean': a relation has" if name in RELATIONS else "one of 'mean', 'none', got 'sum'"
    with pytest.raises(ValueError, match=rf"^{module}: reduction must be {reduction}"):
        case.build(reduction="sum")
    for call, error, message in (
        (lambda loss: loss(student, teacher, reduction="sum", **targets), ValueError, f"reduction must be {reduction}"),
        (
            lambda loss: loss(student, teacher, weight=torch.ones(4), **targets),
            ValueError,
            r"weight must be \(b,\) = \(5,\), got \(4,\)",
        ),
        (
            lambda loss: loss(student, teacher, weight=[1.0] * 5, **targets),
            TypeError,
            "weight must be a torch.Tensor, got list",
        ),
        (
            lambda loss: loss(student, teacher.long(), **targets),
            TypeError,
            "teacher must be a floating-point tensor, got torch.int64",
        ),
        (
            lambda loss: loss(student.int(), teacher, **targets),
            TypeError,
            "student must be a floating-point tensor, got torch.int32",
        ),
        (
            lambda loss: loss(student.numpy(), teacher, **targets),
            TypeError,
            "student must be a torch.Tensor, got ndarray",
        ),
        (lambda loss: loss(student, teacher[:4], **targets), ValueError, "teacher must "),
    ):
        with pytest.raises(error, match=rf"^({name.split(',')[0]}|{owner}): {message}"):
            call(case.build())


@pytest.mark.parametrize("name", LEARNED)
def test_learned_losses_have_a_fixed_number_of_channels(name: str) -> None:
    case = LEARNED[name]
    student, teacher = case.sides(dtype=torch.float32)
    wide = torch.cat([student, student[:, :1]], 1)
    for argument, sides in (("student", (wide, teacher)), ("teacher", (student, wide))):
        message = rf"^{case.module.__name__}: {argument} must be \(b, .*\) with [cd] = {case.shape[0]}, got \(5, {wide.shape[1]}"
        with pytest.raises(ValueError, match=message):
            case.build()(*sides)


VECTOR, MAP, IDENTITIES = torch.ones(4, 3), torch.ones(4, 3, 2, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # Shapes.
        (lambda: angular_distill(torch.ones(4, 128), torch.ones(4, 512)), ValueError, r"angular_distill: teacher must be \(b, d\) like student \(4, 128\), got \(4, 512\); project the student first"),
        (lambda: angular_distill(torch.ones(4), torch.ones(4)), ValueError, r"angular_distill: student must be \(b, d, ...\), got \(4,\)"),
        (lambda: activation_boundary(MAP, MAP[:, :2]), ValueError, r"activation_boundary: teacher must be \(b, \.\.\.\) like student \(4, 3, 2, 2\), got \(4, 2, 2, 2\); project the student first"),
        (lambda: soft_target(VECTOR, VECTOR[:, :2]), ValueError, r"soft_target: teacher must be \(b, c\) like student \(4, 3\), got \(4, 2\); the logits must be of the same classes"),
        (lambda: dist(VECTOR, VECTOR[:, :2]), ValueError, r"dist: teacher must be .*; the logits must be of the same classes"),
        (lambda: decoupled_kd(VECTOR, VECTOR[:, :2], target=IDENTITIES), ValueError, r"decoupled_kd: teacher must be .*; the logits must be of the same classes"),
        (lambda: soft_target(VECTOR, VECTOR[:2]), ValueError, r"soft_target: teacher must be \(b, c\) like student \(4, 3\), got \(2, 3\)"),
        (lambda: channel_attention_map(MAP[0]), ValueError, r"channel_attention_map: features must be \(b, c, h, w\) or \(b, h, w, c\), got \(3, 2, 2\)"),
        (lambda: attention_transfer(MAP, VECTOR), ValueError, r"attention_transfer: teacher must be \(b, c, h, w\), \(b, h, w, c\), \(b, n, d\) or \(b, h, w\), got \(4, 3\)"),
        (lambda: attention_transfer(MAP, torch.ones(4, 9, 5)), ValueError, r"attention_transfer: the layout of teacher \(4, 9, 5\) is ambiguous; give teacher_layout='bnd' for tokens \(b, n, d\) or 'bhw' for attention maps \(b, h, w\)"),
        (lambda: attention_transfer(torch.ones(4, 7, 7, 64), MAP), ValueError, r"attention_transfer: the layout of student \(4, 7, 7, 64\) is ambiguous; give student_layout='bhwc' for channels last or 'bchw' for channels first"),
        (lambda: attention_transfer(MAP, torch.ones(4, 14, 12, 32)), ValueError, r"attention_transfer: the layout of teacher .* is ambiguous; give teacher_layout=.*"),
        (lambda: attention_transfer(MAP, torch.ones(4, 9, 5), teacher_layout="bnd"), ValueError, r"attention_transfer: teacher \(4, 9, 5\) may have 0 or 5 or 8 tokens \(class token, registers\) before those of the grid; give teacher_prefix_tokens= \(0 if all are on the grid\)"),
        (lambda: attention_transfer(MAP, torch.ones(4, 168, 5), teacher_layout="bnd"), ValueError, r"attention_transfer: teacher \(4, 168, 5\) may have an unknown number of tokens .*"),
        (lambda: attention_transfer(MAP, torch.ones(4, 9, 5), teacher_layout="bnd", prefix_tokens=9), ValueError, r"attention_transfer: teacher_prefix_tokens must be a whole number and >= 0 and < 9, got 9"),
        (lambda: attention_transfer(MAP, torch.ones(4, 8, 5), teacher_layout="bnd", prefix_tokens=0), ValueError, r"attention_transfer: teacher must hold the tokens of a square grid or of the other side's grid, got 8; reshape .*"),
        (lambda: attention_transfer(MAP, MAP, layout="bhw"), ValueError, r"attention_transfer: student must be \(b, h, w\), got \(4, 3, 2, 2\)"),
        (lambda: attention_transfer(MAP, MAP, layout="nchw"), ValueError, r"attention_transfer: student_layout must be one of 'bchw', 'bhwc', 'bnd', 'bhw', got 'nchw'"),
        (lambda: AttentionTransferLoss(layout="nchw"), ValueError, r"AttentionTransferLoss: layout must be one of 'bchw', 'bhwc', 'bnd', 'bhw', got 'nchw'"),
        (lambda: AttentionTransferLoss(student_prefix_tokens=-1), ValueError, r"AttentionTransferLoss: student_prefix_tokens must be a whole number and >= 0, got -1"),
        (lambda: attention_map(torch.ones(4, 14, 14, 64)), ValueError, r"attention_map: the layout of features .* is ambiguous; give layout='bhwc' for channels last or 'bchw' for channels first"),
        (lambda: attention_map(torch.ones(4, 196, 64)), ValueError, r"attention_map: the layout of features \(4, 196, 64\) is ambiguous; give layout='bnd' for tokens \(b, n, d\)"),
        (lambda: attentive_similarity(MAP, MAP[:, :2]), ValueError, r"attentive_similarity: teacher must be \(b, c, h, w\) like .*; project the student first"),
        (lambda: hierarchical_context(VECTOR, VECTOR), ValueError, r"hierarchical_context: student must be \(b, c, h, w\), got \(4, 3\)"),
        (lambda: overhaul(MAP, VECTOR, margin=0), ValueError, r"overhaul: teacher must be \(b, c, h, w\), got \(4, 3\)"),
        (lambda: overhaul(MAP, MAP[:, :2], margin=0), ValueError, r"overhaul: teacher must be \(b, c, h, w\) with c = 3, got \(4, 2, 2, 2\)"),
        (lambda: overhaul(VECTOR, VECTOR[:, :2], margin=0), ValueError, r"overhaul: teacher must be \(b, d\) with d = 3, got \(4, 2\)"),
        (lambda: overhaul(torch.ones(4, 3, 2), MAP, margin=0), ValueError, r"overhaul: student must be \(b, c, h, w\), got \(4, 3, 2\)"),
        (lambda: rkd_angle(torch.ones(4), VECTOR), ValueError, r"rkd_angle: student must be \(b, d, ...\), got \(4,\)"),
        (lambda: rkd_angle(VECTOR, torch.ones(4)), ValueError, r"rkd_angle: teacher must be \(b, d, ...\), got \(4,\)"),
        (lambda: variational_information(VECTOR, VECTOR[:, :2]), ValueError, r"variational_information: teacher must be \(b, d\) like student .*"),
        (lambda: VariationalInformationLoss(4, 3)(VECTOR, VECTOR), ValueError, r"VariationalInformationLoss: student must be \(b, d\) with d = 4, got \(4, 3\)"),
        (lambda: VariationalInformationLoss(3, 3)(MAP, VECTOR), ValueError, r"VariationalInformationLoss: teacher must be \(b, c, h, w\) with c = 3, got \(4, 3\)"),
        (lambda: ContrastiveRepresentationLoss(6, 6)(VECTOR, VECTOR), ValueError, r"ContrastiveRepresentationLoss: student must be \(b, d\) with d = 6, got \(4, 3\)"),
        # Numbers and choices.
        (lambda: angular_distill(VECTOR, VECTOR, form="sine"), ValueError, r"angular_distill: form must be one of 'squared', 'cosine', 'chord', 'angle', got 'sine'"),
        (lambda: AngularDistillLoss(form="sine"), ValueError, r"AngularDistillLoss: form must be one of 'squared', 'cosine', 'chord', 'angle', got 'sine'"),
        (lambda: activation_boundary(MAP, MAP, margin=-1), ValueError, r"activation_boundary: margin must be a finite number and >= 0, got -1"),
        (lambda: ActivationBoundaryLoss(margin="1"), TypeError, r"ActivationBoundaryLoss: margin must be a finite number and >= 0, got '1'"),
        (lambda: attention_map(MAP, 0), ValueError, r"attention_map: p must be a finite number and >= 1, got 0"),
        (lambda: attention_transfer(MAP, MAP, p=0.5), ValueError, r"attention_transfer: p must be a finite number and >= 1, got 0\.5"),
        (lambda: AttentionTransferLoss(p="2"), TypeError, r"AttentionTransferLoss: p must be a finite number and >= 1, got '2'"),
        (lambda: attentive_similarity(MAP, MAP, channel=-1), ValueError, r"attentive_similarity: channel must be a finite number and >= 0, got -1"),
        (lambda: AttentiveSimilarityLoss(spatial=math.nan), TypeError, r"AttentiveSimilarityLoss: spatial must be a finite number and >= 0, got nan"),
        (lambda: AttentiveSimilarityLoss(channel=0, spatial=0), ValueError, r"AttentiveSimilarityLoss: channel, spatial must hold a number > 0, got \(0, 0\)"),
        (lambda: correlation_congruence(VECTOR, VECTOR, order=2.0), TypeError, r"correlation_congruence: order must be a whole number and >= 1, got 2\.0"),
        (lambda: CorrelationCongruenceLoss(gamma=0), ValueError, r"CorrelationCongruenceLoss: gamma must be a finite number and > 0, got 0"),
        (lambda: CorrelationCongruenceLoss(order=0), ValueError, r"CorrelationCongruenceLoss: order must be a whole number and >= 1, got 0"),
        (lambda: dark_rank(VECTOR, VECTOR, length=2.5), TypeError, r"dark_rank: length must be a whole number and >= 2, got 2\.5"),
        (lambda: dark_rank(VECTOR, VECTOR, alpha=0), ValueError, r"dark_rank: alpha must be a finite number and > 0, got 0"),
        (lambda: DarkRankLoss(beta=-1.0), ValueError, r"DarkRankLoss: beta must be a finite number and > 0, got -1\.0"),
        (lambda: AttentionTransferLoss(teacher_layout="x"), ValueError, r"AttentionTransferLoss: teacher_layout must be one of .*"),
        (lambda: decoupled_kd(VECTOR, VECTOR, target=IDENTITIES, dim=1.0), TypeError, r"decoupled_kd: dim must be a whole number, got 1\.0"),
        (lambda: MaskedGenerativeLoss(3, 3, seed=-1), ValueError, r"MaskedGenerativeLoss: seed must be a whole number and >= 0, got -1"),
        (lambda: VariationalInformationLoss(3, 0), ValueError, r"VariationalInformationLoss: teacher_channels must be a whole number and >= 1, got 0"),
        (lambda: dist(VECTOR, VECTOR, dim=1.0), TypeError, r"dist: dim must be a whole number, got 1\.0"),
        (lambda: FactorTransferLoss(1.5, 3), TypeError, r"FactorTransferLoss: student_channels must be a whole number and >= 1, got 1\.5"),
        (lambda: ReviewKDLoss((3,), (3,), hidden=0), ValueError, r"ReviewKDLoss: hidden must be a whole number and >= 1, got 0"),
        (lambda: SemCKDLoss((3,), (3,), batch_size=2.0), TypeError, r"SemCKDLoss: batch_size must be a whole number and >= 1, got 2\.0"),
        (lambda: DISTLoss(temperature=0), ValueError, r"DISTLoss: temperature must be a finite number and > 0, got 0"),
        (lambda: dist(VECTOR, VECTOR, beta=-1), ValueError, r"dist: beta must be a finite number and >= 0, got -1"),
        (lambda: HierarchicalContextLoss(levels=4), TypeError, r"HierarchicalContextLoss: levels must be a sequence of whole numbers, got int"),
        (lambda: HierarchicalContextLoss(levels=(2, 0)), ValueError, r"HierarchicalContextLoss: levels\[1\] must be a whole number and >= 1, got 0"),
        (lambda: hierarchical_context(MAP, MAP, levels=(1.5,)), TypeError, r"hierarchical_context: levels\[0\] must be a whole number and >= 1, got 1\.5"),
        (lambda: RKDAngleLoss(chunk_size=0), ValueError, r"RKDAngleLoss: chunk_size must be a whole number and >= 1, got 0"),
        (lambda: RKDDistanceLoss(chunk_size=1.5), TypeError, r"RKDDistanceLoss: chunk_size must be a whole number and >= 1, got 1\.5"),
        (lambda: soft_target(VECTOR, VECTOR, temperature=0), ValueError, r"soft_target: temperature must be a finite number and > 0, got 0"),
        (lambda: SoftTargetLoss(temperature=math.nan), TypeError, r"SoftTargetLoss: temperature must be a finite number and > 0, got nan"),
        (lambda: VariationalInformationLoss(3, 3, hidden=0), ValueError, r"VariationalInformationLoss: hidden must be a whole number and >= 1, got 0"),
        (lambda: VariationalInformationLoss(1.5, 3), TypeError, r"VariationalInformationLoss: student_channels must be a whole number and >= 1, got 1\.5"),
        (lambda: VariationalInformationLoss(3, 3, initial_variance=1e-5), ValueError, r"VariationalInformationLoss: initial_variance must be a finite number and > 1e-05, got 1e-05"),
        (lambda: variational_information(VECTOR, VECTOR, variance=0), ValueError, r"variational_information: variance must be a finite number and > 0, got 0"),
        (lambda: variational_information(VECTOR, VECTOR, variance=torch.ones(2)), ValueError, r"variational_information: variance must be \(c,\) with c = 3, got \(2,\)"),
        (lambda: variational_information(VECTOR, VECTOR, variance=torch.ones(3).int()), TypeError, r"variational_information: variance must be a floating-point tensor, got torch.int32"),
        # Margins.
        (lambda: overhaul(MAP, MAP, margin=0.5), ValueError, r"overhaul: margin must be a finite number and <= 0, got 0\.5"),
        (lambda: overhaul(MAP, MAP, margin=torch.ones(3)), ValueError, r"overhaul: margin must be <= 0, got 1"),
        (lambda: overhaul(MAP, MAP, margin=-torch.ones(2)), ValueError, r"overhaul: margin must be \(c,\) = \(3,\) or a number, got \(2,\)"),
        (lambda: overhaul(MAP, MAP, margin=torch.tensor([0.0, math.nan, 0.0])), ValueError, r"overhaul: margin must be finite, got 1 NaN or infinite values of 3"),
        (lambda: overhaul(MAP, MAP, margin=[-1.0] * 3), TypeError, r"overhaul: margin must be a finite number and <= 0, got \[.*"),
        (lambda: overhaul(MAP, MAP, margin=torch.zeros(3).int()), TypeError, r"overhaul: margin must be a floating-point tensor, got torch.int32"),
        (lambda: OverhaulLoss(-torch.ones(3, 1)), ValueError, r"OverhaulLoss: margin must be \(c,\) or a number, got \(3, 1\)"),
        (lambda: overhaul_margin(nn.BatchNorm2d(3, affine=False)), TypeError, r"overhaul_margin: norm must have a weight and a bias \(c,\), as BatchNorm2d\(c\), got BatchNorm2d\(.*"),
        (lambda: overhaul_margin(nn.Linear(3, 3)), TypeError, r"overhaul_margin: norm must have a weight and a bias \(c,\), as .*"),
        # Targets and negatives.
        (lambda: decoupled_kd(VECTOR, VECTOR, target=IDENTITIES), ValueError, r"decoupled_kd: target must be from 0 to below c = 3, got 3; leave an ignore index out by mask=target != ignore_index"),
        (lambda: decoupled_kd(VECTOR, VECTOR, target=VECTOR[:, 0]), TypeError, r"decoupled_kd: target must be whole numbers, got torch.float32"),
        (lambda: decoupled_kd(VECTOR, VECTOR, target=IDENTITIES[:1]), ValueError, r"decoupled_kd: target must be \(b,\) with b = 4, got \(1,\)"),
        (lambda: DecoupledKDLoss(alpha=-1), ValueError, r"DecoupledKDLoss: alpha must be a finite number and >= 0, got -1"),
        (lambda: contrastive_representation(VECTOR, VECTOR, temperature=0), ValueError, r"contrastive_representation: temperature must be a finite number and > 0, got 0"),
        (lambda: contrastive_representation(VECTOR, VECTOR, target=IDENTITIES[:2]), ValueError, r"contrastive_representation: target must be \(4,\), got \(2,\)"),
        (lambda: contrastive_representation(VECTOR, VECTOR, target=[0, 1, 2, 3]), TypeError, r"contrastive_representation: target must be a torch.Tensor, got list"),
        (lambda: contrastive_representation(VECTOR, VECTOR, negatives=torch.ones(2, 5)), ValueError, r"contrastive_representation: negatives must be \(m, d\) with d = 3, got \(2, 5\)"),
        (lambda: contrastive_representation(VECTOR, VECTOR, negatives=IDENTITIES), TypeError, r"contrastive_representation: negatives must be a floating-point tensor, got torch.int64"),
        (lambda: contrastive_representation(VECTOR, VECTOR, negatives_target=IDENTITIES), ValueError, r"contrastive_representation: negatives_target must be \(0,\), got \(4,\)"),
        (lambda: contrastive_representation(VECTOR, VECTOR, gather=True, reduction="none"), ValueError, r"contrastive_representation: reduction must be 'mean' with gather: .*"),
        (lambda: ContrastiveRepresentationLoss(3, 3, gather=True)(VECTOR, VECTOR, reduction="none"), ValueError, r"ContrastiveRepresentationLoss: reduction must be 'mean' with gather: .*"),
        (lambda: ContrastiveRepresentationLoss(3, 3, queue_size=-1), ValueError, r"ContrastiveRepresentationLoss: queue_size must be a whole number and >= 0, got -1"),
    ],
)  # fmt: skip
def test_other_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        call()


@each_loss
def test_weights_that_are_not_finite_numbers_from_zero(name: str) -> None:
    case = LOSSES[name]
    student, teacher = case.sides(dtype=torch.float32)
    targets = case.targets(5)
    for bad in (-1.0, -1e-30, math.inf, -math.inf, math.nan):
        weight = torch.tensor([1.0, 1.0, bad, 0.0, 2.0])
        with pytest.raises(ValueError, match=r"weight must hold finite numbers >= 0, got .*$"):
            case.build()(student, teacher, weight=weight, **targets)
    with pytest.raises(ValueError, match=r"weight must hold finite numbers >= 0, got -1$"):
        case.build()(student, teacher, weight=torch.tensor([1, -1, 1, 1, 1]), **targets)


@pytest.mark.parametrize("name", ["hint", "soft_target", "dist", "rkd_angle", "contrastive_representation"])
def test_such_weights_count_as_zero_where_they_cannot_be_read(name: str) -> None:
    case = LOSSES[name]
    student, teacher = case.sides(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.build(), fullgraph=True, backend="eager")
    masked = case.build()(student, teacher, weight=torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0]))
    for bad in (-1.0, math.inf, math.nan):
        value = compiled(student, teacher, weight=torch.tensor([1.0, 1.0, bad, 0.0, 2.0]))
        torch.testing.assert_close(value, masked)


@each_loss
def test_numbers_of_numpy(name: str) -> None:
    case = LOSSES[name]
    student, teacher = case.sides(dtype=torch.float32)
    options = {key: np.array(x) if isinstance(x, (int, float, tuple)) else x for key, x in case.options.items()}
    arguments = [np.int64(each) for each in case.arguments]
    loss = replace(case, arguments=tuple(arguments), options=options).build()
    assert torch.equal(loss(student, teacher, **case.targets(5)), case.build()(student, teacher, **case.targets(5)))
    assert repr(loss) == repr(case.build())
    if name not in LEARNED:
        function = getattr(kdlib.functional, name.split(",")[0])
        assert torch.equal(
            function(student, teacher, **options, **case.targets(5)), case.build()(student, teacher, **case.targets(5))
        )


@each_loss
def test_weights_of_any_finite_size(name: str) -> None:
    case = LOSSES[name]
    student, teacher = case.sides(dtype=torch.float32)
    targets, weight = case.targets(5), torch.tensor([1.0, 0.5, 0.25, 0.0, 1.0])
    loss = case.build().eval()
    expected = loss(student, teacher, weight=weight, **targets)
    for scaled in (3.4e38 * weight, 2.0**-130 * weight, 1e300 * weight.double(), 2.0**-140 * weight.double()):
        torch.testing.assert_close(loss(student, teacher, weight=scaled, **targets), expected)
        if loss.per_sample:
            assert torch.isfinite(loss(student, teacher, weight=scaled, reduction="none", **targets)).all()
