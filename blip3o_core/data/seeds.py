"""Random generators of the data, each from the run's seed and the place it is for: nothing to save, nothing shared."""

import numpy as np

ORDER, INDEX, REPLACEMENT, SHARDS, BUFFER = range(5)  # what a generator is for


def generator(purpose: int, *place: int) -> np.random.Generator:
    """The number of words is part of the seed, because SeedSequence can't tell [1] from [1, 0]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, len(place), *place])))
