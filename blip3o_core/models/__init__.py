"""Networks: tensors in, tensors out. One architecture a file, its configuration on top."""
