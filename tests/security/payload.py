"""Pickles that do something when they are read."""

import os
import pickle
from pathlib import Path

import torch

PICKLES = ("torch zip", "torch legacy", "bare pickle")


class Payload:
    """What an attacker writes: unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def write_pickle(file: Path, kind: str, marker: Path) -> Path:
    content = {"weight": torch.ones(2), "extra": Payload(marker)}
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps({"extra": Payload(marker)}))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "torch zip")
    return file
