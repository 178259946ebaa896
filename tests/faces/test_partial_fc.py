"""Merging of the shards of a PartialFC head."""

from functools import partial
from pathlib import Path

import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.heads import ArcFaceHead, CosFaceHead, load_partial_fc, merge_partial_fc


def shards(identities, processes, dim=8, seed=0):
    """Split centers as PartialFC does: rank r starts at `identities // processes * r + min(r, rest)`."""
    centers = torch.randn(identities, dim, generator=torch.Generator().manual_seed(seed))
    starts = [identities // processes * rank + min(rank, identities % processes) for rank in range(processes + 1)]
    return centers, [centers[starts[rank] : starts[rank + 1]].clone() for rank in range(processes)]


def saved(folder, parts, wrap=lambda part: {"epoch": 3, "state_dict_softmax_fc": {"weight": part}}):
    paths = [folder / f"checkpoint_gpu_{rank}.pt" for rank in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        torch.save(wrap(part), path)
    return paths


@pytest.mark.parametrize(("identities", "processes"), [(12, 1), (12, 4), (13, 4), (15, 4), (23, 12)])
def test_merging_restores_the_centers(identities, processes, tmp_path):
    centers, parts = shards(identities, processes)
    assert torch.equal(merge_partial_fc(parts), centers)
    head = load_partial_fc(saved(tmp_path, parts))
    assert isinstance(head, ArcFaceHead)
    assert torch.equal(head.weight, centers)
    assert head.weight.requires_grad
    assert (head.num_identities, head.embedding_dim) == (identities, 8)
    assert torch.isfinite(head(torch.randn(3, 8), torch.tensor([0, 1, identities - 1])))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda part: part,
        lambda part: {"weight": part},
        lambda part: {"state_dict": {"module.weight": part}},
        lambda part: {"weight": part.half()},
    ],
)
def test_supported_files(wrap, tmp_path):
    centers, parts = shards(9, 2)
    head = load_partial_fc(saved(tmp_path, parts, wrap), partial(CosFaceHead, scale=32.0, margin=0.2))
    assert isinstance(head, CosFaceHead)
    assert (head.scale, head.margin, head.weight.dtype) == (32.0, 0.2, torch.float32)
    torch.testing.assert_close(head.weight.detach(), centers, rtol=1e-3, atol=1e-3)


def test_file_names_with_ranks_must_be_in_order(tmp_path):
    _, parts = shards(24, 12)
    paths = saved(tmp_path, parts)
    with pytest.raises(InputError, match=r"in the order of ranks, the file names give \[0, 1, 10, 11, 2"):
        load_partial_fc(sorted(paths))
    with pytest.raises(InputError, match="a sequence of files, one per process, got one path"):
        load_partial_fc(str(paths[0]))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([torch.ones(3, 4), torch.ones(4, 4)], "a shard is missing, or the order is not that of ranks"),
        ([torch.ones(2, 4), torch.ones(3, 4)], r"must have 3 rows, and 2 from shard 1 on, got \[2, 3\]"),
        ([torch.ones(2, 4), torch.ones(2, 5)], r"shard 1 must be \(n, 4\) like shard 0, got \(2, 5\)"),
        ([torch.ones(2)], r"shard 0 must be floating point \(n, d\), got \(2,\)"),
        ([torch.full((2, 2), torch.nan)], "shard 0 must be finite"),
        ([], "at least one tensor, got none"),
    ],
)
def test_invalid_shards(parts, words):
    with pytest.raises(ValueError, match=words):
        merge_partial_fc(parts)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": Path("weights")}, "must contain the class centers"),
        ({"conv1.weight": torch.ones(2, 2)}, "must contain the class centers"),
        ({"weight": torch.ones(()).expand(4, 10**9)}, "declares more values than its"),
        ({"weight": torch.ones(4, 8, dtype=torch.int64)}, "floating point"),
    ],
)
def test_files_without_centers(content, words, tmp_path):
    good, other = saved(tmp_path, shards(8, 2)[1])
    torch.save(content, other)
    with pytest.raises(InputError, match=words):
        load_partial_fc([good, other])


def test_a_head_of_another_size(tmp_path):
    _, parts = shards(8, 2)
    with pytest.raises(InputError, match=r"head must have a weight of .* = \(8, 8\), .* got \(9, 8\)"):
        load_partial_fc(saved(tmp_path, parts), lambda dim, identities: ArcFaceHead(dim, identities + 1))
