"""The reference: tables of names by topic, and one page for each class and function in them.

`names` is an autosummary table. Before the build, each class and function that a table lists gets a page in
`api/generated`, with its entry, its source and links. Those pages are in no toctree: the sidebar shows the names of one
topic at a time, on the page of the topic and on the pages of its names.
"""

import html
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, cast

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.ext.autosummary import Autosummary
from sphinx.highlighting import PygmentsBridge
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec

TABLE = re.compile(r"^\.\. names:: (\S+)\n((?:   .*\n|\n)*)", re.MULTILINE)
FOLDER = "api/generated"
MAX_GUIDES = 6


@dataclass(frozen=True)
class Name:
    """A class or function with a page of its own."""

    module: str
    name: str
    topic: str
    see: tuple[str, ...]

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def page(self) -> str:
        return f"{FOLDER}/{self.full}"

    @property
    def value(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def listed(module: str, content: list[str]) -> list[str]:
    """The names of a table: those of its content, or all that the module defines and documents."""
    names = [line.strip() for line in content if line.strip() and not line.strip().startswith(":")]
    if names:
        return names
    found = importlib.import_module(module)
    documented = {name for _, name in ModuleAnalyzer.for_module(module).find_attr_docs()}
    public = getattr(found, "__all__", None) or [name for name in vars(found) if not name.startswith("_")]
    return [name for name in public if name in documented or defines(module, getattr(found, name))]


def defines(module: str, value: object) -> bool:
    """Whether a class or function is defined in a module or package."""
    return isinstance(value, (type, FunctionType)) and f"{value.__module__}.".startswith(f"{module}.")


def has_page(module: str, name: str) -> bool:
    """Whether the name is a class or a function; constants and type aliases stay on the page of their topic."""
    return isinstance(getattr(importlib.import_module(module), name), (type, FunctionType))


@cache
def names_of(source: Path) -> tuple[Name, ...]:
    """The names with a page, in the order of the tables of all topics."""
    found = []
    for topic in sorted((source / "api").glob("*.rst")):
        for module, body in TABLE.findall(topic.read_text("utf-8") + "\n"):
            options = dict(re.findall(r"^ +:(\w+): (.*)$", body, re.MULTILINE))
            see = tuple(options.get("see", "").split())
            names = [name for name in listed(module, body.splitlines()) if has_page(module, name)]
            found += [Name(module, name, f"api/{topic.stem}", see) for name in names]
    return tuple(found)


def module_of(function: Callable[..., Any]) -> type | None:
    """The loss Module of a function of `kdlib.functional`."""
    losses = importlib.import_module("kdlib.losses")
    bare = inspect.unwrap(function)
    for name in losses.__all__:
        value: type = getattr(losses, name)
        if (called := function_of(value)) and inspect.unwrap(called) is bare:
            return value
    return None


def function_of(value: object) -> Callable[..., Any] | None:
    """The function of `kdlib.functional` that a loss Module calls with its hyper-parameters."""
    if not isinstance(value, type):
        return None
    named = re.match(r"`(\w+)` as a Module", value.__doc__ or "")
    function: Callable[..., Any] | None = vars(value).get("_function")
    return function or (getattr(importlib.import_module("kdlib.functional"), named[1], None) if named else None)


def importable(name: Name) -> str:
    """The shortest package that exports the name."""
    parts = name.module.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if name.name in getattr(importlib.import_module(package), "__all__", ()):
            return package
    return name.module


def guides(name: str, pages: dict[str, str]) -> list[str]:
    """The pages that mention a name most often; a short word such as `train` may be an argument, so it has none."""
    if not ("_" in name.strip("_") or name[:1].isupper()):
        return []
    counts = {page: len(re.findall(rf"\b{name}\b", text)) for page, text in pages.items()}
    return sorted((page for page in counts if counts[page]), key=lambda page: -counts[page])[:MAX_GUIDES]


def text_of(name: Name, pages: dict[str, str]) -> str:
    """The source of the page of a name."""
    value = name.value
    kind = "class" if isinstance(value, type) else "function"
    lines = [":orphan:", "", name.name, "=" * len(name.name), ""]
    lines += [f".. trail:: {name.topic} {importable(name)} {name.name}", ""]
    lines += [f".. currentmodule:: {name.module}", "", f".. auto{kind}:: {name.name}"]
    if isinstance(value, type) and name.module == "kdlib.losses":
        lines += ["   :inherited-members: CallRepr, Module"]
    lines += ["", f".. source:: {name.full}", ""]
    twins = []
    if function := function_of(value):
        twins.append(f"As a function: :py:func:`kdlib.functional.{inspect.unwrap(function).__name__}`.")
    elif kind == "function" and (module := module_of(value)):
        twins.append(f"As a Module: :py:class:`kdlib.losses.{module.__name__}`.")
    links = dict.fromkeys([*(page.lstrip("/") for page in name.see), *guides(name.name, pages)])
    if links:
        twins.append("Guides: " + ", ".join(f":doc:`/{page}`" for page in links) + ".")
    if twins:
        lines += [".. seealso::", ""]
        for twin in twins:
            lines += [f"   {twin}", ""]
    return "\n".join(lines)


def write_pages(app: Sphinx) -> None:
    """Write the page of each name, and remove those of names that are gone."""
    names_of.cache_clear()
    source = Path(app.srcdir)
    guide_pages = {
        page.relative_to(source).with_suffix("").as_posix(): page.read_text("utf-8")
        for page in sorted(source.rglob("*.md"))
        if not page.is_relative_to(source / "_build")
    }
    folder = source / FOLDER
    folder.mkdir(exist_ok=True)
    kept = set()
    for name in names_of(source):
        path, text = source / f"{name.page}.rst", text_of(name, guide_pages)
        kept.add(path)
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
    for path in set(folder.glob("*.rst")) - kept:
        path.unlink()


class Names(Autosummary):
    """`.. names:: kdlib.losses`: a table of names of a module, all public ones by default, and entries of its constants.

    `:see:` names pages that the page of each name links.
    """

    required_arguments = 1
    content: StringList
    option_spec: ClassVar[OptionSpec] = {"see": directives.unchanged, "nosignatures": directives.flag}

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        names = listed(module, list(self.content))
        linked = [name for name in names if has_page(module, name)]
        self.options["nosignatures"] = None
        # Autosummary expects names of the current module without a prefix.
        prefix = "" if self.env.ref_context.get("py:module") == module else f"~{module}."
        self.content = StringList([prefix + name for name in linked], source=self.env.docname)
        made = super().run() if linked else []
        for name in names:
            if name not in linked:
                parent = nodes.Element()
                lines = [f".. autodata:: {module}.{name}", "   :no-value:"]
                self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, parent)
                made += parent.children
        return made

    def get_items(self, names: list[str]) -> list[tuple[str, str | None, str, str]]:
        """The rows of the table; a loss Module has the summary of its function."""
        rows: list[tuple[str, str | None, str, str]] = []
        for shown, _, _, full in super().get_items(names):
            module, _, name = full.rpartition(".")
            value = getattr(importlib.import_module(module), name)
            described = function_of(value) or value
            rows.append((shown, None, (inspect.getdoc(described) or "").split("\n\n")[0].replace("\n", " "), full))
        return rows


class Trail(SphinxDirective):
    """`.. trail:: TOPIC PACKAGE NAME`: the topic of a page and the line that imports its name."""

    required_arguments = 3

    def run(self) -> list[nodes.Node]:
        topic, package, name = self.arguments
        text = f":doc:`/{topic}` › ``from {package} import {name}``"
        parsed, messages = self.parse_inline(text)
        return [nodes.paragraph("", "", *parsed, classes=["trail"]), *messages]


class Source(SphinxDirective):
    """`.. source:: NAME`: the source of an object, folded, and of the function that a loss Module calls."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        value = getattr(importlib.import_module(module), name)
        parts = [inspect.unwrap(part) for part in (function_of(value), value) if part]
        code = "\n\n".join(textwrap.dedent(inspect.getsource(part)) for part in parts)
        root = Path(self.env.app.srcdir).parent
        file = Path(inspect.getsourcefile(parts[-1]) or "").relative_to(root).as_posix()
        light = PygmentsBridge("html", self.config.pygments_style).highlight_block(code, "python")
        page = (
            f'<details class="source"><summary>Source: <code>{html.escape(file)}</code></summary>\n'
            f'<div class="highlight-python notranslate">{light}</div>\n</details>'
        )
        self.env.note_dependency(str(root / file))
        return [nodes.raw("", page, format="html")]


def expand(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show the formula, the arguments and the references of a loss function on the page of its Module."""
    if what == "class" and (called := function_of(obj)):
        function = inspect.getdoc(called) or ""
        parameters = inspect.signature(obj).parameters
        head, _, tail = "\n".join(lines).partition("\n\nExamples:")
        sections = dict(sections_of(function))
        added = [head, "", sections[""], ""]
        if arguments := [text for key, text in arguments_of(sections["Args"]) if key in parameters]:
            added += ["Args:", *arguments, ""]
        added += ["Examples:" + tail.rstrip(), ""] if tail else []
        added += ["References:", sections["References"], ""] if "References" in sections else []
        lines[:] = "\n".join(added).split("\n")
    elif what == "method" and name.endswith(".forward") and (owner := owner_of(name)):
        sections = dict(sections_of(inspect.getdoc(function_of(owner)) or ""))
        parameters = inspect.signature(obj).parameters
        own = inspect.signature(owner).parameters
        arguments = [text for key, text in arguments_of(sections["Args"]) if key in parameters and key not in own]
        lines += ["Args:", *"\n".join(arguments).split("\n"), "", "Returns:", *sections["Returns"].split("\n"), ""]


def owner_of(method: str) -> type | None:
    """The loss Module of a method, if it calls a function."""
    module, name = method.rsplit(".", 2)[:2] if method.count(".") > 1 else ("", "")
    owner = getattr(importlib.import_module(module), name, None) if module else None
    return owner if owner and function_of(owner) and "Args:" not in (owner.forward.__doc__ or "") else None


def sections_of(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a Google-style docstring by title; the part before the first title has the title ""."""
    title, lines = "", list[str]()
    for line in text.split("\n"):
        if found := re.fullmatch(r"(Args|Returns|Raises|Examples|References):", line):
            yield title, "\n".join(lines).strip("\n")
            title, lines = found[1], []
        else:
            lines.append(line)
    yield title, "\n".join(lines).strip("\n")


def arguments_of(section: str) -> Iterator[tuple[str, str]]:
    """The entries of a section `Args` by name."""
    for entry in re.split(r"\n(?=    \w)", section):
        yield entry.strip().split(":")[0], entry


def navigate(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None) -> None:
    """Add the names of the current topic to the sidebar, and the previous and next name to the foot of a page."""
    names = names_of(Path(app.srcdir))
    own = next((name for name in names if name.page == page), None)
    topic = own.topic if own else page
    siblings = [name for name in names if name.topic == topic]
    if not siblings:
        return

    def link(target: str) -> str:
        return app.builder.get_relative_uri(page, target)

    def toctree(**options: Any) -> str:
        made = topic_tree(app, topic, tuple(sorted(options.items())))
        here = app.builder.get_relative_uri(page, "index").removesuffix("index.html")
        made = re.sub(
            r'href="([^":]*)"',
            lambda found: f'href="{link(topic)}"' if found[1] == "#" else f'href="{here}{found[1].removeprefix("../")}"'
            if found[1].startswith("../") else f'href="{here}{topic.rpartition("/")[0]}/{found[1]}"',
            made,
        )  # fmt: skip
        entries = "".join(
            f'<li class="toctree-l2{" current current-page" if name is own else ""}">'
            f'<a class="reference internal" href="{"#" if name is own else link(name.page)}">{name.name}</a></li>'
            for name in siblings
        )
        at = made.index("</a>", made.index(f'href="{link(topic)}"')) + len("</a>")
        return f"{made[:at]}<ul>{entries}</ul>{made[at:]}"

    context["toctree"] = toctree
    if own:
        at = siblings.index(own)
        for key, other in (("prev", at - 1), ("next", at + 1)):
            if 0 <= other < len(siblings):
                context[key] = {"link": link(siblings[other].page), "title": siblings[other].name}


@cache
def topic_tree(app: Sphinx, topic: str, options: tuple[tuple[str, Any], ...]) -> str:
    builder = cast("StandaloneHTMLBuilder", app.builder)  # only this one has the event `html-page-context`
    return str(builder._get_local_toctree(topic, **dict(options)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("names", Names)
    app.add_directive("source", Source)
    app.add_directive("trail", Trail)
    app.connect("builder-inited", write_pages)
    # Before napoleon, which converts the sections.
    app.connect("autodoc-process-docstring", expand, priority=300)
    # Before the theme, which reads the tree.
    app.connect("html-page-context", navigate, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
