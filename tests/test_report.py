"""The report: the right numbers, nothing from outside, no text of a model taken for markup, the same bytes twice."""

import copy
import functools
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fixture import METRIC_INFO, fake_metrics

from tisdpo import heatmap, intervals, plots
from tisdpo.errors import InputError
from tisdpo.heatmap import heatmap_terminal
from tisdpo.report import duration, heatmap_html, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes, tables and visible text of a page; raises where a tag is closed that was not open."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.open, self.text, self.rows = [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(metrics: dict, tmp_path) -> tuple[str, Page]:
    html = write_report(metrics, tmp_path / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


@functools.cache
def made(methods: int, seeds: int, truth: bool) -> tuple[str, Page]:
    """The page of a made-up run as it is; drawn once for all tests that only read it."""
    with tempfile.TemporaryDirectory() as folder:
        return page_of(fake_metrics(methods, seeds, truth), Path(folder))


def numbers(cell: str) -> list[float]:
    return [float(number.replace("−", "-").replace(",", "")) for number in re.findall(r"[−-]?[\d,]+(?:\.\d+)?", cell)]


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_t_quantiles_equal_those_of_scipy(level):
    t = pytest.importorskip("scipy.stats").t
    for degrees in (1, 2, 3, 4, 5, 9, 10, 29, 100, 1001):
        assert intervals.t_quantile(degrees, level) == pytest.approx(t.ppf((1 + level) / 2, degrees), rel=1e-10)


def test_interval_equals_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = [2.1, 1.7, 2.6, 2.2, 1.9]
    found = intervals.estimate(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-10)


def test_one_value_has_no_interval_and_what_is_no_number_does_not_count():
    assert intervals.estimate([3.0]).half_width is None
    assert intervals.estimate([]) is None
    assert intervals.estimate([1.0, None, math.nan, 3.0]).values == (1.0, 3.0)


@pytest.mark.parametrize("degrees, level", [(0, 0.95), (3, 1.0)])
def test_t_quantile_refuses_what_has_none(degrees, level):
    with pytest.raises(ValueError, match="degrees >= 1"):
        intervals.t_quantile(degrees, level)


def test_best_is_named_only_where_its_interval_is_clear_of_all_others():
    near, far, wide = (intervals.estimate(values) for values in ([1.0, 1.1, 1.2], [3.0, 3.1, 3.2], [0.0, 2.0, 5.0]))
    assert intervals.best_method({"a": near, "b": far}, "higher") == "b"
    assert intervals.best_method({"a": near, "b": far}, "lower") == "a"
    assert intervals.best_method({"a": near, "b": far, "c": wide}, "higher") is None  # also the third best counts
    assert intervals.best_method({"a": near, "b": far}, None) is None
    assert intervals.best_method({"a": near, "b": intervals.estimate([9.0])}, "higher") is None
    assert intervals.best_method({"a": near}, "higher") is None


@pytest.mark.parametrize(
    "values, digits",
    [([[1.0, 1.2]], 1), ([[0.5], [123.4]], 0), ([[0.512]], 3), ([[0.5, 0.5001]], 4), ([[0.0]], 2), ([[100.0, 120.0, 110.0]], 0)],
)
def test_digits_follow_the_interval_or_the_size(values, digits):
    assert intervals.decimals([intervals.estimate(one) for one in values]) == digits


def test_numbers_are_printed_with_a_true_minus_and_no_negative_zero():
    assert intervals.number(-12345.678, 1) == "−12,345.7"
    assert intervals.number(-0.001, 2) == "0.00"


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_table_says_what_the_metrics_say(seeds):
    metrics = fake_metrics(10, seeds)
    _, page = made(10, seeds, True)
    rows = {row[0]: row[1:] for row in page.rows}
    for method in metrics["methods"]:
        cells = rows[method["label"]]
        assert len(cells) == len(METRIC_INFO)
        for name, cell in zip(METRIC_INFO, cells):
            values = [result["metrics"][name] for result in metrics["results"] if result["method"] == method["id"]]
            shown = numbers(cell)
            assert shown[0] == pytest.approx(statistics.fmean(values), abs=0.051)
            assert len(shown) == (2 if seeds > 1 else 1)
            if seeds > 1:
                half = 2.7764451051977987 * statistics.stdev(values) / math.sqrt(seeds)  # t of 4 degrees of freedom
                assert shown[1] == pytest.approx(half, abs=0.051)


def test_the_best_value_is_marked_once_per_directed_metric():
    html, _ = made(10, 5, True)
    table = html[html.index('<table class="results">') : html.index("</table>")]
    assert len(re.findall(r'class="v best"', table)) == 2  # reward and accuracy; the others have no direction
    html, page = made(10, 1, True)
    assert 'class="v best"' not in html
    assert "no best value is marked" in page.words


def test_a_seed_without_a_value_is_counted_not_hidden(tmp_path):
    metrics = fake_metrics(3, 5)
    metrics["results"][5]["metrics"]["reward"] = None  # first seed of dpo
    html, _ = page_of(metrics, tmp_path)
    assert html.count("1 of the seeds gave no value") == 1


def test_weights_table_and_findings():
    metrics = fake_metrics(10, 5)
    _, page = made(10, 5, True)
    row = next(row for row in page.rows if row[0] == "(S)" and len(row) > 3)
    auc = [entry["auc"] for entry in metrics["weights"] if entry["construction"] == "S"]
    clipped = [entry["chosen"]["clipped_low"] for entry in metrics["weights"] if entry["construction"] == "S"]
    assert numbers(row[1])[0] == pytest.approx(statistics.fmean(auc), abs=0.0051)
    assert row[4] == "chosen"
    assert numbers(row[7])[0] == pytest.approx(100 * statistics.fmean(clipped), abs=0.051)
    assert page.words.count("nearly two-valued") == 1  # five seeds, five figures, one finding
    assert "all 5 seeds; figures of seed 0" in page.words


@pytest.mark.parametrize("methods, seeds, truth", [(10, 5, True), (2, 1, False), (1, 1, True)], ids=["all", "small", "base alone"])
def test_nothing_comes_from_outside(methods, seeds, truth):
    html, page = made(methods, seeds, truth)
    assert "script" not in page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)|https?:", html)
    known = {value for _, name, value in page.attributes if name == "id"}
    used = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    assert used <= known


def test_every_id_is_used_once():
    _, page = made(10, 5, True)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_charts_take_all_their_colours_from_the_page():
    html, _ = made(10, 5, True)
    charts = "".join(re.findall(r"<svg viewBox.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"(?:fill|stroke): #", charts)
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= set(re.findall(r"--(\w+):", html))


def test_text_of_models_is_never_markup(tmp_path):
    evil = '</pre><script>alert("1")</script><img src="https://example.org/x.png" onerror=x>'
    metrics = fake_metrics(4, 2)
    metrics["name"] = metrics["description"] = metrics["settings"]["evil"] = metrics["environment"]["device"] = evil
    metrics["notes"][0] = metrics["methods"][1]["label"] = metrics["methods"][1]["note"] = evil
    metrics["metric_info"]["reward"].update(label=evil, unit=evil, help=evil)
    metrics["samples"][0]["prompt"] = metrics["samples"][0]["responses"][0]["text"] = evil
    metrics["heatmaps"][0]["prompt"] = metrics["heatmaps"][0]["chosen"]["tokens"][0] = evil
    for entry in metrics["weights"]:
        entry["findings"] = [evil]
        entry["construction"] += evil
    _, page = page_of(metrics, tmp_path)
    assert "script" not in page.tags and "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.words.count('alert("1")') >= 10  # all of it is there, as text


def test_a_dollar_sign_is_no_formula_and_half_a_surrogate_pair_no_crash(tmp_path):
    metrics = fake_metrics(3, 1)
    metrics["metric_info"]["reward"]["label"] = "gain in $ of $x^2"
    metrics["samples"][0]["responses"][0]["text"] = "\ud83d"
    _, page = page_of(metrics, tmp_path)
    assert "gain in $ of $x^2" in page.words


def test_equal_metrics_give_equal_bytes(tmp_path):
    metrics = fake_metrics(5, 2)
    before = copy.deepcopy(metrics)
    first = write_report(metrics, tmp_path / "a.html").read_bytes()
    second = write_report(json.loads(json.dumps(metrics)), tmp_path / "deeper" / "b.html").read_bytes()
    assert first == second
    assert metrics == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.html"]


def test_charts_ignore_the_settings_of_the_user():
    matplotlib = pytest.importorskip("matplotlib")
    plain = plots.swatch(3)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "text.color": "red"}):
        assert plots.swatch(3) == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9


SECTIONS = {
    "results": ["results"],
    "frontier": ["frontier"],
    "curves": ["curves"],
    "weights": ["weights"],
    "heatmaps": ["heatmaps"],
    "samples": ["samples"],
    "run": ["settings", "environment", "seconds"],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_part_is_left_out_and_the_others_stay(tmp_path, section):
    metrics = fake_metrics(4, 1)
    for key in SECTIONS[section]:
        del metrics[key]
    html, _ = page_of(metrics, tmp_path)
    assert set(re.findall(r'<section id="(\w+)"', html)) == set(SECTIONS) - {section}
    assert f'href="#{section}"' not in html


def test_without_truth_the_page_says_so_and_marks_nothing():
    html, page = made(6, 2, False)
    assert "is not known for this data" in page.words
    assert not re.search(r'class="t \w+ (good|bad)', html)
    headings = [cell for row in page.rows for cell in row if row[0] in ("method", "construction")]
    assert "mean" in headings and not {"AUC", "ρ"} & set(headings) and not any("reward" in heading for heading in headings)


def test_only_a_name_is_needed(tmp_path):
    _, page = page_of({"name": "empty"}, tmp_path)
    assert "section" not in page.tags


@pytest.mark.parametrize("part", ["results", "frontier", "curves", "samples"])
def test_an_unlisted_method_is_named(tmp_path, part):
    metrics = fake_metrics(3, 1)
    place = metrics[part][-1]["responses"][-1] if part == "samples" else metrics[part][-1]
    place["method"] = "ghost"
    with pytest.raises(InputError, match=f"'{part}' names the method 'ghost'"):
        write_report(metrics, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, needed", [("matplotlib", "draw"), ("jinja2", "written")])
def test_a_missing_dependency_is_named_with_its_remedy(tmp_path, monkeypatch, module, needed):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'{needed}.*{module}.*pip install "tisdpo\[report\]"'):
        write_report(fake_metrics(3, 1), tmp_path / "report.html")


def test_heat_maps_alone_need_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(heatmap_html(fake_metrics(5, 1)["heatmaps"], title="pair 7"))
    assert "pair 7" in page.words and "what is the garden like?" in page.words
    assert "nav" not in page.tags


def test_curves_of_many_logs_are_thinned_to_means():
    run = {step: (step, float(step)) for step in range(1, 1001)}
    thinned = plots.thin(run)
    assert len(thinned) <= plots.MOST_POINTS
    assert thinned[13] == (7.0, 7.0)  # 1000 logs in windows of 13
    assert sum(y for _, y in thinned.values()) / len(thinned) == pytest.approx(500.5, abs=3)
    assert plots.thin({5: (5, 1.0)}) == {5: (5, 1.0)}


def test_seeds_with_other_steps_are_still_drawn():
    apart = [plots.Series(0, [{1: (1, 0.1), 3: (3, 0.2)}, {2: (2, 0.3), 4: (4, 0.1)}])]
    assert plots.curve("0", apart).count("-series-0-") == 2
    assert plots.frontier(apart, None, "x", "y").count("-series-0-") == 2


@pytest.mark.parametrize("largest", [1e-4, 0.3, 7.0, 23.0, 950.0])
def test_ticks_of_the_kl_axis_are_round_and_apart(largest):
    ticks = plots.sqrt_ticks(largest)
    assert 4 <= len(ticks) <= 10 and ticks[0] == 0 and ticks[-1] <= largest
    assert all(b > a for a, b in itertools.pairwise(ticks))
    assert all(float(f"{tick:.1e}") == pytest.approx(tick, rel=1e-12) for tick in ticks)  # two digits at most


def response(tokens, weights, **more) -> dict:
    return {"tokens": tokens, "weights": weights, **more}


CHOSEN = response(["kind", " and", " warm"], [2.0, 1.0, 4.0], contrast=[0.69, 0.0, 1.39], truth=[0.0, 0.0, 1.0])
REJECTED = response(["rude", " words"], [0.5, 1.05], contrast=[0.69, -0.05], truth=[-1.0, 0.0])


def test_colour_is_the_log_weight_symmetric_around_one():
    limit = heatmap.colour_limit([CHOSEN, REJECTED])
    assert limit == pytest.approx(math.log(4))
    assert heatmap.intensity(2.0, limit) == pytest.approx(0.5)
    assert heatmap.intensity(0.5, limit) == pytest.approx(-0.5)
    assert heatmap.intensity(1.0, limit) == 0 and heatmap.intensity(0.0, limit) == -1 and heatmap.intensity(99.0, limit) == 1
    assert heatmap.scale_ticks(limit) == ["0.25", "0.5", "1", "2", "4"]


def test_nearly_equal_weights_look_nearly_equal_and_one_giant_does_not_bleach_the_rest():
    assert heatmap.intensity(1.01, heatmap.colour_limit([response(["a"], [1.01])])) < 0.05
    assert heatmap.colour_limit([response(["a"], [1e9])]) == pytest.approx(math.log(20))


def test_the_constructions_of_one_pair_stand_together_on_one_scale():
    mild = {**CHOSEN, "weights": [1.1, 1.0, 1.2]}
    maps = [
        {"construction": "S", "seed": 0, "prompt": "p", "chosen": CHOSEN, "rejected": REJECTED},
        {"construction": "S", "seed": 0, "prompt": "other", "chosen": CHOSEN, "rejected": REJECTED},
        {"construction": "D", "seed": 0, "prompt": "p", "chosen": mild, "rejected": REJECTED},
    ]
    groups = heatmap.heatmap_groups(maps)
    assert [[row["construction"] for row in group["rows"]] for group in groups] == [["S", "D"], ["S"]]
    strong, weak = (row["chosen"][2]["alpha"] for row in groups[0]["rows"])
    assert (strong, weak) == ("1.00", "0.13")  # log 1.2 / log 4


def test_tokens_carry_their_figures_and_the_truth_is_marked():
    views = heatmap.token_views(CHOSEN, math.log(4)) + heatmap.token_views(REJECTED, math.log(4))
    assert [view["truth"] for view in views] == ["", "", "good", "bad", ""]
    assert views[2]["title"] == "weight 4 · contrast +1.39 nats · true reward +1.00"
    assert views[3]["side"] == "down" and views[2] | {"lead": " ", "text": "warm", "side": "up"} == views[2]


@pytest.mark.parametrize(
    "token, shown",
    [
        ("Ġkind", " kind"),
        ("▁kind", " kind"),
        ("\n", "⏎\n"),
        ("\x1b[31m", "␛[31m"),
        ("\x9b", "␡"),
        ("", "◌"),
        (" kind", " kind"),
        ("Ċ", "⏎\n"),
    ],
)
def test_tokens_are_shown_as_text_and_never_as_control_characters(token, shown):
    assert heatmap.readable(token) == shown


@pytest.mark.parametrize(
    "broken, message",
    [
        (response(["a", "b"], [1.0]), "2 tokens, but 1 weights"),
        (response(["a"], None), "1 tokens, but none weights"),
        (response(["a"], [1.0], truth=[0.0, 1.0]), "1 tokens, but 2 truth"),
        (response(["a", "b"], [1.0, math.nan]), "weight of token 1 is nan"),
        (response(["a"], [-1.0]), "weight of token 0 is -1.0"),
    ],
)
def test_a_broken_response_is_named(broken, message):
    with pytest.raises(InputError, match=f"rejected response: .*{message}"):
        heatmap_terminal("p", CHOSEN, broken)
    with pytest.raises(InputError, match=message):
        heatmap_html([{"construction": "S", "prompt": "p", "chosen": broken, "rejected": REJECTED}])


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")


def test_terminal_colours(terminal):
    lines = heatmap_terminal("p", CHOSEN, REJECTED).splitlines()
    assert "\x1b[4;48;2;213;94;0;38;2;0;0;0m warm\x1b[0m" in lines[1]  # heaviest: full orange; important: underlined
    assert "\x1b[0m and\x1b[" in lines[1]  # weight 1: no colour
    assert "4;48;2;" in lines[2] and "underlined" in lines[3]
    plain = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(lines[:3]))
    assert plain == "prompt    p\nchosen    kind and warm\nrejected  rude words"


def test_terminal_of_256_colours(terminal, monkeypatch):
    monkeypatch.delenv("COLORTERM")
    assert "\x1b[4;48;5;172;38;5;16m warm\x1b[0m" in heatmap_terminal("p", CHOSEN, REJECTED)


def test_no_colour_runs_over_a_line_end(terminal):
    text = heatmap_terminal("p", response(["a\nb"], [4.0]), REJECTED)
    for line in text.splitlines():
        assert line.count("\x1b[0m") >= 1 and not re.search(r"\x1b\[[1-9][\d;]*m[^\x1b]*$", line)


def test_plain_text_where_there_is_no_colour(terminal, monkeypatch):
    expected = "prompt    p\nchosen    kind{2} and *warm{4}\nrejected  *rude{0.5} words\nweight    in braces"
    assert heatmap_terminal("p", CHOSEN, REJECTED, color=False).startswith(expected)
    monkeypatch.setenv("NO_COLOR", "1")
    assert heatmap_terminal("p", CHOSEN, REJECTED).startswith(expected)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert heatmap_terminal("p", CHOSEN, REJECTED).startswith(expected)


def test_an_escape_sequence_in_a_response_never_reaches_the_terminal(terminal):
    text = heatmap_terminal("\x1b]0;title\x07", response(["\x1b[2J"], [1.0]), REJECTED)
    assert "\x1b[2J" not in text and "\x1b]" not in text and "␛[2J" in text


@pytest.mark.parametrize("seconds, text", [(0.4, "0.4 s"), (42.2, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
