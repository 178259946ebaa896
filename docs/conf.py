"""Documentation build. Needs no network: targets outside this project are named here, not looked up."""

from kdlib import __version__

project = "kdlib"
author = "the kdlib contributors"
project_copyright = "the kdlib contributors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "api/generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"kdlib {version}"
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"

# The tables on the API pages only point to entries that stand elsewhere, so no stub pages are made.
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
    # Other projects' names: no inventory is downloaded, so these stay plain text.
    (r"py:.*", r"(torch|nn|F|np|npt|numpy|einops|PIL|Image|matplotlib|onnx|onnxruntime|tqdm)(\..*)?"),
    (r"py:.*", r"(Tensor|Module|NDArray|ArrayLike|Generator|Parameter|ImageFile)"),
    # The standard library.
    (r"py:.*", r"(collections|typing|typing_extensions|os|pathlib|datetime|argparse|dataclasses|types|enum)\..*"),
    (r"py:.*", r"(Any|Callable|Iterable|Iterator|Literal|Mapping|Path|PathLike|Self|Sequence|Protocol|TypeVar)"),
    (r"py:.*", r"(None|bool|bytes|dict|float|int|list|object|set|str|tuple|type|optional|Ellipsis|\.\.\.)"),
    (r"py:exc", r"[A-Z][A-Za-z]*Error"),
    # Private names, and type variables.
    (r"py:.*", r"(.*\.)?_[A-Za-z_.]+"),
    (r"py:.*", r"kdlib(_faces)?\..*\.(T|P|IntArray|FloatArray|BoolArray|InputSize|Reduction)"),
]
