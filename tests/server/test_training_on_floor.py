"""The trainer with the lowest versions that the extra "train" promises."""

import os
import subprocess

import pytest

from .hosts import REPOSITORY, prepare_training_environment

FILES = ("tests/parity/test_training.py", "tests/train/test_objectives.py", "tests/train/test_webdataset.py",
         "tests/train/test_learning.py", "tests/train/test_export.py", "tests/unit/test_lora_convert.py")  # fmt: skip


@pytest.mark.timeout(900, func_only=True)
def test_training_with_the_lowest_versions():
    python = prepare_training_environment()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run([str(python), "-m", "pytest", "-q", *FILES], cwd=REPOSITORY, env=environment, text=True, capture_output=True,
                            timeout=890)  # fmt: skip
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
