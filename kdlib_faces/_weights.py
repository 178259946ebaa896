"""Reading of untrusted weight files, identified by their first bytes: PyTorch archives, old pickles and safetensors."""

import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdlib_faces._checks import InputError, show_name
from kdlib_faces._tensor_pickle import BlockedName, Foreign, read_tensors

__all__ = ["Weights", "read_weights"]

WHOLE_MODULE = "save model.state_dict() instead"


@dataclass(frozen=True)
class Weights:
    """Content of a weight file.

    Attributes:
        kind: `"PyTorch"` or `"safetensors"`.
        content: the saved object, in which a `Foreign` replaces each object that is neither a tensor nor a plain value;
            for safetensors the dict of its tensors.
        size: file size in bytes.
        metadata: the metadata of a safetensors file.
    """

    kind: str
    content: object
    size: int
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(owner: str, path: Path) -> Weights:
    """Read the tensors and plain values of a file; objects of other classes are not built, and nothing is executed.

    Args:
        owner: beginning of the error messages: the caller and the file.
        path: the file.

    Returns:
        The content, with tensors on the CPU, which may be views of the file.

    Raises:
        InputError: the file is missing or damaged, names a function that runs code, contains a whole module, or declares
            more than its size.
    """
    if not path.is_file():
        raise InputError(f"{owner} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(256)
        _check_first_bytes(owner, head)
        # A safetensors file starts with the length of its JSON header.
        if head[8:9] == b"{" and not head.startswith((b"PK\x03\x04", b"\x80\x02\x8a")):
            tensors, metadata = _read_safetensors(owner, path)
            return Weights("safetensors", tensors, size, metadata)
        archive = head.startswith(b"PK\x03\x04")
        if archive:
            _check_archive(owner, path, size)
    except OSError as error:
        raise InputError(f"{owner} cannot be read: {error.strerror or error}") from error
    try:
        # With a memory-mapped archive, a margin head of gigabytes next to the network is never read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about other pickle protocols
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive)
    except Exception:  # objects of other classes, another pickle protocol, or damage
        content = _read_beside_objects(owner, path, archive)
    return Weights("PyTorch", content, size)


def _read_beside_objects(owner: str, path: Path, archive: bool) -> object:
    """Read the tensors of a file that `torch.load` refuses."""
    try:
        content = read_tensors(path, archive=archive)
    except BlockedName as error:
        raise InputError(
            f"{owner} contains more than tensors: loading it would call {show_name(error)}, which was refused; "
            f"{WHOLE_MODULE}"
        ) from error
    except Exception as error:  # damaged bytes can raise almost any exception in the reader
        raise InputError(
            f"{owner} is damaged, truncated, or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error
    if isinstance(content, Foreign) and not content:
        raise InputError(
            f"{owner} contains an object of the class {show_name(content.name)}, which cannot be read safely; {WHOLE_MODULE}"
        )
    return content


def _check_first_bytes(owner: str, head: bytes) -> None:
    text = head.lstrip()
    if not text:
        raise InputError(f"{owner} is empty")
    if text[:1] == b"<":
        raise InputError(f"{owner} is a web page, not a checkpoint; the download returned HTML or XML")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"{owner} is a Git LFS pointer, not a checkpoint; fetch the actual file")
    if head[:2] == b"\x1f\x8b":
        raise InputError(f"{owner} is compressed with gzip; decompress it first")


def _read_safetensors(owner: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        detail = show_name(" ".join(str(error).split()))
        raise InputError(f"{owner} is damaged, truncated, or not a safetensors file: {detail}") from error


def _check_archive(owner: str, path: Path, size: int) -> None:
    """Check an archive: `torch.save` does not compress, so its content is never larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            compressed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            claimed = sum(entry.file_size for entry in entries)
            pickled = any(name.endswith("data.pkl") for name in names)
            if any(name.endswith("constants.pkl") for name in names):
                raise InputError(
                    f"{owner} is a TorchScript program, which executes code when it is loaded; if you trust it, "
                    "save torch.jit.load(path).state_dict()"
                )
            if not pickled and names:
                raise InputError(
                    f"{owner} is an archive of other files ({show_name(names[0])!r} ...), not a checkpoint; unpack it"
                )
            if compressed is not None or claimed > size:
                raise InputError(
                    f"{owner} declares {claimed} bytes of content in a file of {size}; torch.save does not compress"
                )
            altered = archive.testzip()  # torch.load ignores checksums, so a flipped bit would change a weight
    except InputError:
        raise
    except Exception as error:  # see above
        raise InputError(
            f"{owner} is damaged, truncated, or not a PyTorch checkpoint ({type(error).__name__})"
        ) from error
    if altered is not None:
        raise InputError(f"{owner} is damaged: the checksum of {show_name(altered)!r} does not match")
