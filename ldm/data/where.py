"""Which samples to read: a condition on the keys of each sample's json.

    condition   comparison | has(KEY) | not condition | condition and / or condition | (condition)
    comparison  value < value, also <= > >= == != and chains; value in [constant, ..]; not in
    value       number | true | false | 'text' | KEY | key("any key") | value + - * / value | -value

Python parses the text, and nothing evaluates it: a node outside of this grammar is refused.
A missing value makes a comparison false: NaN in a column of numbers, "" in one of texts. So is the
result of a division by zero.
"""

import ast
import operator
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import NoReturn

import numpy as np

from ldm.utils.errors import UsageError, suggest_nearest

MAX_FILTER_LENGTH = 2000  # characters
MAX_FILTER_DEPTH = 40
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_TRUTHS = {"true": 1.0, "false": 0.0}
_REMEDIES = {
    ast.BitAnd: "write 'and'",
    ast.BitOr: "write 'or'",
    ast.Invert: "write 'not'",
    ast.Pow: "there are + - * and /",
    ast.Attribute: 'a key with a dot is key("a.b")',
    ast.Subscript: 'a key with odd characters is key("a[b]")',
}
_UNKNOWN = np.empty(0, "V1")  # a column whose kind is not known yet
_KINDS = {"f": "numbers", "U": "texts"}


@dataclass(frozen=True)
class SampleFilter:
    """A condition in the grammar above; UsageError for any other text. keys: those it reads."""

    text: str
    keys: tuple[str, ...] = field(init=False)
    _clauses: list[ast.expr] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        root = _parse_expression(self.text)
        is_list = isinstance(root, ast.BoolOp) and isinstance(root.op, ast.And)
        reading = _Evaluation(self.text, None)
        for clause in (clauses := root.values if is_list else [root]):
            reading.condition(clause)
        if not reading.keys:
            raise reading.make_error(root, "it reads no key of the json")
        object.__setattr__(self, "keys", tuple(reading.keys))
        object.__setattr__(self, "_clauses", clauses)

    def select(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
        """Returns the samples (N,) bool that meet the condition, and why the others do not.

        columns (N,): float64 or str by key. The dictionary counts the samples that are left out by
        the first clause (of those that `and` joins) that they do not meet.
        """
        keep = np.ones(len(next(iter(columns.values()))), bool)
        evaluation, left_out = _Evaluation(self.text, columns), {}
        for clause in self._clauses:
            meets = keep & evaluation.condition(clause)
            left_out[evaluation.quote(clause)] = int(keep.sum() - meets.sum())
            keep = meets
        return keep, {clause: count for clause, count in left_out.items() if count}

    def refuse_key(self, key: str, known: Sequence[str], name: str) -> NoReturn:
        """Raises UsageError for a key that no sample of `name` has; known: keys that some have."""
        near = suggest_nearest(key, known)
        near = near or f"; there are {', '.join(known[:8])}" * bool(known)
        raise UsageError(f"{name}: {_describe(self.text)}: no json has the key {key}{near}")


def count_missing(columns: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the number of samples without a value, of each key that some lack."""
    counts = {key: int(_find_missing(values).sum()) for key, values in columns.items()}
    return {key: count for key, count in counts.items() if count}


def _parse_expression(text: str) -> ast.expr:
    def refuse(reason: str) -> NoReturn:
        raise UsageError(f"{_describe(text)}: {reason}")

    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'where is a condition such as "width>=512 and clip>0.25", got {text!r}')
    if len(text) > MAX_FILTER_LENGTH:
        refuse(f"it has {len(text)} characters, and at most {MAX_FILTER_LENGTH} are read")
    if "\n" in text or "\r" in text:
        refuse("it must be one line")
    try:
        with warnings.catch_warnings(action="ignore"):
            root = ast.parse(text.strip(), mode="eval").body
            tokens = list(tokenize.generate_tokens(StringIO(text.strip()).readline))
    except SyntaxError as error:
        place = f" at character {error.offset}" if error.offset else ""
        refuse(f"{error.msg}{place}")
    except (ValueError, MemoryError, RecursionError, tokenize.TokenError) as error:
        refuse(f"it cannot be read ({error or 'it is nested too deeply'})")
    if any(token.type == tokenize.COMMENT for token in tokens):
        refuse("it has a comment (#)")
    depth, nodes = 0, [root]
    while nodes := [child for node in nodes for child in ast.iter_child_nodes(node)]:
        if (depth := depth + 1) > MAX_FILTER_DEPTH:
            refuse(f"it is nested more than {MAX_FILTER_DEPTH} deep")
    return root


class _Evaluation:
    """Evaluates conditions on columns; without them it only checks that they are in the grammar."""

    def __init__(self, text: str, columns: Mapping[str, np.ndarray] | None) -> None:
        self.text, self.columns = text, columns
        self.keys: dict[str, None] = {}

    def quote(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text.strip(), node) or ast.unparse(node)

    def make_error(self, node: ast.AST, reason: str) -> UsageError:
        place = len(self.text.strip().encode()[: node.col_offset].decode()) + 1
        shown = self.quote(node)[:60]
        return UsageError(f"{_describe(self.text)}: {reason}, at character {place}: {shown}")

    def condition(self, node: ast.expr) -> np.ndarray:
        match node:
            case ast.BoolOp(op=op, values=values):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return join.reduce(np.broadcast_arrays(*map(self.condition, values)))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                values = [left, *rest]
                parts = map(self.comparison, values, ops, values[1:])
                return np.logical_and.reduce(np.broadcast_arrays(*parts))
            case ast.Call(func=ast.Name(id="has"), args=[argument], keywords=[]):
                return ~_find_missing(self.column(node, self.read_key(argument)))
        if self.find_key(node):
            raise self.make_error(
                node, "a key alone is no condition: compare it, or write has(KEY)"
            )
        raise self.make_node_error(node, "no condition")

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> np.ndarray:
        if isinstance(op, ast.In | ast.NotIn):
            return self.membership(left, isinstance(op, ast.In), right)
        if type(op) not in _COMPARISONS:
            raise self.make_error(right, "'is' is not known: write ==")
        first, second = self.value(left), self.value(right)
        return self.compare(right, _COMPARISONS[type(op)], first, second)

    def compare(self, node: ast.expr, compare, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if {first.dtype.kind, second.dtype.kind} == {"f", "U"}:
            raise self.make_error(node, "numbers are compared with texts")
        if "V" in (first.dtype.kind, second.dtype.kind):
            return np.ones(1, bool)
        return compare(first, second) & ~_find_missing(first) & ~_find_missing(second)

    def membership(self, left: ast.expr, inside: bool, right: ast.expr) -> np.ndarray:
        value = self.value(left)
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self.make_error(right, "after 'in' stands a list such as ['en', 'de']")
        same = [self.compare(each, operator.eq, value, self.constant(each)) for each in right.elts]
        found = np.logical_or.reduce(np.broadcast_arrays(*same))
        return found if inside else ~found & ~_find_missing(value)

    def value(self, node: ast.expr) -> np.ndarray:
        if (key := self.find_key(node)) is not None:
            return self.column(node, key)
        match node:
            case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
                first, second = self.number(node.left), self.number(node.right)
                if "V" in (first.dtype.kind, second.dtype.kind):
                    return _UNKNOWN
                with np.errstate(all="ignore"):
                    result = _ARITHMETIC[type(op)](first, second)
                return np.where(np.isfinite(result), result, np.nan)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                value = self.number(operand)
                return -value if isinstance(sign, ast.USub) and value.dtype.kind == "f" else value
            case ast.Constant() | ast.Name():
                return self.constant(node)
        raise self.make_node_error(node, "no value")

    def number(self, node: ast.expr) -> np.ndarray:
        value = self.value(node)
        if value.dtype.kind == "U":
            raise self.make_error(node, "texts are not calculated with")
        return value

    def constant(self, node: ast.expr) -> np.ndarray:
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                return -self.constant(node.operand)
            case ast.Name(id="true" | "false" as name):
                return np.array(_TRUTHS[name])
            case ast.Constant(value=int() | float() as number):
                try:
                    if np.isfinite(number := float(number)):
                        return np.array(number)
                except OverflowError:
                    pass
                raise self.make_error(node, "the number is too large")
            case ast.Constant(value=str(text)):
                if not text:
                    raise self.make_error(node, "an empty text is a missing one: write has(KEY)")
                return np.array(text)
            case ast.Constant(value=None):
                raise self.make_error(node, "there is no None: write has(KEY) or not has(KEY)")
        raise self.make_node_error(node, "no constant")

    def column(self, node: ast.expr, key: str) -> np.ndarray:
        self.keys[key] = None
        return _UNKNOWN if self.columns is None else self.columns[key]

    def find_key(self, node: ast.expr) -> str | None:
        """Returns the key that a node names as a value; None if it is something else."""
        match node:
            case ast.Name(id=name) if name not in _TRUTHS:
                if self.quote(node) != name:  # Python writes full-width letters in ASCII
                    raise self.make_error(node, 'a key with such letters is written key("...")')
                return name
            case ast.Call(
                func=ast.Name(id="key"), args=[ast.Constant(value=str(key))], keywords=[]
            ):
                return key
        return None

    def read_key(self, node: ast.expr) -> str:
        """Returns the key in has(KEY), which may be a text."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if (key := self.find_key(node)) is None:
            raise self.make_error(node, "has() takes one key")
        return key

    def make_node_error(self, node: ast.expr, what: str) -> UsageError:
        kind = type(getattr(node, "op", node))
        if kind is ast.Call:
            return self.make_error(
                node, 'functions are not called: there are has(KEY) and key("any key")'
            )
        remedy = f": {_REMEDIES[kind]}" if kind in _REMEDIES else ""
        return self.make_error(node, f"this is {what} of the grammar{remedy}")


def _describe(text: str) -> str:
    shown = " ".join(text.split())
    return f'where="{shown[:120]}{"..." * (len(shown) > 120)}"'


def _find_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "U":
        return values == ""
    return np.isnan(values) if values.dtype.kind == "f" else np.ones(1, bool)
