"""Nano: the whole architecture at toy size. Its sizes and untrained checkpoint, the stages of its training, and the trained weights."""
