"""`.bin` sets: what pickle itself would read is read the same, what it would run is refused, and nothing else comes out."""

import io
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.data import BinSet, load_bin, save_bin
from kdlib_faces.data.formats import bin as bin_module
from kdlib_faces.data.formats import pickle as pickle_module
from kdlib_faces.data.formats.pickle import parse_pickle
from kdlib_faces.data.images import decode_image
from tests.faces.reader_files import Shown, encoded

QUIET = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(tmp_path, data, name="set.bin"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol=4))
    return path


IMAGES = [bytes([value]) * (3 + value) for value in range(8)]
SAME = [True, False, True, False]


class Arrays:
    """Pictures as the tools keep them: bytes, flat arrays, columns of old OpenCV, an array of objects."""

    plain = staticmethod(list)
    flat = staticmethod(lambda images: [np.frombuffer(image, np.uint8) for image in images])
    copies = staticmethod(lambda images: [np.frombuffer(image, np.uint8).copy() for image in images])
    column = staticmethod(lambda images: [np.frombuffer(image, np.uint8).reshape(-1, 1) for image in images])
    mutable = staticmethod(lambda images: [bytearray(image) for image in images])

    @staticmethod
    def objects(images):
        array = np.empty(len(images), dtype=object)
        array[:] = images
        return array


LABELS = [list, tuple, np.array, lambda x: [np.bool_(v) for v in x], lambda x: [int(v) for v in x]]
LABELS += [lambda x: np.array(x, "<i8"), lambda x: np.array(x, ">i4"), lambda x: [np.int64(v) for v in x]]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", [name for name in vars(Arrays) if not name.startswith("_")])
@pytest.mark.parametrize("labels", LABELS)
def test_every_protocol_and_form_that_the_tools_write(tmp_path, protocol, form, labels):
    content = (getattr(Arrays, form)(IMAGES), labels(SAME))
    found = load_bin(put(tmp_path, pickle.dumps(content, protocol=protocol)))
    assert found.images == IMAGES
    assert found.same.tolist() == SAME
    assert found.same.dtype == bool
    assert (len(found), repr(found)) == (4, "<BinSet: 4 pairs, 2 genuine>")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_both_numpys(tmp_path, protocol):
    data = pickle.dumps([Arrays.flat(IMAGES), np.array(SAME)], protocol=protocol)
    old, new = (b"numpy.core.", b"numpy._core.")
    here, there = (new, old) if new in data else (old, new)
    if protocol < 4:
        data = data.replace(here, there)
    else:  # the module is text with its length in front, within frames
        for module in (b"multiarray", b"numeric"):
            before, after = (b"\x8c" + bytes([len(core + module)]) + core + module for core in (here, there))
            data = data.replace(before, after)
        frame = data.index(b"\x95")
        data = data[:frame] + data[frame + 9 :]
    assert there in data
    assert here not in data
    assert load_bin(put(tmp_path, data)).images == IMAGES


def python2(images, same, protocol):
    """What `cPickle.dump((images, same), f, protocol)` of Python 2 leaves: byte strings by S, U and T."""

    def string(image):
        if protocol == 0:
            body = "".join(chr(b) if 32 <= b < 127 and b not in (39, 92) else f"\\x{b:02x}" for b in image)
            return b"S'" + body.replace("\\x5c", "\\\\").replace("\\x0a", "\\n").encode() + b"'\n"
        if len(image) < 256:
            return b"U" + bytes([len(image)]) + image
        return b"T" + len(image).to_bytes(4, "little") + image

    if protocol == 0:
        out = b"((lp1\n" + b"".join(string(image) + b"p%d\na" % (at + 2) for at, image in enumerate(images)) + b"(lp0\n"
        return out + b"".join(b"I01\na" if flag else b"I00\na" for flag in same) + b"tp1\n."
    head, flags = (b"\x80\x02", (b"\x89", b"\x88")) if protocol == 2 else (b"", (b"I00\n", b"I01\n"))
    out = head + (b"" if protocol == 2 else b"(") + b"]q\x01(" + b"".join(string(image) for image in images)
    return out + b"e]q\x02(" + b"".join(flags[flag] for flag in same) + (b"e\x86." if protocol == 2 else b"et.")


@pytest.mark.parametrize("protocol", range(3))
def test_files_of_python_2(tmp_path, protocol):
    images = [bytes(range(256)), b"\\'\"\n\r\t\0", b"x" * 300, b"\xff\xd8\xff"]
    data = python2(images, [True, False], protocol)
    assert list(pickle.loads(data, encoding="bytes")) == [images, [True, False]]
    found = load_bin(put(tmp_path, data))
    assert found.images == images
    assert found.same.tolist() == [True, False]


def test_arrays_of_python_2(tmp_path):
    """`numpy` of Python 2: the state's letters and data are byte strings, and the core is the old one."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01K\x04\x85cnumpy\ndtype\n"
        b"q\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x02\x03\xfftb"
    )
    data = b"\x80\x02](" + array + b"h\x03e]\x88a\x86."
    assert load_bin(put(tmp_path, data)).images == [b"\1\2\3\xff"] * 2


class Runs:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hostile(sign):
    """Pickles that run code, each by another road."""
    command = f"touch {sign}"
    inst = b"(S'" + command.encode() + b"'\nios\nsystem\n."
    obj = b"(cos\nsystem\nS'" + command.encode() + b"'\no."
    build = b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR(dS'x'\nI1\nsb."
    return {
        "os.system": pickle.dumps(Runs(os.system, command)),
        "protocol 0": pickle.dumps(([Runs(os.system, command)], [True]), protocol=0),
        "protocol 2": pickle.dumps(([Runs(os.system, command)], [True]), protocol=2),
        "inside a list": pickle.dumps(([*IMAGES, Runs(os.system, command)], SAME)),
        "builtins.eval": pickle.dumps(Runs(eval, f"open({str(sign)!r}, 'w')")),
        "builtins.getattr": pickle.dumps(Runs(getattr, "", "join")),
        "numpy's own loader": b"cnumpy\nload\n(S'x'\ntR.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro\x94\x93)R.",
        "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
        "a name that is a name": b"\x80\x04cnumpy\ndtype\ncnumpy\ndtype\n\x93.",
        "INST": inst,
        "OBJ": obj,
        "BUILD on an object": build,
        "BUILD on a name": b"cnumpy\ndtype\n(K\x03U\x01|NNNtb.",
        "NEWOBJ": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
        "PERSID": b"Psomewhere\n.",
        "BINPERSID": b"\x80\x02K\x01Q.",
        "EXT1": b"\x80\x02\x82\x01.",
        "a dict": pickle.dumps({"a": 1}),
        "a set": pickle.dumps({1}),
        "a frozen set": pickle.dumps(frozenset({1})),
        "a float": pickle.dumps(1.5),
        "a complex": pickle.dumps(1j),
        "a range": pickle.dumps(range(3)),
        "an out-of-band buffer": b"\x80\x05\x97.",
        "a class": pickle.dumps(Path("x")),
        "a structured dtype": pickle.dumps(np.zeros(2, [("a", "u1")])),
        "a date": pickle.dumps(np.zeros(2, "M8[s]")),
        "calling bytes by a number": b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
        "encoding with another codec": pickle.dumps(Runs(__import__("_codecs").encode, "x", "rot13")),
        "an array of another class": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85U\x01btR.",
    }


@pytest.mark.parametrize("road", hostile("x"))
def test_what_runs_code_is_refused_before_anything_runs(tmp_path, road):
    sign = tmp_path / "ran"
    before = set(sys.modules)
    with pytest.raises(InputError, match=r"set\.bin: byte \d+: ") as caught:
        load_bin(put(tmp_path, hostile(sign)[road]))
    assert not sign.exists()
    assert set(sys.modules) == before
    assert "\n" not in str(caught.value)


def test_the_message_names_what_was_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"byte \d+: the name (posix|nt)\.system is refused: a set of images needs bytes"
    ):
        load_bin(put(tmp_path, pickle.dumps(Runs(os.system, "true"))))
    with pytest.raises(InputError, match=r"byte 2: the pickle operation EMPTY_DICT is refused"):
        load_bin(put(tmp_path, b"\x80\x02}."))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGES, SAME, 1), "must hold two items, images and labels, got tuple of 3"),
        ("x", "must hold two items, images and labels, got str of 1"),
        ((b"abcd", SAME), "the images must be a list, got bytes of 4"),
        ((IMAGES, True), "the labels must be a list, got bool"),
        ((IMAGES[:7], SAME), "4 labels need 8 images, got 7; the file is incomplete"),
        ((IMAGES, SAME[:3]), "3 labels need 6 images, got 8"),
        ((IMAGES[:6], SAME), "4 labels need 8 images, got 6"),
        (([], []), "the set holds no pair"),
        ((["text", *IMAGES[1:]], SAME), "image 0 must be bytes or .n,. uint8, got str of 4"),
        (([*IMAGES[:3], None, *IMAGES[4:]], SAME), "image 3 must be bytes or .n,. uint8, got NoneType"),
        (([b"", *IMAGES[1:]], SAME), "image 0 must have 1 to 67,108,864 bytes, got 0"),
        (([np.zeros((2, 2), np.uint8), *IMAGES[1:]], SAME), r"image 0 must be .* got an array \(2, 2\) of '\|u1'"),
        (([np.zeros(3, np.int8), *IMAGES[1:]], SAME), "image 0 must be .* got an array .3,. of '.i1'"),
        (([np.uint8(3), *IMAGES[1:]], SAME), r"image 0 must be .* got an array \(\)"),
        ((IMAGES, [True, False, 2, True]), "label 2 must be True or False, got 2"),
        ((IMAGES, [True, False, "x", True]), "label 2 must be True or False, got str of 1"),
        ((IMAGES, [True, False, None, True]), "label 2 must be True or False, got NoneType"),
        ((IMAGES, np.array([1, 0, 1, 3])), "label 3 must be True or False, got 3"),
        ((IMAGES, [np.int64(2), 0, 0, 1]), "label 0 must be True or False, got 2"),
        ((IMAGES, [np.zeros(2, bool), 0, 0, 1]), "label 0 must be True or False, got array"),
    ],
)
def test_other_content_is_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_bin(put(tmp_path, content))


def test_an_array_that_lies_about_its_shape(tmp_path):
    array = pickle.dumps(np.frombuffer(b"abcd", np.uint8).copy(), protocol=2)
    lying = array.replace(b"K\x04\x85", b"K\x09\x85")
    assert lying != array
    body = lying[2:-1]
    with pytest.raises(InputError, match=r"image 0: an array \(9,\) of '\|u1' holds 4 bytes"):
        load_bin(put(tmp_path, b"\x80\x02](" + body + b"h\x00e]\x88a\x86."))


def test_an_array_that_was_never_filled(tmp_path):
    hollow = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    with pytest.raises(InputError, match="image 0 must be numbers, got an array of ''"):
        load_bin(put(tmp_path, b"\x80\x02](" + hollow + hollow + b"e]\x88a\x86."))


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"\.bin set not found: .*no\.bin"):
        load_bin(tmp_path / "no.bin")
    with pytest.raises(InputError, match=r"\.bin set must be a file, got the folder"):
        load_bin(tmp_path)
    with pytest.raises(InputError, match=r"the \.bin set is empty"):
        load_bin(put(tmp_path, b""))


def test_sizes_are_capped(tmp_path, monkeypatch):
    path = put(tmp_path, (IMAGES, SAME))
    for limit, value, message in (
        ("MAX_FILE", 20, r"bytes; a \.bin set has at most 20"),
        ("MAX_IMAGES", 7, "8 images; sets above 7 are refused"),
        ("MAX_IMAGE", 5, "image 3 must have 1 to 5 bytes, got 6"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(bin_module, limit, value)
            with pytest.raises(InputError, match=message):
                load_bin(path)
    monkeypatch.setattr(pickle_module, "MAX_OPERATIONS", 10)
    with pytest.raises(InputError, match="more than 10 operations"):
        load_bin(path)


def test_bombs_cost_no_more_than_their_bytes():
    """A memo that doubles lists, one that encodes a text again and again, marks, deep nesting, huge announced lengths."""
    doubling = b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (at + 1, at, at) for at in range(100)) + b"."
    text = b"X" + (20_000).to_bytes(4, "little") + b"x" * 20_000
    encoding = b"\x80\x02(" + text + b"q\x00c_codecs\nencode\nq\x010" + b"h\x01h\x00U\x06latin1\x86R" * 2_000 + b"l."
    encoding = encoding.replace(b"U\x06latin1", b"X\x06\0\0\0latin1")
    bombs = [
        doubling,
        encoding,
        b"(" * 20_000 + b".",
        b"]" * 20_000 + b"a" * 19_999 + b".",
        b"\x80\x04\x8e" + b"\xff" * 8 + b"x.",
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 20_000 + b"\n.",
        b"p" + b"9" * 19 + b"\n.",
        b"(" + (b"X" + (50_001).to_bytes(4, "little") + b"x" * 49_997 + "\U0001f600".encode()) * 20 + b"l.",
    ]
    for bomb in bombs:
        tracemalloc.start()
        try:
            parse_pickle(bomb)
        except InputError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 90 * min(len(bomb), 400_000) + 2 * len(bomb) + 2_000_000, bomb[:20]


@QUIET
@given(st.lists(st.binary(min_size=1, max_size=400), min_size=2, max_size=12), st.data())
def test_a_set_comes_back_and_pickle_reads_it_too(tmp_path, images, data):
    images = images[: len(images) // 2 * 2]
    same = data.draw(st.lists(st.booleans(), min_size=len(images) // 2, max_size=len(images) // 2))
    path = tmp_path / "own.bin"
    save_bin(path, images, same)
    found = load_bin(path)
    assert found.images == images
    assert found.same.tolist() == same
    assert pickle.loads(path.read_bytes()) == (images, same)
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.bin"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=20) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


@QUIET
@given(VALUES, st.integers(0, 5))
@example((), 0)
@example(["\\", "\n", "\u20ac", "\U0001f600"], 0)
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    assert parse_pickle(pickle.dumps(value, protocol=protocol)) == value


def test_saving_checks_what_it_is_given(tmp_path):
    for images, same, message in (
        (IMAGES, [True], "images must be two per label, at least 2, got 8"),
        ([], [], "two per label"),
        ([b"", b"x"], [True], "image 0 must be 1 to"),
        (["x", b"x"], [True], "image 0 must be 1 to .* got str"),
        ([b"x", b"x"], [2], r"same must be \(n,\) bools"),
    ):
        with pytest.raises(ValueError, match=message):
            save_bin(tmp_path / "x.bin", images, same)
    assert list(tmp_path.iterdir()) == []


# Decoding


CODECS = ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "TGA", "JPEG2000", "PCX", "DDS", "ICO"]


@pytest.mark.parametrize("codec", CODECS)
def test_any_codec_is_found_from_the_bytes(codec):
    Image.init()
    if codec not in Image.SAVE:
        pytest.skip(f"the installed Pillow is built without {codec}, so the test cannot make its input")
    pixels = np.full((16, 16, 3), (200, 100, 40))
    decoded = decode_image(encoded(pixels, codec), 16)
    assert decoded.shape == (3, 16, 16)
    assert np.abs(decoded.astype(int) - pixels.transpose(2, 0, 1)).max() <= (30 if codec in ("JPEG", "WEBP") else 8)


def test_a_codec_that_starts_a_program_is_refused():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    with pytest.raises(InputError, match=r"image: not a readable image \(unknown format\)"):
        decode_image(stream.getvalue(), 8)


def test_batches_are_uint8_in_order_and_of_one_size():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 12, 12, 3))
    kept = BinSet([encoded(image) for image in pixels], np.array([True, False, True]))
    batches = list(kept.batches(12, batch_size=4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 12, 12), (2, 3, 12, 12)]
    assert all(batch.dtype == torch.uint8 for batch in batches)
    np.testing.assert_array_equal(torch.cat(batches).numpy(), pixels.transpose(0, 3, 1, 2))


def test_an_image_that_does_not_decode_is_named_and_progress_is_shown(tmp_path):
    path = tmp_path / "bad.bin"
    save_bin(path, [encoded(np.zeros((4, 4, 3)))] * 3 + [b"no image"], [True, False])
    seen = Shown()
    batches = load_bin(path).batches(4, batch_size=2, progress=seen)
    next(batches)
    with pytest.raises(InputError, match=r"bad\.bin: image 3: not a readable image \(unknown format"):
        next(batches)
    assert seen == ["images (4)"]
    with pytest.raises(ValueError, match="size must be a whole number and >= 1"):
        load_bin(path).batches(0)


def test_memory_does_not_grow_with_the_set():
    """Sixteen batches of a set take what one takes: the whole set would be 24 MB even as bytes."""
    image = encoded(np.zeros((64, 64, 3)))
    kept = BinSet([image] * 2048, np.ones(1024, bool))
    for batch in kept.batches(64, batch_size=128):
        del batch
        break
    tracemalloc.start()
    for batch in kept.batches(64, batch_size=128):
        del batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
