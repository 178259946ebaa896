"""Mutants of a source file: the operators of mutmut in the bodies of functions, without messages and types."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_assignment, operator_if_exp

MESSAGE_NAMES = {"owner", "name", "names", "what", "argument", "message", "where", "like"}
"""Parameters and variables that only error messages use."""
CHECKS = (
    "check", "require", "gather", "label_array", "look_up", "one_batch", "reduce", "resample_counts", "shards_of",
    "unit_block",
)  # fmt: skip
"""Beginnings of the names of functions that take parts of an error message as strings."""
SKIPPED = (cst.Annotation, cst.Assert, cst.Decorator, cst.FormattedString, cst.Raise)
"""Types, decorators and messages."""
OPERATORS = [each for each in mutation_operators if each[1] is not operator_assignment]
"""All but `x = None`, which the first use of x or the type checker detects."""
AT_IMPORT = "__init_subclass__"
"""A method that runs when the package is imported, before a function is changed."""
SIMPLE = (cst.Name, cst.BaseNumber, cst.SimpleString)


@dataclass(frozen=True)
class Mutant:
    """A change of one expression of a function.

    Args:
        path: source file, relative to the repository.
        function: qualified name of the outermost function.
        line: line of the change; no part of the key.
        before: source of the expression.
        after: source in its place.
        number: position among equal changes of the function, from 1.
        last_line: last line of the expression.
        body: first and last line of the function.
        start: first character of the expression in the file.
        end: character after its last.
        default: parameter whose default is changed; empty if the change is in the body.
    """

    path: str
    function: str
    line: int
    before: str
    after: str
    number: int
    last_line: int
    body: tuple[int, int]
    start: int
    end: int
    default: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """Identity that edits of other lines leave as it is."""
        return self.path, self.function, self.before, self.after, self.number

    @property
    def change(self) -> str:
        """The change without the parts that are equal."""
        same = 0
        while same < min(len(self.before), len(self.after)) and self.before[same] == self.after[same]:
            same += 1
        return (
            f"{self.before}  ->  {self.after}"
            if same < 60
            else f"...{self.before[same - 40 :]}  ->  ...{self.after[same - 40 :]}"
        )

    def mutate(self, text: str) -> str:
        """Return the source of the file with the change."""
        return text[: self.start] + self.after + text[self.end :]


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """Return the mutants of a file."""
    text = path.read_text(encoding="utf-8")
    visitor = _Visitor(path.relative_to(root).as_posix(), text)
    MetadataWrapper(cst.parse_module(text)).visit(visitor)
    return visitor.found


def function_code(text: str, path: Path, mutant: Mutant) -> CodeType:
    """Return the code object of the mutant's function in a source of its file."""
    found: list[CodeType] = []

    def collect(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_qualname == mutant.function and constant.co_firstlineno <= mutant.line:
                    found.append(constant)
                collect(constant)

    collect(compile(text, str(path), "exec", dont_inherit=True))
    return max(found, key=lambda code: code.co_firstlineno)


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.scopes: list[str] = []
        self.outer: cst.FunctionDef | None = None
        self.function, self.default = "", ""
        self.silent: set[cst.CSTNode] = set()
        self.equal: dict[cst.CSTNode, str] = {}
        self.found: list[Mutant] = []
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.offsets = [0]
        for line in text.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, SKIPPED) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString)):
            return False
        if isinstance(node, cst.Call):
            if _callee(node).endswith(("Error", "Warning", "warn")):
                return False
            self.silent |= {arg.value for arg in node.args if _is_silent(node, arg)}
            self.equal |= _sort_kinds(node)
        if isinstance(node, cst.If) and _is_compiling(node.test) and node.orelse is None:
            return False
        if isinstance(node, cst.IfExp) and _is_compiling(node.test):
            self.equal[node] = cst.Module(body=[]).code_for_node(next(iter(operator_if_exp(node))))
        if isinstance(node, cst.Comparison):
            self.equal |= _dtype_kinds(node)
        if isinstance(node, cst.Assign) and _code(node.targets[0].target) in MESSAGE_NAMES:
            self.silent |= {node.value, *_parts(node.value)}
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.scopes.append(node.name.value)
            if isinstance(node, cst.FunctionDef) and self.outer is None:
                self.outer, self.function = node, ".".join(self.scopes)
            if node.name.value == AT_IMPORT:
                return False
        if isinstance(node, cst.Param) and node.default is not None:
            if not isinstance(node.default, SIMPLE) or node.name.value in MESSAGE_NAMES:
                return False
            self.default = node.name.value
        if self.outer is not None and node not in self.silent:
            for kind, operator in OPERATORS:
                if isinstance(node, kind):
                    for new in operator(node):
                        if operator is not operator_arg_removal or _removes_an_option(node, new):
                            self.add(node, new)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.Param):
            self.default = ""
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)):
            self.scopes.pop()
            if original_node is self.outer:
                self.outer = None

    def add(self, node: cst.CSTNode, new: cst.CSTNode) -> None:
        """Record a change."""
        assert self.outer is not None
        if isinstance(node, cst.SimpleString) and (" " in node.value or _same_subscripts(node, new)):
            return
        place, body = self.get_metadata(PositionProvider, node), self.get_metadata(PositionProvider, self.outer)
        start = self.offsets[place.start.line - 1] + place.start.column
        end = self.offsets[place.end.line - 1] + place.end.column
        before, after = self.text[start:end], cst.Module(body=[]).code_for_node(new)
        if after == self.equal.get(node):
            return
        change = self.function, before, after
        self.counts[change] += 1
        lines = body.start.line, body.end.line
        self.found.append(
            Mutant(
                self.path, self.function, place.start.line, before, after, self.counts[change], place.end.line, lines,
                start, end, self.default,
            )
        )  # fmt: skip


def _code(node: cst.BaseAssignTargetExpression) -> str:
    return node.value if isinstance(node, cst.Name) else ""


def _parts(node: cst.BaseExpression) -> list[cst.BaseExpression]:
    return [each.value for each in node.elements] if isinstance(node, cst.Tuple) else []


def _callee(node: cst.Call) -> str:
    """Last name of the called function."""
    function = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    return function.value if isinstance(function, cst.Name) else ""


def _is_silent(call: cst.Call, arg: cst.Arg) -> bool:
    """Whether an argument is a part of a message, a type, the check of equal lengths, or a device, which a CPU ignores."""
    name = _callee(call)
    if arg.keyword is not None and arg.keyword.value == "device":
        return True
    if name == "zip":
        return arg.keyword is not None and arg.keyword.value == "strict"
    if name == "cast":
        return arg is call.args[0]
    if name.lstrip("_").startswith(CHECKS):
        value = arg.value
        named = isinstance(value, cst.Name) and value.value in MESSAGE_NAMES
        return named or isinstance(value, (cst.SimpleString, cst.FormattedString))
    return False


def _is_compiling(test: cst.BaseExpression) -> bool:
    """Whether only a compiler takes a branch; the tests of `torch.compile` do not run for mutants."""
    return isinstance(test, cst.Call) and _callee(test) == "is_compiling"


def _sort_kinds(call: cst.Call) -> dict[cst.CSTNode, str]:
    """Return the capitals of the kind of a sort, which NumPy reads in any case."""
    if _callee(call) not in ("sort", "argsort"):
        return {}
    kinds = [arg.value for arg in call.args if arg.keyword is not None and arg.keyword.value == "kind"]
    return {each: each.value.upper() for each in kinds if isinstance(each, cst.SimpleString)}


def _dtype_kinds(comparison: cst.Comparison) -> dict[cst.CSTNode, str]:
    """Return the letters of `dtype.kind in "iu"` with an X, which is the kind of no data type."""
    if not (isinstance(comparison.left, cst.Attribute) and comparison.left.attr.value == "kind"):
        return {}
    letters = [target.comparator for target in comparison.comparisons]
    return {each: f'"XX{each.raw_value}XX"' for each in letters if isinstance(each, cst.SimpleString)}


def _same_subscripts(before: cst.SimpleString, after: cst.CSTNode) -> bool:
    """Whether both are the same subscripts of `einsum`, in capital and small letters."""
    return "->" in before.value and isinstance(after, cst.SimpleString) and after.value.lower() == before.value.lower()


def _removes_an_option(call: cst.Call, new: cst.Call) -> bool:
    """Whether the mutant removes a keyword argument; the type checker detects other removals, and None as an argument."""
    kept = {id(arg) for arg in new.args}
    removed = [arg for arg in call.args if id(arg) not in kept]
    return len(new.args) < len(call.args) and removed[0].keyword is not None and not _is_silent(call, removed[0])
