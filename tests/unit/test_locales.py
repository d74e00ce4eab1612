"""Every node is translated, wholly, into each language of `locales/`."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ..nodes.schemas import LOCALES, NodeSchema, english, english_categories, read_schemas

LANGUAGES = ("de", "es", "fr", "ja", "zh")
SCHEMAS = {schema.node_id: schema for schema in read_schemas()}
KEPT = re.compile(
    r"models/\w+|[\w*]+\.(?:json|safetensors|yaml)|\d+ x \d+|BLIP3-o|Qwen2\.5-VL|SigLIP2_SANA|\b(?:sincos|mrope|arange|cosine|linear)\b"
)
"""Names, files and values, which a translation leaves as they are."""


def read(language: str, file: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{file}.json").read_text("utf-8"))


def texts(entry: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every text in the tree."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from texts(value, f"{path}/{key}")
    else:
        assert isinstance(entry, str), path
        yield path, entry


def test_these_languages_are_there() -> None:
    assert {folder.name for folder in LOCALES.iterdir()} == {"en", *LANGUAGES}


def test_english_is_what_the_code_says() -> None:
    """Otherwise: python -m tests.nodes.schemas"""
    assert read("en", "nodeDefs") == {node_id: english(schema) for node_id, schema in SCHEMAS.items()}
    assert read("en", "main") == {"nodeCategories": english_categories()}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["nodeDefs", "main"])
def test_a_translation_has_every_text_and_no_other(language: str, file: str) -> None:
    translated, original = dict(texts(read(language, file))), dict(texts(read("en", file)))
    assert list(translated) == list(original)
    assert [path for path, text in translated.items() if not text.strip()] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_files_and_values_are_left_as_they_are(language: str) -> None:
    translated = dict(texts(read(language, "nodeDefs")))
    for path, text in texts(read("en", "nodeDefs")):
        if path.endswith(("tooltip", "description")):
            assert set(KEPT.findall(text)) <= set(KEPT.findall(translated[path].replace("\u00a0", " "))), (path, translated[path])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_labels_of_a_node_differ_and_tooltips_are_not_english(language: str, schema: NodeSchema) -> None:
    definition, original = read(language, "nodeDefs")[schema.node_id], english(schema)
    for kind in ("inputs", "outputs"):
        labels = [entry["name"] for entry in definition[kind].values()]
        assert len(set(labels)) == len(labels), labels
        for name, entry in definition[kind].items():
            assert entry.get("tooltip") != original[kind][name].get("tooltip") or "tooltip" not in entry, name
    assert definition["description"] != original["description"]
