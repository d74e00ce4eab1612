"""LoRA files: reading, writing, merging, converting. Training them is in train/."""
