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
    except RecursionError as error:
        raise ConfigError(f"{file}: not valid TOML (hundreds of brackets inside each other). Close them, or take them out.") from error
    except toml.TOMLDecodeError as error:
        hint = " Write Windows paths in 'single quotes', or with /." if "\\" in str(error) or "escape" in str(error).lower() else ""
        raise ConfigError(f"{file}: not valid TOML ({error}). Text needs quotes, lists need [ ], true and false are lower-case; a section "
                          f"or key stands there only once.{hint}") from error


@dataclasses.dataclass(frozen=True)
class Word:
    """A value of the command line: what it is as TOML, and as it was typed, which a key for text takes (a folder called 2024)."""

    typed: str
    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` words set single keys; `data.0.path=...` the first [[data]]. Values are TOML; bare words are text."""
    values = json.loads(json.dumps(values, default=str))  # a deep copy; TOML dates, which no key takes, become text
    for word in overrides:
        name, equals, text = word.partition("=")
        path = name.strip().split(".")
        if "\udc80" <= max(word, default="") <= "\udfff":
            raise ConfigError(f"{word!r}: is not UTF-8. Rename the file or folder.")
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
    if not isinstance(place, list):
        raise ConfigError(f"{name}: {part!r} leads nowhere: what stands before it is a value, not a section.")
    before = name[: name.rindex(part)].rstrip(".")
    raise ConfigError(f"{name}: {part!r} leads nowhere. {before} is a list of {len(place)}, counted from 0; {before}.{len(place)} adds a "
                      f"new one. Write {before}.0.{following or part}=...")


def _parse_value(text: str) -> Word:
    toml = _toml_module()
    try:
        values = toml.loads(f"value = {text}")
    except (toml.TOMLDecodeError, ValueError, RecursionError):  # a number of thousands of digits, hundreds of brackets
        return Word(text, text)
    return Word(text, values["value"] if len(values) == 1 else text)


def build(cls: type, values: Any, path: str = "", root: type | None = None) -> Any:
    """An instance of the dataclass from plain tables. Raises ConfigError that names the key and the value.

    root: the dataclass of the whole file, where a key that stands in the wrong section is looked up.
    """
    root = root or cls
    values = values.value if isinstance(values, Word) else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {values!r} is not a section. Write [{path}] and its keys below, or [[{path}]] for one of several.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"{_join(path, key)}: unknown key. {_known(key, fields, path, root)}")
    return cls(**{key: _convert(value, hints[key], fields[key].metadata, _join(path, key), root) for key, value in values.items()})


def _known(key: str, fields: typing.Mapping[str, Any], path: str, root: type) -> str:
    """The same key in another section, else the nearest one here, else the nearest anywhere, else all that are here."""
    everywhere = [(section, name) for section, name in known_keys(root) if section != path]
    if found := [_join(section, name) for section, name in everywhere if name == key]:
        return f"Did you mean {' or '.join(found)}?"
    if near := difflib.get_close_matches(key, fields, n=1, cutoff=0.5):
        return f"Did you mean {_join(path, near[0])}?"
    if near := difflib.get_close_matches(key, [name for _, name in everywhere], n=1, cutoff=0.75):
        return f"Did you mean {next(_join(*pair) for pair in everywhere if pair[1] == near[0])}?"
    return f"Known keys here: {', '.join(fields)}."


def known_keys(root: type) -> list[tuple[str, str]]:
    """(section, key) of everything that a file may hold; the sections of a list are called `data.0`."""
    keys = []
    for field in dataclasses.fields(root):
        hint = typing.get_type_hints(root)[field.name]
        many = typing.get_origin(hint) is tuple
        section = typing.get_args(hint)[0] if many else hint
        keys += [(f"{field.name}.0" if many else field.name, own.name) for own in dataclasses.fields(section)]
    return keys


def _convert(value: Any, hint: Any, metadata: typing.Mapping[str, Any], path: str, root: type) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path, root)
    if isinstance(value, Word):
        value = value.typed if hint is str and not isinstance(value.value, str) else value.value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            if dataclasses.is_dataclass(args[0]):
                raise ConfigError(f"{path}: there may be several of these. Write [[{path}]] in the file, {path}.0.{_first(args[0])}=... on "
                                  "the command line.")
            example = _toml_value(value) if type(value) is args[0] else _example(args[0])
            raise ConfigError(f"{path}: {value!r} is not a list. Write [{example}].")
        return tuple(_convert(item, args[0], metadata, f"{path}.{index}", root) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {value!r} is not a table. Write {{name = value}}.")
        for key in value:
            if metadata.get("keys") and key not in metadata["keys"]:
                raise ConfigError(f"{path}.{key}: unknown key.{_nearest(key, metadata['keys'])} Known: {', '.join(metadata['keys'])}.")
        return {key: _convert(item, args[1], metadata, f"{path}.{key}", root) for key, item in value.items()}
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
        raise ConfigError(f"{path}: {value!r} is out of range. It must be {bounds(metadata) or 'a finite number'}.")
    return value


def bounds(metadata: typing.Mapping[str, Any]) -> str:
    """What a number may be, in words; empty if anything."""
    low, high = metadata["minimum"], metadata["maximum"]
    if low is not None and high is not None:
        return f"{low:g} to {high:.10g}"
    return f"at least {low:.10g}" if low is not None else f"at most {high:.10g}" if high is not None else ""


def _first(cls: type) -> str:
    return dataclasses.fields(cls)[0].name


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
    """A dataclass of sections as TOML, each key behind its documentation. Of an empty list of sections one is shown as comments."""
    lines: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            for item in value:
                lines += ["", *_section(item, field.name, array=True)]
            if not value:
                item = typing.get_args(typing.get_type_hints(type(config))[field.name])[0]()
                lines += ["", *(line if line.startswith("# ") else f"#{line}" for line in _section(item, field.name, array=True))]
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
    words, lines = f"{metadata['help']}{_allowed(metadata)}".split(), ["#"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("#")
        lines[-1] += f" {word}"
    return lines


def _allowed(metadata: typing.Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return f". One of: {', '.join(metadata['choices'])}"
    if metadata["keys"]:
        return f". Keys: {', '.join(metadata['keys'])}"
    return f". {bounds(metadata).capitalize()}" if bounds(metadata) else ""


def option_tables(root: type) -> str:
    """All options as Markdown, one table per section: what docs/training.md holds."""
    lines: list[str] = []
    for field in dataclasses.fields(root):
        hint = typing.get_type_hints(root)[field.name]
        many = typing.get_origin(hint) is tuple
        section = typing.get_args(hint)[0] if many else hint
        about = section.__doc__.partition(":")[2].strip()
        title = f"[[{field.name}]]" if many else f"[{field.name}]"
        lines += [f"### `{title}`", "", f"{about[:1].upper()}{about[1:]}", "", "| key | default | meaning |", "|---|---|---|"]
        for own in dataclasses.fields(section):
            default = own.default if own.default is not dataclasses.MISSING else own.default_factory()
            text = f"{own.metadata['help']}{_allowed(own.metadata)}".replace("|", "\\|")
            lines.append(f"| `{own.name}` | `{_toml_value(default)}` | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped, too
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
