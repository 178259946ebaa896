"""Small networks, images and files for the tests of checkpoints."""

import io
import zipfile

import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import build_backbone, load_backbone

FORMATS = [
    {},
    {"_use_new_zipfile_serialization": False},
    *[{"pickle_protocol": number} for number in (3, 4, 5)],
]  # options of torch.save


def small(name="mobilefacenet", **changes):
    arguments = {"embedding_dim": 16, "width": 0.125, "input_size": 32, **changes}
    return build_backbone(name, seed=0, **arguments).eval()


def faces(batch=2, size=(32, 32)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def refused(path):
    """The one line with which a file is refused."""
    with pytest.raises(InputError) as caught:
        load_backbone(path)
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    return str(caught.value)


def zipped(*names, content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()
