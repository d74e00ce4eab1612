"""Scenes keep their distances and contrast, and the same seed draws the same pixels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from blip3o_core.errors import InputError
from blip3o_core.shapes.facts import Facts, Wanted, fault, random_scene, realise, tidied, usual_scene
from blip3o_core.shapes.holdout import SHAPE_COLOURS, is_held_out
from blip3o_core.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    backgrounds_for,
    clear_relation,
    contrasts,
    is_in_place,
    is_possible,
    label_map,
    middle_of,
    place_of,
    render,
)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others():
    def drawn(seed):
        rng = np.random.default_rng(seed)
        return b"".join(render(random_scene(rng)).tobytes() for _ in range(5))

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_maps_of_labels_lie_under_their_pictures():
    rng = np.random.default_rng(6)
    for _ in range(20):
        scene = random_scene(rng)
        picture, labels = np.asarray(render(scene), int), np.asarray(label_map(scene))
        inside = labels[:, :, 0] > 0
        assert set(labels[~inside, 1].tolist()) == {9 + list(BACKGROUNDS).index(scene.background)}
        for thing in scene.objects:
            numbers = [1 + SHAPES.index(thing.shape), 1 + list(COLOURS).index(thing.colour), 1 + (thing.size == "large")]
            own = (labels == numbers).all(axis=2)
            x, y = (int(value * 128) for value in thing.centre)
            assert labels[y, x].tolist() == [*numbers[:2], numbers[2] + 2]
            if thing.shape == "ring":
                continue  # its middle is background
            own |= (labels == [*numbers[:2], numbers[2] + 2]).all(axis=2)
            assert own.sum() > 100
            assert (np.abs(picture[own] - COLOURS[thing.colour]).sum(axis=1) < 10).mean() > 0.6  # all but the antialiased edge
        assert (np.abs(picture[~inside] - BACKGROUNDS[scene.background]).sum(axis=1) < 10).mean() > 0.95


def test_every_object_is_in_a_place_that_texts_can_name():
    rng = np.random.default_rng(3)
    things = [thing for _ in range(200) for thing in random_scene(rng).objects]
    assert {place_of(thing) for thing in things} == set(PLACES)
    assert all((value * 16).is_integer() for thing in things for value in thing.centre)


def test_objects_never_overlap_leave_the_picture_or_vanish_in_the_background():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert is_possible(scene)
        lone = [np.asarray(render(Scene((thing,), scene.background), 64)) != BACKGROUNDS[scene.background] for thing in scene.objects]
        covered = sum(mask.any(axis=2).astype(int) for mask in lone)
        assert covered.max() == 1
        assert all(mask.any() for mask in lone)
        assert not covered[0].any() and not covered[-1].any() and not covered[:, 0].any() and not covered[:, -1].any()


@pytest.mark.parametrize("colour, background, visible", [
    ("white", "white", False), ("white", "sky", False), ("black", "black", False), ("purple", "grey", False),
    ("blue", "sky", True), ("green", "grey", True), ("yellow", "white", True), ("blue", "black", True),
])  # fmt: skip
def test_contrast_decides_which_colours_go_on_a_background(colour, background, visible):
    assert contrasts(colour, background) is visible
    assert (background in backgrounds_for([colour])) is visible


def test_every_colour_has_two_backgrounds_and_every_background_six_colours():
    assert all(len(backgrounds_for([colour])) >= 2 for colour in COLOURS)
    assert all(sum(contrasts(colour, background) for colour in COLOURS) >= 6 for background in BACKGROUNDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_and_lies_in_its_middle(shape):
    pixels = np.asarray(render(Scene((Object(shape, "white", "large", (0.5, 0.5)),), "black"), 400))[:, :, 0]
    rows, columns = np.flatnonzero((pixels > 128).any(axis=1)), np.flatnonzero((pixels > 128).any(axis=0))
    width = 400 * 2 * SIZES["large"]
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(0.9 * width if shape == "square" else width, abs=2)
    assert rows[[0, -1]].mean() == pytest.approx(199.5, abs=1.5)
    assert columns[[0, -1]].mean() == pytest.approx(199.5, abs=1.5)


def test_pictures_are_antialiased():
    pixels = np.asarray(render(Scene((Object("circle", "white", "large", (0.5, 0.5)),), "black")))[:, :, 0]
    assert ((pixels > 40) & (pixels < 230)).sum() > 50


def test_edges_between_colours_lie_in_the_middle_of_the_place_that_they_are_given():
    scene = Scene((Object("square", "white", "large", (0.5, 0.25)),), "black")
    pixels = np.asarray(render(scene), np.float64)[:, :, 0] - 25
    middles = np.arange(128) + 0.5
    assert pixels.sum(axis=0) @ middles / pixels.sum() == pytest.approx(64, abs=0.15)
    assert pixels.sum(axis=1) @ middles / pixels.sum() == pytest.approx(32, abs=0.15)


@pytest.mark.parametrize("place", PLACES)
def test_an_object_asked_for_a_place_is_there_and_in_no_other(place):
    rng = np.random.default_rng(1)
    for _ in range(20):
        thing = realise(Facts((Wanted("star", place=place),)), rng).objects[0]
        assert place_of(thing) == place
        assert [name for name in PLACES if is_in_place(thing, name)] == [place]


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_asked_for_a_relation_are_clearly_in_it(relation):
    rng = np.random.default_rng(1)
    facts = Facts((Wanted("circle", "red"), Wanted("square", "blue")), ((0, relation, 1),))
    for _ in range(20):
        scene = realise(facts, rng)
        assert clear_relation(*scene.objects) == relation
        assert fault(facts, scene) == ""
        (x, y), (other_x, other_y) = (thing.centre for thing in scene.objects)
        assert {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[relation]


def test_four_large_objects_find_their_place():
    scene = realise(Facts((Wanted("ring", size="large"),) * 4), np.random.default_rng(0))
    assert is_possible(scene) and len(scene.objects) == 4


def test_facts_that_no_picture_can_show_are_refused():
    with pytest.raises(InputError, match="no picture can show that"):
        realise(Facts((Wanted("circle", "white"),), background="white"), np.random.default_rng(0))


def test_number_background_shapes_and_colours_all_stay_frequent_without_the_held_out_combinations():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, refuse=is_held_out) for _ in range(240)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert min(Counter(len(scene.objects) for scene in scenes).values()) > 40
    assert min(Counter(scene.background for scene in scenes).values()) > 40
    shapes, colours = Counter(thing.shape for thing in things), Counter(thing.colour for thing in things)
    assert len(shapes) == 6 and min(shapes.values()) > 0.1 * len(things)
    assert len(colours) == 8 and min(colours.values()) > 0.03 * len(things)  # white goes on two backgrounds only
    assert {(thing.shape, thing.colour) for thing in things} == {(s, c) for s in SHAPES for c in COLOURS} - SHAPE_COLOURS


def test_a_tidied_scene_has_the_same_things_in_the_same_places_in_the_middle_where_there_is_room():
    rng = np.random.default_rng(8)
    centred, moved = 0, 0
    for _ in range(300):
        scene = random_scene(rng)
        tidy = tidied(scene)
        assert is_possible(tidy)
        for thing, new in zip(scene.objects, tidy.objects, strict=True):
            assert replace(new, centre=thing.centre) == thing
            assert place_of(new) == place_of(thing)
            if len(scene.objects) == 1:
                assert new.centre == middle_of(place_of(thing))
            centred, moved = centred + (new.centre == middle_of(place_of(thing))), moved + (new.centre != thing.centre)
    assert centred > 400 and moved > 400


def test_a_tidied_scene_follows_from_sizes_and_places_alone():
    things = [("star", "red", "small", "left"), ("ring", "blue", "small", "centre"), ("cross", "green", "small", "top right")]
    rng, found = np.random.default_rng(9), set()
    for _ in range(12):
        scene = realise(Facts(tuple(Wanted(*thing) for thing in things), background="white"), rng)
        found.add(tuple(thing.centre for thing in tidied(scene).objects))
    assert len(found) == 1


@pytest.mark.parametrize("facts, places", [
    (Facts((Wanted("star"),)), ("centre",)),
    (Facts((Wanted("star", "red"), Wanted("ring"))), ("left", "right")),
    (Facts((Wanted("star"), Wanted("ring")), ((0, "right of", 1),)), ("right", "left")),
    (Facts((Wanted("star"), Wanted("ring")), ((1, "above", 0),)), ("bottom", "top")),
    (Facts((Wanted("star"),) * 3, background="grey"), ("top left", "top right", "bottom")),
    (Facts((Wanted("ring", size="small"),) * 4), ("top left", "top right", "bottom left", "bottom right")),
])  # fmt: skip
def test_usual_arrangements(facts, places):
    rng = np.random.default_rng(10)
    for _ in range(10):
        scene = usual_scene(facts, rng)
        assert is_possible(scene) and fault(facts, scene) == ""
        assert tuple(place_of(thing) for thing in scene.objects) == places
        alike = {asked: thing.colour for asked, thing in zip(facts.objects, scene.objects, strict=True)}
        assert all(thing.colour == alike[asked] for asked, thing in zip(facts.objects, scene.objects, strict=True))


def test_an_unwanted_arrangement_gives_way_to_the_next():
    rng = np.random.default_rng(11)
    facts = Facts((Wanted("circle"), Wanted("triangle")))  # a circle left of a triangle is held out
    assert {tuple(map(place_of, usual_scene(facts, rng, is_held_out).objects)) for _ in range(20)} == {("top", "bottom")}
    assert usual_scene(facts, rng, lambda scene: True) is None
    assert usual_scene(Facts((Wanted("circle", place="left"),)), rng) is None
