"""Template pooling, 1:1 and 1:N against the published steps written out plainly."""

from typing import Any

import numpy as np
import pytest

from kdlib_faces.evaluation import (
    TemplateIdentificationProtocol,
    TemplateVerificationProtocol,
    evaluate,
    identify_templates,
    pool_templates,
    tar_at_far,
    template_verification,
)
from kdlib_faces.evaluation.matching import pair_scores as pair_module
from kdlib_faces.evaluation.matching import templates as pooling_module


def make(images: int = 900, templates: int = 80, width: int = 12, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    generator = np.random.default_rng(seed)
    ids = generator.permutation(templates * 3)[:templates] + 5
    owner = np.concatenate([np.arange(templates), generator.integers(0, templates, images - templates)])
    media = generator.integers(0, 200, images)
    centers = generator.normal(size=(templates // 2, width))
    embeddings = centers[owner // 2] + generator.normal(size=(images, width))
    return embeddings * generator.uniform(0.5, 20, size=(images, 1)), ids[owner], media, generator.random(images)


def published(embeddings: Any, ids: Any, media: Any, scores: Any, norm: str) -> dict[Any, np.ndarray]:
    """insightface's image2template_feature: mean over a medium of several images, sum over media, then unit."""
    pooled = {}
    for template in sorted(set(ids.tolist())):
        parts = []
        for medium in sorted(set(media[ids == template].tolist())):
            rows = [k for k in range(len(ids)) if ids[k] == template and media[k] == medium]
            images = []
            for k in rows:
                image = np.asarray(embeddings[k], dtype=np.float64)
                image = image / np.sqrt((image**2).sum()) if norm == "unit" else image
                images.append(image * (1.0 if scores is None else scores[k]))
            parts.append(sum(images) / len(images))
        total = sum(parts)
        pooled[template] = total / np.sqrt((total**2).sum())
    return pooled


@pytest.mark.parametrize("norm", ["keep", "unit"])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_pooling_equals_the_published_procedure(norm: Any, scored: bool, dtype: Any) -> None:
    embeddings, ids, media, scores = make()
    embeddings = embeddings.astype(dtype)
    given = scores if scored else None
    found = pool_templates(embeddings, ids, media, detector_scores=given, feature_norm=norm)
    expected = published(embeddings, ids, media, given, norm)
    assert found.ids.tolist() == list(expected)
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    assert found.features.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(found.features, np.array(list(expected.values())), atol=tolerance)
    assert (found.feature_norm, found.detector_scores, int(found.images.sum())) == (norm, scored, 900)
    assert ("lengths kept" in found.convention) == (norm == "keep")


@pytest.mark.parametrize("block", [3, 64])
def test_pooling_does_not_depend_on_blocks_shards_or_order(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, ids, media, scores = make()
    whole = pool_templates(embeddings, ids, media, detector_scores=scores).features
    monkeypatch.setattr(pooling_module, "BLOCK", block)
    order = np.argsort(ids, kind="stable")
    for given in (slice(None), order):
        e, i, m, s = embeddings[given], ids[given], media[given], scores[given]
        for form in (e, [e[:100], e[100:101], e[101:]], iter([e[:899], e[899:]])):
            np.testing.assert_allclose(pool_templates(form, i, m, detector_scores=s).features, whole, atol=1e-12)


def test_string_ids_and_lengths_beyond_float32() -> None:
    rows = np.array([[1e25, 1e25], [2e25, 0.0], [0.0, 1e-30]], dtype=np.float32)
    found = pool_templates(rows, ["b", "b", "a"], ["x", "y", "z"], feature_norm="unit")
    assert found.ids.tolist() == ["a", "b"]
    np.testing.assert_allclose(
        found.features[1], np.array([1 + np.sqrt(2), 1]) / np.hypot(1 + np.sqrt(2), 1), atol=1e-7
    )
    huge = np.array([[3e38, 3e38], [3e38, 0.0]], dtype=np.float32)
    for form in (huge, [huge[:1], huge[1:]]):
        found = pool_templates(form, [1, 1], [1, 2])
        np.testing.assert_allclose(found.features[0], np.array([2, 1]) / np.sqrt(5), atol=1e-7)


def pairs(ids: Any, count: int, seed: int = 1) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(seed)
    known = np.unique(ids)
    left = generator.integers(0, known.size, count)
    right = (left + generator.integers(1, known.size, count)) % known.size
    near = generator.random(count) < 0.3
    right = np.where(near, left ^ 1, right)
    return known[left], known[right], left // 2 == right // 2


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("mode", ["exact", "nearest"])
def test_verification_equals_plain_products(rows: int, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_module, "ROWS", rows)
    monkeypatch.setattr(pair_module, "SPARSE", {1: 0.7, 8: 0.5}.get(rows, 100))
    embeddings, ids, media, scores = make()
    order = np.argsort(ids, kind="stable")
    embeddings, ids, media = embeddings[order], ids[order], media[order]
    left, right, same = pairs(ids, 4000)
    fars = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    result = template_verification(
        embeddings, ids, media, left, right, same, detector_scores=scores, fars=fars, mode=mode
    )
    pooled = published(embeddings, ids, media, scores, "keep")
    plain = np.array([pooled[a] @ pooled[b] for a, b in zip(left.tolist(), right.tolist(), strict=True)])
    for far in fars:
        expected = tar_at_far(plain[same], plain[~same], far, mode=mode)
        point = result.tar[far]
        assert (point.tar, point.false_accepts) == (expected.tar, expected.false_accepts)
        assert point.resolvable == expected.resolvable
        assert point.threshold == pytest.approx(expected.threshold, abs=1e-6 if mode == "nearest" else 1e-11)
    entry = result.to_dict()
    assert (entry["feature_norm"], entry["mode"], entry["genuine"]) == ("keep", mode, int(same.sum()))
    assert entry["tar"]["0.0001"]["resolvable"] is False


def test_equal_templates_tie_despite_float32_rounding() -> None:
    # Template 1 and its copy 2 meet the same others: genuine and impostor scores are equal, none may be above the other.
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(60, 128))
    rows[1] = 3 * rows[0]
    others = np.arange(2, 60)
    left = np.concatenate([np.zeros(58, dtype=int), np.ones(58, dtype=int)])
    right, same = np.concatenate([others, others]), np.arange(116) >= 58
    result = template_verification(rows, np.arange(60), np.arange(60), left, right, same, fars=(0.25, 0.5))
    for far, point in result.tar.items():
        assert point.tar == pytest.approx(np.floor(58 * far) / 58, abs=1e-12)


def one_to_n(seed: int = 0) -> tuple[Any, Any, Any, Any, Any]:
    generator = np.random.default_rng(seed)
    subjects, width = 40, 8
    centers = generator.normal(size=(subjects, width))
    codes = np.concatenate([np.arange(subjects), generator.integers(0, subjects, 90)])
    ids = generator.permutation(500)[: codes.size] + 1
    embeddings = centers[codes] + 0.8 * generator.normal(size=(codes.size, width))
    names = np.array([f"s{k}" for k in codes])
    galleries = [(ids[:18], names[:18]), (ids[18:40], names[18:40])]
    return embeddings, ids, galleries, (ids[40:], names[40:]), names


def test_galleries_are_searched_separately() -> None:
    """One gallery: threshold from the non-mated probes' largest scores, hits of the mated ones."""
    embeddings, ids, galleries, (probe_ids, names), _ = one_to_n()
    pooled = pool_templates(embeddings, ids, np.arange(ids.size))
    result = identify_templates(pooled, galleries, (probe_ids, names), fpirs=(0.05, 0.2), ranks=(1, 3))
    by_id = dict(zip(pooled.ids.tolist(), pooled.features, strict=True))
    mate_ranks, tpirs = [], []
    for number, (search, (enrolled, subjects)) in enumerate(zip(result.searches, galleries, strict=True)):
        rows, non_mated, mated = np.stack([by_id[each] for each in enrolled.tolist()]), [], []
        for k, (probe, name) in enumerate(zip(probe_ids.tolist(), names.tolist(), strict=True)):
            scores, mate = rows @ by_id[probe], np.flatnonzero(subjects == name)
            assert (search.best[k], search.best_scores[k]) == (scores.argmax(), pytest.approx(scores.max(), abs=1e-12))
            assert search.mated[k] == (mate.size == 1)
            mine = scores[mate[0]] if mate.size else -np.inf
            rank = 1 + (scores > mine).sum() if mate.size else 0
            assert (search.ranks[k], search.mate_scores[k]) == (rank, pytest.approx(mine, abs=1e-12))
            (mated if mate.size else non_mated).append((mine, rank) if mate.size else scores.max())
        mate_ranks += [rank for _, rank in mated]
        for fpir in (0.05, 0.2):
            threshold = sorted(non_mated, reverse=True)[int(np.floor(fpir * len(non_mated) + 1e-9))]
            tpir = np.mean([rank == 1 and score > threshold for score, rank in mated])
            point = result.points[fpir][number]
            assert (point.tpir, point.mated, point.nonmated) == (pytest.approx(tpir), len(mated), 90 - len(mated))
            assert point.threshold == pytest.approx(threshold, abs=1e-12)
            assert point.fpir <= fpir
            tpirs.append(tpir)
    assert result.tpir[0.05].value == pytest.approx(np.mean(tpirs[::2]), abs=1e-12)
    assert result.tpir[0.2].value == pytest.approx(np.mean(tpirs[1::2]), abs=1e-12)
    assert 0.1 < result.tpir[0.05].value < 0.95
    for rank in (1, 3):
        assert result.rates[rank].value == pytest.approx((np.array(mate_ranks) <= rank).mean())
    assert (result.mated, result.probes.rows.size) == (90, 90)


def test_the_protocol_passes_its_settings() -> None:
    embeddings, ids, galleries, probes, _ = one_to_n()
    media = np.arange(ids.size)
    given = {"fpirs": (0.05,), "ranks": (1,), "replicates": 40, "seed": 3}
    pooled = pool_templates(embeddings, ids, media, feature_norm="unit")
    for level in (0.5, 0.99):
        protocol = TemplateIdentificationProtocol(
            ids, media, galleries, probes, feature_norm="unit", level=level, **given
        )
        direct = identify_templates(pooled, galleries, probes, level=level, **given)
        assert evaluate(embeddings, protocol).to_dict() == direct.to_dict()
    assert "galleries searched separately" in direct.convention
    assert "each image normalized first" in direct.templates.convention
    for bad in ({"level": 1.0}, {"feature_norm": "half"}):
        with pytest.raises(ValueError, match=f"TemplateIdentificationProtocol: {next(iter(bad))} must be"):
            TemplateIdentificationProtocol(ids, media, galleries, probes, **bad)


def test_tpir_requires_the_mate_first_and_above_the_threshold() -> None:
    eye = np.eye(4)
    # Probe 10 is nearer to b than to its own a; probe 11 is b; probe 12 is not enrolled.
    rows = np.stack([eye[0], eye[1], 0.6 * eye[0] + 0.8 * eye[1], eye[1], 0.3 * eye[0] + eye[3]])
    pooled = pool_templates(rows, [1, 2, 10, 11, 12], np.arange(5))
    result = identify_templates(
        pooled, [([1, 2], ["a", "b"])], ([10, 11, 12], ["a", "b", "z"]), fpirs=(0.5,), ranks=(1, 2)
    )
    assert result.tpir[0.5].value == 0.5
    assert (result.rates[1].value, result.rates[2].value) == (0.5, 1.0)
    assert not result.points[0.5][0].resolvable
    assert result.points[0.5][0].fpir == 0.0
    # Of two probes that are not enrolled, one may be accepted.
    pooled = pool_templates(np.vstack([rows, rows[-1:]]), [1, 2, 10, 11, 12, 13], np.arange(6))
    probes = ([10, 11, 12, 13], ["a", "b", "z", "y"])
    assert identify_templates(pooled, [([1, 2], ["a", "b"])], probes, fpirs=(0.5,)).points[0.5][0].resolvable


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_ids_of_every_integer_type_are_distinguished(dtype: Any) -> None:
    ends = np.iinfo(dtype)
    ids = np.array([ends.max, ends.min, 7, ends.max, 9], dtype=dtype)
    pooled = pool_templates(np.eye(5) + 1, ids, np.arange(5))
    assert pooled.ids.tolist() == sorted({ends.max, ends.min, 7, 9})
    assert pooled.images.tolist() == [1, 1, 1, 2]
    left, right = np.array([ends.max, 7, 9], dtype=dtype), np.array([ends.min, 9, ends.max], dtype=dtype)
    protocol = TemplateVerificationProtocol(ids, np.arange(5), left, right, [1, 0, 0], fars=(0.5,))
    result = protocol.verify(pooled)
    assert result.impostor == 2
    protocol = TemplateVerificationProtocol(ids, np.arange(5), np.array([7, 8, 9], dtype), right, [1, 0, 0])
    with pytest.raises(ValueError, match="left must be in template_ids, got 8 in entry 1"):
        protocol.verify(pooled)


def test_an_unknown_id_beside_a_single_template_is_refused() -> None:
    for other in (3, 5):
        with pytest.raises(ValueError, match=f"right must be in template_ids, got {other} in entry 1"):
            template_verification(np.eye(2), [4, 4], [0, 1], [4, 4], [4, other], [1, 0])
