"""ONNX files that are damaged, hostile, or keep their weights elsewhere, and descriptions of good ones."""

import json
import sys

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper

from kdlib_faces.teachers import import_onnx
from kdlib_faces.teachers.onnx.inspect import describe_graph, list_taps, suggest_taps
from kdlib_faces.teachers.onnx.session import OnnxTeacher
from tests.faces.tiny_graph import KERNEL, MATRIX, SECOND, network, save, truth


def test_describe_graph(path):
    facts = describe_graph(path)
    assert facts["inputs"] == {"images": [None, 3, 16, 16]}
    assert facts["outputs"] == {"out": [1, 6]}
    assert facts["opset"] == {"ai.onnx": 13}
    assert facts["nodes"]["Conv"] == 2
    assert facts["parameters"] == KERNEL.size + SECOND.size + MATRIX.size
    assert facts["macs"] == 64 * (KERNEL.size + SECOND.size) + MATRIX.size
    assert (facts["embedding_dim"], facts["input_size"]) == (6, 16)
    assert facts["bytes"] == path.stat().st_size
    assert json.loads(json.dumps(facts)) == facts


def test_list_and_suggest_taps(path, images):
    assert list_taps(path) == [
        ("c1", "Conv", (1, 4, 8, 8)),
        ("r1", "Relu", (1, 4, 8, 8)),
        ("c2", "Conv", (1, 4, 8, 8)),
        ("map", "Add", (1, 4, 8, 8)),
        ("flat", "Flatten", (1, 4)),
        ("out", "MatMul", (1, 6)),
    ]
    assert suggest_taps(path) == {"map8": "map"}
    assert OnnxTeacher(path, suggest_taps(path))(images)["map8"].shape == (5, 4, 8, 8)


def test_truncated_and_damaged_files_raise_input_errors_only(path):
    whole = path.read_bytes()
    for stop in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:stop])
        with pytest.raises(InputError) as caught:
            OnnxTeacher(path)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for where in rng.integers(0, len(whole), 3):
            damaged[where] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            OnnxTeacher(path)
        except InputError:
            refused += 1
    assert refused  # others only changed a weight or a name


def test_files_that_are_not_onnx_are_refused(tmp_path):
    contents = (b"", b"not a graph at all\n" * 9, b"\x00" * 64, b"\x89PNG\r\n\x1a\n", b"PK\x03\x04")
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.onnx").write_bytes(content)
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2**31)
    for name, message in (
        *((f"{number}.onnx", "not an ONNX file") for number in range(len(contents))),
        ("none.onnx", "does not exist"),
        ("", "must be a file"),
        ("huge.onnx", "at most 2147483647 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            OnnxTeacher(tmp_path / name)


def with_input(*inputs):
    model = network()
    del model.graph.input[:]
    model.graph.input.extend(helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs)
    return model


def test_weights_that_are_listed_as_inputs_are_not_inputs(tmp_path, images):
    model = network()
    model.ir_version = 3  # where every initializer had to be an input
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    got = OnnxTeacher(save(model, tmp_path))(images)["embedding"]
    torch.testing.assert_close(got, truth(images)["embedding"], rtol=1e-4, atol=1e-5)


def test_an_operation_unknown_to_the_runtime_is_refused(tmp_path):
    model = network()
    model.graph.node[1].op_type = "NoSuchOp"
    with pytest.raises(InputError, match=r"net.onnx cannot be run: .*NoSuchOp") as caught:
        OnnxTeacher(save(model, tmp_path))
    assert "\n" not in str(caught.value)


def external(location, *, offset="0", length=None):
    """A network whose first kernel is in another file."""
    model = network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length or str(KERNEL.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    return model


def test_external_weights_beside_the_file_are_read_and_fingerprinted(tmp_path, images):
    file = save(external("weights.bin", offset="8"), tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(8) + KERNEL.tobytes())
    teacher = OnnxTeacher(file)
    torch.testing.assert_close(teacher(images)["embedding"], truth(images)["embedding"], rtol=1e-4, atol=1e-5)
    (tmp_path / "weights.bin").write_bytes(bytes(8) + (2 * KERNEL).tobytes())
    assert OnnxTeacher(file).fingerprint != teacher.fingerprint


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "a\0/../../secret.bin", ".", ""]
)
def test_external_weights_outside_the_folder_are_refused(tmp_path, location):
    folder = tmp_path / "graph"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(KERNEL.tobytes())
    attribute = network()
    tensor = external(location).graph.initializer[0]
    attribute.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))
    for model in (external(location), attribute):
        with pytest.raises(InputError, match="must lie in the folder of the graph"):
            OnnxTeacher(save(model, folder))


@pytest.mark.skipif(sys.platform == "win32", reason="creating symbolic links needs administrator rights on Windows")
def test_external_weights_by_a_link(tmp_path, images):
    (tmp_path / "secret.bin").write_bytes(KERNEL.tobytes())
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "weights.bin").symlink_to("../secret.bin")
    file = save(external("weights.bin"), folder)
    with pytest.raises(InputError, match="must lie in the folder of the graph"):
        OnnxTeacher(file)
    # A download cache keeps graph and weights in one store and links both.
    file.rename(tmp_path / "blob")
    file.symlink_to("../blob")
    torch.testing.assert_close(OnnxTeacher(file)(images)["embedding"], truth(images)["embedding"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_input(("images", 1, ["n", 3, 16, 16]), ("age", 1, [1])), "one input.*got 'images', 'age'"),
        (with_input(), "one input.*got none"),
        (with_input(("images", 1, [1, 48])), "no image input"),
        (with_input(("images", 7, [1, 3, 8, 8])), "type int64"),
        (with_input(("images", 8, [1, 3, 8, 8])), "type string"),
        (with_input(("images", 99, [1, 3, 8, 8])), "type unknown"),
        (network(size=2**20), "too large: .* 'images' has 3,298,534,883,328 values"),
        (external("weights.bin", length="999999"), "reach beyond"),
        (external("weights.bin", offset="-4"), "reach beyond"),
        (external("weights.bin", offset="four"), "broken offset"),
        (external("weights.bin", offset="9" * 30), "reach beyond"),
        (external("absent.bin"), "does not exist"),
        (external("weights.bin", length="8"), "the constant 'kernel' is damaged"),
    ],
)
def test_graphs_without_one_image_input_or_with_broken_weights_are_refused(tmp_path, model, words):
    (tmp_path / "weights.bin").write_bytes(KERNEL.tobytes())
    with pytest.raises(InputError, match=words):
        OnnxTeacher(save(model, tmp_path))


def test_whatever_onnx_raises_on_a_damaged_file_is_one_line_that_names_it(tmp_path):
    def unknown_type(graph):
        graph.initializer[0].data_type = 77

    def huge(graph):
        graph.initializer[0].dims[:] = [2**40, 2**40, 2**40]

    def short(graph):
        graph.initializer[0].raw_data = graph.initializer[0].raw_data[:-3]

    def no_type(graph):
        graph.initializer[0].ClearField("data_type")

    def attribute(graph):
        graph.node[0].attribute[0].ClearField("type")

    def no_output(graph):
        del graph.node[3].output[:]

    def line_break(graph):
        graph.node[1].op_type, graph.node[1].name = "Relu\n", "a\nb\u202e"

    for change in (unknown_type, huge, short, no_type, attribute, no_output, line_break):
        model = network()
        change(model.graph)
        path = save(model, tmp_path, f"{change.__name__}.onnx")
        for use in (OnnxTeacher, describe_graph, list_taps, import_onnx):
            with pytest.raises(InputError, match=rf"{change.__name__}\.onnx") as caught:
                use(path)
            assert str(caught.value).isprintable(), str(caught.value)
