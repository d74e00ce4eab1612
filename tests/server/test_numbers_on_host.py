"""The unit and parity tests with each host's own packages: the floor versions are tested, not only promised."""

import os
import subprocess

from .hosts import REPOSITORY, Host

FOLDERS = ("tests/parity", "tests/unit")
LEFT_OUT = "tests/unit/test_cli*.py"  # run the command, which is slow; its code does not depend on package versions


def test_unit_and_parity_tests_pass_with_the_packages_of_the_host(host: Host):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run([str(host.python), "-m", "pytest", "-q", *FOLDERS, f"--ignore-glob={LEFT_OUT}"], cwd=REPOSITORY,
                            env=environment, text=True, capture_output=True, timeout=590)  # fmt: skip
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
