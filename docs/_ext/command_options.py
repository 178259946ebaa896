"""Directives for the options and settings of `kdlib-faces`, read from its parser and its configuration classes."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from kdlib_faces.alignment.photographs import AlignConfig
from kdlib_faces.caching.build import CacheConfig
from kdlib_faces.cli import make_parser
from kdlib_faces.commands.train import CONFIGS
from kdlib_faces.config import Configuration, walk_settings
from kdlib_faces.demo.config import DemoConfig, faces_config, start_config, unused_settings
from kdlib_faces.harness.tasks import EvaluateConfig

ENTRY = re.compile(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)

COMMON = "common"


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by name, such as `"train"` and `"cache build"`."""
    found: dict[str, argparse.ArgumentParser] = {}
    unseen = [("", make_parser())]
    while unseen:
        prefix, parser = unseen.pop()
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for group in groups:
            unseen += [(f"{prefix}{name} ", each) for name, each in group.choices.items()]
        if not groups:
            found[prefix.strip()] = parser
    return found


def option_rows(command: str) -> Iterator[tuple[str, str, str]]:
    """The arguments of a command that not all commands have, or those that all have: name with its value, default, meaning."""
    parsers = command_parsers()
    common = set.intersection(*({action.dest for action in each._actions} for each in parsers.values()))
    named = next(iter(parsers)) if command == COMMON else command
    for action in parsers[named]._actions:
        if action.dest == "help" or (action.dest in common) != (command == COMMON):
            continue
        text, stated = action.help or "", ""
        if found := re.search(r" \(([^()]*)\)$", text):
            text, stated = text[: found.start()], found[1].removeprefix("default: ")
        value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else "")
        if not value and action.nargs != 0:
            value = action.dest.upper()
        name = action.option_strings[0] if action.option_strings else str(value)
        shown = f"{name} {value}".rstrip() if action.option_strings else name
        if not stated and action.default not in (None, [], True, False):
            stated = str(action.default)
        if action.required:
            stated = "required"
        yield shown, stated, text


def meanings(config: Configuration, prefix: str = "") -> dict[str, str]:
    """The entry of `Attributes:` for each setting, nested ones included."""
    found: dict[str, str] = {}
    for cls in reversed(type(config).__mro__):
        for name, text in ENTRY.findall((inspect.getdoc(cls) or "").partition("Attributes:\n")[2]):
            text = " ".join(text.split())
            found[prefix + name] = text if "_" in text.split()[0] else text[0].upper() + text[1:]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= meanings(value, f"{prefix}{field.name}.")
    return found


def settings_tables(command: str) -> Mapping[str, tuple[Configuration, Mapping[str, str]]]:
    """Column heads of a command, each with its defaults and with the settings that such a run does not read."""
    if command == "train":
        return {name: (cls(), {}) for name, cls in CONFIGS.items()}
    if command == "demo":
        return {
            "synthetic": (DemoConfig(), unused_settings(faces=False, start=False)),
            "real, from a teacher": (start_config(112), unused_settings(faces=True, start=True)),
            "real, from scratch": (faces_config(), unused_settings(faces=True, start=False)),
        }
    config = {"evaluate": EvaluateConfig, "cache build": CacheConfig, "align": AlignConfig}[command]
    return {"default": (config(), {})}


def settings_rows(command: str) -> Iterator[tuple[str, ...]]:
    """The settings of a command: key, one default for each column, meaning."""
    columns = settings_tables(command)
    values = {head: dict(walk_settings(config)) for head, (config, _) in columns.items()}
    texts: dict[str, str] = {}
    for config, _ in columns.values():
        texts = meanings(config) | texts
    for key in dict.fromkeys(key for each in values.values() for key in each):
        if key not in texts:
            raise ExtensionError(f"{command}: the setting {key} has no entry under 'Attributes:' of its class")
        cells = []
        for head, (_, unused) in columns.items():
            read = key in values[head] and not any(f"{key}.".startswith(f"{name}.") for name in unused)
            cells.append(written(command, head, key, values[head][key]) if read else "")
        if any(cells):
            yield key, *cells, texts[key]


def written(command: str, head: str, key: str, value: object) -> str:
    """The default as `--set` takes it."""
    if (command, head) == ("demo", "real, from a teacher") and key in ("amp", "compile"):
        return "by the CPU"  # the machine that builds the pages must not decide
    if value is None:
        return "`none`"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else ""


class _Table(SphinxDirective):
    """A table in Markdown, parsed in the place of the directive."""

    required_arguments = 1
    final_argument_whitespace = True

    def make(self, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[nodes.Node]:
        lines = [head, tuple("---" for _ in head), *rows]
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        parent = nodes.Element()
        self.state.nested_parse(StringList(text, source=self.env.docname), self.content_offset, parent)
        return list(parent.children)


class CommandOptions(_Table):
    """`{command-options} train`: the options of a command; `{command-options} common`: those that every command has."""

    def run(self) -> list[nodes.Node]:
        rows = [
            (f"`{name}`", default, re.sub(r"(?<!\w)(--[\w-]+)", r"`\1`", text))
            for name, default, text in option_rows(self.arguments[0])
        ]
        return self.make(("option", "default", "meaning"), rows)


class CommandSettings(_Table):
    """`{command-settings} train`: what `--set` and the file of `--config` may set, with the defaults."""

    def run(self) -> list[nodes.Node]:
        command = self.arguments[0]
        heads = tuple(f"`{name}`" if command == "train" else name for name in settings_tables(command))
        rows = [(f"`{key}`", *rest) for key, *rest in settings_rows(command)]
        return self.make(("setting", *heads, "meaning"), rows)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-options", CommandOptions)
    app.add_directive("command-settings", CommandSettings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
