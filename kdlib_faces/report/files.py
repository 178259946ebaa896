"""Room: report. Writes and remakes a report's files. The only module of this room that touches the disk.

Each file is written beside its place and moved onto it, so a reader or a killed run never sees half a file.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdlib_faces._checks import InputError, report_key
from kdlib_faces.progress import progress as show
from kdlib_faces.report import html, markdown
from kdlib_faces.report.elements import FigureImages, Shown
from kdlib_faces.report.figures import FIGURES
from kdlib_faces.report.pictures import Picture
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.schema import check_run, to_json
from kdlib_faces.report.theme import DARK, LIGHT, Theme, lay_out_like, to_png
from kdlib_faces.report.view import View

__all__ = ["render", "write"]

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 64 * 2**20


def _save(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone; a report is to be passed on
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise report_key("directory", "a folder or a new name", str(directory)) from None
    return folder


def write(
    directory: str | os.PathLike[str],
    run: Mapping[str, Any],
    *,
    pictures: Sequence[Picture] = (),
    progress: bool = False,
) -> Path:
    """Write `report.json`, `report.md`, `report.html` and `figures/*.png`.

    Args:
        directory: made if absent; earlier report files in it are replaced.
        run: the content of report.json (see `check_run`); non-finite numbers become null.
        pictures: shown at the end of the report, or with the protocol that names them, and kept as figures/NAME.png.
        progress: show how many figures are drawn.

    Returns:
        The path of report.html.

    Raises:
        InputError: a key of `run` is missing or wrong, or two pictures share a name or take a figure's.

    Examples:
        >>> run = {"format": 1, "title": "Demo", "models": {"m": {"role": "student", "protocols": {}}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, run).name
        'report.html'
    """
    data = to_json(run)
    check_run(data)
    own = _own_names(data)
    for index, picture in enumerate(pictures):
        taken = own | {other.name for other in pictures[:index]}
        if picture.name in taken:
            raise report_key(f"pictures[{index}].name", f"none of {', '.join(sorted(taken))}", picture.name)
    folder = _folder(directory)
    if pictures:
        data["figures"] = (data.get("figures") or {}) | {p.name: f"figures/{p.name}.png" for p in pictures}
        said = {p.name: {"title": p.title, "caption": p.caption} for p in pictures}
        data["pictures"] = (data.get("pictures") or {}) | said
    # The numbers first: they may have taken days, and nothing that draws can then lose them.
    _save(folder / "report.json", (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    for picture in pictures:
        buffer = io.BytesIO()
        picture.pixels.save(buffer, format="PNG")
        _save(folder / "figures" / f"{picture.name}.png", buffer.getvalue())
    return render(folder, progress=progress)


def _read(folder: Path) -> Any:
    path = folder / "report.json"
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"report: {path} cannot be read: {error.strerror or error}") from None
    if len(content) > _LARGEST:
        raise InputError(f"report: {path} is larger than {_LARGEST // 2**20} MiB")
    try:
        return to_json(json.loads(content))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"report: {path} is not JSON: {error}") from None


def _find_pictures(folder: Path, run: Mapping[str, Any]) -> tuple[list[Shown], list[str]]:
    """The recorded pictures that are PNG files below `folder`, and the names of the others."""
    own = _own_names(run)
    shown, missing = [], []
    root = folder.resolve()
    for name, relative in (run.get("figures") or {}).items():
        if name in own:
            continue
        try:
            path = (folder / relative).resolve()
        except (OSError, ValueError):
            path = root
        # The record may come from a stranger: it must not pull another file of this machine into a page.
        if root not in path.parents or not path.is_file() or path.stat().st_size > _LARGEST:
            missing.append(name)
            continue
        png = path.read_bytes()
        if not png.startswith(_PNG):
            missing.append(name)
            continue
        said = (run.get("pictures") or {}).get(name) or {}
        inside = path.relative_to(root).as_posix()
        shown.append(Shown(name, said.get("title") or name, said.get("caption") or "", inside, png))
    return shown, missing


def _both(light: Figure | None, dark: Figure | None) -> tuple[bytes, bytes]:
    """The same figure on both grounds, in one layout."""
    assert light is not None  # what can be drawn at one width can be drawn at the other
    assert dark is not None
    return to_png(light), to_png(lay_out_like(dark, light))


Job = Callable[[Theme, bool], Figure | None]


def _jobs(view: View) -> dict[str, Job]:
    """File name -> the function of theme and width that draws it. Protocols take the place of the figures by age gap."""
    kept = FIGURES if not view.evaluations else [plot for plot in FIGURES if plot.name in ("cost", "training")]
    jobs: dict[str, Job] = {plot.name: partial(plot.draw, view) for plot in kept}
    for evaluation in view.evaluations:
        for plot, (_, _, draw) in PLOTS.items():
            jobs[f"{evaluation.name}-{plot}"] = partial(draw, view, evaluation)
    return jobs


def _own_names(run: Mapping[str, Any]) -> set[str]:
    """Names that figures of this run take."""
    return {plot.name for plot in FIGURES} | {
        f"{evaluation['name']}-{plot}" for evaluation in run.get("evaluations") or () for plot in PLOTS
    }


def render(directory: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Remake report.md, report.html and the figures from report.json and the pictures on disk.

    Args:
        directory: holds report.json.
        progress: show how many figures are drawn.

    Returns:
        The path of report.html.

    Raises:
        InputError: report.json is missing, not JSON, or not a run.
    """
    folder = Path(directory)
    run = _read(folder)
    check_run(run)
    _folder(folder)
    view = View(run)
    figures: dict[str, FigureImages] = {}
    jobs = _jobs(view)
    for name in {plot.name for plot in FIGURES} - jobs.keys():
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    for name, draw in show(jobs.items(), "figures", total=len(jobs), quiet=not progress):
        path = folder / "figures" / f"{name}.png"
        wide = draw(LIGHT, False)
        if wide is None:
            path.unlink(missing_ok=True)
            continue
        light, dark = _both(wide, draw(DARK, False))
        light_narrow, dark_narrow = _both(draw(LIGHT, True), draw(DARK, True))
        width = round(100 * wide.get_size_inches()[0])
        figures[name] = FigureImages(light, dark, light_narrow, dark_narrow, width)
        _save(path, light)
    shown, missing = _find_pictures(folder, run)
    listed = {s.name: (s.title, s.caption, s.path) for s in shown}
    _save(folder / "report.md", markdown.page(view, list(figures), listed, missing).encode())
    _save(folder / "report.html", html.page(view, figures, shown, missing).encode())
    return folder / "report.html"
