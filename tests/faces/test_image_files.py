"""Images as they are decoded: every format, orientation and shape; folders of identities as they are scanned."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdlib_faces._checks import InputError
from kdlib_faces.commands import inspect
from kdlib_faces.data import BinSet, FaceDataWarning, read_agedb, read_faces, read_fgnet, save_bin, save_records
from kdlib_faces.data import image_files as image_files_module
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.image_files import decode_jpeg, image_size, image_suffixes, open_rgb, scan_folder
from kdlib_faces.data.images import decode_image, read_pixels
from kdlib_faces.harness.embeddings import embed_set, open_model
from kdlib_faces.harness.image_sets import images_of_files
from tests.faces.cache_files import run
from tests.faces.reader_files import encoded, put, touch
from tests.faces.set_files import network

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def turned(pixels, codec, orientation, **options):
    """An image file whose pixels are to be turned, by its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, codec, exif=exif, **options)


def notes_of(*entries):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faces = read_faces(list(entries))
    assert [str(each.message) for each in caught] == list(faces.notes)
    assert all(each.category is FaceDataWarning for each in caught)
    return faces, " | ".join(faces.notes)


# Pixels


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, codec, orientation):
    options = {"lossless": True} if codec == "WEBP" else {"quality": 100} if codec in ("JPEG", "AVIF") else {}
    data = turned(np.kron(PIXELS, np.ones((8, 8, 1))), codec, orientation, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = read_pixels(put(tmp_path, data, "photo.img"))
    np.testing.assert_array_equal(found, np.asarray(upright))
    assert found.shape[:2] == ((48, 32) if orientation < 5 else (32, 48)) == image_size(data)


@pytest.mark.parametrize(
    "before", [b"\xff\xe2\0\x06\xff\xda\xff\xd9", b"\xff\xfe\0\x02" * 300, b"\xff" * 5], ids=["scan", "many", "fill"]
)
def test_the_orientation_is_found_behind_other_segments(tmp_path, before):
    data = turned(np.kron(PIXELS, np.ones((8, 8, 1))), "JPEG", 6)
    upright = read_pixels(put(tmp_path, data, "photo.jpg"))
    found = read_pixels(put(tmp_path, data[:2] + before + data[2:], "later.jpg"))
    np.testing.assert_array_equal(found, upright)


def test_broken_metadata_do_not_hide_an_image():
    data = turned(PIXELS, "JPEG", 6)
    broken = data.replace(b"Exif\0\0II", b"Exif\0\0XX").replace(b"Exif\0\0MM", b"Exif\0\0XX")
    assert broken != data
    assert decode_image(broken, 6).shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("shape", "size", "inner"),
    [
        ((112, 96), 112, (slice(None), slice(8, 104))),
        ((96, 112), 112, (slice(8, 104), slice(None))),
        ((112, 112), 112, (slice(None), slice(None))),
        ((224, 192), 112, (slice(None), slice(8, 104))),
        ((112, 112), (112, 96), (slice(None), slice(None))),
        ((112, 96), (112, 96), (slice(None), slice(None))),
    ],
)
def test_another_shape_is_centered_on_black_and_not_cut(shape, size, inner):
    pixels = np.random.default_rng(1).integers(1, 256, (*shape, 3), dtype=np.uint8)
    found = decode_image(encoded(pixels), size).transpose(1, 2, 0)
    assert found.shape == ((112, 112, 3) if size == 112 else (112, 96, 3))
    small = np.asarray(Image.fromarray(pixels).resize((shape[1] * 112 // shape[0], 112), Image.Resampling.BILINEAR))
    expected = pixels if max(shape) <= 112 else small
    expected = expected[:, 8:104] if size == (112, 96) and shape == (112, 112) else expected
    np.testing.assert_array_equal(found[inner], expected)
    black = found.copy()
    black[inner] = 0
    assert not black.any()


def test_gray_and_transparent_images_become_rgb_and_small_ones_are_antialiased():
    gray = decode_image(encoded(PIXELS[..., 0]), 6)
    assert (gray[0] == gray[1]).all()
    assert (gray[0, :, 1:5] == PIXELS[..., 0]).all()
    transparent = np.dstack([PIXELS, np.full((6, 4), 9)])
    np.testing.assert_array_equal(decode_image(encoded(transparent), (6, 4)), PIXELS.transpose(2, 0, 1))
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    small = decode_image(encoded(checker), 16)
    assert 100 < small.min() <= small.max() < 155  # picking pixels would give 0 or 255


@pytest.mark.parametrize("shape", [(2000, 3000), (250, 250), (40, 40)])
def test_images_far_from_the_size_of_the_network_are_warned_about_with_their_size(tmp_path, shape):
    data = encoded(np.zeros((*shape, 3)))
    message = rf"far from the 112 x 112 pixels .* with {shape[1]} x {shape[0]}; the network expects aligned crops"
    for name in ("a/1.png", "b/1.png"):
        put(tmp_path, data, name)
    faces = read_faces(tmp_path)
    with pytest.warns(FaceDataWarning, match=f"2 of 2 images are {message}"):
        load_images(faces, 112)
    with pytest.warns(FaceDataWarning, match=message):
        next(BinSet([data, encoded(np.zeros((112, 112, 3)))], np.ones(1, bool)).batches(112))
    assert load_images(faces, max(shape)).shape[0] == 2


def test_all_broken_images_are_listed_at_once(tmp_path):
    names = [f"{'ab'[row % 2]}/{row}.png" for row in range(600)]
    for row, name in enumerate(names):
        put(tmp_path, encoded(PIXELS) if row not in (3, 500) else b"broken", name)
    with pytest.raises(InputError, match=r"2 of 600 images cannot be read: .*b/3\.png: not a .*; .*a/500\.png: not a "):
        load_images([tmp_path / name for name in names], 6)
    with pytest.raises(InputError, match=r"2 of 4 images cannot be read: set: image 1: not .*; set: image 2: not "):
        list(BinSet([encoded(PIXELS), b"x", b"y", encoded(PIXELS)], np.ones(2, bool)).batches(6, batch_size=1))


# Folders


@pytest.mark.parametrize("suffix", ["jfif", "gif", "avif", "jp2", "tga", "JPE", "jpg_large", ""])
def test_images_of_every_suffix_are_found(tmp_path, suffix):
    codec = {"gif": "GIF", "avif": "AVIF", "jp2": "JPEG2000", "tga": "TGA"}.get(suffix, "JPEG")
    for name in ("ann/1", "bob/1"):
        put(tmp_path, encoded(PIXELS, codec), f"{name}.{suffix}".rstrip("."))
    faces = read_faces(tmp_path)
    assert (faces.identity_names, len(faces), faces.notes) == (("ann", "bob"), 2, ())
    assert decode_image(faces.images[0], 6).shape == (3, 6, 6)


def test_images_in_nested_folders_belong_to_the_outer_identity(tmp_path):
    touch(tmp_path, "ann/1.jpg", "ann/2019/2.jpg", "bob/2019/3.jpg", "bob/2020/more/4.jpg", ".git/5.jpg", "bob/.x.jpg")
    (tmp_path / "bob/2019/loop").symlink_to(tmp_path / "bob")
    faces = read_faces(tmp_path)
    assert [faces.identity_names[number] for number in faces.identities] == ["ann", "ann", "bob", "bob"]


def test_folders_of_identities_one_level_below_are_not_merged(tmp_path):
    touch(tmp_path, "train/ann/1.jpg", "train/bob/1.jpg", "val/eve/1.jpg")
    with pytest.raises(
        InputError, match=r"such as in train/ann: is the identity the outer folder or the inner one\? Pass"
    ):
        read_faces(tmp_path)
    touch(tmp_path, *(f"videos/id{row}/{row}{at}/1.jpg" for row in range(10, 16) for at in "ab"))
    faces, notes = notes_of(tmp_path / "videos")
    assert (faces.num_identities, len(faces)) == (6, 12)
    assert "two folders deep, such as in id10/10a; the identities are the outer folders" in notes


def test_skipped_files_are_counted_and_named(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "b/1.heic", "b/2.heic", "a/notes.txt", "a/Thumbs.db", "loose.jpg")
    (tmp_path / "empty").mkdir()
    _, notes = notes_of(tmp_path)
    assert "skipped files that are not images: 3 (.heic 2, .txt 1, such as" in notes
    assert "skipped images that belong to no identity: 1, such as loose.jpg" in notes
    assert "empty folders: 1, such as 'empty'" in notes
    touch(tmp_path, "agedb/1_Ann_30_f.jpg", "agedb/2_Bob_30_m.jpg", "agedb/other.jpg")
    with pytest.warns(
        FaceDataWarning, match=r"skipped images without a name like number_Name_age_sex\.jpg: 1, such as"
    ):
        read_agedb(tmp_path / "agedb")
    touch(tmp_path, "fgnet/001A02.JPG", "fgnet/002A16.JPG", "fgnet/002A20.raw", "fgnet/points/001a02.PTS")
    with pytest.warns(FaceDataWarning, match=r"fgnet: skipped files that are not images: 1 \(\.raw 1, such as "):
        faces = read_fgnet(tmp_path / "fgnet", published=False)
    assert len(faces.notes) == 1


def test_an_identity_whose_files_cannot_be_read_is_refused(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.heic", "c/x/2.heic", "d/1.raw")
    with pytest.raises(
        InputError, match=r"no file of the identity 'c' is an image .*\.heic 2, .*, nor of 1 more; conv"
    ):
        read_faces(tmp_path)


def test_what_pillow_only_recognizes_is_no_image(tmp_path):
    assert {".jpg", ".jfif", ".gif", ".webp"} <= image_suffixes()
    assert not {".eps", ".h5", ".mpg", ".pdf"} & image_suffixes()
    touch(tmp_path, "x.eps", "x.jpg")
    assert [file.name for files in scan_folder(tmp_path) for file in files] == ["x.jpg", "x.eps"]


def test_broken_and_missing_images_are_skipped_on_request(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png", "c/1.png"):
        put(tmp_path, encoded(PIXELS) if name not in ("b/2.png", "c/1.png") else b"broken", name)
    assert len(read_faces(tmp_path)) == 4
    with pytest.raises(InputError, match=r"2 of 4 images cannot be read: .*b/2\.png: .*c/1\.png: "):
        load_images(read_faces(tmp_path), 6)
    with pytest.warns(
        FaceDataWarning, match=r"skipped 2 of 4 images, which cannot be read, and with them all images of 1 identity:"
    ):
        faces = read_faces(tmp_path, on_error="skip")
    assert (faces.identity_names, faces.identities.tolist()) == (("a", "b"), [0, 1])
    assert load_images(faces, 6).shape == (2, 3, 6, 6)
    listed = put(tmp_path, "path,identity\na/1.png,a\nno.png,b\nb/1.png,b\n", "list.csv")
    with pytest.warns(FaceDataWarning, match=r"no\.png: image file not found"):
        assert len(read_faces(listed, on_error="skip")) == 2
    with pytest.raises(ValueError, match="on_error must be one of 'stop', 'skip', 'keep', got 'warn'"):
        read_faces(listed, on_error="warn")


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_command_line_lists_broken_images_or_skips_them(tmp_path, capsys):
    for name in ("f/a/1.png", "f/b/1.png", "f/b/2.png", "f/b/3.png"):
        put(tmp_path, encoded(np.zeros((32, 32, 3))) if name < "f/b/2" else b"broken", name)
    given = ("cache", "build", "--quiet", "--teacher", network(tmp_path / "t.pt", 0), "--data", tmp_path / "f")
    assert run(*given, "--output", tmp_path / "stop") == 2
    assert capsys.readouterr().err.count("not a readable image") == 2
    assert run(*given, "--output", tmp_path / "skip", "--on-error", "skip") == 0
    assert "kdlib-faces: warning: " in capsys.readouterr().err


def test_an_evaluation_warns_about_sizes_and_lists_all_broken_images(tmp_path):
    model = open_model(network(tmp_path / "t.pt", 0))
    files = [put(tmp_path, encoded(PIXELS) if row not in (1, 5) else b"x", f"{row}.png") for row in range(6)]
    with (
        pytest.warns(FaceDataWarning, match=r"4 of 4 images are far from the 32 x 32 pixels .* with 4 x 6"),
        pytest.raises(InputError, match=r"2 of 6 images cannot be read: .*1\.png: .*5\.png: not a readable"),
    ):
        embed_set(model, images_of_files("set", files), tmp_path, batch_size=2)


# Descriptions


def test_inspect_describes_every_kind_of_face_data(tmp_path):
    data, wide = encoded(np.zeros((112, 112, 3))), encoded(np.zeros((40, 60, 3)))
    save_bin(tmp_path / "set.bin", [data, data, wide, b"broken"], [True, False])
    save_records(tmp_path / "train.rec", [data, data, wide], [0, 0, 1])
    for name in ("faces/a/1.png", "faces/b/1.png", "faces/b/x.txt"):
        put(tmp_path, data, name)
    (tmp_path / "faces/b/x.txt").write_text("words")
    put(tmp_path, "a/1.png b/1.png 0\na/1.png a/2.png 1\n", "pairs.txt")
    put(tmp_path, "name,imagenum1,imagenum2,\nAnn,1,2,\nAnn,1,Bob,2\n", "pairs.csv")
    put(tmp_path, "name same_person\r\nAnn_1.jpg 1\r\nAnn_2.jpg 1\r\nAnn_1.jpg 0\r\nBob_1.jpg 0\r\n", "cplfw.txt")
    described = {
        name: inspect.file(tmp_path / name) for name in ("set.bin", "train.rec", "faces", "pairs.txt", "pairs.csv")
    }
    for name, lines in {
        "set.bin": (
            "pairs         2, 1 genuine",
            "4 images decoded, 1 broken",
            "112 x 112 (2), 60 x 40 (1)",
            "image 3: not a",
        ),
        "train.rec": (
            "images        3",
            "identities    2, numbered 0 to 1",
            "ranges        2, as the labels",
            "60 x 40 (1)",
        ),
        "faces": ("identities    2", "skipped files that are not images: 1 (.txt 1", "2 images decoded, 0 broken"),
        "pairs.txt": ("pairs         2, 1 genuine", "images        3, such as a/1.png", "identities    2"),
        "pairs.csv": ("images        3, such as Ann/Ann_0001.jpg",),
    }.items():
        for line in lines:
            assert line in described[name]
    assert "warning       1 of 3 images are far from the 128 x 128 pixels" in inspect.file(tmp_path / "train.rec", 128)
    assert "images        3, such as Ann_1.jpg" in inspect.file(tmp_path / "cplfw.txt")
    (tmp_path / "pytorch_model.bin").write_bytes(network(tmp_path / "t.pt", 0).read_bytes())
    assert "layout" in inspect.file(tmp_path / "pytorch_model.bin")


# JPEG by simplejpeg


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{"quality": 95}, {"quality": 40, "progressive": True}, {"quality": 90, "optimize": True}]
)
def test_jpeg_images_have_the_same_pixels_with_and_without_simplejpeg(subsampling, options, monkeypatch):
    rng = np.random.default_rng(subsampling)
    for shape in ((112, 112, 3), (37, 51, 3), (1, 3, 3), (16, 16)):
        data = encoded(rng.integers(0, 256, shape), "JPEG", subsampling=subsampling, **options)
        fast = decode_jpeg(data)
        if len(shape) == 3:
            np.testing.assert_array_equal(fast, np.asarray(open_rgb(data, "x")))
            assert decode_jpeg(data[: len(data) // 2]) is None
        else:
            assert fast is None  # gray images are left to Pillow
        with monkeypatch.context() as patch:
            patch.setattr(image_files_module, "_simplejpeg", lambda: None)
            plain = decode_image(data, 40)
        np.testing.assert_array_equal(decode_image(data, 40), plain)


def test_jpeg_images_that_may_be_turned_are_left_to_pillow():
    data = turned(np.zeros((8, 16, 3), np.uint8), "JPEG", 6)
    assert decode_jpeg(data) is None
    assert decode_image(data, (16, 8)).shape == (3, 16, 8)
    assert open_rgb(data, "x").size == (8, 16)
