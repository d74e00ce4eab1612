"""`blip3o doctor` on folders as people have them, and `blip3o completion` in a real shell."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..conftest import REPOSITORY


@pytest.fixture
def models(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "models" / "owner" / "tiny")
    shutil.copytree(Path(__file__).parents[1] / "data" / "sana" / "checkpoint", tmp_path / "models" / "sana")
    other = tmp_path / "models" / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "models"


def test_found_models_and_how_they_would_run(blip3o, models):
    result = blip3o("doctor", "--models", models, "--json", cwd=models.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    found = {Path(model["path"]).name: model for model in report["models"] if not model["packaged"]}
    assert {name: model["kind"] for name, model in found.items()} == {
        "tiny": "BLIP3-o model", "sana": "SigLIP2 + SANA decoder", "other": "another kind of model"}  # fmt: skip
    verdicts = found["tiny"]["tasks"]
    assert verdicts["text to image"].endswith("at once: runs") and verdicts["understanding"].endswith("at once: runs")
    assert verdicts["reconstruction"] == "lacks the weights of: encoder", "the tiny checkpoint has none"
    assert report["packages"]["torch"]["version"] and report["problems"] == []
    text = blip3o("doctor", "--models", models, cwd=models.parent)
    assert "No problems." in text.stdout and "owner/tiny" in text.stdout and "text to image" in text.stdout


def test_broken_models_old_packages_and_missing_folders_are_problems(blip3o, models, tmp_path):
    weights = models / "owner" / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    old = tmp_path / "packages" / "Pillow-9.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: Pillow\nVersion: 9.0\n")
    result = blip3o("doctor", "--models", models, "--models", tmp_path / "nowhere", cwd=tmp_path,
                    PYTHONPATH=os.pathsep.join((str(REPOSITORY), str(old.parent))))  # fmt: skip
    problems = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM: ")]
    assert result.returncode == 1 and len(problems) == 3, result.stdout
    assert any("Pillow 9.0 is installed" in problem and 'pip install "Pillow>=10.3"' in problem for problem in problems)
    assert any("nowhere: no such folder" in problem for problem in problems)
    assert any("model.safetensors" in problem for problem in problems)


def test_packages_that_break_the_import_of_others_are_still_named(blip3o, tmp_path):
    old = tmp_path / "packages" / "tqdm-1.0.dist-info"  # transformers looks for it when it is imported
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 1.0\n")
    result = blip3o("doctor", cwd=tmp_path, PYTHONPATH=os.pathsep.join((str(REPOSITORY), str(old.parent))))
    assert result.returncode == 1 and "tqdm 1.0 is installed" in result.stdout and "Mend the packages first" in result.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_choices(blip3o, tmp_path):
    pytest.importorskip("shtab", reason="needs the extra completion")
    script = tmp_path / "blip3o.bash"
    script.write_text(blip3o("completion", "bash", check=True).stdout)

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_blip3o; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        found = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return set(found.stdout.split())

    assert {"generate", "edit", "ask", "download", "doctor"} <= completed("blip3o", "")
    assert completed("blip3o", "gen") == {"generate"}
    assert "--guidance-scale" in completed("blip3o", "generate", "--guid")
    assert completed("blip3o", "download", "siglip2-s") == {"siglip2-sana"}
