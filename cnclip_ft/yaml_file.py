"""Reading a recipe's YAML: plain data, each key once, of a size that people write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import RequestError

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000  # aliases counted as often as they stand for something


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates (2024-01-05 is a text), with 1e-4 as a number, and no key twice."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """The content of a file.

    Raises:
        RequestError: with line and column where there is one.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RequestError(
                f"{path}: {path.stat().st_size:,} bytes; a recipe has at most {MOST_BYTES:,}. Is this the right file?"
            )
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: not readable ({error.strerror or error})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        how = "it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"line {line} is not UTF-8"
        raise RequestError(f"{path}: not readable as YAML: {how}. Save the recipe as UTF-8.") from None
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise RequestError(f"{path}: not readable as YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: it is no YAML, a key stands twice, or it is too large or too deep.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, OverflowError):
        raise ValueError("it is nested too deeply") from None


def _check(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values under `node`, aliases written out."""
    found = counts.get(id(node))
    if found is not None:
        if not found:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias that holds itself")
        return found
    counts[id(node)], total = 0, 1
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key must be a word")
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"line {line}: the key '{key.value}' stands twice (first in line {lines[key.value]})")
            lines[key.value] = line
            total += _check(value, counts)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_check(value, counts) for value in node.value)
    if total > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values (aliases written out)")
    counts[id(node)] = total
    return total
