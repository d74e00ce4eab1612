"""SECURITY.md shows each promise by tests that are there."""

import ast
import re

from ..conftest import REPOSITORY

TEXT = (REPOSITORY / "SECURITY.md").read_text("utf-8")


def test_every_promise_names_tests_that_exist():
    rows = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and "Shown by" not in line]
    assert len(rows) >= 14
    for promise, shown in rows:
        named = re.findall(r"`(tests/[^`]+)`", shown)
        assert named, promise
        for test in named:
            path, _, function = test.partition("::")
            tree = ast.parse((REPOSITORY / path).read_text("utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
            assert function in defined if function else defined, f"{promise}: there is no {test}"


def test_every_security_test_shows_a_promise():
    for file in sorted((REPOSITORY / "tests" / "security").glob("test_*.py")):
        assert f"tests/security/{file.name}" in TEXT or file.name == "test_promises.py", file.name
