"""Exported networks: parity with the network, what the files state, and refusals."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import Backbone, MobileFaceNet, build_backbone
from kdlib_faces.export import convert_float16, export_onnx, export_program, quantize_onnx
from kdlib_faces.export._equalize import equalize
from kdlib_faces.export._prelu import join_prelu, split_prelu
from kdlib_faces.export._rounding import round_weights
from kdlib_faces.export.float_graph import sample_faces
from kdlib_faces.harness.embeddings import open_model
from kdlib_faces.teachers import OnnxTeacher
from kdlib_faces.teachers.onnx.inspect import describe_graph
from tests.faces.exported import scramble

SIZE = 32


def network() -> Backbone:
    return scramble(MobileFaceNet(embedding_dim=16, width=0.25, input_size=SIZE))


def faces(count: int = 24) -> Tensor:
    return sample_faces(SIZE, count)


def run(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"images": images.numpy()})[0]
    return output


def similarity(left: np.ndarray, right: np.ndarray) -> float:
    return float(torch.cosine_similarity(torch.from_numpy(left), torch.from_numpy(right)).mean())


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path]:
    model = network()
    model.input_spec = model.input_spec.changed(color="bgr", mean=100.0, scale=64.0)
    folder = tmp_path_factory.mktemp("export")
    return model, export_onnx(model, folder / "student.onnx", metadata={"training": {"steps": 3}})


def test_the_graph_takes_any_batch_and_equals_the_network(graph: tuple[Backbone, Path]) -> None:
    model, path = graph
    for batch in (1, 3, 5):
        images = model.input_spec(faces(batch))
        wanted = model(images).detach().numpy()
        np.testing.assert_allclose(run(path, images), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_the_graph_states_its_images_and_comes_back_as_a_teacher(graph: tuple[Backbone, Path]) -> None:
    model, path = graph
    (entry,) = (json.loads(each.value) for each in onnx.load(path).metadata_props if each.key == "kdlib_faces")
    assert entry["embedding_dim"] == 16
    assert entry["opset"] == 18
    assert entry["training"] == {"steps": 3}
    teacher = OnnxTeacher(path)
    assert teacher.image_format == model.input_spec
    images = faces(4)
    wanted = model(model.input_spec(images))
    torch.testing.assert_close(teacher(images)["embedding"], wanted, rtol=1e-3, atol=1e-3)
    assert describe_graph(path)["images"].startswith("BGR, (pixel - 100) / 64, 32 x 32")
    assert open_model(path).entry.input.startswith("BGR")


def test_prelu_is_split_exactly_for_any_slope_and_joined_again(graph: tuple[Backbone, Path]) -> None:
    _, path = graph
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "PRelu" not in kinds
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for last in (0.75, 1.5):
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 3, 4, 4] images) => (float[n, 3, 4, 4] embedding) '
            f"<float[3, 1, 1] slope = {{0.25, -0.5, {last}}}> {{ embedding = PRelu(images, slope) }}"
        )
        split_prelu(model)
        assert "PRelu" not in {node.op_type for node in model.graph.node}
        session = onnxruntime.InferenceSession(model.SerializeToString())
        wanted = np.where(images > 0, images, images * np.array([0.25, -0.5, last]).reshape(-1, 1, 1))
        np.testing.assert_allclose(session.run(None, {"images": images})[0], wanted, rtol=1e-5, atol=1e-6)
        join_prelu(model)
        joined = [node.op_type for node in model.graph.node] == ["PRelu"]
        assert joined == (last <= 1)


def test_normalized_embeddings_have_unit_length(tmp_path: Path) -> None:
    path = export_onnx(network(), tmp_path / "unit.onnx", normalize=True, opset=20)
    np.testing.assert_allclose(np.linalg.norm(run(path, faces(3)), axis=1), 1, rtol=1e-5)
    assert onnx.load(path).opset_import[0].version == 20


def test_a_graph_that_differs_is_refused_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "student.onnx"
    target.write_bytes(b"before")
    with pytest.raises(InputError, match=r"must be within 1e-12 of those of the network, got a relative error of"):
        export_onnx(network(), target, tolerance=1e-12)

    def refuse(path: Path) -> None:
        onnx.checker.check_model(str(path))
        raise InputError("loses too much")

    with pytest.raises(InputError, match="loses too much"):
        export_onnx(network(), target, check=refuse)
    assert target.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["student.onnx"]
    with pytest.raises(ValueError, match="opset"):
        export_onnx(network(), target, opset=11)


def test_a_program_equals_the_network_at_any_batch(tmp_path: Path) -> None:
    model = network()
    path = export_program(model, tmp_path / "student.pt2")
    loaded = torch.export.load(path).module()
    for batch in (1, 4):
        torch.testing.assert_close(loaded(faces(batch)), model(faces(batch)), rtol=1e-4, atol=1e-4)


def test_int8_is_small_and_close(graph: tuple[Backbone, Path], tmp_path: Path) -> None:
    model, source = graph
    path = quantize_onnx(source, faces(), tmp_path / "int8.onnx")
    images = model.input_spec(sample_faces(SIZE, 40)[24:])
    assert similarity(run(path, images), run(source, images)) > 0.95
    stored = onnx.load(path)
    kinds = {node.op_type for node in stored.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    teacher = OnnxTeacher(path)
    assert teacher.image_format == model.input_spec
    assert teacher.run_batch is None
    assert describe_graph(path)["embedding_dim"] == 16
    # Rows do not depend on the others of a batch.
    np.testing.assert_array_equal(run(path, images)[:1], run(path, images[:1]))


def test_an_int8_graph_runs_in_int8_with_its_first_layers_in_float(
    graph: tuple[Backbone, Path], tmp_path: Path
) -> None:
    _, source = graph
    path = quantize_onnx(source, faces(), tmp_path / "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    (entry,) = (json.loads(each.value) for each in onnx.load(path).metadata_props if each.key == "kdlib_faces")
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(source).graph.node)
    # A PReLU is one convolution and a maximum of uint8 in int8, two convolutions in float.
    assert kinds.count("QLinearConv") > convolutions // 2
    assert kinds.count("Max") > 10
    assert kinds.count("PRelu") == 0
    assert 0 < entry["float_nodes"] < 10


def test_rounding_by_inputs_has_a_smaller_error_than_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    inputs = (mixed @ torch.randn(32, 2000, generator=generator, dtype=torch.float64))[None] + 3
    weight = torch.randn(1, 8, 32, generator=generator, dtype=torch.float64)
    rounded, steps = round_weights(weight, inputs)
    assert rounded.dtype == torch.int8
    nearest = (weight / steps[..., None].double()).round() * steps[..., None].double()
    errors = [((each - weight) @ inputs).var(dim=2).sum() for each in (rounded * steps[..., None].double(), nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_calibration_takes_bytes_and_floats_alike(graph: tuple[Backbone, Path], tmp_path: Path) -> None:
    _, source = graph
    pixels = ((faces() + 1) * 127.5).round().to(torch.uint8)
    paths = [
        quantize_onnx(source, each, tmp_path / f"{number}.onnx")
        for number, each in enumerate((pixels, pixels.numpy(), pixels.float() / 127.5 - 1))
    ]
    assert len({path.read_bytes() for path in paths[:2]}) == 1
    images = faces(3)
    # Rounding of the ranges moves single values by a step.
    assert similarity(run(paths[0], images), run(paths[2], images)) > 0.99


def test_sensitive_parts_stay_float_and_an_impossible_cosine_is_refused(
    graph: tuple[Backbone, Path], tmp_path: Path
) -> None:
    _, source = graph
    with pytest.raises(InputError, match=r"must have a mean cosine of at least 1 to those of .*student\.onnx, got 0\."):
        quantize_onnx(source, faces(8), tmp_path / "int8.onnx", min_cosine=1.0)
    assert not (tmp_path / "int8.onnx").exists()
    with pytest.raises(InputError, match=r"at least 8 images, got \(2, 3, 32, 32\)"):
        quantize_onnx(source, faces(2), tmp_path / "int8.onnx")


def test_equal_ranges_change_no_output(graph: tuple[Backbone, Path]) -> None:
    model, source = graph
    images = model.input_spec(faces(6))
    before = onnx.load(source)
    after = copy.deepcopy(before)
    names = [node.output[0] for node in before.graph.node]
    probe = copy.deepcopy(before)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)

    def peaks(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
        probe = copy.deepcopy(graph)
        del probe.graph.output[:]
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = onnxruntime.InferenceSession(probe.SerializeToString())
        arrays = zip(names, session.run(None, {"images": images.numpy()}), strict=True)
        return {name: np.abs(array).max((0, 2, 3)) for name, array in arrays if array.ndim == 4}

    def spread(found: dict[str, np.ndarray]) -> float:
        return float(np.mean([each.mean() / each.max() for each in found.values()]))

    first = peaks(before)
    equalize(after, first)
    sessions = [onnxruntime.InferenceSession(each.SerializeToString()) for each in (before, after)]
    wanted, found = (session.run(None, {"images": images.numpy()})[0] for session in sessions)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert spread(peaks(after)) > 1.3 * spread(first)


def test_float16_halves_the_file(graph: tuple[Backbone, Path], tmp_path: Path) -> None:
    model, source = graph
    path = convert_float16(source, tmp_path / "half.onnx")
    assert path.stat().st_size < 0.65 * source.stat().st_size
    images = model.input_spec(faces(3))
    assert run(path, images).dtype == np.float32
    assert similarity(run(path, images), run(source, images)) > 0.999
    assert OnnxTeacher(path).image_format == model.input_spec


@pytest.mark.parametrize("family", ["ir", "mobilenet_v2"])
def test_other_families_are_exported(family: str, tmp_path: Path) -> None:
    sizes = {"ir": {"layers": (1, 1, 1, 1), "width": 0.125}, "mobilenet_v2": {"width": 0.25}}[family]
    model = scramble(build_backbone(family, embedding_dim=8, input_size=SIZE, **sizes))
    images = faces(2)
    path = export_onnx(model, tmp_path / "net.onnx", images=images)
    np.testing.assert_allclose(run(path, images), model(images).detach().numpy(), rtol=1e-3, atol=1e-3)


def test_malformed_metadata_are_refused(graph: tuple[Backbone, Path], tmp_path: Path) -> None:
    _, source = graph
    for text, words in (
        ("[1]", "must be a JSON object"),
        ('{"input": {"colour": 1}}', "must hold 'input' with"),
        ('{"input": {"size": 32, "scale": 0}}', "does not describe its images"),
    ):
        model = onnx.load(source)
        del model.metadata_props[:]
        model.metadata_props.add(key="kdlib_faces", value=text)
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(InputError, match=words):
            OnnxTeacher(tmp_path / "bad.onnx")
