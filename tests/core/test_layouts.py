"""Layouts of feature maps: said by an argument where the shape may be read in several ways."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib import AttentiveSimilarityLoss, HierarchicalContextLoss, NSTLoss, OverhaulLoss
from kdlib.functional import attentive_similarity, channel_attention_map, hierarchical_context, nst, overhaul
from tests.core.loss_inputs import noise

MAP_LOSSES = [
    (nst, NSTLoss, {}),
    (attentive_similarity, AttentiveSimilarityLoss, {}),
    (hierarchical_context, HierarchicalContextLoss, {}),
    (overhaul, lambda **options: OverhaulLoss(-0.5, **options), {"margin": -0.5}),
]


@pytest.mark.parametrize(("loss", "module", "options"), MAP_LOSSES)
def test_maps_with_channels_last_must_say_so(
    loss: Callable[..., Tensor], module: Callable[..., Any], options: dict[str, Any]
) -> None:
    student, teacher = noise(2, 5, 4, 4), noise(2, 5, 4, 4, seed=1)
    expected = loss(student, teacher, **options)
    last = [x.movedim(1, 3) for x in (student, teacher)]
    argument = "student_layout" if loss in (nst, attentive_similarity) else "layout"
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: the layout of student .* is ambiguous; give {argument}="):
        loss(*last, **options)
    torch.testing.assert_close(loss(*last, layout="bhwc", **options), expected)
    torch.testing.assert_close(module(layout="bhwc")(*last), expected)
    assert "layout='bhwc'" in repr(module(layout="bhwc"))
    with pytest.raises(ValueError, match="Loss: layout must be one of 'bchw', 'bhwc', got 'bnd'"):
        module(layout="bnd")
    if argument != "layout":
        torch.testing.assert_close(loss(student, last[1], teacher_layout="bhwc", **options), expected)
        torch.testing.assert_close(module(student_layout="bhwc")(last[0], teacher), expected)


def test_a_channel_map_of_channels_last() -> None:
    x = noise(2, 5, 4, 4)
    expected = channel_attention_map(x)
    torch.testing.assert_close(channel_attention_map(x.movedim(1, 3), layout="bhwc"), expected)
    with pytest.raises(
        ValueError, match=r"channel_attention_map: the layout of features .* is ambiguous; give layout="
    ):
        channel_attention_map(x.movedim(1, 3))
