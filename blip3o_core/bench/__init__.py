"""How fast each stage is, against a plain baseline in the same run."""
