"""Face lists, pair lists and images: what is read, and what each kind of broken file says."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.data import image_files as image_files_module
from kdlib_faces.data.dataset import FaceImages, load_images
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.sources.base import FileImages
from tests.faces.reader_files import Shown, put, touch


def read_image(path, size):
    return FaceImages(FileImages([path]), size)[0]


write = partial(put, name="faces.csv")


def picture(path, pixels, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    return tmp_path


def test_ages_groups_and_unknown_ones(folder):
    faces = read_faces(
        [write(folder, "identity,x,Path,age,age_group\nAnn,1,a.jpg,7.5,Young\nBob,,b.jpg,,\nAnn,2,c.jpg,40,adult\n")]
    )
    assert faces.identities.tolist() == [0, 1, 0]
    assert faces.identity_names == ("Ann", "Bob")
    np.testing.assert_array_equal(faces.ages, np.array([7.5, np.nan, 40], np.float32))
    assert (faces.group_names, faces.age_groups.tolist()) == (("adult", "young"), [1, -1, 0])
    assert faces.paths[0] == folder / "a.jpg"


def test_without_ages_both_columns_are_none(folder):
    faces = read_faces(write(folder, "\ufeffpath,identity,age\n\na.jpg,Ann,\nb.jpg,Bob,\n"))
    assert faces.ages is None
    assert faces.age_groups is None


def test_two_lists_name_the_same_file(folder):
    first, second = (write(folder, "path,identity\na.jpg,A\nb.jpg,B\n", name=name) for name in ("one.csv", "two.csv"))
    with pytest.raises(InputError, match=r"two\.csv line 2: the image .*a\.jpg' is listed already .*one\.csv line 2"):
        read_faces([first, second])


def test_missing_lists_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"face list not found: .*nope\.csv"):
        read_faces(tmp_path / "nope.csv")
    with pytest.raises(InputError, match="no images found; a folder of faces needs one subfolder"):
        read_faces(tmp_path)
    with pytest.raises(InputError, match="at least one face list"):
        read_faces([])


def test_a_subset_numbers_identities_anew(folder):
    touch(folder, "d.jpg")
    faces = read_faces(write(folder, "path,identity,age\na.jpg,A,\nb.jpg,B,4\nc.jpg,C,5\nd.jpg,C,6\n"))
    part = faces.subset([3, 1])
    assert (part.identities.tolist(), part.identity_names) == ([1, 0], ("B", "C"))
    assert part.ages.tolist() == [6, 4]
    assert repr(part) == "<FaceList: 2 images, 2 identities, 2 ages>"
    for wrong in ([4], [-1], np.zeros(3, bool), [[0]]):
        with pytest.raises(ValueError, match=r"FaceList\.subset"):
            faces.subset(wrong)
    with pytest.raises(ValueError, match=r"FaceList: ages must be \(n,\) = \(1,\)"):
        FaceList(FileImages(["a"]), np.zeros(1, np.int64), ("A",), ages=np.zeros(2, np.float32))


def test_unreadable_images_are_named(tmp_path, monkeypatch):
    good = picture(tmp_path / "good.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    cut = write(tmp_path, good.read_bytes()[:900], name="cut.jpg")
    text = write(tmp_path, "hello", name="text.png")
    for path in (cut, text):
        with pytest.raises(InputError, match=rf"{path.name}: not a readable image"):
            load_images([good, path], 8)
    with pytest.raises(InputError, match="image file not found"):
        read_image(tmp_path / "no.jpg", 8)
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="images of mode 'I;16' are not read"):
        read_image(tmp_path / "deep.png", 8)
    monkeypatch.setattr(image_files_module, "MAX_PIXELS", 4000)
    with pytest.raises(InputError, match=r"64 x 64 pixels; images above 4,000 are refused"):
        read_image(good, 8)


def test_load_images_keeps_the_order(tmp_path):
    paths = [picture(tmp_path / f"{value}.png", np.full((4, 4, 3), value)) for value in range(0, 200, 20)]
    seen = Shown()
    tensor = load_images(paths, 4, progress=seen)
    assert tensor.shape == (10, 3, 4, 4)
    assert tensor.dtype == torch.uint8
    assert tensor[:, 0, 0, 0].tolist() == list(range(0, 200, 20))
    assert seen == ["images (10)"]
    assert to_float(tensor).aminmax() == (-1.0, pytest.approx(180 / 127.5 - 1))
