"""Fixtures of several test files."""

import pytest
import torch


@pytest.fixture
def no_figures(monkeypatch):
    """Figures are tested with the report, and take most of the time."""
    monkeypatch.setattr("kdlib_faces.report.files._jobs", lambda view: {})


@pytest.fixture
def images():
    """Five images for the network of `path`."""
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def path(tmp_path):
    """The ONNX file of a small network."""
    from tests.faces.tiny_graph import network, save

    return save(network(), tmp_path)


@pytest.fixture
def graph(tmp_path):
    """The ONNX file of a teacher of 112 pixels; its tests need onnx and onnxruntime."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from tests.faces.tiny_graph import tiny_graph

    return tiny_graph(tmp_path / "net.onnx")
