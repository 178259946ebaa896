"""The images that ONNX graphs take: pixels, channels, layout, batch and size; and which output is the embedding."""

import time
import warnings

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from kdlib_faces.teachers import OnnxTeacher  # noqa: E402
from kdlib_faces.teachers.onnx.inspect import describe_graph, list_taps, suggest_taps  # noqa: E402
from kdlib_faces.teachers.open import onnx_taps  # noqa: E402
from tests.faces.tiny_graph import network, reshaped, save, truth  # noqa: E402

RED_GREEN_BLUE = np.array([0.485, 0.456, 0.406], np.float32)


def _images(height=16, width=16, count=3):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def prefixed(operations, shape=("n", 3, 16, 16), dtype=TensorProto.FLOAT):
    """A network whose graph begins with operations: kind, constants and attributes of each."""
    model = network()
    graph = model.graph
    tensor, nodes = "raw", []
    for at, (kind, constants, attributes) in enumerate(operations):
        names = [f"constant{at}_{number}" for number in range(len(constants))]
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names, strict=True)
        )
        out = "images" if at == len(operations) - 1 else f"step{at}"
        nodes.append(helper.make_node(kind, [tensor, *names], [out], **attributes))
        tensor = out
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.input[0].CopyFrom(helper.make_tensor_value_info("raw", dtype, shape))
    return model


def _f(*values):
    return np.array(values if len(values) > 1 else values[0], np.float32)


HALF = ("Sub", [_f(127.5)], {})
FIRST, LAST = [0, 3, 1, 2], ("n", 16, 16, 3)
NORM = [
    np.ones(3, np.float32),
    np.zeros(3, np.float32),
    np.full(3, 127.5, np.float32),
    np.full(3, 127.5**2, np.float32),
]


@pytest.mark.parametrize(
    "model",
    [
        prefixed([HALF, ("Mul", [_f(1 / 127.5)], {})]),
        prefixed([("Div", [_f(255)], {}), ("Sub", [_f(0.5)], {}), ("Div", [_f(0.5)], {})]),
        prefixed([("Mul", [_f(1 / 127.5)], {}), ("Add", [_f(-1)], {})]),
        prefixed([("Sub", [_f(0.5)], {}), ("Mul", [_f(2)], {})]),
        prefixed([("BatchNormalization", NORM, {"epsilon": 1e-9})]),
        prefixed([("Transpose", [], {"perm": FIRST})], LAST),
        prefixed([("Transpose", [], {"perm": FIRST})], ("n", "h", "w", "c")),
        prefixed([("Sub", [_f(127.5, 127.5, 127.5)], {}), ("Transpose", [], {"perm": FIRST}), ("Div", [_f(127.5)], {})], LAST),
        prefixed([("Cast", [], {"to": 1}), HALF, ("Div", [_f(127.5)], {})], dtype=TensorProto.UINT8),
        prefixed([("Cast", [], {"to": 1}), ("Transpose", [], {"perm": FIRST}), HALF, ("Div", [_f(127.5)], {})], LAST,
                 TensorProto.UINT8),
    ],
    ids=["sub mul", "div sub div", "mul add", "unit", "norm", "last", "last free", "last sub", "bytes", "bytes last"],
)  # fmt: skip
def test_images_are_fed_as_the_first_operations_expect_them(tmp_path, model):
    images = ((_images() + 1) * 127.5).round() / 127.5 - 1
    got = OnnxTeacher(save(model, tmp_path))(images)["embedding"]
    torch.testing.assert_close(got, truth(images)["embedding"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flip", [[], [("Gather", [np.array([2, 1, 0])], {"axis": 1})],
                                  [("Slice", [np.array([x]) for x in (2, -9, 1, -1)], {})]], ids=["", "gather", "slice"])  # fmt: skip
def test_means_of_each_channel_show_the_channel_order(tmp_path, flip):
    red_first = RED_GREEN_BLUE[:, None, None]
    for means, color in ((red_first, "rgb"), (red_first[::-1], "bgr")):
        teacher = OnnxTeacher(save(prefixed([*flip, ("Sub", [means.copy()], {}), ("Div", [_f(0.5)], {})]), tmp_path))
        expected = {"rgb": "bgr", "bgr": "rgb"}[color] if flip else color
        assert (teacher.image_format.color, teacher.image_format.mean, teacher.image_format.scale) == (
            expected,
            0.0,
            255.0,
        )


def test_what_a_graph_takes_can_be_stated(tmp_path):
    images = _images()
    path = save(network(), tmp_path)
    spec = InputSpec(color="bgr", mean=(100.0, 110.0, 120.0), scale=64.0)
    teacher = OnnxTeacher(path, preprocess=spec)
    expected = ((images.flip(1) + 1) * 127.5 - torch.tensor(spec.mean)[:, None, None]) / 64
    torch.testing.assert_close(teacher(images)["embedding"], truth(expected)["embedding"], rtol=1e-4, atol=1e-4)
    assert teacher.fingerprint != OnnxTeacher(path).fingerprint
    assert repr(eval(repr(teacher))) == repr(teacher)
    hidden = prefixed([("Identity", [], {}), ("Transpose", [], {"perm": FIRST})], ("n", "h", "w", "c"))
    assert OnnxTeacher(save(hidden, tmp_path, "hidden.onnx"), layout="bhwc")(images)["embedding"].shape == (3, 6)
    with pytest.raises(ValueError, match="layout must be one of 'bchw', 'bhwc'"):
        OnnxTeacher(path, layout="nhwc")


def test_wrong_pixels_are_noticed(tmp_path):
    path = save(prefixed([HALF, ("Mul", [_f(1 / 12.75)], {})]), tmp_path)
    with pytest.warns(
        UserWarning, match=r"nearly the same embedding .* give preprocess=InputSpec\(mean=0.0, scale=1.0\)"
    ):
        OnnxTeacher(path, preprocess=InputSpec())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnnxTeacher(path)


@pytest.mark.parametrize("model", [network(7), reshaped((7, 4), batch=7), reshaped((1, 4), batch=1)])
def test_descriptions_and_taps_of_a_fixed_batch(tmp_path, model):
    path = save(model, tmp_path)
    facts = describe_graph(path)
    assert (facts["outputs"], facts["embedding_dim"]) == ({"out": [1, 6]}, 6)
    assert facts["inputs"]["images"][1:] == [3, 16, 16]
    assert ("map", "Add", (1, 4, 8, 8)) in list_taps(path)
    assert suggest_taps(path) == {"map8": "map"}
    teacher = OnnxTeacher(path, {"embedding": None, "map": "map"})
    for count in (1, 7, 9):
        images = _images(count=count)
        torch.testing.assert_close(teacher(images), truth(images), rtol=1e-4, atol=1e-4)


def test_a_huge_fixed_batch_is_not_run(tmp_path):
    begin = time.monotonic()
    path = save(network(4096, 112), tmp_path)
    assert OnnxTeacher(path).run_batch is None
    assert describe_graph(path)["inputs"] == {"images": [4096, 3, 112, 112]}
    path = save(reshaped((4096, 4), batch=4096, size=112), tmp_path)
    for use in (OnnxTeacher, describe_graph, list_taps):
        with pytest.raises(InputError, match="only runs in batches of 4,096 images"):
            use(path)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("nodes", "numbers"),
    [
        ([helper.make_node("ConstantOfShape", ["huge"], ["big"])], {"huge": [200_000, 200_000]}),
        ([helper.make_node("Expand", ["pooled", "huge"], ["big"])], {"huge": [1, 4, 90_000, 90_000]}),
        ([helper.make_node("Tile", ["pooled", "huge"], ["big"])], {"huge": [1, 1, 90_000, 90_000]}),
    ],
)
def test_huge_intermediate_tensors_are_refused_before_they_are_made(tmp_path, nodes, numbers):
    extra = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    tail = [*nodes, helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0),
            helper.make_node("Mul", ["pooled", "most"], ["kept"]), helper.make_node("Flatten", ["kept"], ["flat"])]  # fmt: skip
    with pytest.raises(InputError, match=r"too large: .* largest tensor 'big' has"):
        OnnxTeacher(save(network(tail=tail, extra=extra), tmp_path))


def with_outputs(*nodes, first="out", size=16):
    """A network with more nodes, whose first output is the tensor `first`."""
    model = network(size=size)
    model.graph.node.extend(nodes)
    model.graph.output[0].name = first
    return model


COLUMN = [helper.make_node("Unsqueeze", ["out", "axes"], ["column"])]


@pytest.mark.parametrize("axes", [[2, 3], [1, 2], [1]], ids=["b d 1 1", "b 1 1 d", "b 1 d"])
def test_dimensions_of_one_around_an_embedding_are_dropped(tmp_path, axes):
    model = with_outputs(*COLUMN, first="column")
    model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), "axes"))
    path = save(model, tmp_path)
    torch.testing.assert_close(
        OnnxTeacher(path)(_images())["embedding"], truth(_images())["embedding"], rtol=1e-4, atol=1e-4
    )
    assert describe_graph(path)["embedding_dim"] == 6


def test_an_embedding_that_loses_its_batch_for_one_image(tmp_path):
    path = save(with_outputs(helper.make_node("Squeeze", ["out"], ["column"]), first="column"), tmp_path)
    for count in (1, 3):
        images = _images(count=count)
        torch.testing.assert_close(
            OnnxTeacher(path)(images)["embedding"], truth(images)["embedding"], rtol=1e-4, atol=1e-4
        )
    assert describe_graph(path)["embedding_dim"] == 6


def test_a_norm_is_not_taken_for_the_embedding(tmp_path):
    model = with_outputs(helper.make_node("ReduceL2", ["out"], ["norm"], axes=[1], keepdims=1), first="norm")
    model.graph.output.append(onnx.ValueInfoProto(name="out"))
    path = save(model, tmp_path)
    torch.testing.assert_close(
        OnnxTeacher(path)(_images())["embedding"], truth(_images())["embedding"], rtol=1e-4, atol=1e-4
    )
    facts = describe_graph(path)
    assert (facts["embedding"], facts["embedding_dim"], list(facts["outputs"])) == ("out", 6, ["norm", "out"])


def test_images_that_are_not_square(tmp_path):
    model = network()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 112, 96]))
    path = save(model, tmp_path)
    assert describe_graph(path)["input_size"] == (112, 96)
    assert onnx_taps(str(path), stage=0) == {"embedding": None, "map": "map"}
    images = _images(112, 112)
    # As aligned crops of 112 x 112 become 112 x 96 everywhere else: 8 columns on each side are cut.
    got = OnnxTeacher(path, resize=True)(images)["embedding"]
    torch.testing.assert_close(got, truth(images[..., 8:-8])["embedding"], rtol=1e-4, atol=1e-4)


def test_a_provider_that_the_runtime_drops_is_an_error(tmp_path, monkeypatch):
    import onnxruntime

    path = save(network(), tmp_path)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime's own, which a command line does not show
        with pytest.raises(InputError, match="cannot use CUDAExecutionProvider on this machine"):
            OnnxTeacher(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
