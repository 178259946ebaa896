"""Sphinx configuration. The build needs no network: no inventory of another project is downloaded."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import desc
from sphinx.util.nodes import make_refnode

from kdlib import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kdlib"
author = "the kdlib contributors"
project_copyright = "the kdlib contributors, Apache-2.0"
version = release = __version__

# Single backticks mark code in all docstrings.
default_role = "code"
# Formulas become MathML, which browsers render without a script, also offline.
html_math_renderer = "mathml"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "command_options",
    "reference",
    "references",
]
exclude_patterns = ["_build", "_ext"]
# Blocks without a language are plain text.
highlight_language = "none"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"kdlib {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_js_files = ["sidebar.js"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"

# The extension `reference` writes the pages of the names.
autosummary_generate = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

nitpick_ignore_regex = [
    # Names of other projects, which stay plain text.
    (r"py:.*", r"(torch|nn|F|np|npt|numpy|einops|PIL|Image|matplotlib|onnx|onnxruntime|tqdm)(\..*)?"),
    (r"py:.*", r"(Tensor|Module|NDArray|ArrayLike|Generator|Parameter|ImageFile|DeviceMesh)"),
    # The standard library.
    (
        r"py:.*",
        r"(abc|collections|contextlib|typing|typing_extensions|os|pathlib|datetime|argparse|dataclasses|types|enum|mmap|io|re)\..*",
    ),
    (r"py:.*", r"(Any|Callable|Iterable|Iterator|Literal|Mapping|Path|PathLike|Self|Sequence|Protocol|TypeVar)"),
    (r"py:.*", r"(None|bool|bytes|dict|float|int|list|object|set|str|tuple|type|optional|Ellipsis|\.\.\.)"),
    (r"py:exc", r"[A-Z][A-Za-z]*Error"),
    # Private names, and type variables.
    (r"py:.*", r"(.*\.)?_[A-Za-z_.]+"),
    (r"py:.*", r"kdlib\.training\.sharded\..*"),
    (r"py:.*", r"(kdlib\.training\.checkpoint\.EvaluationRow|kdlib_faces\.config\.Configuration)"),
    (r"py:.*", r"kdlib(_faces)?\..*\.(T|P|R|Picture|IntArray|FloatArray|BoolArray|InputSize|Reduction)"),
]


def _prose(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from parsing prose before a colon as a type: "Returns: The count: a shared parameter ..."."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]
    made: list[str] = []
    indent: str | None = None
    for line in lines:
        if section := re.fullmatch(r"( *)(Returns|Yields):", line):
            indent = section[1]
            opening = f"{indent}:{section[2].lower()}: "
        elif indent is not None and line.startswith(indent + " "):
            made.append(opening + line.strip() if opening else line)
            opening = ""
        else:
            indent = None if line.strip() else indent
            made.append(line)
    lines[:] = made


WIDE_FORMULA = 24  # characters of an inline formula that may not fit a narrow window


def _mathml(translator: Any, node: nodes.Element, block: bool) -> None:
    formula = tex2mathml(node.astext(), as_block=block)
    if block:
        formula = f'<div class="math-wrapper">{formula}</div>'
    elif len(re.sub(r"<[^>]*>|\s", "", formula)) > WIDE_FORMULA:
        formula = f'<span class="wide-formula">{formula}</span>'
    translator.body.append(formula)
    raise nodes.SkipNode


def _link_names(app: Any, tree: nodes.document, page: str) -> None:
    """Link code that is a public name, such as `SoftTargetLoss` or `tar_at_far`, to its entry, except within that entry.

    A short word such as `train` may be an argument. It is linked only where a Module's first line names its function.
    """
    entries: dict[str, list[Any]] = {}
    for full, entry in app.env.get_domain("py").objects.items():
        if entry.objtype in ("class", "function") and not entry.aliased:
            entries.setdefault(full.rpartition(".")[2], []).append(entry)
    for literal in list(tree.findall(nodes.literal)):
        name = literal.astext().removesuffix("()").rpartition(".")[2]
        after = literal.next_node(siblings=True, descend=False)
        named = after is not None and after.astext().startswith(" as a Module")
        clear = "_" in name.strip("_") or name[:1].isupper() or named
        found = entries.get(name, [])
        if not clear or len(found) != 1 or isinstance(literal.parent, nodes.reference):
            continue
        if not _within(literal, found[0].node_id):
            to = make_refnode(app.builder, page, found[0].docname, found[0].node_id, literal.deepcopy(), name)
            literal.replace_self(to)


def _within(node: nodes.Node, anchor: str) -> bool:
    """Return whether the node is inside the entry of the anchor."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, desc) and anchor in node[0]["ids"]:
            return True
    return False


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _prose, priority=400)
    app.connect("doctree-resolved", _link_names)
    inline = (lambda translator, node: _mathml(translator, node, False), None)
    display = (lambda translator, node: _mathml(translator, node, True), None)
    app.add_html_math_renderer("mathml", inline, display)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
