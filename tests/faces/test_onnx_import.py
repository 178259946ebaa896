"""ONNX files as native backbones: recognized by their layers, equal to the file, trainable, saved and loaded."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from kdlib import OUTPUT, StudentAdapter, TeacherAdapter  # noqa: E402
from kdlib_faces._checks import InputError  # noqa: E402
from kdlib_faces.backbones import MBF, IResNet, MBFFlat, MobileFaceNet, load_backbone, save_backbone  # noqa: E402
from kdlib_faces.teachers import OnnxTeacher, import_onnx, restore_statistics  # noqa: E402
from tests.faces.exported import scramble, write  # noqa: E402
from tests.faces.tiny_graph import tiny_graph  # noqa: E402

NETWORKS = {
    "iresnet": lambda: IResNet((2, 1, 2, 1), embedding_dim=24, width=0.125, input_size=32),
    "mbf": lambda: MBF(24, scale=1, blocks=(1, 2, 1, 1), input_size=32),
    "mbf_wide": lambda: MBF(24, scale=2, blocks=(2, 1, 2, 1), input_size=32),
    "mbf_flat": lambda: MBFFlat(24, scale=2, blocks=(1, 1, 1, 1), input_size=32, tail_channels=8),
    "mobilefacenet": lambda: MobileFaceNet(24, width=0.25, input_size=32),
}


def _images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("fold", [False, True], ids=["own norms", "folded norms"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_is_imported_as_the_network_that_it_was_exported_from(tmp_path: Path, name: str, fold: bool) -> None:
    model = scramble(NETWORKS[name]())
    path = write(model, tmp_path / "anything.onnx", fold=fold)
    found = import_onnx(path)
    assert type(found) is type(model)
    assert found.arguments == model.arguments
    assert found.state_dict().keys() == model.state_dict().keys()
    expected = OnnxTeacher(path)(_images())["embedding"]
    with torch.no_grad():
        got = found(_images())
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(got, model(_images()), rtol=1e-3, atol=1e-4)
    if not fold:
        assert all(torch.allclose(value.float(), found.state_dict()[key].float(), atol=1e-5)
                   for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked"))  # fmt: skip


@pytest.mark.parametrize("flatten", ["Reshape", "view"])
def test_other_spellings_of_flatten_and_another_eps(tmp_path: Path, flatten: str) -> None:
    model = scramble(NETWORKS["iresnet"]())
    found = import_onnx(write(model, tmp_path / "a.onnx", fold=False, eps=2e-5, flatten=flatten))
    torch.testing.assert_close(found(_images()), model(_images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "grid", "last"), [("mobilefacenet", 1, "Flatten"), ("mbf", 1, "Squeeze"), ("iresnet", 2, "Flatten")]
)
def test_an_embedding_made_by_a_convolution(tmp_path: Path, name: str, grid: int, last: str) -> None:
    """Paddle and others write the linear layer as a convolution over the final grid, with its bias added behind it."""
    model = scramble(NETWORKS[name]())
    file = onnx.load(str(write(model, tmp_path / "a.onnx", fold=False)))
    graph, make = file.graph, onnx.helper.make_node
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    flatten, linear, norm = list(graph.node)[-3:]
    matrix = weights[linear.input[1]] if linear.op_type == "Gemm" else weights[linear.input[1]].T
    bias = weights[linear.input[2]] if linear.op_type == "Gemm" else np.zeros(len(matrix), np.float32)
    new = {"kernel": np.ascontiguousarray(matrix).reshape(len(matrix), -1, grid, grid), "shift": bias[:, None, None]}
    new["sides"] = np.array([2, 3])
    del graph.node[-3:]
    graph.node.extend(
        [
            make("Conv", [flatten.input[0], "kernel"], ["conv"]),
            make("Add", ["conv", "shift"], ["sum"]),
            make("BatchNormalization", ["sum", *norm.input[1:]], ["norm"], epsilon=1e-5),
            make(last, ["norm", "sides"] if last == "Squeeze" else ["norm"], norm.output),
        ]
    )
    graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in new.items())
    onnx.save(file, str(tmp_path / "b.onnx"))
    found = import_onnx(tmp_path / "b.onnx")
    assert found.arguments == model.arguments
    torch.testing.assert_close(found(_images()), model(_images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["iresnet", "mbf", "mbf_flat", "mobilefacenet"])
def test_a_free_input_size_is_derived_from_the_final_grid(tmp_path: Path, name: str) -> None:
    model = scramble(NETWORKS[name]())
    assert import_onnx(write(model, tmp_path / "a.onnx", size=None, fold=True)).arguments == model.arguments


def test_the_network_is_saved_loaded_tapped_and_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scramble(NETWORKS["mbf_flat"]())
    found = import_onnx(write(model, tmp_path / "a.onnx", fold=True))
    save_backbone(found, tmp_path / "start.pt")
    again = load_backbone(tmp_path / "start.pt")
    assert repr(again) == repr(found)
    assert torch.equal(again(_images()), found(_images()))
    teacher = TeacherAdapter(again, {"embedding": OUTPUT, "map": again.stages[2]})
    assert teacher(_images())["map"].shape == (3, 256, 4, 4)
    student = StudentAdapter(found, {"embedding": OUTPUT})
    optimizer = torch.optim.SGD(found.parameters(), lr=0.05)
    goal = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    losses = []
    for _ in range(12):
        loss = (1 - F.cosine_similarity(student(_images())["embedding"], goal)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is not None for parameter in found.parameters())


def test_restored_statistics_keep_eval_mode_and_bring_train_mode_close(tmp_path: Path) -> None:
    model = scramble(NETWORKS["mbf_flat"]())
    found = import_onnx(write(model, tmp_path / "a.onnx", fold=True))
    images = _images(64)
    before = found(images).detach()

    def change_in_train_mode() -> float:
        return float((found.train()(images).detach() - before).abs().mean() / before.abs().mean())

    off = change_in_train_mode()
    found = import_onnx(tmp_path / "a.onnx")
    restore_statistics(found, images, batch=16)
    assert not found.training
    torch.testing.assert_close(found(images), before, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in found.modules())
    assert change_in_train_mode() < 0.05 < off
    with pytest.raises(ValueError, match="restore_statistics: number of images"):
        restore_statistics(found, images[:1])


def test_other_networks_are_refused_by_node(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny\.onnx cannot be imported .* at GlobalAveragePool 'pool'"):
        import_onnx(tiny_graph(tmp_path / "tiny.onnx"))
    graph = onnx.load(str(write(scramble(NETWORKS["iresnet"]()), tmp_path / "a.onnx", fold=True)))
    sum_node = next(node for node in graph.graph.node if node.op_type == "Add")
    sum_node.op_type = "Mul"
    onnx.save(graph, str(tmp_path / "b.onnx"))
    with pytest.raises(InputError, match=re.escape(f"at Mul {sum_node.name!r}")):
        import_onnx(tmp_path / "b.onnx")


def _changed(path: Path, change) -> Path:
    graph = onnx.load(str(path))
    change(graph.graph)
    target = path.with_name("changed.onnx")
    onnx.save(graph, str(target))
    return target


def test_hostile_graphs_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write(scramble(NETWORKS["mbf"]()), tmp_path / "a.onnx", fold=True)

    def circle(graph) -> None:
        graph.node[4].input[0] = graph.node[8].output[0]

    def nan(graph) -> None:
        array = onnx.numpy_helper.to_array(graph.initializer[0]).copy()
        array[0] = float("nan")
        graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, graph.initializer[0].name))

    def strides(graph) -> None:
        node = next(node for node in graph.node if node.op_type == "Conv")
        next(a for a in node.attribute if a.name == "strides").ints[:] = [2, 1]

    def short(graph) -> None:
        del graph.node[-2:]
        graph.output[0].name = graph.node[-1].output[0]

    for change in (circle, nan, strides, short):
        with pytest.raises(InputError, match=r"changed\.onnx") as caught:
            import_onnx(_changed(path, change))
        assert "\n" not in str(caught.value)


def test_a_network_with_other_outputs_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = write(scramble(NETWORKS["mbf"]()), tmp_path / "a.onnx", fold=True)
    monkeypatch.setattr("kdlib_faces.teachers.onnx.import_graph.TOLERANCE", -1.0)
    with pytest.raises(InputError, match="outputs differ from those of the network by"):
        import_onnx(path)
    assert isinstance(import_onnx(path, verify=False), nn.Module)


def test_the_published_file(tmp_path: Path) -> None:
    path = os.environ.get("KDLIB_W600K_MBF", "")
    if not Path(path).is_file():
        pytest.skip("w600k_mbf.onnx is missing; set KDLIB_W600K_MBF to its path")
    found = import_onnx(path)
    assert repr(found) == ("MBFFlat(embedding_dim=512, scale=2, blocks=(1, 4, 6, 2), input_size=112, tail_channels=64)")
    expected = OnnxTeacher(path)(_images(4, 112))["embedding"]
    with torch.no_grad():
        torch.testing.assert_close(found(_images(4, 112)), expected, rtol=0, atol=1e-4)
    save_backbone(found, tmp_path / "start.pt")
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path / "start.pt")(_images(4, 112)), expected, rtol=0, atol=1e-4)
