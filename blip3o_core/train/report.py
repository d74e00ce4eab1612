"""report.html: one page that shows whether a run learned something; opens from disk, needs no network and no script.

`python -m blip3o_core.train.report FOLDER` writes it for any run, also for one that goes on or was killed.
"""

import argparse
import html
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import Blip3oError, ConfigError, InputError
from ..files import write_text
from ..images import load_image
from .config import TrainConfig, print_config
from .log import GIB, format_seconds, read_log
from .options import build

Points = list[tuple[float, float]]  # (step, value)
MOST_POINTS = 1000  # of a curve; neighbours of longer ones are averaged
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 26  # margins of a plot, pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --faint: #667080; --paper: #f6f7f9; --card: #fff; --line: #e2e5ea; --good: #1a7f4b;
  --bad: #b3261e; --s0: #2563c9; --s1: #d9730d; --s2: #178a64; --s3: #8b45c7; --s4: #c7347a; --s5: #8a6d1b; --s6: #3b8ea5; --s7: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --faint: #98a2b0; --paper: #14171b; --card: #1c2026; --line: #323841;
  --good: #52c98b; --bad: #ff8a80; --s0: #6ea3ff; --s1: #f5a255; --s2: #4cc79c; --s3: #c391f5; --s4: #f283b4; --s5: #d3b45c;
  --s6: #74c3d8; --s7: #9aa3af } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1160px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px } h2 { font-size: 17px; margin: 0 0 10px } p { margin: 0 0 12px }
svg + h2 { margin-top: 26px } dd, td:last-child { overflow-wrap: anywhere }
td.number:last-child { white-space: nowrap }
.faint, .time, th, figcaption, .key { color: var(--faint) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; min-width: 0 }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 18px }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px 24px; margin: 0 }
dt { color: var(--faint); font-size: 13px } dd { margin: 0; font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th { font-weight: 500; font-size: 13px }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
tr:last-child td { border-bottom: 0 }
.number { text-align: right } .time { white-space: nowrap } .good { color: var(--good); font-weight: 600 }
.bad { color: var(--bad); font-weight: 600 }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { fill: var(--faint); font-size: 12px }
.grid { stroke: var(--line) } polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
polyline.raw { stroke-width: 1; opacity: .45 } .key { font-size: 13px; margin: 0 0 8px }
.key span { white-space: nowrap; margin-right: 18px } .key i { display: inline-block; width: 16px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle } .key i.raw { opacity: .45 }
figure { margin: 0 0 22px } figcaption { font-size: 13px; margin-bottom: 6px } ol { margin: 0 0 16px; padding-left: 22px }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line) }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, Consolas, monospace; margin: 12px 0 0 } summary { cursor: pointer; font-weight: 600 }
""" + "".join(f".s{i} {{ stroke: var(--s{i}) }} circle.s{i}, i.s{i} {{ fill: var(--s{i}); background: var(--s{i}) }}\n" for i in range(8))


@dataclass(frozen=True)
class Curve:
    """name: in the legend. colour: 0..7. raw: thin and pale. dots: a mark with its number at every point."""

    name: str
    points: Points
    colour: int = 0
    raw: bool = False
    dots: bool = False


def write_report(folder: Path) -> Path:
    """Writes report.html into the folder of a run, from its log.jsonl. Raises InputError if there is no such folder, OutputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Give the output folder of a training run.")
    lines = read_log(folder)
    # A step that a resumed run reached again counts once.
    train, validation, pictures = (
        list({line["step"]: line for line in lines if line["kind"] == kind}.values()) for kind in ("train", "validation", "pictures")
    )
    runs = [line for line in lines if line["kind"] == "run"]
    config = runs[-1].get("config") or {} if runs else {}
    title = f"Training of {_name(config) or folder.resolve().name}"
    parts = [
        f"<h1>{_text(title)}</h1><p class=faint>{_text(folder.resolve())}</p>",
        _section("", _facts(config, runs, train, lines)),
        _section("Validation loss", _validation_table(validation) + _validation_chart(validation)),
        _section("Training loss", _loss_chart(train)),
        _small_charts(train),
        _section("Samples", _samples(folder, config, pictures)),
        _section("Events", _events(lines)),
        f"<section><details><summary>Configuration</summary><pre>{_text(_toml(config))}</pre></details></section>" if config else "",
    ]
    path = folder / "report.html"
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(title)}</title><style>{STYLE}</style>")
    body = "\n".join(filter(None, parts))
    write_text(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')
    return path


def chart(curves: Sequence[Curve], *, number: Callable[[float], str], width: int = 1080, height: int = 300, zero: bool = False) -> str:
    """Curves over steps as SVG, with a legend where there are several; a sentence if there is nothing to draw.

    The range leaves out the outermost 2 % of raw values, which are drawn at the edge. zero: the range starts at 0.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return "<p class=faint>Nothing was logged yet.</p>"
    values = [value for curve in curves for value in _inner([y for _, y in curve.points], 0.02 if curve.raw else 0.0)]
    y_ticks = _ticks(0.0 if zero else min(values), max(values))
    steps = [x for curve in curves for x, _ in curve.points]
    x_low, x_high = min(steps), max(steps)
    x_low = 0 if x_low < x_high / 10 else x_low
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))

    def place_x(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def place_y(y: float) -> float:
        share = min(max((y - y_low) / (y_high - y_low), 0.0), 1.0)
        return TOP + (height - TOP - BOTTOM) * (1 - share)

    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(", ".join(curve.name for curve in curves))}">']
    for tick in y_ticks:
        y = place_y(tick)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in (tick for tick in _ticks(x_low, x_high, most=max(width // 150, 3)) if x_low <= tick <= x_high and tick == round(tick)):
        drawn.append(f'<text x="{place_x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:.0f}</text>')
    for curve in curves:
        points = _thinned(curve.points)
        kind = f"s{curve.colour}{' raw' if curve.raw else ''}"
        drawn.append(f'<polyline class="{kind}" points="{" ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)}"/>')
        if curve.dots or len(points) == 1:
            drawn += [f'<circle class="{kind}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5">'
                      f"<title>{_text(curve.name)}, step {x:.0f}: {number(y)}</title></circle>" for x, y in points]
    key = "".join(f'<span><i class="s{curve.colour}{" raw" if curve.raw else ""}"></i>{_text(curve.name)}</span>' for curve in curves)
    return (f'<p class="key">{key}</p>' if len(curves) > 1 else "") + "".join(drawn) + "</svg>"


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers around low..high: 1, 2 or 5 times a power of ten apart, the outer ones at or beyond the ends."""
    if not high > low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def _inner(values: list[float], share: float) -> list[float]:
    cut = int(len(values) * share)
    return sorted(values)[cut: len(values) - cut]


def _thinned(points: Points) -> Points:
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _smoothed(points: Points) -> Points:
    """Means of neighbours up to a twentieth of the curve away, near ones counting more."""
    points = _thinned(points)
    reach = max(len(points) // 20, 1)
    smooth = []
    for index, (step, _) in enumerate(points):
        near = range(max(index - reach, 0), min(index + reach + 1, len(points)))
        weights = [reach + 1 - abs(index - other) for other in near]
        smooth.append((step, sum(weight * points[other][1] for weight, other in zip(weights, near, strict=True)) / sum(weights)))
    return smooth


def _points(lines: Sequence[dict[str, Any]], key: str, task: str | None = None) -> Points:
    pairs = ((line["step"], line.get(key) if task is None else (line.get(key) or {}).get(task)) for line in lines)
    return [(step, value) for step, value in pairs if value is not None]


def _tasks(lines: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({task for line in lines for task in line.get("losses") or {}})


def _loss_chart(train: list[dict[str, Any]]) -> str:
    points = _points(train, "loss")
    curves = [Curve("each line of the log", points, 0, raw=True)]
    if len(points) >= 10:
        curves.append(Curve("smoothed", _smoothed(points), 0))
    lost = len(train) - len(points)
    note = f'<p class="bad">In {lost} of {len(train)} lines of the log the loss is no finite number.</p>' if lost else ""
    tasks = _tasks(train)
    per_task = ""
    if len(tasks) > 1:
        task_curves = [Curve(task, _smoothed(_points(train, "losses", task)), index % 8) for index, task in enumerate(tasks)]
        per_task = "<h2>Training loss per task, smoothed</h2>" + chart(task_curves, number=_number)
    return note + chart(curves, number=_number) + per_task


def _validation_chart(lines: list[dict[str, Any]]) -> str:
    curves = [Curve(task, _points(lines, "losses", task), index % 8, dots=True) for index, task in enumerate(_tasks(lines))]
    return chart(curves, number=_number)


def _validation_table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for task in _tasks(lines):
        points = _points(lines, "losses", task)
        if len(points) < 2:
            continue
        (first_step, first), (last_step, last), (best_step, best) = points[0], points[-1], min(points, key=lambda point: point[1])
        change = 100 * (last / first - 1) if first else 0.0
        kind = "good" if change < 0 else "bad" if change > 0 else ""
        cells = (f"{_number(first)} (step {first_step})", f"{_number(last)} (step {last_step})", f"{_number(best)} (step {best_step})")
        rows.append(f"<tr><td>{_text(task)}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells)
                    + f'<td class="number {kind}">{change:+.1f} %</td></tr>')
    if not rows:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name in ("first", "last", "lowest", "first &rarr; last"))
    return f'<table style="margin-bottom: 16px"><tr><th>task</th>{head}</tr>{"".join(rows)}</table>'


def _small_charts(train: list[dict[str, Any]]) -> str:
    plots = {"Learning rate": "learning_rate", "Samples per second": "samples_per_second", "Gradient norm": "grad_norm"}
    drawn = (_section(title, chart([Curve(title, _points(train, key))], number=_number, width=360, height=190, zero=True))
             for title, key in plots.items())
    return f'<div class="row">{"".join(drawn)}</div>' if train else ""


def _facts(config: dict[str, Any], runs: list[dict[str, Any]], train: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    total = runs[-1].get("total_steps") if runs else None
    done = max((line["step"] for line in lines), default=0)
    facts = {
        "model": (config.get("model") or {}).get("path"),
        "method": _method(config),
        "data": ", ".join(f"{data.get('path')} ({data.get('task')})" for data in _list(config.get("data"))),
        "steps": f"{done} of {total}" if total else done,
        "time": format_seconds(max((line.get("seconds") or 0.0 for line in train), default=0.0)) if train else "",
    }
    speeds = sorted(speed for _, speed in _points(train, "samples_per_second"))
    if speeds:
        facts["samples per second, median"] = _number(speeds[len(speeds) // 2])
    if train:
        facts["peak memory"] = f"{max(line.get('memory_bytes') or 0 for line in train) / GIB:.1f} GiB"
    items = (f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items() if value not in (None, ""))
    return f"<dl>{''.join(items)}</dl>"


def _method(config: dict[str, Any]) -> str:
    method, lora = (config.get("train") or {}).get("method"), config.get("lora") or {}
    if method == "lora":
        parts = [*_list(lora.get("parts")), *(["latent_queries"] if lora.get("latent_queries") else [])]
        return f"LoRA, rank {lora.get('rank')}, on {', '.join(map(str, parts))}"
    return f"full: {', '.join(map(str, _list(config['train'].get('parts'))))}" if method == "full" else ""


def _samples(folder: Path, config: dict[str, Any], pictures: list[dict[str, Any]]) -> str:
    figures = []
    for line in sorted(pictures, key=lambda line: line["step"]):
        file = str(line.get("file"))
        try:
            if not (folder / file).resolve().is_relative_to(folder.resolve()):
                continue  # a log from elsewhere: the page shows nothing of this machine but its own folder
            width, height = load_image(folder / file).size
        except (InputError, OSError, ValueError):  # deleted by the user, not written to the end, or no name of a file
            continue
        source = html.escape(quote(file), quote=True)
        figures.append(f'<figure><figcaption>step {line["step"]}</figcaption><a href="{source}"><img loading="lazy" src="{source}" '
                       f'width="{width}" height="{height}" alt="samples at step {line["step"]}"></a></figure>')
    if not figures:
        return ""
    prompts = "".join(f"<li>{_text(prompt)}</li>" for prompt in _list((config.get("samples") or {}).get("prompts")))
    return (f"<ol>{prompts}</ol>" if prompts else "") + "".join(figures)


def _events(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if line["kind"] in ("event", "run"):
            text = line.get("text", "") if line["kind"] == "event" else ("resumed" if line.get("resumed") else "started")
            rows.append(f'<tr><td class="number">{line["step"]}</td><td class="time">{_text(line.get("time", ""))}</td>'
                        f"<td>{_text(text)}</td></tr>")
    head = '<tr><th class="number">step</th><th>time</th><th style="width: 100%">event</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _section(title: str, content: str) -> str:
    """Nothing where there is no content."""
    return f"<section>{f'<h2>{_text(title)}</h2>' if title else ''}{content}</section>" if content else ""


def _name(config: dict[str, Any]) -> str:
    return str((config.get("output") or {}).get("name") or "")


def _list(value: object) -> list[Any]:
    """Of a log that another version wrote: nothing where there is no list."""
    return value if isinstance(value, list) else []


def _toml(config: dict[str, Any]) -> str:
    try:
        return print_config(build(TrainConfig, config))
    except ConfigError:  # logged by a version with other keys
        return json.dumps(config, indent=1, ensure_ascii=False)


def _number(value: float) -> str:
    """Up to four significant digits."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _text(value: object) -> str:
    """For HTML. Names of files may hold bytes that are no text."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m blip3o_core.train.report", description="Write report.html of a training run.")
    parser.add_argument("folder", type=Path, help="output folder of the run, with log.jsonl")
    try:
        print(write_report(parser.parse_args(argv).folder))
    except Blip3oError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
