"""Figures: what is drawn is what the artifacts hold, in colours that follow the page, with the same bytes each time."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from bnfctl.artifact import Artifact, Store
from bnfctl.errors import BnfctlError
from bnfctl.report import figures_builds, figures_shifts, figures_svg, figures_training
from bnfctl.report.collect import collect
from bnfctl.report.figures import Figure, figures
from bnfctl.report.figures_svg import SERIES, panel, series, short
from bnfctl.report.sources import Sources
from tests.report.colours import contrast, linear
from tests.report.evals import graded, publish
from tests.report.page_world import publish_build, publish_train, shift_rows


def world(folder: Path, methods: Sequence[tuple[str, int]] = (("bnf", 2), ("dpo", 2)), shared: bool = True) -> Sources:
    """Trainings of these losses and as many seeds each, with shifts; and two builds, one without rewards."""
    store = Store(folder / "artifacts")
    build, bare = publish_build(store), publish_build(store, seed=1, records=30, rewards=False)
    made: list[Artifact] = [bare]
    for loss, seeds in methods:
        for seed in range(seeds):
            policy = publish_train(store, build, loss, seed, steps=100).pinned()
            rows = graded("gsm8k", [0.0, 1.0, 0.0, 1.0])
            made.append(publish(store, rows, policy, seed=seed, shifts=shift_rows(loss, seed, 24, shared)))
    return collect(made, store)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return world(tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="session")
def drawn(sources: Sources) -> dict[str, Figure]:
    return {figure.id: figure for figure in figures(sources)}


def column(sources: Sources, method: str, name: str) -> np.ndarray:
    runs = next(one.runs for one in sources.methods if one.label == method)
    return np.array([row[name] for run in runs for made in run.evals for row in made.rows([name], "shifts")])


def test_the_papers_figures_come_first_and_in_its_order(drawn: dict[str, Figure]) -> None:
    assert list(drawn) == [
        *(f"figure-3{letter}" for letter in "abcdef"), "figure-4", "training-objective", "training-shift",
        "training-margin", "training-coefficient", "build-0", "build-1",
    ]  # fmt: skip
    assert {figure.section for figure in drawn.values()} == {"shifts", "training", "builds"}


@pytest.mark.parametrize(("figure", "name"), [("figure-3a", "ll_sum"), ("figure-3e", "z2_mean"), ("figure-3f", "gini")])
def test_boxes_say_the_percentiles_of_all_seeds(
    drawn: dict[str, Figure], sources: Sources, figure: str, name: str
) -> None:
    header, *rows = drawn[figure].numbers
    for row in rows:
        values = column(sources, row[0], name)
        said = dict(zip(header, row, strict=True))
        assert said["n"] == "48" and said["seeds"] == "2"
        assert said["mean"] == f"{values.mean():.3g}"
        assert [said[f"{share} %"] for share in (5, 50, 95)] == [f"{np.percentile(values, s):.3g}" for s in (5, 50, 95)]
        assert f"{row[0]}: mean {said['mean']}" in drawn[figure].alt
    assert [row[0] for row in rows] == ["DPO", "BNF"]
    assert "n = 48 responses per method, seeds pooled" in drawn[figure].caption
    assert "95 % interval (normal, prompts as clusters)" in drawn[figure].caption
    assert "Ticks under a box: the mean of each seed" in drawn[figure].caption


def dots(figure: Figure) -> int:
    """Marks in a method's colour; ticks are muted."""
    return len(re.findall(r'<use[^>]*class="f-\d', figure.svg))


def test_the_scatter_has_a_dot_for_each_response_up_to_a_limit(
    drawn: dict[str, Figure], sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn["figure-3c"]
    assert dots(figure) == 2 * 48
    x, y = column(sources, "BNF", "ll_mean"), column(sources, "BNF", "z2_mean")
    row = next(row for row in figure.numbers if row[0] == "BNF")
    assert row[1:3] == ("48", f"{np.corrcoef(x, y)[0, 1]:.2f}")
    monkeypatch.setattr(figures_shifts, "POINTS", 10)
    fewer = next(one for one in figures_shifts.figures(sources) if one.id == "figure-3c")
    assert dots(fewer) == 2 * 10
    assert "At most 10 of a method's responses are drawn" in fewer.caption
    assert [row[1:4] for row in fewer.numbers] == [row[1:4] for row in figure.numbers], "correlations are of all"


def test_figure_4_has_tenths_of_dpo_and_both_readings_of_shared_responses(drawn: dict[str, Figure]) -> None:
    figure = drawn["figure-4"]
    columns = {column[0]: column[1:] for column in zip(*figure.numbers, strict=True)}
    assert set(columns) == {"bin", "edges of DPO (nats)", "DPO, share", "BNF, share", "DPO, mean", "BNF, mean"}
    assert all(abs(float(share.split()[0]) - 10) < 0.2 for share in columns["DPO, share"])
    assert sum(float(share.split()[0]) for share in columns["BNF, share"]) == pytest.approx(100, abs=0.5)
    means = [float(mean) for mean in columns["DPO, mean"]]
    assert means == sorted(means), "its own bins are in order"
    assert figure.svg.count('role="img"') == 2


def test_figure_4_without_shared_responses_or_dpo_has_the_reading_that_remains(tmp_path: Path) -> None:
    found = {one.id: one for one in figures_shifts.figures(world(tmp_path, (("simpo", 1), ("bnf", 2)), shared=False))}
    assert found["figure-4"].svg.count('role="img"') == 1
    assert "deciles of SimPO" in found["figure-4"].title, "the first of the table"
    assert "need the same responses" in found["figure-4"].caption
    alone = figures_shifts.figures(world(tmp_path / "alone", (("bnf", 1),)))
    assert "figure-3a" in {one.id for one in alone} and "figure-4" not in {one.id for one in alone}


def test_nothing_is_drawn_of_what_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    assert figures(collect([publish(store, graded("gsm8k", [1.0, 0.0, 1.0]))], store)) == []


def test_numbers_beyond_any_axis_are_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    train = publish_train(store, publish_build(store, records=5), "bnf", 0, steps=3)
    lines = [{"step": step, "split": "train", "margin": value} for step, value in ((1, 1.0), (2, 1e308), (3, -1e308))]
    (train.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (curves,) = [one for one in figures_training.figures(collect([train], store)) if one.id == "training-margin"]
    assert curves.numbers[1][-2] == "1"


def test_a_line_is_the_mean_over_seeds_at_the_steps_of_all() -> None:
    one = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 4.0])
    other = np.array([2.0, 3.0, 4.0]), np.array([4.0, 8.0, 9.0])
    steps, values = figures_training.mean_of([one, other])
    assert steps.tolist() == [2, 3] and values.tolist() == [3, 6]


def test_a_long_training_is_drawn_as_means_of_consecutive_steps() -> None:
    pairs = np.stack([np.arange(1, 1001), np.arange(1000) * 2.0], axis=1)
    steps, values = figures_training.thinned(pairs)
    assert len(steps) <= figures_training.POINTS
    assert (steps[0], values[0]) == (np.arange(1, 14).mean(), np.arange(13).mean() * 2)
    assert steps[-1] == np.arange(989, 1001).mean(), "the last one is of what is left"
    few = np.array([[1.0, 5.0], [2.0, 7.0]])
    assert figures_training.thinned(few)[1].tolist() == [5, 7]


def test_only_losses_that_can_be_split_have_an_objective_per_label(drawn: dict[str, Figure]) -> None:
    of = {(row[0], row[1]) for row in drawn["training-objective"].numbers[1:]}
    assert {("BNF", "chosen"), ("BNF", "rejected"), ("DPO", "all responses")} <= of
    assert ("DPO", "chosen") not in of
    coefficient = drawn["training-coefficient"].numbers[1:]
    assert {row[2] for row in coefficient} == {"train"}, "held-out records pull nothing"


def test_histograms_count_every_response(drawn: dict[str, Figure], sources: Sources) -> None:
    both = {"build-0", "build-1"}
    whole = next(key for key in both if ("Rewards", "chosen") in {row[:2] for row in drawn[key].numbers})
    bare = next(iter(both - {whole}))
    rows = {row[:2]: row[2:] for row in drawn[whole].numbers[1:]}
    made = next(list(one.rows()) for one in sources.builds if one.ref in drawn[whole].title)
    assert rows["Lengths", "rejected"][0] == str(len(made))
    assert rows["Rewards", "chosen"] == (str(len(made)), f"{np.mean([row['chosen_reward'] for row in made]):.4g}")
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in made]
    assert rows["Margins of the pairs", "pairs"] == (str(len(made)), f"{np.mean(gaps):.4g}")
    assert {row[0] for row in drawn[bare].numbers[1:]} == {"Lengths"}
    assert "This build has no rewards" in drawn[bare].caption


def corners(svg: str, colour: int) -> list[np.ndarray]:
    """Points [corners, 2] of each filled shape in a colour."""
    shapes = re.findall(rf'<path d="([^"]+)"[^>]* opacity="[^>]* class="f-{colour}\b', svg)
    return [np.array(re.findall(r"([\d.]+) ([\d.]+)", shape), float) for shape in shapes]


def test_rewards_of_a_few_values_have_a_bar_each_and_lengths_have_a_scale(store: Store) -> None:
    few = [{"chosen": 1.0, "rejected": 0.0}, {"chosen": 0.5, "rejected": 0.0}, {"chosen": 1.0, "rejected": 0.5}]
    build = publish_build(store, records=30, rewards=few)
    (figure,) = figures_builds.figures(collect([build], store))
    rewards, margins, lengths = re.split(r'(?=<svg [^>]*role="img")', figure.svg)[1:]
    for panel_, values in ((rewards, ["0", "0.5", "1"]), (margins, ["0.5", "1"])):
        assert re.findall(r'text-anchor="middle"[^>]*>([\d.]+)<', panel_) == values
    bars = {
        side: [bar[0, 1] - bar[2, 1] for bar in corners(rewards, n)] for n, side in enumerate(("chosen", "rejected"))
    }
    one = bars["chosen"][2] / 20
    assert bars["chosen"] == pytest.approx([0, 10 * one, 20 * one], abs=0.05)
    assert bars["rejected"] == pytest.approx([20 * one, 10 * one, 0], abs=0.05)
    rows = list(build.rows())
    counted = [[len(row[f"{side}_ids"]) for row in rows] for side in ("chosen", "rejected")]
    ends = min(map(min, counted)), max(map(max, counted))
    counts = [np.histogram(found, figures_builds.BINS, ends)[0] for found in counted]
    for number in (0, 1):
        (stairs,) = corners(lengths, number)
        heights = stairs[0, 1] - stairs[1:-1:2, 1]
        assert heights / heights.max() == pytest.approx(counts[number] / counts[number].max(), abs=0.005)


def test_the_markup_is_sound_and_has_no_style_colour_or_shared_id(drawn: dict[str, Figure]) -> None:
    ids: Counter[str] = Counter()
    for figure in drawn.values():
        tree = ElementTree.fromstring(f"<div>{figure.svg}</div>")
        assert tree.findall(".//path"), figure.id
        ids.update(element.attrib["id"] for element in tree.iter() if "id" in element.attrib)
        for element in tree.iter():
            assert element.tag in ("div", "ul", "li", "svg", "g", "defs", "clipPath", "path", "use", "text", "rect")
            assert not {"style", "fill", "stroke"} & element.attrib.keys() or element.attrib.get("fill") == "none"
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure.svg))
        assert used <= set(ids), figure.id
        assert not re.search(r"#[0-9a-f]{6}\b", figure.svg), "a colour that would not follow the page"
    assert set(ids.values()) == {1}


def test_equal_inputs_give_equal_bytes_whatever_a_user_has_set(sources: Sources, drawn: dict[str, Figure]) -> None:
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        again = {figure.id: figure for figure in figures_shifts.figures(sources)}
    assert again == {key: figure for key, figure in drawn.items() if figure.section == "shifts"}


def test_a_label_is_text_whatever_is_in_it() -> None:
    label = "$x^2$ <b>&\x07 數" + "y" * 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one about a character that matplotlib's own font lacks
        made = panel("p", lambda axes: axes.set_title(short(label, 30)), 'label " < >')  # type: ignore[arg-type]
    (title,) = ElementTree.fromstring(made).findall(".//text[@text-anchor='start']") or [
        one for one in ElementTree.fromstring(made).iter("text") if "x^2" in (one.text or "")
    ]
    assert title.text == short(label, 30) == "$x^2$ <b>&\\x07 數" + "y" * 13 + "…"
    assert ElementTree.fromstring(made).attrib["aria-label"] == 'label " < >'


def test_broken_metrics_are_named(tmp_path: Path) -> None:
    found = world(tmp_path, (("bnf", 1),))
    path = found.trains[0].path / "metrics.jsonl"
    path.write_text('{"objective": 1}\n', encoding="utf-8")
    with pytest.raises(BnfctlError, match="unreadable metrics") as caught:
        figures_training.figures(found)
    assert caught.value.where == str(path) and "bnfctl verify" in str(caught.value.hint)


def test_two_bases_have_figures_of_their_own(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures_shifts, "panel", lambda *_, **__: "<svg/>")  # only what is said is of interest
    one, other = sources.methods
    apart = replace(sources, methods=(replace(one, base="first"), replace(other, base="second")))
    found = [figure for figure in figures_shifts.figures(apart) if figure.id.startswith("figure-3a")]
    assert [figure.id for figure in found] == ["figure-3a-0", "figure-3a-1"]
    assert [figure.title.rpartition(" ")[2] for figure in found] == ["(first)", "(second)"]


def test_figures_cost_nothing_until_one_is_drawn() -> None:
    code = "import sys, bnfctl.report.figures, bnfctl.report.page; sys.exit(any('matplotlib' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def colours() -> list[dict[str, str]]:
    """The custom properties of the page, light and dark."""
    style = files("bnfctl.report").joinpath("page.css").read_text(encoding="utf-8")
    screen = style[: style.index("@media print")]
    light, dark = re.findall(r":root \{(.*?)\}", screen, re.S)[:2]
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]


BLIND = {
    "none": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]),
}  # fmt: skip
"""Linear RGB as it is seen without one kind of cones (Machado, Oliveira and Fernandes 2009, severity 1)."""


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b*, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (
        np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_everyone_and_from_the_paper(mode: int) -> None:
    found = colours()[mode]
    methods = [found[f"c{number}"] for number in range(SERIES)]
    for text in ("ink", "muted", "accent"):
        assert min(contrast(found[text], found[ground]) for ground in ("paper", "card", "faint")) >= 4.5, text
    assert min(contrast(colour, found["card"]) for colour in methods) >= 3
    for kind, matrix in BLIND.items():
        seen = [lab(matrix @ linear(colour)) for colour in methods]
        near = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen[:5], 2))
        assert near >= 15, kind
        assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 8, kind


def test_each_of_the_first_methods_has_a_colour_a_line_and_a_marker_of_its_own() -> None:
    assert len({series(n) for n in range(SERIES)}) == len({str(d) for d in figures_svg.DASHES}) == SERIES
    assert len(set(figures_svg.MARKERS)) == len(figures_svg.MARKERS) >= SERIES
    samples = figures_svg.legend([(f"m{number}", number) for number in range(len(figures_svg.MARKERS))])
    marks = re.findall(r'<path d="([^"]+)" class="f-\d"/>', samples)
    assert len(set(marks)) == len(marks) == len(figures_svg.MARKERS), "every marker has its sample in the legend"
