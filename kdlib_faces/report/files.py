"""Writing of a report's files, and rendering from report.json."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError, report_key
from kdlib_faces._output import check_output
from kdlib_faces.progress import progress as show
from kdlib_faces.report.curves import RUN_PLOTS
from kdlib_faces.report.pages import PictureFile, html_page, markdown_page
from kdlib_faces.report.pictures import Picture
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.reader import from_json, to_json
from kdlib_faces.report.schema import FORMAT, PictureEntry, Report, check_report
from kdlib_faces.report.theme import to_svg

__all__ = ["read", "render", "write"]

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_BYTES = 16 * 2**20


def write(
    directory: str | os.PathLike[str], report: Report, *, pictures: Sequence[Picture] = (), progress: bool = False
) -> Path:
    """Write report.json, report.md, report.html and the figures.

    Args:
        directory: Folder, created if absent; files of an earlier report in it are replaced.
        report: The content; non-finite numbers become null.
        pictures: Pictures, shown with the protocol that names them or at the end, and written to figures/NAME.png.
        progress: Whether to show progress.

    Returns:
        The path of report.html.

    Raises:
        InputError: Names are unknown, lists have the wrong length, or two pictures share a name.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.report import ModelEntry
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, Report("Demo", {"m": ModelEntry("student")})).name
        'report.html'
    """
    entries = dict(report.pictures)
    for index, picture in enumerate(pictures):
        if picture.name in entries:
            raise report_key(f"pictures[{index}].name", "used once", picture.name)
        entries[picture.name] = PictureEntry(picture.title, picture.caption)
    content = {"format": FORMAT, **to_json(replace(report, pictures=entries))}
    _parse(content)
    folder = _make_folder(directory)
    # The numbers come first: they may have taken days, and a failure to draw must not lose them.
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _save(folder / "report.json", text.encode())
    for picture in pictures:
        buffer = io.BytesIO()
        picture.pixels.save(buffer, format="PNG")
        _save(folder / "figures" / f"{picture.name}.png", buffer.getvalue())
    return render(folder, progress=progress)


def render(directory: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Make report.md, report.html and the figures again from report.json and the pictures on disk.

    Args:
        directory: Folder of the report.
        progress: Show progress.

    Returns:
        The path of report.html.

    Raises:
        InputError: report.json is missing, or is not a report.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.report import ModelEntry
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write(folder, Report("Demo", {"m": ModelEntry("student")}))
        ...     page.unlink()
        ...     render(folder) == page and page.exists()
        True
    """
    folder = Path(directory)
    report = read(folder / "report.json")
    _make_folder(folder)
    figures = {}
    jobs = _jobs(report)
    for old in (folder / "figures").glob("*.svg"):
        if old.stem not in jobs and (old.stem in RUN_PLOTS or old.stem.rpartition("-")[2] in PLOTS):
            old.unlink()
    for name, draw in show(jobs.items(), "figures", total=len(jobs), quiet=not progress):
        figure = draw()
        path = folder / "figures" / f"{name}.svg"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figures[name] = to_svg(figure, name)
        _save(path, figures[name].encode())
    pictures, missing = _find_pictures(folder, report)
    _save(folder / "report.md", markdown_page(report, list(figures), pictures, missing).encode())
    _save(folder / "report.html", html_page(report, figures, pictures, missing).encode())
    return folder / "report.html"


def _jobs(report: Report) -> dict[str, partial[Figure | None]]:
    """File name of each figure to the call that draws it."""
    jobs: dict[str, partial[Figure | None]] = {name: partial(plot.draw, report) for name, plot in RUN_PLOTS.items()}
    for summary in report.evaluations:
        jobs |= {f"{summary.name}-{name}": partial(plot.draw, report, summary) for name, plot in PLOTS.items()}
    return jobs


def _save(path: Path, content: bytes) -> None:
    with atomic_write(path, durable=True) as stream:
        stream.write(content)


def _make_folder(directory: str | os.PathLike[str]) -> Path:
    # Figures are written and deleted there, so a link in a report from elsewhere must not lead to another folder.
    folder = check_output(Path(directory))
    if (folder / "figures").is_symlink() or (folder / "figures").is_file():
        raise InputError(f"report: {folder / 'figures'} must be a folder and no link; remove it")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    return folder


def read(path: Path) -> Report:
    """Read a report.json.

    Args:
        path: The file.

    Returns:
        The report, with every field checked.

    Raises:
        InputError: The file is missing, too large, or no report of this version.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.report import ModelEntry
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write(folder, Report("Demo", {"m": ModelEntry("student", parameters=1000)}))
        ...     read(Path(folder, "report.json")).models["m"].parameters
        1000
    """
    if path.exists() and not path.is_file():
        raise InputError(f"report: {path} is no file")
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"report: {path} cannot be read: {error.strerror or error}") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"report: {path} is larger than {_MAX_BYTES // 2**20} MiB")
    try:
        parsed = json.loads(content, object_pairs_hook=_unique_keys, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"report: {path} is not JSON: {error}") from None
    try:
        return _parse(to_json(parsed))
    except InputError as error:
        raise InputError(f"report: {path}: {str(error).removeprefix('report: ')}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _parse(content: object) -> Report:
    """Check the JSON form of a report and build it."""
    if not isinstance(content, dict) or "format" not in content:
        raise InputError("report: run.format is missing")
    if content["format"] != FORMAT:
        raise report_key("run.format", f"{FORMAT}, the format this version reads", content["format"])
    report = from_json(Report, {key: value for key, value in content.items() if key != "format"}, "run")
    check_report(report)
    return report


def _find_pictures(folder: Path, report: Report) -> tuple[list[PictureFile], list[str]]:
    """The listed pictures that are PNG files inside `folder`, and the names of the others."""
    found, missing = [], []
    root = folder.resolve()
    for name, entry in report.pictures.items():
        path = (folder / "figures" / f"{name}.png").resolve()
        # A link in a report from elsewhere must not copy another file of this machine into the page.
        inside = root in path.parents and path.is_file() and path.stat().st_size <= _MAX_BYTES
        content = path.read_bytes() if inside else b""
        if content.startswith(_PNG):
            found.append(PictureFile(name, entry.title, entry.caption, content))
        else:
            missing.append(name)
    return found, missing
