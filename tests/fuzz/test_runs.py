"""What a training run leaves and reads again: its log, which becomes a page, and its checkpoints."""

import json

import torch
from hypothesis import strategies as st
from PIL import Image

from blip3o_core.train.state import RunState, save_checkpoint

from .damage import byte_changes, changed, damaged, header_changes, json_changes, odd_values, remake, with_header

MARKUP = ("<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</pre><iframe srcdoc='x'>", "javascript:alert(1)",
          "//host/x.png", "<!--", "]]>",
          "' onload='alert(1)", "&lt;b&gt;", "http://host/x.png", "</title><svg/onload=alert(1)>", "</style>")  # fmt: skip
LOG = [
    {"kind": "run", "step": 0, "time": "2025-01-01 00:00:00", "total_steps": 20, "config": {
        "model": {"path": "model"}, "train": {"method": "lora"}, "lora": {"parts": ["dit"], "rank": 4},
        "data": [{"path": "cats", "task": "edit"}],
        "samples": {"prompts": ["a cat"]}, "output": {"name": "cat"}}},
    {"kind": "train", "step": 10, "loss": 0.5, "losses": {"edit": 0.5}, "learning_rate": 1e-4, "grad_norm": 1.0, "samples_per_second": 2.0,
     "memory_bytes": 1, "seconds": 3.0},
    {"kind": "train", "step": 20, "loss": 0.4, "losses": {"edit": 0.4}, "learning_rate": 1e-4, "grad_norm": 1.0, "samples_per_second": 2.0,
     "memory_bytes": 1, "seconds": 6.0},
    {"kind": "validation", "step": 0, "losses": {"edit": 0.9}}, {"kind": "validation", "step": 20, "losses": {"edit": 0.6}},
    {"kind": "pictures", "step": 20, "file": "a.png"}, {"kind": "event", "step": 20, "time": "now", "text": "done"},
]  # fmt: skip


def test_logs_of_runs(fuzz, worker, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    def check(changes, raw):
        text = "\n".join(json.dumps(line) for line in changed(LOG, changes)).encode()
        (tmp_path / "log.jsonl").write_bytes(text if raw is None else damaged(text, raw))
        return worker(fuzz, "report", folder=str(tmp_path))

    fuzz(check, ci=30, nightly=300, changes=json_changes(st.one_of(odd_values(), st.sampled_from(MARKUP), st.sampled_from(MARKUP))),
         raw=st.one_of(st.none(), st.none(), st.none(), byte_changes()))  # fmt: skip


def test_checkpoints_of_runs(fuzz, worker, tmp_path):
    weight = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = RunState(step=3, position=12, base="0123", topology={"processes": 1})
    source = save_checkpoint(tmp_path / "run", state, {"weight": weight}, optimizer.state_dict(), None, keep=1)
    whole = {file.name: file.read_bytes() for file in source.iterdir()}
    assert set(whole) == {"state.json", "optimizer.pt", "trained.safetensors"}

    def check(file, changes, header, raw):
        if file == "state.json" and raw is None:
            content = json.dumps(changed(json.loads(whole[file]), changes)).encode()
        elif file == "trained.safetensors" and raw is None:
            content = with_header(whole[file], header)
        else:
            content = damaged(whole[file], raw or [])
        return worker(fuzz, "resumed", folder=str(remake(tmp_path / "step_00000003", source, {file: content})), base="0123")

    fuzz(check, ci=30, nightly=300, file=st.sampled_from(sorted(whole)), changes=json_changes(), header=header_changes(),
         raw=st.one_of(st.none(), byte_changes()))  # fmt: skip
