"""The age-invariant teacher, the linear maps on frozen embeddings, and outputs recorded once."""

import numpy as np
import pytest
import torch
from torch import nn

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


def test_the_parts_add_up_to_the_embedding() -> None:
    net = AgeInvariantNet(MobileFaceNet(embedding_dim=8, width=0.25, input_size=32)).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = StudentAdapter(net, {"embedding": OUTPUT, "parts": "parts"})(images)
    torch.testing.assert_close(out["parts"].sum(1), net.backbone(images))
    torch.testing.assert_close(out["parts"][:, 0], out["embedding"])


def test_correlation_is_that_of_numpy_and_blind_to_the_length_of_the_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 4, generator=generator)
    w = torch.randn(4, generator=generator)
    expected = np.corrcoef((x @ w).numpy(), (y @ w).numpy())[0, 1] ** 2
    assert float(canonical_correlation(x, y, w)) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(canonical_correlation(x, y, 7 * w), canonical_correlation(x, y, w))
    constant = canonical_correlation(torch.ones(5, 4), torch.ones(5, 4), w)
    assert float(constant) < 1e-12


def test_the_direction_climbs_while_the_features_descend() -> None:
    loss = AgeFactorLoss(4, decorrelation=1.0)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 4, generator=generator)
    parts = torch.stack([base, base * torch.tensor([1.0, -1.0, 0.5, 0.0])], dim=1).requires_grad_()
    unknown = torch.full((64,), float("nan"))
    loss(parts, unknown).backward()
    rho = canonical_correlation(*parts.unbind(1), loss.direction)
    free = torch.autograd.grad(rho, [loss.direction, parts])
    torch.testing.assert_close(loss.direction.grad, -free[0])
    torch.testing.assert_close(parts.grad, free[1])
    assert loss.classifier.weight.grad.abs().sum() == 0  # no age is known, so nothing is learned of age


def test_unknown_ages_and_groups_are_left_out() -> None:
    loss = AgeFactorLoss(3, decorrelation=0.0)
    parts = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    known = loss(parts[:2], torch.tensor([5.0, 65.0]))
    mixed = loss(parts, torch.tensor([5.0, 65.0, float("nan"), float("nan")]))
    torch.testing.assert_close(known, mixed)
    grouped = AgeFactorLoss(3, groups=2, decorrelation=0.0)
    torch.testing.assert_close(grouped(parts[:2], torch.tensor([0, 1])), grouped(parts, torch.tensor([0, 1, -1, -1])))


def test_rotation_recovers_a_turn_and_keeps_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(200, 6, generator=generator), dim=1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    found = fit_rotation(x, x @ turn)
    torch.testing.assert_close(found, turn, atol=1e-5, rtol=0)
    noisy = fit_rotation(x, torch.randn(200, 9, generator=generator))
    torch.testing.assert_close((x @ noisy) @ (x @ noisy).T, x @ x.T, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least the 6 dimensions"):
        fit_rotation(x, x[:, :3])


def test_the_age_map_brings_unseen_people_together_across_age() -> None:
    """Embeddings with a strong age direction: the map learned on some people must help on others."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(300, 16, generator=generator)
    shift = 3.0 * torch.randn(1, 16, generator=generator)
    young = people + shift + 0.2 * torch.randn(300, 16, generator=generator)
    adult = people - shift + 0.2 * torch.randn(300, 16, generator=generator)
    rows = torch.cat([young[:200], adult[:200]])
    who = torch.arange(200).repeat(2)
    groups = torch.arange(2).repeat_interleave(200)
    matrix = fit_age_map(rows, who, age_groups=groups, l2_sp_weight=0.1, steps=200, lr=1e-2)

    def rank1(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
        return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())

    unit = torch.nn.functional.normalize
    before = rank1(young[200:], adult[200:])
    after = rank1(unit(young[200:], dim=1) @ matrix, unit(adult[200:], dim=1) @ matrix)
    assert after > before + 0.1
    with pytest.raises(InputError, match="ages or age_groups must be given"):
        fit_age_map(rows, who)
    with pytest.raises(InputError, match="at least two identities"):
        fit_age_map(rows, who, age_groups=torch.zeros(400, dtype=torch.int64))


def test_where_nothing_speaks_of_age_the_map_leaves_unseen_people_where_they_were() -> None:
    """Two hundred people, no direction of age: what such a map learns is those people by heart."""
    generator = torch.Generator().manual_seed(0)

    def seen(count: int) -> torch.Tensor:
        person = torch.randn(count, 128, generator=generator).repeat_interleave(2, 0)
        return torch.nn.functional.normalize(person + 1.3 * torch.randn(2 * count, 128, generator=generator), dim=1)

    def found(rows: torch.Tensor) -> float:
        unit = torch.nn.functional.normalize(rows, dim=1)
        scores = unit[::2] @ unit[1::2].T
        strangers = scores[~torch.eye(len(scores), dtype=torch.bool)]
        return float((scores.diagonal() > strangers.quantile(0.999)).float().mean())

    train, test = seen(200), seen(600)
    matrix = fit_age_map(train, torch.arange(400) // 2, age_groups=torch.arange(400) % 2)
    assert found(test @ matrix) > found(test) - 0.01


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"embedding": images.mean((1, 2)), "map": images}


def test_outputs_are_recorded_once_for_both_views_and_looked_up(tmp_path) -> None:
    images = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = _Flat()
    recorded = cache_outputs(teacher, images, tmp_path, fingerprint="a")
    assert teacher.calls == 10
    pixels = images.float() / 127.5 - 1
    got = recorded(torch.tensor([599, 0]), torch.tensor([1, 0]))
    torch.testing.assert_close(got["embedding"][0], pixels[599].flip(2).mean((0, 1)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got["map"][1], pixels[0], atol=1e-3, rtol=1e-3)
    cache_outputs(teacher, images, tmp_path, fingerprint="a")
    assert teacher.calls == 10
    with pytest.raises(InputError, match=r"what differs is the teacher .weights, code or taps.; its"):
        cache_outputs(teacher, images, tmp_path, fingerprint="b")
    with pytest.raises(InputError, match="what differs is the data; its"):
        cache_outputs(teacher, images.flip(0), tmp_path, fingerprint="a")
    with pytest.raises(CacheError, match="no sample 600"):
        recorded(torch.tensor([600]), torch.tensor([0]))


def test_a_stopped_recording_goes_on_and_gives_the_same_bytes(tmp_path) -> None:
    images = torch.randint(0, 256, (700, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Stops(_Flat):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        cache_outputs(Stops(), images, tmp_path / "a", fingerprint="x")
    later = _Flat()
    cache_outputs(later, images, tmp_path / "a", fingerprint="x")
    assert later.calls <= 12
    cache_outputs(_Flat(), images, tmp_path / "b", fingerprint="x")
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nan_outputs_are_refused_by_name(tmp_path) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"embedding": images.mean((1, 2)) / 0}

    with pytest.raises(InputError, match=r"outputs of it: .*'embedding' of sample 0, view 0 must fit float16, got"):
        cache_outputs(
            Broken(), torch.zeros(4, 3, 4, 4, dtype=torch.uint8), tmp_path, fingerprint="x", label="outputs of it"
        )


def test_all_that_was_said_is_read_in_order(tmp_path) -> None:
    images = torch.randint(0, 256, (300, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recorded = cache_outputs(_Flat(), images, tmp_path)
    mirrored = images[torch.tensor([290, 1])].float().flip(3) / 127.5 - 1
    torch.testing.assert_close(read_outputs(recorded, "map", torch.tensor([290, 1]), 1), mirrored, atol=1e-3, rtol=1e-3)
    assert read_outputs(recorded, "embedding", torch.arange(300)).shape == (300, 4)


def test_a_mapped_teacher_passes_other_features_through() -> None:
    class Looked(nn.Module):
        reads = ("sample", "view")

        def forward(self, sample: torch.Tensor, view: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"embedding": torch.ones(len(sample), 4), "map": torch.ones(len(view), 1)}

    teacher = MappedTeacher(Looked(), {"embedding": torch.eye(4) * 2})
    assert teacher.reads == ("sample", "view")
    out = teacher(torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(out["embedding"], torch.ones(1, 4))
    torch.testing.assert_close(out["map"], torch.ones(1, 1))
