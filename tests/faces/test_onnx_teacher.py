"""ONNX teachers on tiny graphs: free, fixed and wrongly declared batches, taps, and files that must be refused."""

import copy
import json
import multiprocessing
import os
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlib.adapters.tap import OUTPUT
from kdlib_faces._checks import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from kdlib_faces.teachers.onnx.inspect import describe_graph, list_taps, suggest_taps  # noqa: E402
from kdlib_faces.teachers.onnx.session import OnnxTeacher  # noqa: E402

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32)
SECOND = RNG.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32)
MATRIX = RNG.normal(0, 0.5, (4, 6)).astype(np.float32)


def network(batch="n", size=16, *, tail=None, extra=(), dtype=TensorProto.FLOAT, channels=3):
    """Conv, Relu, Conv, Add at half size ("map"), pooled and multiplied to a 6-vector ("out")."""
    real = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["c1"], "first", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "second"], ["c2"], "middle", pads=[1] * 4),
        helper.make_node("Add", ["r1", "c2"], ["map"], "sum"),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"], "pool"),
        *(tail or [helper.make_node("Flatten", ["pooled"], ["flat"], "flatten")]),
        helper.make_node("MatMul", ["flat", "matrix"], ["out"], "last"),
    ]
    weights = {
        "kernel": KERNEL[:, :channels].astype(real),
        "second": SECOND.astype(real),
        "matrix": MATRIX.astype(real),
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", dtype, [batch, channels, size, size])],
        # The declared output is that of one image, as exporters leave it.
        [helper.make_tensor_value_info("out", dtype, [1, 6])],
        [*[numpy_helper.from_array(value, name) for name, value in weights.items()], *extra],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model


def reshaped(shape=(1, 4)):
    """A graph with a declared free batch and a reshape made for one image."""
    tail = [helper.make_node("Reshape", ["pooled", "shape"], ["flat"], "reshape")]
    return network(tail=tail, extra=[numpy_helper.from_array(np.array(shape, np.int64), "shape")])


def mixing(batch):
    """Rows that depend on each other: the mean of the batch is added, as by a BatchNorm in training mode."""
    tail = [
        helper.make_node("Flatten", ["pooled"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["mean", "ramp"], ["bent"]),
        helper.make_node("Add", ["rows", "bent"], ["flat"]),
    ]
    ramp = np.arange(4, dtype=np.float32)[None] if batch == "n" else np.arange(batch, dtype=np.float32)[:, None]
    return network(batch, tail=tail, extra=[numpy_helper.from_array(ramp, "ramp")])


def save(model, folder, name="net.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def truth(images):
    """The same network in torch."""
    r1 = F.conv2d(images, torch.from_numpy(KERNEL), stride=2, padding=1).relu()
    maps = r1 + F.conv2d(r1, torch.from_numpy(SECOND), padding=1)
    return {"map": maps, "embedding": maps.mean((2, 3)) @ torch.from_numpy(MATRIX)}


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def path(tmp_path):
    return save(network(), tmp_path)


TAPS = {"map": "map", "embedding": None}


@pytest.mark.parametrize(
    ("model", "run_batch"),
    [(network(), None), (network(1), 1), (network(2), 2), (network(7), 7), (reshaped(), 1), (reshaped((-1, 4)), None)],
    ids=["free", "fixed1", "fixed2", "fixed7", "reshape of one image", "reshape of any batch"],
)
def test_features_are_those_of_the_network_for_every_kind_of_batch(tmp_path, images, model, run_batch):
    teacher = OnnxTeacher(save(model, tmp_path), TAPS)
    assert teacher.run_batch == run_batch
    for batch in (images, images[:1], images[:0]):
        features = teacher(batch)
        assert list(features) == ["map", "embedding"]
        for name, want in truth(batch).items():
            assert features[name].shape == want.shape
            assert features[name].dtype == torch.float32
            torch.testing.assert_close(features[name], want, rtol=1e-4, atol=1e-5)


def test_a_reshape_that_mixes_images_is_detected(tmp_path, images):
    """(1, -1) joins all images into one row, which must not pass for a batch."""
    tail = [
        helper.make_node("Reshape", ["pooled", "one"], ["wide"]),
        helper.make_node("Slice", ["wide", "start", "stop", "axis"], ["flat"]),
    ]
    numbers = {"one": [1, -1], "start": [0], "stop": [4], "axis": [1]}
    extra = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    teacher = OnnxTeacher(save(network(tail=tail, extra=extra), tmp_path))
    assert teacher.run_batch == 1
    torch.testing.assert_close(teacher(images)["embedding"], truth(images)["embedding"], rtol=1e-4, atol=1e-5)


def test_rows_that_depend_on_each_other_are_run_alone_or_refused(tmp_path):
    assert OnnxTeacher(save(mixing("n"), tmp_path)).run_batch == 1
    with pytest.raises(InputError, match="mixes the 3 images"):
        OnnxTeacher(save(mixing(3), tmp_path))


def test_batch_limits_the_images_of_a_run(tmp_path, path, images):
    for batch in (1, 2, 9):
        teacher = OnnxTeacher(path, batch=batch)
        assert teacher.run_batch == batch
        torch.testing.assert_close(teacher(images)["embedding"], truth(images)["embedding"], rtol=1e-4, atol=1e-5)
    for model, batch, message in (
        (reshaped(), 4, "one image at a time"),
        (network(2), 4, "fixes its batch at 2"),
        (network(), 0, "batch must be a whole number"),
        (reshaped((-1, 2, 2, 1)), "auto", "net.onnx"),  # wrong for any number of images
    ):
        with pytest.raises(ValueError, match=message):
            OnnxTeacher(save(model, tmp_path), batch=batch)


def test_it_has_no_state_and_no_gradient_and_reads_any_precision(tmp_path, path, images):
    teacher = OnnxTeacher(path).train()
    assert not [*teacher.parameters(), *teacher.state_dict()]
    assert not teacher(images.clone().requires_grad_())["embedding"].requires_grad
    for dtype in (torch.float64, torch.bfloat16):
        given = images.to(dtype)
        want = truth(given.float())["embedding"]
        torch.testing.assert_close(teacher(given)["embedding"], want, rtol=1e-4, atol=1e-5)
    half = OnnxTeacher(save(network(dtype=TensorProto.FLOAT16), tmp_path, "half.onnx"), TAPS)
    got = half(images)["embedding"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, truth(images)["embedding"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wanted", ["map", "sum", OUTPUT, None, OUTPUT[0], OUTPUT["out"]])
def test_taps_name_a_tensor_a_node_or_an_output(path, images, wanted):
    teacher = OnnxTeacher(path, {"feature": wanted, "again": wanted})
    want = truth(images)["map" if isinstance(wanted, str) else "embedding"]
    features = teacher(images)
    torch.testing.assert_close(features["feature"], want, rtol=1e-4, atol=1e-5)
    assert torch.equal(features["again"], features["feature"])
    assert teacher.shapes == {name: tuple(want.shape[1:]) for name in ("feature", "again")}


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        ({"map": "maps"}, "no tensor or node named 'maps' in .*; the nearest are 'map'"),
        ({"map": "kernel"}, "no tensor or node named 'kernel'"),
        ({"map": OUTPUT[3]}, "no tensor or node named"),
        ({}, "at least one feature"),
    ],
)
def test_wrong_taps_are_refused_in_one_line(path, taps, words):
    with pytest.raises(InputError, match=words) as caught:
        OnnxTeacher(path, taps)
    assert "\n" not in str(caught.value)


def test_a_tap_must_be_batch_first_and_floating_point(tmp_path):
    tail = [
        helper.make_node("Shape", ["pooled"], ["dims"], "shape"),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[1, 0]),
    ]
    file = save(network(tail=tail), tmp_path)
    for tensor in ("dims", "turned"):
        with pytest.raises(InputError, match=rf"tap 'x': '{tensor}' must be floating point \(b, ...\)"):
            OnnxTeacher(file, {"x": tensor})


def test_wrong_images_are_refused_and_resized_on_demand(tmp_path, path, images):
    teacher = OnnxTeacher(path)
    assert teacher.input_size == 16
    larger = F.interpolate(images, size=32)
    with pytest.raises(InputError, match=r"images must be \(b, 3, 16, 16\) .* got \(5, 3, 32, 32\); resize=True"):
        teacher(larger)
    resized = OnnxTeacher(path, resize=True)
    want = F.interpolate(larger, size=(16, 16), mode="bilinear", antialias=True)
    assert torch.equal(resized(larger)["embedding"], teacher(want)["embedding"])
    assert torch.equal(resized(images)["embedding"], teacher(images)["embedding"])
    for wrong, error, message in (
        (torch.full((1, 3, 16, 16), 255.0), InputError, r"in \[-1, 1\], got values up to 255"),
        (images * torch.nan, InputError, "images must be finite"),
        (images[:, :1], InputError, r"images must be \(b, 3, h, w\), got \(5, 1, 16, 16\)"),
        (images[0], ValueError, r"images must be \(b, 3, h, w\)"),
        (images.to(torch.uint8), TypeError, "floating-point"),
    ):
        with pytest.raises(error, match=message):
            teacher(wrong)
    free = save(network(size="side"), tmp_path, "free.onnx")
    assert OnnxTeacher(free).input_size is None
    torch.testing.assert_close(OnnxTeacher(free)(larger)["embedding"], truth(larger)["embedding"], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="nothing to resize to"):
        OnnxTeacher(free, resize=True)


def bgr_bytes(x):
    return (x.flip(1) + 1) * 127.5


def test_preprocess_converts_images_to_the_format_of_the_graph(tmp_path, path, images):
    got = OnnxTeacher(path, preprocess=bgr_bytes)(images)["embedding"]
    torch.testing.assert_close(got, truth(bgr_bytes(images))["embedding"], rtol=1e-4, atol=1e-3)
    gray = save(network(channels=1), tmp_path, "gray.onnx")
    with pytest.raises(InputError, match=r"must take \(b, 3, h, w\) .* give a callable preprocess"):
        OnnxTeacher(gray)
    assert OnnxTeacher(gray, preprocess=lambda x: x.mean(1, keepdim=True))(images)["embedding"].shape == (5, 6)
    with pytest.raises(InputError, match="after preprocess for"):
        OnnxTeacher(path, preprocess=lambda x: x[:, :, :8])(images)
    with pytest.raises(InputError, match="preprocess must be 'symmetric' or a callable"):
        OnnxTeacher(path, preprocess="imagenet")


def test_nan_output_names_the_tap_and_the_image(tmp_path, images):
    tail = [
        helper.make_node("Flatten", ["pooled"], ["rows"]),
        helper.make_node("ReduceMax", ["images"], ["max"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["max", "one"], ["column"]),
        helper.make_node("Sub", ["two", "column"], ["gap"]),
        helper.make_node("Log", ["gap"], ["log"]),  # NaN where an image is brighter than 2
        helper.make_node("Add", ["rows", "log"], ["flat"]),
    ]
    extra = [
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array([2], np.float32), "two"),
    ]
    teacher = OnnxTeacher(save(network(tail=tail, extra=extra), tmp_path), batch=2)
    assert teacher(images)["embedding"].isfinite().all()
    images[3] = 3
    with pytest.raises(InputError, match=r"tap 'embedding': .* NaN or infinity for image 1 \(images 2 to 3 of 5\)"):
        teacher(images)


def test_copies_pickles_and_the_fingerprint(path, images):
    teacher = OnnxTeacher(path, TAPS, threads=1, preprocess=bgr_bytes)
    want = teacher(images)
    for other in (
        copy.deepcopy(teacher),
        pickle.loads(pickle.dumps(teacher)),
        OnnxTeacher(path, TAPS, preprocess=bgr_bytes),
    ):
        got = other(images)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert other.fingerprint == teacher.fingerprint
    assert len(teacher.fingerprint) == 64
    others = [OnnxTeacher(path, TAPS), OnnxTeacher(path), OnnxTeacher(path, TAPS, preprocess=lambda x: x * 2)]
    others += [OnnxTeacher(path, TAPS, preprocess=lambda x: x * 3), OnnxTeacher(path, TAPS, resize=True)]
    assert len({teacher.fingerprint, *[other.fingerprint for other in others]}) == 6


def test_a_changed_file_is_refused_by_a_copy(path, images):
    twin = copy.deepcopy(OnnxTeacher(path))
    model = network()
    model.producer_name = "another producer"
    save(model, path.parent)
    with pytest.raises(InputError, match="has changed since"):
        twin(images)


def _child(teacher, images, queue):
    torch.set_num_threads(1)
    queue.put(teacher(images)["embedding"].numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the fork start method is tested, and this system does not have it")
def test_a_forked_process_opens_its_own_session(path, images):
    teacher = OnnxTeacher(path, threads=2)
    want = teacher(images)["embedding"].numpy()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(teacher, images, queue), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        process.start()
    assert np.array_equal(queue.get(timeout=60), want)
    process.join(60)
    assert process.exitcode == 0


def test_repr_rebuilds(path):
    teacher = OnnxTeacher(path, {"m": "map"}, threads=1, resize=True)
    assert repr(teacher) == f"OnnxTeacher({str(path)!r}, {{'m': 'map'}}, threads=1, resize=True)"
    assert repr(eval(repr(teacher))) == repr(teacher)


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


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_input(("images", 1, ["n", 3, 16, 16]), ("age", 1, [1])), "one input.*got 'images', 'age'"),
        (with_input(), "one input.*got none"),
        (with_input(("images", 1, [1, 48])), "no image input"),
        (with_input(("images", 7, [1, 3, 8, 8])), "type int64"),
        (with_input(("images", 8, [1, 3, 8, 8])), "type string"),
        (with_input(("images", 99, [1, 3, 8, 8])), "type unknown"),
        (network(size=2**20), "at most 268435456 values"),
    ],
)
def test_graphs_without_one_image_input_are_refused(tmp_path, model, words):
    with pytest.raises(InputError, match=words):
        OnnxTeacher(save(model, tmp_path))


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
        (external("weights.bin", length="999999"), "reach beyond"),
        (external("weights.bin", offset="-4"), "reach beyond"),
        (external("weights.bin", offset="four"), "broken offset"),
        (external("weights.bin", offset="9" * 30), "reach beyond"),
        (external("absent.bin"), "does not exist"),
        (external("weights.bin", length="8"), "cannot be run"),
    ],
)
def test_broken_external_weights_are_refused(tmp_path, model, words):
    (tmp_path / "weights.bin").write_bytes(KERNEL.tobytes())
    with pytest.raises(InputError, match=words):
        OnnxTeacher(save(model, tmp_path))


def test_providers_and_threads_are_checked(path):
    kept = [("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})]
    assert pickle.loads(pickle.dumps(OnnxTeacher(path, providers=kept))).providers == kept
    for wrong, message in (
        (["Abacus"], r"no execution provider 'Abacus'.*CPUExecutionProvider"),
        ([3], "a name, or a pair of name and options, got"),
        ([("CPUExecutionProvider", 1)], "a name, or a pair of name and options, got"),
        ("CPUExecutionProvider", "providers must be a list of execution providers, got"),
    ):
        with pytest.raises(InputError, match=message):
            OnnxTeacher(path, providers=wrong)
    with pytest.raises(ValueError, match="threads must be a whole number"):
        OnnxTeacher(path, threads=0)


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_a_missing_library_names_the_extra(path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"needs {library}; pip install kdlib-torch\[onnx\]"):
        OnnxTeacher(path)


def test_the_runtime_writes_nothing(tmp_path, capfd):
    file = save(reshaped(), tmp_path)
    OnnxTeacher(file)(torch.zeros(3, 3, 16, 16))
    file.write_bytes(file.read_bytes().replace(b"Relu", b"Rel\xfc"))
    with pytest.raises(InputError):
        OnnxTeacher(file)
    assert capfd.readouterr() == ("", "")
