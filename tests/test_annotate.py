"""Ratings of tokens by people: the page in a real browser, the file it exports, and what agreement is computed from it."""

import json
import math
import re
from functools import partial

import browser
import pytest
import tiny
import torch

from tisdpo import agreement, annotate, cli
from tisdpo.data import tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.hf import train_bpe
from tisdpo.intervals import bootstrap
from tisdpo.scored import load_scored, make_provenance, save_scored, scored_sets

TAG = "<img src=x onerror='window.hit = 1'>"  # one token
NASTY = f'it\'s </script><script>window.hit = 1</script> & {TAG} {{{{ 7 * 7 }}}} "ok"\nsecond line'


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Enough to see that there are intervals; test_bootstrap_intervals looks at the real ones."""
    monkeypatch.setattr(agreement, "bootstrap", partial(bootstrap, resamples=40))


def save(rows, path, tokenizer, construction="S"):
    save_scored(rows, path, make_provenance(tokenizer, max_length=256, positive="a", negative="b", how={"construction": construction}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the world: two constructions of one seed, another seed, and the tokenizer."""
    path = tmp_path_factory.mktemp("run")
    rows = tiny.rows(12)
    for side in ("chosen", "rejected"):
        truth = [tiny.world().token_rewards(ids, prompt) for ids, prompt in zip(rows[f"{side}_ids"], rows["prompt_ids"])]
        rows = rows.add_column(f"{side}_truth", truth)
    save(tiny.contrast(rows), path / "seed-0/scored/S", tiny.tokenizer())
    save(tiny.contrast(rows, 0.125), path / "seed-0/scored/D", tiny.tokenizer(), "D")
    save(tiny.contrast(rows.select(range(5))), path / "seed-1/scored/S", tiny.tokenizer())
    tiny.tokenizer().save_pretrained(path / "seed-0/base/model")
    return path


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A scored set of text that would break a page that did not escape it, with its tokenizer."""
    path = tmp_path_factory.mktemp("nasty")
    tokenizer = train_bpe([NASTY, "a kind answer", "a rude answer, caf\u00e9"], 400)
    tokenizer.add_tokens([TAG])
    tokenizer.save_pretrained(path / "model")
    pairs = [{"prompt": f"{n}: <b>why</b>?", "chosen": f" {NASTY} {n}", "rejected": f" a rude answer {n}, caf\u00e9"} for n in range(4)]
    return save(tiny.contrast(tokenize_pairs(pairs, tokenizer, max_length=256)[0]), path / "S", tokenizer)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.PROGRAM is None:
        pytest.skip("needs a browser: chromium (Debian: apt-get install chromium) on the PATH")
    one = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()


def fails(capsys, *argv) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tisdpo: ") and err.count("\n") == 1, err
    return err.removeprefix("tisdpo: ").rstrip("\n")


def ratings(path, rater, pairs, /, **more):
    """A file of ratings: {row: (chosen, rejected)}, all done."""
    content = {"format": "tisdpo ratings", "version": 1, "set": "s", "tokenizer": "t", "rater": rater}
    content["pairs"] = [{"row": row, "done": True, "chosen": c, "rejected": r} for row, (c, r) in pairs.items()]
    path.write_text(json.dumps(content | more))
    return path


# The page


def test_a_person_rates_and_exports_and_it_is_compared(nasty, chromium, tmp_path, capsys):
    page = tmp_path / "annotate.html"
    words = ["annotate", str(nasty), "--tokenizer", str(nasty.parent / "model"), "--pairs", "3", "--seed", "1", "--out", str(page)]
    assert cli.main(words) == 0 and capsys.readouterr().out == f"{page}\n"
    chromium.events.clear()
    chromium.open(page)

    # every text is shown as it is, and none of it runs
    data = chromium.js("page")
    row = load_scored(nasty)[data["pairs"][0]["row"]]
    assert chromium.js("$('prompt').textContent") == f"{row['index']}: <b>why</b>?"
    shown = chromium.js("[...document.querySelectorAll('#chosen .tok')].map(t => t.textContent)")
    assert len(shown) == len(row["chosen_ids"])
    text = chromium.js("$('chosen').textContent").replace("␣", " ")  # a space that is a token of its own
    assert TAG in shown and NASTY.replace("\n", "⏎\n") in text and "window.hit" in text and chromium.js("window.hit === undefined")
    assert chromium.js("$('place').textContent") == "Pair 1 of 3" and chromium.js("document.querySelector('.how').open")
    assert "did not touch counts as 0" in re.sub(r"\s+", " ", chromium.js("document.body.textContent"))

    # the mouse steps through the ratings, or uses the palette; the keyboard goes on from there
    get = "state.pairs[state.at]"
    for expected in (1, 2, -1, -2, None, 1):
        chromium.click("#chosen [data-i='2']")
        assert chromium.js(f"{get}.chosen[2]") == expected
    chromium.click(".palette [data-value='-2']")
    assert chromium.js(f"{get}.chosen[2]") == -2
    assert chromium.js("token('chosen', 2).getAttribute('aria-label')").endswith(": −2")
    assert chromium.js("document.activeElement === token('chosen', 2) && getComputedStyle(document.activeElement).outlineStyle === 'solid'")
    chromium.press("ArrowRight", "2", "ArrowRight", "Shift+1", "ArrowRight", "d", "ArrowRight", "+", "ArrowRight", "-", "-", "-")
    chromium.press("ArrowRight", "g", "u", "ArrowRight", "a", "Backspace")
    assert chromium.js(f"{get}.chosen.slice(2, 10)") == [-2, 2, -1, 0, 1, -2, None, None]
    chromium.press("Tab", "f")  # the other response
    assert chromium.js(f"{get}.rejected[0]") == 1
    chromium.press("ArrowUp")
    assert chromium.js("current.side") == "chosen"
    chromium.press("Enter")
    assert chromium.js("[$('place').textContent, $('share').textContent, state.pairs[0].done]") == ["Pair 2 of 3", "1 done", True]
    chromium.press("u")  # also of a pair that was done
    assert chromium.js("[state.at, state.pairs[0].done]") == [0, False]
    chromium.press("Enter", "ArrowRight", "1", "n", "p")
    assert chromium.js("[state.at, state.pairs.map(p => p.done)]") == [1, [True, True, False]]

    # a reload keeps all of it; no file without a name
    before = chromium.js("state")
    chromium.reload()
    assert chromium.js("state") == before and chromium.js("$('place').textContent") == "Pair 2 of 3"
    assert not chromium.js("document.querySelector('.how').open")
    chromium.click("#export")
    assert chromium.js("$('message').textContent").startswith("Write your name first")
    chromium.type("Ann Ä.")  # the name has the focus; its letters are no commands
    chromium.click("#export")
    exported = chromium.download("ratings-Ann-Ä-.json")
    found = json.loads(exported.read_text())
    assert found["rater"] == "Ann Ä." and [p["done"] for p in found["pairs"]] == [True, True]  # the third pair was not touched
    assert found["pairs"][0]["row"] == data["pairs"][0]["row"] and found["pairs"][0]["chosen"][2:10] == [-2, 2, -1, 0, 1, -2, None, None]
    assert agreement.read_ratings(exported) == found

    # the file goes on elsewhere; what is none is refused and changes nothing
    chromium.js("localStorage.clear()")
    chromium.reload()
    assert chromium.js("state.pairs.some(p => p.done)") is False
    for content, said in (
        ("{", "was not imported: it is no file of ratings of this version."),
        (json.dumps(found | {"set": "other"}), "was not imported: it belongs to another set of pairs."),
        (
            exported.read_text().replace("-2", "3"),
            f"was not imported: row {data['pairs'][0]['row']} has other tokens, or a rating that is none.",
        ),
    ):
        (tmp_path / "wrong.json").write_text(content)
        chromium.choose("#file", tmp_path / "wrong.json")
        chromium.wait("$('message').textContent")
        assert chromium.js("$('message').textContent") == f"wrong.json {said}"
        chromium.js("say('')")
    assert chromium.js("state.pairs.some(p => p.done) || state.rater") == ""
    chromium.choose("#file", exported)
    chromium.wait("$('message').textContent")
    assert chromium.js("$('message').textContent") == "Imported 2 pairs of Ann Ä.."
    assert chromium.js("state.pairs") == before["pairs"] and chromium.js("$('rater').value") == "Ann Ä."

    # nothing went wrong and nothing was fetched
    requests = [e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
    assert not [e for e in chromium.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

    # and the export is what agreement reads
    assert cli.main(["agreement", str(exported), "--weights", str(nasty), "--out", str(tmp_path / "agreement.json")]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "agreement.json").read_text())
    (line,) = content["contrast"]
    tokens = sum(len(load_scored(nasty)[p["row"]][f"{side}_ids"]) for p in found["pairs"] for side in ("chosen", "rejected"))
    assert (line["pairs"], line["tokens"]) == (2, tokens) and content["raters"][0]["nonzero"] == 7 and "Ann Ä." in out
    rows = [load_scored(nasty)[p["row"]] for p in found["pairs"]]
    rated = [x or 0 for p in found["pairs"] for side in ("chosen", "rejected") for x in p[side]]
    r = [x for row in rows for side in ("chosen", "rejected") for x in row[f"{side}_contrast"]]
    assert line["spearman"]["value"] == pytest.approx(spearman(r, rated))


def test_the_page_is_blind_and_of_one_file(run, nasty, tmp_path):
    (page,) = annotate.write(run, tmp_path / "new/page.html", pairs=6)
    html = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert set(data) == {"format", "version", "set", "tokenizer", "rater", "pairs"}
    assert all(set(pair) == {"row", "prompt", "chosen", "rejected"} for pair in data["pairs"])
    assert "0.125" not in html and not re.search(r"\b(src|href)=\"(?!data:)", html)  # 0.125 is the contrast of all tokens
    # the sample follows the seed, and a pair comes once
    rows = [pair["row"] for pair in data["pairs"]]
    again, other = (annotate.write(run, tmp_path / "again.html", pairs=6, seed=seed)[0].read_text() for seed in (0, 1))
    assert again == html and other != html and len(set(rows)) == 6
    # tokens of the set, whose pieces joined are the response
    response = tiny.tokenizer().decode(load_scored(run / "seed-0/scored/S")[rows[0]]["chosen_ids"])
    assert "".join(data["pairs"][0]["chosen"]) == response


def test_of_a_run_the_first_seed_is_taken(run, tmp_path):
    assert [path.relative_to(run).as_posix() for path in scored_sets(run)] == ["seed-0/scored/D", "seed-0/scored/S", "seed-1/scored/S"]
    for n in (9, 10):
        (tmp_path / f"seed-{n}/scored/S").mkdir(parents=True)
        (tmp_path / f"seed-{n}/scored/S/provenance.json").write_text("{}")
    assert [path.parts[-3] for path in scored_sets(tmp_path)] == ["seed-9", "seed-10"]


def test_what_annotate_refuses(run, nasty, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert fails(capsys, "annotate", run, "--out", page) == f"--pairs 20: {run}/seed-0/scored/D has 12; ask for at most as many"
    assert fails(capsys, "annotate", tmp_path).startswith(f"{tmp_path} is no scored set, nor a run with one; make one with ")
    no_truth = fails(capsys, "annotate", nasty, "--pairs", 2, "--from-truth", tmp_path / "t.json", "--out", page)
    assert no_truth.startswith(f"--from-truth: {nasty} has no known truth, which only runs on a world")
    assert fails(capsys, "annotate", nasty, "--pairs", 2, "--out", page).endswith("name it with --tokenizer")
    assert not list(tmp_path.iterdir())


# Ratings from the known truth


def test_ratings_from_the_truth_are_its_signs_and_sizes():
    rows = [{"chosen_truth": [0.0, 1.0, -0.5, 0.1], "rejected_truth": [0.0]}, {"chosen_truth": [-4.0], "rejected_truth": [2.0, 0.0]}]
    first, second = annotate.ratings_from_truth(rows, [0, 1])
    assert first == {"row": 0, "done": True, "chosen": [0, 1, -1, 1], "rejected": [0]}
    assert second == {"row": 1, "done": True, "chosen": [-2], "rejected": [1, 0]}
    assert annotate.ratings_from_truth(rows[:1], [0])[0]["chosen"] == [0, 2, -1, 1]  # the size is relative to the rows'
    blind = annotate.ratings_from_truth(rows, [0, 1], missed=1.0)
    assert not any(x for pair in blind for side in ("chosen", "rejected") for x in pair[side])
    many = [{"chosen_truth": [1.0] * 1000, "rejected_truth": [0.0]}]
    assert 250 < annotate.ratings_from_truth(many, [0], missed=0.3, seed=5)[0]["chosen"].count(0) < 350
    with pytest.raises(ValueError, match="missed=2"):
        annotate.ratings_from_truth(rows, [0], missed=2)


def test_the_truth_of_a_run_agrees_with_itself_and_a_blind_contrast_with_nothing(run, tmp_path, capsys):
    file, page = tmp_path / "truth.json", tmp_path / "page.html"
    assert cli.main(["annotate", str(run), "--pairs", "12", "--from-truth", str(file), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n{file}\n"
    assert cli.main(["agreement", str(file), "--weights", str(run)]) == 0
    out = capsys.readouterr().out
    assert "seed-0/scored/S" in out and "seed-1" not in out and "between" not in out  # seed 1 has other pairs, and there is one rater
    found = agreement.compare([file], [run / "seed-0/scored/D"])["contrast"][0]  # a contrast of 0.125 everywhere
    assert found["auc"]["value"] == 0.5 and found["spearman"]["value"] is None
    truth = json.loads(file.read_text())
    positive = [x > 0 for pair in truth["pairs"] for side in ("chosen", "rejected") for x in pair[side] if x]
    assert positive and found["sign"]["value"] == pytest.approx(sum(positive) / len(positive))


# Agreement


def spearman(a, b):
    return pytest.importorskip("scipy.stats").spearmanr(a, b).statistic


def interval_alpha(*raters):
    """Krippendorff's alpha of complete data at the interval level, from its definition: 1 - observed over expected disagreement."""
    units, values = list(zip(*raters)), [x for one in raters for x in one]
    observed = sum((a - b) ** 2 for unit in units for a in unit for b in unit) / (len(raters) - 1) / len(values)
    return 1 - observed / (sum((a - b) ** 2 for a in values for b in values) / len(values) / (len(values) - 1))


A = {0: ([2, 0, 0, None], [0, -1]), 3: ([1, 0], [-2, None, 0]), 7: ([0, 0], [1])}
B = {0: ([1, 0, 0, 0], [0, -2]), 3: ([1, 1], [-2, 0, -1]), 9: ([2], [0])}


def test_agreement_between_raters_is_that_of_the_definitions(tmp_path):
    pytest.importorskip("krippendorff", reason="needs the extra annotate")
    files = [ratings(tmp_path / "a.json", "ann", A), ratings(tmp_path / "b.json", "bo", B)]
    found = agreement.compare(files)
    a, b = ([x or 0 for row in (0, 3) for side in one[row] for x in side] for one in (A, B))  # the rows that both have
    between = found["between"]
    assert (between["pairs"], between["tokens"]) == (2, 11)
    assert between["spearman"]["value"] == pytest.approx(spearman(a, b))
    assert between["alpha_interval"]["value"] == pytest.approx(interval_alpha(a, b))
    assert -1 <= between["alpha_ordinal"]["low"] <= between["alpha_ordinal"]["value"] <= between["alpha_ordinal"]["high"] <= 1
    assert found["raters"][0] == {"rater": "ann", "file": str(files[0]), "pairs": 3, "tokens": 14, "nonzero": 5}
    # a third rater, who has other pairs in common with each of them
    c = ratings(tmp_path / "c.json", "cy", {7: ([0, 1], [1]), 0: A[0]})
    third = agreement.compare([*files, c])["between"]
    rank = [
        spearman(a, b),
        spearman([2, 0, 0, 0, 0, -1, 0, 0, 1], [2, 0, 0, 0, 0, -1, 0, 1, 1]),
        spearman([1, 0, 0, 0, 0, -2], [2, 0, 0, 0, 0, -1]),
    ]
    assert (third["pairs"], third["tokens"]) == (3, 14) and third["spearman"]["value"] == pytest.approx(sum(rank) / 3)
    # raters who agree everywhere
    same = agreement.compare([files[0], ratings(tmp_path / "d.json", "di", A)])["between"]
    assert same["alpha_ordinal"] == {"value": 1.0, "low": 1.0, "high": 1.0} == same["alpha_interval"]
    text = agreement.table(found)
    assert re.search(r"Krippendorff's alpha, ordinal +0\.\d\d \[", text) and "contrast" not in text


def test_raters_without_common_pairs_or_without_any_difference(tmp_path):
    pytest.importorskip("krippendorff", reason="needs the extra annotate")
    apart = [ratings(tmp_path / "a.json", "ann", {0: A[0]}), ratings(tmp_path / "b.json", "bo", {9: B[9]})]
    between = agreement.compare(apart)["between"]
    nothing = {"value": None, "low": None, "high": None}
    assert between == {"pairs": 0, "tokens": 0, "alpha_ordinal": nothing, "alpha_interval": nothing, "spearman": nothing}
    zero = {0: ([0, 0], [0]), 1: ([0], [None])}
    files = [ratings(tmp_path / "a.json", "ann", zero), ratings(tmp_path / "b.json", "bo", zero)]
    found = agreement.compare(files)
    assert found["between"]["alpha_ordinal"] == nothing == found["between"]["spearman"]
    assert "interval                      –" in re.sub(r" {2,}", " " * 22, agreement.table(found))


def test_pairs_that_are_not_done_do_not_count(tmp_path):
    file = ratings(tmp_path / "a.json", "ann", A)
    content = json.loads(file.read_text())
    content["pairs"][1]["done"] = False
    file.write_text(json.dumps(content))
    assert agreement.compare([file])["raters"][0]["pairs"] == 2


def test_the_contrast_is_compared_with_its_sign_on_both_sides(tmp_path):
    """r > 0 speaks for a token, in the rejected response too: no side is turned round."""
    rows = tiny.contrast(tiny.rows(6))
    path = save(rows, tmp_path / "S", tiny.tokenizer())
    ids = json.loads((path / "provenance.json").read_text())["ids"]

    def rate(row, side):
        return [round(2 * x) for x in rows[row][f"{side}_contrast"]]

    pairs = {row: (rate(row, "chosen"), rate(row, "rejected")) for row in range(6)}
    line = agreement.compare([ratings(tmp_path / "a.json", "ann", pairs, set=ids)], [path])["contrast"][0]
    assert line["sign"]["value"] == 1 and line["spearman"]["value"] > 0.95 and line["auc"]["value"] == 1
    turned = {row: (c, [-x for x in r]) for row, (c, r) in pairs.items()}
    line = agreement.compare([ratings(tmp_path / "a.json", "ann", turned, set=ids)], [path])["contrast"][0]
    assert 0 < line["sign"]["value"] < 1 and line["spearman"]["value"] < 0.5 and line["auc"]["value"] == 1


def test_bootstrap_intervals():
    def mean(xs):
        return {"mean": sum(xs) / len(xs), "seldom": None if math.prod(xs) else 1.0}

    values = torch.randn(400).tolist()
    found = bootstrap(mean, values)
    middle, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    assert found["mean"] == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.3 * error)
    assert bootstrap(mean, values) == found  # the same every time
    assert found["seldom"] is None  # not defined for most samples
    assert bootstrap(mean, [1]) == {"mean": None, "seldom": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"is no JSON \(.*\); export it again from its page$"),
        ("[" * 100000, r"is no JSON \("),
        ("[1]", r"is no file of ratings; export one from a page of `tisdpo annotate`$"),
        ('{"format": "other"}', "is no file of ratings"),
        ({"version": 2}, "has version 2 of the format, known here is 1; use the tisdpo it is of$"),
        ({"rater": " "}, "has no rater; write a name on its page and export it again$"),
        ({"set": None}, "has no set; export it again$"),
        ({"pairs": {}}, "has no list of pairs"),
        ({"pairs": [{"row": True}]}, "pair 0 has the row True"),
        ({"pairs": [{"row": 1, "chosen": [], "rejected": []}, {"row": 1}]}, "pair 1 has the row 1"),
        ({"pairs": [{"row": 1, "chosen": [0]}]}, "row 1 has no list of ratings for its rejected response"),
        (
            {"pairs": [{"row": 1, "chosen": [0, 3], "rejected": []}]},
            r"row 1, chosen token 1 is rated 3; a rating is -2, -1, 0, 1, 2 or null$",
        ),
        ({"pairs": [{"row": 1, "chosen": [0.5], "rejected": []}]}, r"row 1, chosen token 0 is rated 0.5; "),
        ({"pairs": [{"row": 1, "chosen": [0], "rejected": [0]}]}, "has no pair that is done; mark pairs as done"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, text, said):
    path = ratings(tmp_path / "a.json", "ann", A, **(text if isinstance(text, dict) else {}))
    if isinstance(text, str):
        path.write_text(text)
    assert re.match(f"{re.escape(str(path))}:? {said}", fails(capsys, "agreement", path))


def test_comparisons_that_are_refused(run, tmp_path, capsys):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    ratings(one, "ann", A)
    ratings(other, "bo", B, set="another")
    assert fails(capsys, "agreement", one, other) == f"{other} rates the set another, but {one} the set s; compare one"
    ratings(other, "ann", B)
    assert fails(capsys, "agreement", one, other) == f"{one} and {other} are both by the rater 'ann'; give one file per rater"
    assert fails(capsys, "agreement", one, one) == f"{one} and {one} are both by the rater 'ann'; give one file per rater"
    ratings(other, "bo", {3: ([1, 0], [0, 0])})
    assert fails(capsys, "agreement", one, other).startswith(f"row 3 has 2 and 2 tokens in {other}, but 2 and 3 in {one}; ")
    scored = run / "seed-0/scored/S"
    assert fails(capsys, "agreement", one, "--weights", scored).startswith(f"{scored} has other pairs than those rated in {one} (set s)")
    assert fails(capsys, "agreement", one, "--weights", run).startswith(f"{run} has other pairs than")
    ids = json.loads((scored / "provenance.json").read_text())["ids"]
    ratings(one, "ann", {0: ([1], [1])}, set=ids)
    assert re.match(
        rf"row 0 has \d+ and \d+ tokens in {scored}, but 1 and 1 ratings; ", fails(capsys, "agreement", one, "--weights", scored)
    )
    ratings(one, "ann", {12: ([1], [1])}, set=ids)
    assert fails(capsys, "agreement", one, "--weights", scored).startswith(f"row 12 is rated, but {scored} has rows 0 to 11; ")
    with pytest.raises(InputError, match="there is no file of ratings"):
        agreement.compare([])


def test_agreement_between_raters_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "krippendorff", None)
    files = [ratings(tmp_path / "a.json", "ann", A), ratings(tmp_path / "b.json", "bo", B)]
    with pytest.raises(InputError, match=r'needs krippendorff; run: pip install "tisdpo\[annotate\]"'):
        agreement.compare(files)
    assert agreement.compare(files[:1])["between"] is None  # one rater does not need it
