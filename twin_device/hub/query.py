"""IoT Hub's query language over twin documents.

    SELECT [TOP n] * | attribute [AS name], ... | COUNT() | AVG(x) | SUM(x) | MIN(x) | MAX(x) [AS name], ...
    FROM devices | devices.modules | devices.jobs
    [WHERE condition] [GROUP BY attribute, ...]

Source: IoT Hub, "Query language for device and module twins, jobs, and message routing". A member that is not
there is undefined; a comparison with undefined, or of values of different types, is undefined; what is not
exactly true selects nothing. null is the exception: it equals only null, and differs from everything else.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]
_Expression = Callable[[Document], Any]

MAX_TEXT = 8192  # characters
_MAX_NESTING = 50
_COLLECTIONS = ("devices", "devices.modules", "devices.jobs")
_AGGREGATES = ("count", "avg", "sum", "min", "max")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w$])"
    r"|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|\[\[(?P<escaped>[^\]]+)\]\]"
    r"|(?P<word>[A-Za-z_$][\w$]*)"
    r"|(?P<sign>!=|<>|<=|>=|[=<>+\-*/%(),.\[\]]))",
    re.ASCII | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# From weak to strong; AND, OR and NOT are handled by themselves.
_COMPARISONS = ("=", "!=", "<>", "<", ">", "<=", ">=")


class QueryError(Exception):
    """A query that cannot be understood. position: where, as an offset in the text from 0."""

    def __init__(self, text: str, position: int, message: str) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        excerpt = " ".join(text[position : position + 20].split())
        near = f" near {excerpt!r}" if excerpt else " at its end"
        super().__init__(f"The query is wrong in line {line}, column {column}{near}: {message}.")
        self.position = position
        self.message = message


class _Undefined:
    def __repr__(self) -> str:
        return "undefined"


_UNDEFINED = _Undefined()


@dataclass
class Query:
    """A query that was understood. collection: where it looks. is_raw: False for SELECT * (whole twins)."""

    collection: str = "devices"
    top: int | None = None
    # Name of the row's member, aggregate or "", and the value; empty for SELECT *.
    columns: list[tuple[str, str, _Expression]] = field(default_factory=list)
    condition: _Expression | None = None
    groups: list[_Expression] = field(default_factory=list)

    @property
    def is_raw(self) -> bool:
        return bool(self.columns)


def parse(text: str) -> Query:
    """Understand a query; QueryError if that is not possible."""
    return _Parser(text).query()


def parse_condition(text: str) -> Query:
    """Understand a condition alone, as jobs have it; "*" and "" are all devices."""
    parser = _Parser(text)
    query = Query()
    if text.strip() not in ("", "*"):
        query.condition = parser.condition(query)
        parser.end()
    return query


def run(query: Query, documents: Iterable[Document]) -> list[Document]:
    """The rows, in the documents' order; groups in the order of their first member. Rows of SELECT * are the
    documents themselves."""
    chosen = [one for one in documents if query.condition is None or query.condition(one) is True]
    if not query.columns:
        return chosen[: query.top]
    if not query.groups and not any(aggregate for _, aggregate, _ in query.columns):
        return [_row(query, [one]) for one in chosen[: query.top]]
    groups: dict[str, list[Document]] = {}
    for one in chosen:
        groups.setdefault(repr([group(one) for group in query.groups]), []).append(one)
    if not query.groups and not groups:
        groups[""] = []
    return [_row(query, members) for members in groups.values()][: query.top]


def _row(query: Query, members: list[Document]) -> Document:
    row: Document = {}
    for name, aggregate, value in query.columns:
        found = _aggregated(aggregate, members, value) if aggregate else value(members[0])
        if found is not _UNDEFINED:
            row[name] = found
    return row


def _aggregated(aggregate: str, members: list[Document], value: _Expression) -> Any:
    if aggregate == "count":
        return len(members)
    numbers = [found for found in map(value, members) if _is_number(found)]
    if not numbers:
        return _UNDEFINED
    if aggregate == "avg":
        return sum(numbers) / len(numbers)
    if aggregate == "sum":
        return sum(numbers)
    return min(numbers) if aggregate == "min" else max(numbers)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > MAX_TEXT:
            raise QueryError(text, MAX_TEXT, f"a query has at most {MAX_TEXT} characters")
        # Kind, value and place of each token.
        self._tokens: list[tuple[str, str, int]] = []
        self._at = 0
        self._depth = 0
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                place += len(text[place:]) - len(text[place:].lstrip())
                raise QueryError(text, place, "no word, number, string or sign of the language begins here")
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind], match.start(kind)))
            place = match.end()
        self._tokens.append(("end", "", len(text)))

    # ------------------------------------------------------------------ tokens

    def _error(self, message: str) -> QueryError:
        return QueryError(self._text, self._tokens[self._at][2], message)

    def _next(self) -> tuple[str, str]:
        kind, value, _ = self._tokens[self._at]
        if kind != "end":
            self._at += 1
        return kind, value

    def _is(self, *wanted: str) -> bool:
        kind, value, _ = self._tokens[self._at]
        return kind in ("word", "sign") and value.lower() in wanted

    def _take(self, *wanted: str) -> str | None:
        return self._next()[1].lower() if self._is(*wanted) else None

    def _expect(self, wanted: str) -> None:
        if self._take(wanted) is None:
            raise self._error(f"{wanted.upper()} is expected")

    def end(self) -> None:
        if self._tokens[self._at][0] != "end":
            raise self._error("the query should end here")

    # ------------------------------------------------------------------ clauses

    def query(self) -> Query:
        query = Query()
        self._expect("select")
        if self._take("top"):
            kind, value = self._next()
            if kind != "number" or not value.isdigit() or int(value) < 1:
                self._at -= 1
                raise self._error("TOP is followed by a number from 1 up")
            query.top = int(value)
        names: list[str] = []
        if not self._take("*"):
            while True:
                names.append(self._column(query))
                if not self._take(","):
                    break
        self._expect("from")
        place = self._at
        found = self._name()
        while self._take("."):
            found += "." + self._name()
        if found.lower() not in _COLLECTIONS:
            self._at = place
            raise self._error(f"a query is FROM {', '.join(_COLLECTIONS)}")
        query.collection = found.lower()
        if self._take("where"):
            query.condition = self.condition(query)
        grouped: list[str] = []
        place = self._at
        if self._take("group"):
            self._expect("by")
            while True:
                start = self._tokens[self._at][2]
                query.groups.append(self._path(query, self._name()))
                grouped.append(
                    self._text[start : self._tokens[self._at][2]].strip().rstrip(",").strip().lower()
                )
                if not self._take(","):
                    break
        self.end()
        self._check(query, names, grouped, place)
        return query

    def _check(self, query: Query, names: list[str], grouped: list[str], place: int) -> None:
        aggregated = any(aggregate for _, aggregate, _ in query.columns)
        if query.groups or aggregated:
            self._at = place
            if not query.columns:
                raise self._error("SELECT * does not go with GROUP BY")
            if query.collection == "devices.jobs":
                raise self._error("devices.jobs is not aggregated")
            for (_, aggregate, _), text in zip(query.columns, names, strict=True):
                if not aggregate and text.lower() not in grouped:
                    raise self._error(f"{text} is neither aggregated nor in GROUP BY")

    def _column(self, query: Query) -> str:
        """One projection; returns its text without AS."""
        start = self._tokens[self._at][2]
        kind, name = self._next()
        aggregate = ""
        value: _Expression = _undefined
        if kind == "word" and name.lower() in _AGGREGATES and self._take("("):
            aggregate = name.lower()
            if aggregate != "count":
                value = self._path(query, self._name())
            self._expect(")")
            default = aggregate
        else:
            if kind not in ("word", "escaped"):
                self._at -= kind != "end"
                raise self._error("an attribute is expected")
            value = self._path(query, name)
            default = self._tokens[self._at - 1][1].strip("]")
        text = self._text[start : self._tokens[self._at][2]].strip()
        if self._take("as"):
            default = self._name()
        query.columns.append((default, aggregate, value))
        return text

    def _name(self) -> str:
        kind, value = self._next()
        if kind not in ("word", "escaped"):
            self._at -= kind != "end"
            raise self._error("a name is expected")
        return value

    # ------------------------------------------------------------------ expressions

    def condition(self, query: Query) -> _Expression:
        return self._or(query)

    def _nested(self, parse: Callable[[Query], _Expression], query: Query) -> _Expression:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"expressions nest at most {_MAX_NESTING} deep")
        found = parse(query)
        self._depth -= 1
        return found

    def _or(self, query: Query) -> _Expression:
        terms = [self._and(query)]
        while self._take("or"):
            terms.append(self._and(query))
        return terms[0] if len(terms) == 1 else lambda one: _any([term(one) for term in terms])

    def _and(self, query: Query) -> _Expression:
        terms = [self._not(query)]
        while self._take("and"):
            terms.append(self._not(query))
        return terms[0] if len(terms) == 1 else lambda one: _all([term(one) for term in terms])

    def _not(self, query: Query) -> _Expression:
        if self._take("not"):
            inner = self._nested(self._not, query)

            def negated(one: Document) -> Any:
                found = inner(one)
                return (not found) if isinstance(found, bool) else _UNDEFINED

            return negated
        return self._comparison(query)

    def _comparison(self, query: Query) -> _Expression:
        left = self._sum(query)
        sign = self._take(*_COMPARISONS)
        if sign:
            right = self._sum(query)
            return lambda one: _compared(sign, left(one), right(one))
        word = self._take("in", "nin")
        if word:
            return self._membership(query, left, word == "in")
        return left

    def _membership(self, query: Query, left: _Expression, wanted: bool) -> _Expression:
        closing = {"[": "]", "(": ")"}.get(self._take("[", "(") or "")
        if closing is None:
            raise self._error("IN is followed by [ and values")
        members = self._list(query, closing)

        def found(one: Document) -> Any:
            value = left(one)
            if value is _UNDEFINED:
                return _UNDEFINED
            return any(_compared("=", value, member(one)) is True for member in members) is wanted

        return found

    def _list(self, query: Query, closing: str) -> list[_Expression]:
        members: list[_Expression] = []
        while not self._take(closing):
            if members and not self._take(","):
                raise self._error(f"a comma or {closing} is expected")
            members.append(self._nested(self._or, query))
        return members

    def _sum(self, query: Query) -> _Expression:
        return self._operation(query, self._product, "+", "-")

    def _product(self, query: Query) -> _Expression:
        return self._operation(query, self._unary, "*", "/", "%")

    def _operation(self, query: Query, term: Callable[[Query], _Expression], *signs: str) -> _Expression:
        terms = [("+", term(query))]
        while sign := self._take(*signs):
            terms.append((sign, term(query)))
        if len(terms) == 1:
            return terms[0][1]

        def computed(one: Document) -> Any:
            total = terms[0][1](one)
            for sign, value in terms[1:]:
                total = _computed(sign, total, value(one))
            return total

        return computed

    def _unary(self, query: Query) -> _Expression:
        if self._take("-"):
            inner = self._nested(self._unary, query)
            return lambda one: _computed("-", 0, inner(one))
        return self._primary(query)

    def _primary(self, query: Query) -> _Expression:
        kind, value = self._next()
        if kind == "number":
            number: Any = int(value, 16) if value[:2].lower() == "0x" else float(value)
            number = int(value) if value.isdigit() else number
            return lambda _: number
        if kind == "string":
            string = _ESCAPE.sub(_unescaped, value[1:-1])
            return lambda _: string
        if kind == "sign" and value == "(":
            inner = self._nested(self._or, query)
            self._expect(")")
            return inner
        if kind == "sign" and value == "[":
            members = self._list(query, "]")
            return lambda one: [member(one) for member in members]
        if kind == "word":
            constants = {"true": True, "false": False, "null": None, "undefined": _UNDEFINED}
            if value.lower() in constants and not self._is("."):
                constant = constants[value.lower()]
                return lambda _: constant
            if self._is("("):
                return self._call(query, value)
        if kind in ("word", "escaped"):
            return self._path(query, value)
        self._at -= kind != "end"
        raise self._error("a value is expected")

    def _call(self, query: Query, name: str) -> _Expression:
        place = self._at - 1
        self._expect("(")
        arguments = self._list(query, ")")
        function, counts = _FUNCTIONS.get(name.lower(), (None, ()))
        if function is None or len(arguments) not in counts:
            self._at = place
            what = "there is no such function" if function is None else "it has another number of arguments"
            raise self._error(what)
        call = function
        return lambda one: call(*[argument(one) for argument in arguments])

    def _path(self, query: Query, first: str) -> _Expression:
        """The value at a path that begins with a name that was read already."""
        parts: list[str | int] = [first]
        while True:
            if self._take("."):
                parts.append(self._name())
            elif self._is("[") and self._tokens[self._at + 1][0] in ("number", "string"):
                self._take("[")
                kind, value = self._next()
                if kind == "number" and not value.isdigit():
                    raise self._error("an index is a number from 0 up")
                parts.append(int(value) if kind == "number" else _ESCAPE.sub(_unescaped, value[1:-1]))
                self._expect("]")
            else:
                break
        return lambda one: _found(one, _without_collection(parts, query.collection))


def _without_collection(parts: list[str | int], collection: str) -> list[str | int]:
    # devices.jobs.jobId is jobId, devices.tags.x is tags.x.
    words = collection.split(".")
    for length in range(len(words), 0, -1):
        if [str(part).lower() for part in parts[:length]] == words[:length] and len(parts) > length:
            return parts[length:]
    return parts


def _found(document: Document, parts: list[str | int]) -> Any:
    value: Any = document
    for index, part in enumerate(parts):
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                return _UNDEFINED
            value = value[part]
            continue
        if not isinstance(value, dict):
            return _UNDEFINED
        if part not in value and index == 0:
            # The names of a document's own members have no case: deviceId, DeviceId.
            part = next((name for name in value if name.lower() == part.lower()), part)
        if part not in value:
            return _UNDEFINED
        value = value[part]
    return value


def _undefined(_one: Document) -> Any:
    return _UNDEFINED


def _unescaped(match: "re.Match[str]") -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPED.get(code, code)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _any(values: list[Any]) -> Any:
    if any(value is True for value in values):
        return True
    return False if all(value is False for value in values) else _UNDEFINED


def _all(values: list[Any]) -> Any:
    if any(value is False for value in values):
        return False
    return True if all(value is True for value in values) else _UNDEFINED


def _compared(sign: str, left: Any, right: Any) -> Any:
    if left is _UNDEFINED or right is _UNDEFINED:
        return _UNDEFINED
    equal, unequal = sign == "=", sign in ("!=", "<>")
    if left is None or right is None:
        if equal or unequal:
            return (left is right) is equal
        return _UNDEFINED
    alike = (
        (_is_number(left) and _is_number(right))
        or (isinstance(left, str) and isinstance(right, str))
        or (isinstance(left, bool) and isinstance(right, bool))
    )
    if not alike:
        return _UNDEFINED
    if equal or unequal:
        return (left == right) is equal
    if isinstance(left, bool):
        return _UNDEFINED
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[sign]


def _computed(sign: str, left: Any, right: Any) -> Any:
    if not _is_number(left) or not _is_number(right) or (sign in "/%" and right == 0):
        return _UNDEFINED
    try:
        if sign == "+":
            return left + right
        if sign == "-":
            return left - right
        if sign == "*":
            return left * right
        # The sign of the remainder is the one of the dividend.
        return left / right if sign == "/" else math.fmod(left, right)
    except (OverflowError, ValueError):
        return _UNDEFINED


def _of_strings(work: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*values: Any) -> Any:
        return work(*values) if all(isinstance(value, str) for value in values) else _UNDEFINED

    return guarded


def _of_numbers(work: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*values: Any) -> Any:
        try:
            found = work(*values) if all(_is_number(value) for value in values) else _UNDEFINED
        except (OverflowError, ValueError, ZeroDivisionError):
            return _UNDEFINED
        return _UNDEFINED if isinstance(found, complex) else found

    return guarded


def _is(*kinds: type) -> Callable[[Any], Any]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _substring(text: Any, start: Any, length: Any = 10**9) -> Any:
    fits = isinstance(text, str) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in (start, length)
    )
    return text[start : start + length] if fits and start >= 0 and length >= 0 else _UNDEFINED


def _power(base: float, exponent: float) -> Any:
    # As floats: integers could grow without end.
    return float(base) ** float(exponent)


_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "is_defined": (lambda value: value is not _UNDEFINED, (1,)),
    "is_null": (lambda value: value is None, (1,)),
    "is_bool": (_is(bool), (1,)),
    "is_number": (_is_number, (1,)),
    "is_string": (_is(str), (1,)),
    "is_object": (_is(dict), (1,)),
    "is_array": (_is(list), (1,)),
    "is_primitive": (lambda value: value is None or isinstance(value, (str, int, float)), (1,)),
    "startswith": (_of_strings(str.startswith), (2,)),
    "starts_with": (_of_strings(str.startswith), (2,)),
    "endswith": (_of_strings(str.endswith), (2,)),
    "ends_with": (_of_strings(str.endswith), (2,)),
    "contains": (_of_strings(lambda text, part: part in text), (2,)),
    "index_of": (_of_strings(str.find), (2,)),
    "length": (_of_strings(len), (1,)),
    "lower": (_of_strings(str.lower), (1,)),
    "upper": (_of_strings(str.upper), (1,)),
    "concat": (_of_strings(lambda *parts: "".join(parts)), tuple(range(2, 33))),
    "substring": (_substring, (2, 3)),
    "abs": (_of_numbers(abs), (1,)),
    "ceiling": (_of_numbers(math.ceil), (1,)),
    "floor": (_of_numbers(math.floor), (1,)),
    "exp": (_of_numbers(math.exp), (1,)),
    "power": (_of_numbers(_power), (2,)),
    "sign": (_of_numbers(lambda value: (value > 0) - (value < 0)), (1,)),
    "sqrt": (_of_numbers(math.sqrt), (1,)),
    "square": (_of_numbers(lambda value: _power(value, 2)), (1,)),
}
