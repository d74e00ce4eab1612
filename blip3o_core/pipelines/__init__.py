"""Plain values in, pictures out: the stages of the model put together."""
