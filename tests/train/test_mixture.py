"""The order of samples: exact shares, every sample as often as it should be, a function of the position alone."""

import pickle
from collections import Counter

import pytest

from blip3o_core.data.mixture import Mixture
from blip3o_core.errors import DataError


def draws(mixture: Mixture, start: int, stop: int) -> list[tuple[int, int]]:
    found = [mixture.locate(position) for position in range(start, stop)]
    return [(draw.dataset, mixture.index_of(draw.dataset, draw.number)) for draw in found]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_without_weights_shows_every_sample_as_often_as_repeats_says(epoch):
    mixture = Mixture([7, 3, 5], [0, 0, 0], [1, 4, 2], seed=3)
    assert mixture.epoch_length == 7 + 12 + 10
    counted = Counter(draws(mixture, epoch * 29, (epoch + 1) * 29))
    expected = {(0, i): 1 for i in range(7)} | {(1, i): 4 for i in range(3)} | {(2, i): 2 for i in range(5)}
    assert counted == expected


def test_weights_are_exact_to_rounding_in_every_epoch():
    mixture = Mixture([100, 10, 1], [1, 2, 4], [1, 1, 1], seed=0)
    assert mixture.epoch_length == 111
    for epoch in range(3):
        counted = Counter(dataset for dataset, _ in draws(mixture, epoch * 111, (epoch + 1) * 111))
        assert all(abs(counted[dataset] - 111 * weight / 7) < 1 for dataset, weight in enumerate((1, 2, 4)))
        assert sum(counted.values()) == 111


def test_with_weights_a_dataset_still_goes_through_all_its_samples_before_one_comes_again():
    mixture = Mixture([100, 10], [1, 1], [1, 1], seed=0)
    small = [index for dataset, index in draws(mixture, 0, 110) if dataset == 1]
    assert len(small) == 55
    assert all(sorted(small[first : first + 10]) == list(range(10)) for first in range(0, 50, 10))


@pytest.mark.parametrize("weights", [[0, 0], [2, 1]])
def test_draws_of_a_dataset_are_numbered_without_gaps_over_all_epochs(weights):
    mixture = Mixture([7, 3], weights, [1, 2], seed=2)
    found = [mixture.locate(position) for position in range(5 * mixture.epoch_length)]
    for dataset in range(2):
        numbers = [draw.number for draw in found if draw.dataset == dataset]
        assert numbers == list(range(5 * mixture.counts[dataset]))


def test_a_small_weight_makes_the_epoch_long_enough_to_be_drawn():
    mixture = Mixture([5, 5], [1000, 1], [1, 1], seed=0)
    assert mixture.counts == (1000, 1)


def test_a_position_gives_the_same_draw_whatever_was_asked_before():
    forward = draws(Mixture([7, 3], [0, 0], [1, 2], seed=1), 0, 60)
    mixture = Mixture([7, 3], [0, 0], [1, 2], seed=1)
    assert [draws(mixture, position, position + 1)[0] for position in reversed(range(60))] == forward[::-1]
    assert draws(pickle.loads(pickle.dumps(mixture)), 20, 60) == forward[20:]


def test_seeds_epochs_and_datasets_have_different_orders():
    one, other = (draws(Mixture([50, 50], [0, 0], [1, 1], seed=seed), 0, 200) for seed in (0, 1))
    assert one != other
    assert one[:100] != one[100:]
    assert [index for dataset, index in one[:100] if dataset == 0] != [index for dataset, index in one[:100] if dataset == 1]


def test_a_pickled_mixture_is_small():
    mixture = Mixture([100_000, 1], [0, 0], [1, 1], seed=0)
    draws(mixture, 0, 2)
    assert len(pickle.dumps(mixture)) < 1000


@pytest.mark.parametrize("weights, message", [
    ([1, 0], r"data.1.weight is 0, but other datasets have a weight. Give one to all"),
    ([1, 1e-9], "data.1.weight is 1e-09, a share below one in a million"),
])  # fmt: skip
def test_weights_that_can_not_be_kept_are_refused(weights, message):
    with pytest.raises(DataError, match=message):
        Mixture([5, 5], weights, [1, 1], seed=0)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="data.1 holds no samples"):
        Mixture([5, 0], [0, 0], [1, 1], seed=0)
