"""Directive for the bibliography: the sections `References:` of the docstrings of a package."""

import importlib
import inspect
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTION = re.compile(r"^References:\n((?:[ ]{4,}.*\n?|\n)+)", re.MULTILINE)


def references(package: str) -> Iterator[tuple[str, str]]:
    """The public names of a package with their references, but those that point to another name."""
    module = importlib.import_module(package)
    for name in sorted(module.__all__, key=str.lower):
        found = SECTION.search((inspect.getdoc(getattr(module, name)) or "") + "\n")
        if found and not found[1].lstrip().startswith("See `"):
            yield name, " ".join(found[1].split())


class References(SphinxDirective):
    """`{references} kdlib.functional`: a definition list of the names and their references."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        lines = []
        for package in self.arguments[0].split():
            for name, text in references(package):
                lines += [f"`{name}`", ": " + re.sub(r":(\w+):`", r"{\1}`", text), ""]
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, parent)
        return list(parent.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("references", References)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
