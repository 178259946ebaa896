"""Strided depthwise convolutions that are computed with stride 1 in training."""

import copy

import pytest
import torch
from torch import nn

from kdlib_faces.backbones import build_backbone
from kdlib_faces.training.depthwise import StridedDepthwiseConv2d, replace_strided_depthwise


@pytest.mark.parametrize("stride", [2, 3, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding", "dilation"), [(3, 1, 1), (3, 0, 1), (5, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("size", [(14, 14), (15, 13)])
def test_output_and_gradients_are_those_of_the_plain_layer(
    stride: int | tuple[int, int], kernel: int, padding: int, dilation: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6)).double()
    fast = copy.deepcopy(plain)
    replace_strided_depthwise(fast)
    assert isinstance(fast[0], StridedDepthwiseConv2d)
    images = torch.randn(2, 6, *size, dtype=torch.float64)
    results = []
    for layer in (plain, fast):
        inputs = images.clone().requires_grad_()
        outputs = layer(inputs)
        outputs.square().sum().backward()
        results.append([outputs, inputs.grad, *(each.grad for each in layer.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_only_strided_depthwise_layers_change() -> None:
    network = build_backbone("mobilefacenet", embedding_dim=16, width=0.25, input_size=32)
    names = list(network.state_dict())
    expected = [m.groups > 1 and max(m.stride) > 1 for m in network.modules() if isinstance(m, nn.Conv2d)]
    replace_strided_depthwise(network)
    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
    assert [isinstance(each, StridedDepthwiseConv2d) for each in layers] == expected
    assert sum(expected) == 3
    assert list(network.state_dict()) == names


def test_without_gradient_the_stride_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4))
    replace_strided_depthwise(network)
    calls: list[object] = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, inputs: calls.append(inputs))
    with torch.no_grad():
        network(torch.zeros(1, 4, 6, 6))
    assert len(calls) == 1
