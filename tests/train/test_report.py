"""report.html of a run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from blip3o_core.errors import InputError
from blip3o_core.sheets import contact_sheet
from blip3o_core.train.config import as_dict, load_config
from blip3o_core.train.log import RunLog
from blip3o_core.train.pictures import save_sheet
from blip3o_core.train.report import MOST_POINTS, Curve, chart, main, write_report

ATTACK = "<script>alert('1')</script>"


class Page(HTMLParser):
    """Tags with their attributes; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def lengths(page: Page) -> list[int]:
    """Numbers of points of all curves."""
    return [len(line["points"].split()) for line in page.all("polyline")]


@pytest.fixture
def page():
    return lambda folder: Page(write_report(folder).read_text("utf-8"))


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run of 60 updates: 30 lines, 4 validations of two tasks, 2 sheets, one event; killed and resumed once."""
    words = [f"model.path=/models/{ATTACK}", "data.0.path=cats & dogs/", "output.name=my_cat", "train.steps=80"]
    config = as_dict(load_config(None, [*words, "samples.prompts=" + json.dumps([ATTACK, "一只狐狸"], ensure_ascii=False)]))
    for start, end in ((0, 40), (20, 60)):
        with RunLog(tmp_path, total_steps=80, start_step=start, config=config, log_every=2, resumed=start > 0) as run:
            for step in range(start + 1, end + 1):
                losses = {"edit": 2 / step, "text_to_image": 1 / step}
                run.train(step, loss=1.5 / step, losses=losses, learning_rate=1e-4, grad_norm=1.0, samples=4, memory_bytes=3 * 2**30)
                if step % 20 == 0 or step == 1:
                    run.validation(step, {"edit": 0.8 - step / 100, "text_to_image": 0.5 + step / 400})
                if step % 30 == 0:
                    sheet = contact_sheet([Image.new("RGB", (64, 64))], [ATTACK], columns=None, title=ATTACK)
                    run.pictures(step, sheet, save_sheet(tmp_path, step, sheet))
            run.event(end, f"skipped {ATTACK}.jpg")
    return tmp_path


def test_curves_have_a_point_for_every_line_of_the_log(trained, page):
    # validation of 2 tasks: steps 1, 20, 40, 60; loss raw and smoothed; loss of 2 tasks; learning rate, throughput, gradient norm
    assert lengths(page(trained)) == [4, 4, 30, 30, 30, 30, 30, 30, 30]


def test_the_header_tells_model_method_steps_time_and_the_change_of_validation(trained, page):
    text = page(trained).text
    assert "Training of my_cat" in text
    assert "LoRA, rank 16, on dit" in text
    assert "60 of 80" in text
    assert "cats & dogs/ (text_to_image)" in text
    assert "3.0 GiB" in text
    assert re.search(r"0:00:\d\d", text)
    assert "edit0.79 (step 1)0.2 (step 60)0.2 (step 60)-74.7 %" in text
    assert "text_to_image0.5025 (step 1)0.65 (step 60)0.5025 (step 1)+29.4 %" in text


def test_what_users_wrote_is_text_and_never_markup(trained, page):
    report = page(trained)
    assert not report.all("script")
    assert report.text.count(ATTACK) == 5, "model, prompt, event and twice the configuration"
    assert "<script" not in (trained / "report.html").read_text("utf-8")


def test_sheets_stand_in_order_of_step_with_relative_lazy_links(trained, page):
    images = page(trained).all("img")
    assert [image["src"] for image in images] == ["samples/step_00000030.png", "samples/step_00000060.png"]
    assert all(image["loading"] == "lazy" and int(image["width"]) > 0 for image in images)
    assert all((trained / image["src"]).is_file() for image in images)
    (trained / images[0]["src"]).unlink()
    assert [image["src"] for image in page(trained).all("img")] == ["samples/step_00000060.png"], "a deleted sheet is left out"


def test_the_page_needs_no_network(trained):
    text = write_report(trained).read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:|//|/|file:)|url\(|@import|https?://""", text)


def test_events_and_the_configuration_are_shown(trained, page):
    text = page(trained).text
    assert re.search(r"0\d{4}-\d\d-\d\d \d\d:\d\d:\d\dstarted20\d{4}-\d\d-\d\d \d\d:\d\d:\d\dresumed", text)
    assert "[train]" in text and 'name = "my_cat"' in text and "steps = 80" in text
    assert "一只狐狸" in text


@pytest.mark.parametrize("log", [None, b"", b'{"kind": "tr', b'{"kind": "run", "step": 0}\n{"kind": "train", "step": 1, "loss": null}\n'])
def test_a_run_that_logged_nothing_yet_has_a_report(tmp_path, page, log):
    if log is not None:
        (tmp_path / "log.jsonl").write_bytes(log)
    assert "Nothing was logged yet" in page(tmp_path).text


def test_one_point_is_drawn_and_lost_losses_are_told(tmp_path, page):
    with RunLog(tmp_path, total_steps=2, start_step=0, config={"unknown": {"key": 1}}, log_every=1, resumed=False) as run:
        for step, loss in ((1, 0.5), (2, math.nan)):
            run.train(step, loss=loss, losses={"edit": loss}, learning_rate=0.0, grad_norm=0.0, samples=1, memory_bytes=0)
    report = page(tmp_path)
    assert len(report.all("circle")) == 1
    assert "In 1 of 2 lines of the log the loss is no finite number" in report.text
    assert '"unknown"' in report.text, "a configuration of another version is shown as it is"


def places(svg: str) -> list[tuple[float, float]]:
    (line,) = Page(svg).all("polyline")
    return [tuple(map(float, pair.split(","))) for pair in line["points"].split()]


def tick_labels(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_points_lie_where_the_axes_say():
    svg = chart([Curve("loss", [(0, 0.0), (50, 1.0), (100, 0.5)])], number=str, width=600, height=200)
    rows = {float(label): float(y) - 4 for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', svg)}
    columns = {float(label): float(x) for x, label in re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="middle">([^<]*)<', svg)}
    assert {0.0, 1.0} <= set(rows) and {0.0, 100.0} <= set(columns)
    assert rows[1] < rows[0], "larger values stand higher"
    middle = (columns[0] + columns[100]) / 2
    half = (rows[0] + rows[1]) / 2
    assert places(svg) == [
        pytest.approx(point, abs=0.11) for point in ((columns[0], rows[0]), (middle, rows[1]), (columns[100], half))
    ]


@pytest.mark.parametrize(("low", "high"), [(0.31, 0.33), (0.0, 1e-4), (5.0, 5.0), (0.0, 0.0), (-2.0, 3.0), (1e6, 3e6), (1e-9, 2e-9)])
def test_axes_have_few_round_different_ticks(low, high):
    labels = tick_labels(chart([Curve("loss", [(1000, low), (5000, high)])], number=lambda value: f"{value:.3g}"))
    values = [label for label in labels if label not in {"1000", "2000", "3000", "4000", "5000"}]
    assert 2 <= len(values) <= 8 and len(set(values)) == len(values)
    assert {"1000", "5000"} <= set(labels)


def test_long_curves_are_averaged_and_one_spike_does_not_flatten_them():
    points = [(step, 1.0 + step % 2) for step in range(100_000)]
    assert len(places(chart([Curve("loss", points)], number=str))) <= MOST_POINTS
    spiked = [(step, 1e6 if step == 500 else 1.0 + step % 2) for step in range(1000)]
    heights = [y for _, y in places(chart([Curve("loss", spiked, raw=True)], number=str))]
    assert max(heights) - sorted(heights)[1] > 100, "pixels between 1 and 2"


def test_the_command_writes_the_report_and_names_a_missing_folder(trained, tmp_path, capsys):
    assert main([str(trained)]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "report.html")
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        write_report(tmp_path / "nowhere")


def test_names_of_files_that_are_no_text_do_not_break_the_page(tmp_path, page):
    with RunLog(tmp_path, total_steps=1, start_step=0, config={}, resumed=False) as run:
        run.event(0, "skipped \udcff.jpg")
    assert "skipped ?.jpg" in page(tmp_path).text


@pytest.mark.parametrize("line", [
    {"kind": "train", "step": True, "loss": 1.0}, {"kind": "train", "step": 10**40}, {"kind": ["train"], "step": 1},
    {"kind": "train", "step": 1, "loss": "low"}, {"kind": "train", "step": 1, "loss": 1e308},
    {"kind": "validation", "step": 1, "losses": [1]},
    {"kind": "validation", "step": 1, "losses": {"edit": {}}}, {"kind": "run", "step": 0, "config": {"model": 5}},
    {"kind": "run", "step": 0, "config": {"data": [5]}}, {"kind": "run", "step": 0, "config": {"train": {"method": "full", "parts": 5}}},
    {"kind": "run", "step": 0, "config": {"train": {"method": "lora"}, "lora": {"parts": {}}, "samples": {"prompts": 5}}},
    {"kind": "pictures", "step": 1, "file": "a\0.png"}, {"kind": "pictures", "step": 1, "file": "log.jsonl"},
], ids=str)  # fmt: skip
def test_lines_that_nobody_wrote_do_not_end_in_a_traceback(tmp_path, line, page):
    """Found by fuzzing."""
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "train", "step": 2, "loss": 0.25}) + "\n" + json.dumps(line) + "\n", "utf-8")
    assert lengths(page(tmp_path))[0] == 1


def test_pictures_outside_of_the_folder_are_not_shown(tmp_path, page):
    run = tmp_path / "run"
    run.mkdir()
    for place in (tmp_path, run):
        Image.new("RGB", (9, 9)).save(place / "a.png")
    (run / "link.png").symlink_to(tmp_path / "a.png")
    files = ("a.png", "../a.png", str(tmp_path / "a.png"), "link.png")
    lines = [{"kind": "pictures", "step": step, "file": file} for step, file in enumerate(files)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert [image["src"] for image in page(run).all("img")] == ["a.png"]
