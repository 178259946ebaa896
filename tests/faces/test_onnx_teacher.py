"""ONNX teachers on tiny graphs: free, fixed and wrongly declared batches, taps, and files that must be refused."""

import copy
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

from kdlib_faces.teachers.onnx.session import OnnxTeacher  # noqa: E402
from tests.faces.tiny_graph import mixing, network, reshaped, save, truth  # noqa: E402

TAPS = {"map": "map", "embedding": None}


@pytest.mark.parametrize(
    ("model", "run_batch"),
    [
        (network(), None),
        (network(1), 1),
        (network(2), None),
        (network(7), None),
        (reshaped(), 1),
        (reshaped((-1, 4)), None),
    ],
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
        (reshaped(), 4, "in batches of 1 only"),
        (network(1), 4, "in batches of 1 only"),
        (reshaped((3, 4), batch=3), 2, "in batches of 3 only"),
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
    with pytest.raises(InputError, match="must take images of 3 channels"):
        OnnxTeacher(gray)
    with pytest.raises(InputError, match="in the layout 'bhwc'; give another layout"):
        OnnxTeacher(path, layout="bhwc")
    assert OnnxTeacher(gray, preprocess=lambda x: x.mean(1, keepdim=True))(images)["embedding"].shape == (5, 6)
    with pytest.raises(InputError, match="after preprocess for"):
        OnnxTeacher(path, preprocess=lambda x: x[:, :, :8])(images)
    with pytest.raises(TypeError, match="preprocess must be callable"):
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
    with pytest.raises(InputError, match=r"tap 'embedding': .* NaN or infinity for image 3 of the batch"):
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
