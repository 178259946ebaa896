"""Weight files from outside, read without running anything in them: PyTorch archives, old pickles, safetensors.

What a file is shows in its first bytes, never in its name. Everything that is no weight file (a web page saved by a
failed download, a pointer of Git LFS, an archive of other things) is told apart and named.
"""

import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdlib_faces._checks import InputError, show_name
from kdlib_faces._safetensors import is_safetensors, read_safetensors

__all__ = ["Weights", "read_weights"]

WHOLE_MODULE = "save model.state_dict() instead"


@dataclass(frozen=True)
class Weights:
    """Content of a weight file.

    Attributes:
        kind: `"PyTorch"` or `"safetensors"`.
        content: what was saved; for safetensors the dict of its tensors.
        metadata: the strings of a safetensors file.
        size: of the file, in bytes.
    """

    kind: str
    content: Any
    size: int
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(owner: str, path: Path) -> Weights:
    """The content of the file: tensors and plain values only.

    Args:
        owner: who asks and for which file, for the error's first words.
        path: the file.

    Returns:
        The content; tensors on the CPU, which may view the file.

    Raises:
        InputError: no such file, a damaged one, one that holds other things than tensors and plain values, or that
            claims more than it has.
    """
    if not path.is_file():
        raise InputError(f"{owner} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(256)
        _refuse_what_is_no_weights(owner, head)
        if is_safetensors(head):
            tensors, metadata = read_safetensors(owner, path)
            return Weights("safetensors", tensors, size, metadata)
        archive = head.startswith(b"PK\x03\x04")
        if archive:
            _check_archive(owner, path, size)
    except OSError as error:
        raise InputError(f"{owner} cannot be read: {error.strerror or error}") from error
    try:
        # A mapped archive is read only where a tensor is used, so that a head of gigabytes beside the network costs
        # nothing.
        with warnings.catch_warnings():  # another pickle protocol is either read or refused below
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # bytes from outside can make the reader raise nearly anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise InputError(
                f"{owner} holds more than tensors: loading it would call {show_name(found[1])}, which was refused; "
                f"{WHOLE_MODULE}, or where you trust the file save its state dict alone: "
                'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pt")'
            ) from error
        if archive and re.search(r"Unsupported operand 1(49|50|51)\b", str(error)):  # opcodes of protocols 4 and 5
            raise InputError(
                f"{owner} is pickled by a newer protocol than is read safely; save it again by torch.save without "
                "pickle_protocol=, or as safetensors"
            ) from error
        raise InputError(f"{owner} is damaged, cut short, or no PyTorch checkpoint ({type(error).__name__})") from error
    return Weights("PyTorch", content, size)


def _refuse_what_is_no_weights(owner: str, head: bytes) -> None:
    text = head.lstrip()
    if not text:
        raise InputError(f"{owner} is empty")
    if text[:1] == b"<":
        raise InputError(f"{owner} is a web page, not a checkpoint; the download was answered by an HTML or XML text")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"{owner} is a Git LFS pointer, not a checkpoint; fetch the file itself")
    if head[:2] == b"\x1f\x8b":
        raise InputError(f"{owner} is compressed by gzip; unpack it first")


def _check_archive(owner: str, path: Path, size: int) -> None:
    """`torch.save` stores its entries as they are, so an archive never holds more than its file is long."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            claimed = sum(entry.file_size for entry in entries)
            pickled = any(name.endswith("data.pkl") for name in names)
            if any(name.endswith("constants.pkl") for name in names):
                raise InputError(
                    f"{owner} is a TorchScript program, which runs code when it is loaded; where you trust it, "
                    "save torch.jit.load(path).state_dict()"
                )
            if not pickled and names:
                raise InputError(
                    f"{owner} is an archive of other files ({show_name(names[0])!r} ...), no checkpoint; unpack it"
                )
            if packed is not None or claimed > size:
                raise InputError(
                    f"{owner} claims {claimed} bytes of content in a file of {size}; torch.save does not compress"
                )
            altered = archive.testzip()  # torch.load compares no checksums: a flipped bit would become a weight
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{owner} is damaged, cut short, or no PyTorch checkpoint ({type(error).__name__})") from error
    if altered is not None:
        raise InputError(f"{owner} is damaged: the checksum of {show_name(altered)!r} differs")
