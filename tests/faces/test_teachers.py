"""The age-invariant network by DAL, linear maps on frozen embeddings, and cached teacher outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, StudentAdapter
from kdlib.cache import CacheError
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MobileFaceNet
from kdlib_faces.teachers import (
    AgeFactorLoss,
    AgeInvariantNet,
    MappedTeacher,
    cache_outputs,
    canonical_correlation,
    fit_age_map,
    fit_rotation,
    read_outputs,
)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_parts_add_up_to_the_embedding() -> None:
    net = AgeInvariantNet(MobileFaceNet(embedding_dim=8, width=0.25, input_size=32)).eval()
    images = torch.randn(3, 3, 32, 32, generator=_rng())
    out = StudentAdapter(net, {"embedding": OUTPUT, "parts": "parts"})(images)
    torch.testing.assert_close(out["parts"].sum(1), net.backbone(images))
    torch.testing.assert_close(out["parts"][:, 0], out["embedding"])


def test_correlation_is_that_of_numpy_and_independent_of_the_length_of_the_direction() -> None:
    x, y, w = (torch.randn(*shape, generator=_rng(seed)) for seed, shape in enumerate(((50, 4), (50, 4), (4,))))
    expected = np.corrcoef((x @ w).numpy(), (y @ w).numpy())[0, 1] ** 2
    assert float(canonical_correlation(x, y, w)) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(canonical_correlation(x, y, 7 * w), canonical_correlation(x, y, w))
    assert float(canonical_correlation(torch.ones(5, 4), torch.ones(5, 4), w)) < 1e-12


def test_the_direction_ascends_while_the_features_descend() -> None:
    loss = AgeFactorLoss(4, decorrelation=1.0)
    base = torch.randn(64, 4, generator=_rng())
    parts = torch.stack([base, base * torch.tensor([1.0, -1.0, 0.5, 0.0])], dim=1).requires_grad_()
    loss(parts, torch.full((64,), float("nan"))).backward()
    correlation = canonical_correlation(*parts.unbind(1), loss.direction)
    plain = torch.autograd.grad(correlation, [loss.direction, parts])
    torch.testing.assert_close(loss.direction.grad, -plain[0])
    torch.testing.assert_close(parts.grad, plain[1])
    assert loss.classifier.weight.grad.abs().sum() == 0  # no age is known


def test_unknown_ages_and_groups_are_left_out() -> None:
    parts = torch.randn(4, 2, 3, generator=_rng())
    nan = float("nan")
    for loss, known, mixed in (
        (AgeFactorLoss(3, decorrelation=0.0), torch.tensor([5.0, 65.0]), torch.tensor([5.0, 65.0, nan, nan])),
        (AgeFactorLoss(3, groups=2, decorrelation=0.0), torch.tensor([0, 1]), torch.tensor([0, 1, -1, -1])),
    ):
        torch.testing.assert_close(loss(parts[:2], known), loss(parts, mixed))


def test_a_rotation_is_recovered_and_keeps_cosines() -> None:
    x = F.normalize(torch.randn(200, 6, generator=_rng()), dim=1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=_rng(1))).Q
    torch.testing.assert_close(fit_rotation(x, x @ rotation), rotation, atol=1e-5, rtol=0)
    rows = x @ fit_rotation(x, torch.randn(200, 9, generator=_rng(2)))
    torch.testing.assert_close(rows @ rows.T, x @ x.T, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least the 6 dimensions"):
        fit_rotation(x, x[:, :3])


def test_the_age_map_raises_cross_age_similarity_of_unseen_identities() -> None:
    """Embeddings with a strong age direction: a map fitted on some identities must help on others."""
    generator = _rng()
    identities = torch.randn(300, 16, generator=generator)
    shift = 3.0 * torch.randn(1, 16, generator=generator)
    young = identities + shift + 0.2 * torch.randn(300, 16, generator=generator)
    adult = identities - shift + 0.2 * torch.randn(300, 16, generator=generator)
    rows, labels = torch.cat([young[:200], adult[:200]]), torch.arange(200).repeat(2)
    groups = torch.arange(2).repeat_interleave(200)
    matrix = fit_age_map(rows, labels, age_groups=groups, l2_sp_weight=0.1, steps=200, lr=1e-2)

    def rank1(matrix: Tensor) -> float:
        a, b = (F.normalize(F.normalize(each[200:], dim=1) @ matrix, dim=1) for each in (young, adult))
        return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())

    assert rank1(matrix) > rank1(torch.eye(16)) + 0.1
    years = torch.where(groups == 1, 40.0, 5.0)
    by_years = fit_age_map(rows, labels, ages=years, l2_sp_weight=0.1, steps=200, lr=1e-2)
    torch.testing.assert_close(by_years, matrix)
    with pytest.raises(InputError, match="ages or age_groups must be given"):
        fit_age_map(rows, labels)
    with pytest.raises(InputError, match="at least two identities"):
        fit_age_map(rows, labels, age_groups=torch.zeros(400, dtype=torch.int64))


def test_without_an_age_direction_the_map_does_not_hurt_unseen_identities() -> None:
    """The map could only memorize the 200 identities that it is fitted on."""
    generator = _rng()

    def sample(count: int) -> Tensor:
        identities = torch.randn(count, 128, generator=generator).repeat_interleave(2, 0)
        return F.normalize(identities + 1.3 * torch.randn(2 * count, 128, generator=generator), dim=1)

    def tar(rows: Tensor) -> float:
        unit = F.normalize(rows, dim=1)
        scores = unit[::2] @ unit[1::2].T
        impostors = scores[~torch.eye(len(scores), dtype=torch.bool)]
        return float((scores.diagonal() > impostors.quantile(0.999)).float().mean())

    train, test = sample(200), sample(600)
    matrix = fit_age_map(train, torch.arange(400) // 2, age_groups=torch.arange(400) % 2)
    assert tar(test @ matrix) > tar(test) - 0.01


IMAGES = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8, generator=_rng())


class _Flat(nn.Module):
    """Counts its calls and is interrupted at `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.calls, self.stop = 0, stop

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return {"embedding": images.mean((1, 2)), "map": images}


def test_outputs_are_computed_once_for_both_views_and_read(tmp_path: Path) -> None:
    teacher = _Flat()
    cached = cache_outputs(teacher, IMAGES, tmp_path, fingerprint="a")
    assert teacher.calls == 10
    pixels = IMAGES.float() / 127.5 - 1
    out = cached(torch.tensor([599, 0]), torch.tensor([1, 0]))
    torch.testing.assert_close(out["embedding"][0], pixels[599].flip(2).mean((0, 1)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out["map"][1], pixels[0], atol=1e-3, rtol=1e-3)
    rows = torch.tensor([290, 1])
    torch.testing.assert_close(read_outputs(cached, "map", rows, 1), pixels[rows].flip(3), atol=1e-3, rtol=1e-3)
    assert read_outputs(cached, "embedding", torch.arange(600)).shape == (600, 4)
    cache_outputs(teacher, IMAGES, tmp_path, fingerprint="a")
    assert teacher.calls == 10
    with pytest.raises(InputError, match=r"the difference is the teacher .weights, code or taps.; its"):
        cache_outputs(teacher, IMAGES, tmp_path, fingerprint="b")
    with pytest.raises(InputError, match="the difference is the data; its"):
        cache_outputs(teacher, IMAGES.flip(0), tmp_path, fingerprint="a")
    with pytest.raises(CacheError, match="no sample 600"):
        cached(torch.tensor([600]), torch.tensor([0]))


def test_an_interrupted_run_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache_outputs(_Flat(stop=3), IMAGES, tmp_path / "a")
    later = _Flat()
    cache_outputs(later, IMAGES, tmp_path / "a")
    assert later.calls < 10
    cache_outputs(_Flat(), IMAGES, tmp_path / "b")
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert ours == theirs


def test_outputs_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"embedding": images.mean((1, 2)) / 0}

    with pytest.raises(InputError, match=r"outputs of it: .*'embedding' of sample 0, view 0 must fit float16, got"):
        cache_outputs(Broken(), IMAGES[:4], tmp_path, fingerprint="x", label="outputs of it")


def test_a_mapped_teacher_passes_other_features_through() -> None:
    class Cached(nn.Module):
        inputs = ("sample", "view")

        def forward(self, sample: Tensor, view: Tensor) -> dict[str, Tensor]:
            return {"embedding": torch.ones(len(sample), 4), "map": torch.ones(len(view), 1)}

    teacher = MappedTeacher(Cached(), {"embedding": torch.eye(4) * 2})
    assert teacher.inputs == ("sample", "view")
    out = teacher(torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(out["embedding"], torch.ones(1, 4))
    torch.testing.assert_close(out["map"], torch.ones(1, 1))
