"""Frozen dataclasses <-> TOML: typed, documented, with the nearest valid name for a misspelt key."""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

WIDTH = 118  # of a line of documentation


def option(
    default: Any, help: str, *, choices: Sequence[str] | None = None, minimum: float | None = None, maximum: float | None = None,
    keys: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with its documentation.

    Args:
        choices: allowed values, or allowed items of a list. keys: allowed keys of a table.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "keys": keys}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_toml(file: Path) -> dict[str, Any]:
    """Raises ConfigError if the file is missing or no TOML."""
    toml = _toml_module()
    try:
        return toml.loads(file.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file. Give a TOML file; --print-config shows one with all keys.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read as UTF-8 text ({error}).") from error
    except toml.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML ({error}). Text needs quotes, lists need [ ], true and false are lower-case.") from error


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` words set single keys; `data.0.path=...` the first [[data]]. Values are TOML; bare words are text."""
    values = json.loads(json.dumps(values, default=str))  # a deep copy; TOML dates, which no key takes, become text
    for word in overrides:
        name, equals, text = word.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"{word!r} is no override. Write section.key=value, for instance train.steps=2000.")
        place: Any = values
        for depth, part in enumerate(path[:-1]):
            place = _descend(place, part, name, following=path[depth + 1])
        if isinstance(place, list):
            place = _descend(place, path[-1], name, following="")
        if not isinstance(place, dict):
            raise ConfigError(f"{word!r}: {'.'.join(path[:-1])} is no section.")
        place[path[-1]] = _parse_value(text.strip())
    return values


def _descend(place: Any, part: str, name: str, following: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(part, [] if following.isdigit() else {})
    if isinstance(place, list) and part.isdigit() and int(part) <= len(place):
        if int(part) == len(place):
            place.append({})
        return place[int(part)]
    length = f"a list of {len(place)}" if isinstance(place, list) else "not a section"
    raise ConfigError(f"{name}: {part!r} leads nowhere, it stands in {length}. Items count from 0, a new one is added at the end.")


def _parse_value(text: str) -> Any:
    toml = _toml_module()
    try:
        return toml.loads(f"value = {text}")["value"]
    except (toml.TOMLDecodeError, KeyError):
        return text


def build(cls: type, values: Any, path: str = "") -> Any:
    """An instance of the dataclass from plain tables. Raises ConfigError that names the key and the value."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {values!r} is not a section. Write [{path}] and its keys below, or [[{path}]] for one of several.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"Did you mean {_join(path, near[0])}?" if near else f"Known keys here: {', '.join(fields)}."
            raise ConfigError(f"{_join(path, key)}: unknown key. {known}")
    return cls(**{key: _convert(value, hints[key], fields[key].metadata, _join(path, key)) for key, value in values.items()})


def _convert(value: Any, hint: Any, metadata: typing.Mapping[str, Any], path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: {value!r} is not a list. Write [{_example(args[0])}].")
        return tuple(_convert(item, args[0], metadata, f"{path}.{index}") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {value!r} is not a table. Write {{name = value}}.")
        for key in value:
            if metadata.get("keys") and key not in metadata["keys"]:
                raise ConfigError(f"{path}.{key}: unknown key.{_nearest(key, metadata['keys'])} Known: {', '.join(metadata['keys'])}.")
        return {key: _convert(item, args[1], metadata, f"{path}.{key}") for key, item in value.items()}
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{path}: options have one type each")
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: {value!r} is {_kind(type(value))}, expected {_kind(hint)}, for instance {_example(hint)}.")
    choices, low, high = metadata.get("choices"), metadata.get("minimum"), metadata.get("maximum")
    if choices is not None and value not in choices:
        raise ConfigError(f"{path}: {value!r} is unknown.{_nearest(value, choices)} Use one of {', '.join(choices)}.")
    if hint in (int, float) and not ((low is None or value >= low) and (high is None or value <= high) and math.isfinite(value)):
        bounds = f"{'' if low is None else low}..{'' if high is None else high}"
        raise ConfigError(f"{path}: {value!r} is out of range ({bounds}).")
    return value


def _nearest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _kind(cls: type) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a section"}.get(
        cls, cls.__name__
    )


def _example(cls: Any) -> str:
    return {str: '"text"', int: "1", float: "0.5", bool: "true"}.get(cls, "...")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def to_toml(config: Any) -> str:
    """A dataclass of sections as TOML, each key behind its documentation."""
    lines: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            for item in value or ():
                lines += ["", *_section(item, field.name, array=True)]
        else:
            lines += ["", *_section(value, field.name, array=False)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _section(section: Any, path: str, *, array: bool) -> list[str]:
    title = type(section).__doc__.split(":", 1)[-1].strip() if ":" in type(section).__doc__ else ""
    lines = [*([f"# {title}"] if title else []), f"[[{path}]]" if array else f"[{path}]"]
    nested: list[str] = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for item in value:
                nested += ["", *_section(item, f"{path}.{field.name}", array=True)]
            continue
        lines += [*_comment(field.metadata), f"{field.name} = {_toml_value(value)}"]
    return lines + nested


def _comment(metadata: typing.Mapping[str, Any]) -> list[str]:
    text = metadata["help"]
    low, high = metadata["minimum"], metadata["maximum"]
    if metadata["choices"]:
        text += f". One of: {', '.join(metadata['choices'])}"
    elif low is not None or high is not None:
        text += f". Range {'' if low is None else low}..{'' if high is None else high}"
    words, lines = text.split(), ["#"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("#")
        lines[-1] += f" {word}"
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _toml_module():
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    from ..runtime import require_package

    return require_package("tomli", extra="train", purpose="reading TOML on Python 3.10")
