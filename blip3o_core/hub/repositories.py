"""What can be downloaded by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Repository:
    """A published repository; `kind` says how its files are chosen (see `selection`)."""

    repo_id: str
    kind: str

    @property
    def folder_name(self) -> str:
        """Of the folder that its files go to."""
        return self.repo_id.rpartition("/")[2]


REPOSITORIES = {
    "4b": Repository("BLIP3o/BLIP3o-Model-4B", "blip3o"),
    "8b": Repository("BLIP3o/BLIP3o-Model-8B", "blip3o"),
    "eva-clip": Repository("jiuhai/eva_clip_vision_tower", "eva_clip"),
    "siglip2-sana": Repository("BLIP3o/SigLIP2_SANA", "sana"),
}
TASKS = {
    "generate": "text to image", "edit": "image-conditioned generation", "ask": "understanding", "reconstruct": "reconstruction",
}  # fmt: skip
"""What a user says -> task of `variants.blip3o.TASKS`. Only "blip3o" repositories have parts that a task can do without."""
