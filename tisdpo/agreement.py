"""Ratings of tokens by people: their file, how far the raters agree with each other, and with an estimated contrast.

A rating says how much worse or better a token makes its response, -2..2; the contrast r_t = log pi+ - log pi- has the same direction in
both responses of a pair (only the weight turns it round in the rejected one), so ratings and contrast are compared with their signs.
"""

import json
import math
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from tisdpo.data import SIDES
from tisdpo.errors import InputError
from tisdpo.evaluate import truth_agreement
from tisdpo.intervals import RESAMPLES, bootstrap, number
from tisdpo.scored import load_contrast, load_provenance, scored_sets

FORMAT, VERSION = "tisdpo ratings", 1
SCALE = (-2, -1, 0, 1, 2)

Rated = dict[int, Tensor]  # row of the set: its ratings, chosen then rejected


# The file of one rater


def ratings_file(provenance: dict, rater: str, pairs: Iterable[dict]) -> dict:
    """What the page exports: pairs of {"row", "done", "chosen", "rejected"}, a rating or None for every completion token."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "set": provenance["ids"],
        "tokenizer": provenance["tokenizer"],
        "rater": rater,
        "pairs": list(pairs),
    }


def read_ratings(path: str | Path) -> dict:
    """The ratings in a file, as `ratings_file` describes them.

    Raises InputError for what is no such file, another version of it, no rater, a pair that stands there twice, a rating that is none of
    SCALE, and where no pair is done.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); export it again from its page") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no file of ratings; export one from a page of `tisdpo annotate`")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has version {content.get('version')!r} of the format, known here is {VERSION}; use the tisdpo it is of")
    for name in ("set", "tokenizer", "rater"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise InputError(f"{path} has no {name}; " + ("write a name on its page and " * (name == "rater")) + "export it again")
    pairs = content.get("pairs")
    if not isinstance(pairs, list):
        raise InputError(f"{path} has no list of pairs; export it again from its page")
    seen = set()
    for place, pair in enumerate(pairs):
        row = pair.get("row") if isinstance(pair, dict) else None
        if type(row) is not int or row < 0 or row in seen:
            raise InputError(
                f"{path}: pair {place} has the row {row!r}, where a row of the set stands that no other pair has; export it again"
            )
        seen.add(row)
        for side in SIDES:
            values = pair.get(side)
            if not isinstance(values, list):
                raise InputError(f"{path}: row {row} has no list of ratings for its {side} response; export it again from its page")
            for position, value in enumerate(values):
                if value is not None and (type(value) is not int or value not in SCALE):
                    raise InputError(f"{path}: row {row}, {side} token {position} is rated {value!r}; a rating is -2, -1, 0, 1, 2 or null")
    if not any(pair.get("done") is True for pair in pairs):
        raise InputError(f"{path} has no pair that is done; mark pairs as done on its page and export again")
    return content


def _done(content: dict) -> Rated:
    """Ratings of the pairs that are done; a token that was not touched in them counts as 0."""
    return {
        pair["row"]: torch.tensor([value or 0 for side in SIDES for value in pair[side]], dtype=torch.float64)
        for pair in content["pairs"]
        if pair.get("done") is True
    }


# Comparison


def compare(files: Iterable[str | Path], weights: Iterable[str | Path] = ()) -> dict:
    """Agreement of raters with each other and with the contrast of scored sets, as JSON can hold it.

    files    one of `tisdpo annotate`'s page for every rater, all of one set; samples may differ, then common pairs are compared
    weights  scored sets of these pairs, or runs: of a run all sets with these pairs

    {"set", "tokenizer", "raters": [{"rater", "file", "pairs", "tokens", "nonzero"}],
     "between": None for one rater, else {"pairs", "tokens", "alpha_ordinal", "alpha_interval", "spearman"} over the pairs that at least two
                raters have done: Krippendorff's alpha, and the mean of Spearman's correlation over the pairs of raters,
     "contrast": [{"scored", "rater", "pairs", "tokens", "auc", "spearman", "sign"}]}

    auc and spearman are those of `tisdpo.evaluate.truth_agreement` with the ratings as truth; sign is the share of the tokens rated
    nonzero whose contrast has the rating's sign, a contrast of 0 counts one half. Each figure is {"value", "low", "high"}, with the
    95 % interval of `tisdpo.intervals.bootstrap` over pairs; None where it is not defined.

    Raises InputError for files that cannot be read or belong to different sets, two files of one rater, and lists of ratings that do not
    have one value per token.
    """
    paths = [str(path) for path in files]
    if not paths:
        raise InputError("there is no file of ratings; give at least one that a page of `tisdpo annotate` exported")
    contents = {path: read_ratings(path) for path in paths}
    first, *others = contents
    for path in others:
        for name in ("set", "tokenizer"):
            if contents[path][name] != contents[first][name]:
                raise InputError(
                    f"{path} rates the {name} {contents[path][name]}, but {first} the {name} {contents[first][name]}; compare one"
                )
    _check_raters(paths, contents)
    _check_lengths(contents)
    raters = {content["rater"]: _done(content) for content in contents.values()}
    return {
        "format": "tisdpo agreement",
        "version": VERSION,
        "set": contents[first]["set"],
        "tokenizer": contents[first]["tokenizer"],
        "raters": [
            {"rater": rater, "file": path, **_size(rated), "nonzero": sum(int((x != 0).sum()) for x in rated.values())}
            for path, (rater, rated) in zip(contents, raters.items())
        ],
        "between": _between(raters) if len(raters) > 1 else None,
        "contrast": [
            _against(rated, contrast) | {"scored": str(path), "rater": rater}
            for path, contrast in _contrasts(weights, contents).items()
            for rater, rated in raters.items()
        ],
    }


def _check_raters(paths: list[str], contents: dict[str, dict]) -> None:
    by_rater = {}
    for path in paths:
        rater = contents[path]["rater"]
        if rater in by_rater:
            raise InputError(f"{by_rater[rater]} and {path} are both by the rater {rater!r}; give one file per rater")
        by_rater[rater] = path


def _check_lengths(contents: dict[str, dict]) -> None:
    known = {}
    for path, content in contents.items():
        for pair in content["pairs"]:
            lengths = tuple(len(pair[side]) for side in SIDES)
            where, others = known.setdefault(pair["row"], (path, lengths))
            if lengths != others:
                raise InputError(
                    f"row {pair['row']} has {lengths[0]} and {lengths[1]} tokens in {path}, but {others[0]} and {others[1]} in {where}; "
                    "export both again from pages of one set"
                )


def _contrasts(weights: Iterable[str | Path], contents: dict[str, dict]) -> dict[Path, Rated]:
    """The contrast of every row that is rated, in the scored sets that `weights` names."""
    path, content = next(iter(contents.items()))
    counts = {pair["row"]: [len(pair[side]) for side in SIDES] for one in contents.values() for pair in one["pairs"]}
    found = {}
    for given in weights:
        fitting = [one for one in scored_sets(given) if load_provenance(one)["ids"] == content["set"]]
        if not fitting:
            raise InputError(
                f"{given} has other pairs than those rated in {path} (set {content['set']}); give a set scored on the same pairs"
            )
        for one in fitting:
            rows = load_contrast(one)
            for row, lengths in counts.items():
                if row >= len(rows):
                    raise InputError(f"row {row} is rated, but {one} has rows 0 to {len(rows) - 1}; export the ratings again")
                tokens = [len(rows[row][f"{side}_contrast"]) for side in SIDES]
                if tokens != lengths:
                    raise InputError(
                        f"row {row} has {tokens[0]} and {tokens[1]} tokens in {one}, but {lengths[0]} and {lengths[1]} ratings; "
                        "export the ratings again"
                    )
            found[one] = {
                row: torch.tensor([x for side in SIDES for x in rows[row][f"{side}_contrast"]], dtype=torch.float64) for row in counts
            }
    return found


def _against(rated: Rated, contrast: Rated) -> dict:
    def figures(rows: list[int]) -> dict[str, float | None]:
        r, ratings = (torch.cat([values[row] for row in rows]) for values in (contrast, rated))
        right = (r * ratings)[ratings != 0].sign()
        return {**truth_agreement(r, ratings), "sign": 0.5 + 0.5 * right.mean().item() if len(right) else None}

    return {**_size(rated), **_with_intervals(list(rated), figures)}


def _between(raters: dict[str, Rated]) -> dict:
    by_row = {row: [rated[row] for rated in raters.values() if row in rated] for rated in raters.values() for row in rated}
    several = {row: ratings for row, ratings in sorted(by_row.items()) if len(ratings) > 1}
    counts = {row: torch.stack([(torch.stack(ratings) == value).sum(0) for value in SCALE], dim=1) for row, ratings in several.items()}

    def spearman(rows: list[int]) -> float | None:
        known = []
        for a, b in combinations(raters.values(), 2):
            common = [row for row in rows if row in a and row in b]
            if common:
                known.append(truth_agreement(torch.cat([a[row] for row in common]), torch.cat([b[row] for row in common]))["spearman"])
        return sum(known) / len(known) if known and None not in known else None

    def figures(rows: list[int]) -> dict[str, float | None]:
        joined = torch.cat([counts[row] for row in rows]) if rows else torch.zeros(0, len(SCALE))
        return {"alpha_ordinal": _alpha(joined, "ordinal"), "alpha_interval": _alpha(joined, "interval"), "spearman": spearman(rows)}

    return {**_size({row: ratings[0] for row, ratings in several.items()}), **_with_intervals(list(several), figures)}


def _with_intervals(rows: list[int], figures: Callable[[list[int]], dict[str, float | None]]) -> dict[str, dict]:
    """{name: {"value", "low", "high"}} of the figures, with intervals over the rows."""
    spans = bootstrap(figures, rows)
    return {name: dict(zip(("value", "low", "high"), (value, *(spans[name] or (None, None))))) for name, value in figures(rows).items()}


def _alpha(counts: Tensor, level: str) -> float | None:
    """Krippendorff's alpha from how many raters gave each value of SCALE to each token, [tokens, values]; None if all gave the same."""
    try:
        import krippendorff
    except ImportError as error:
        raise InputError('agreement between raters needs krippendorff; run: pip install "tisdpo[annotate]"') from error
    if (counts.sum(0) > 0).sum() < 2:
        return None
    found = float(krippendorff.alpha(value_counts=counts.numpy(), value_domain=SCALE, level_of_measurement=level))
    return found if math.isfinite(found) else None


def _size(rated: Rated) -> dict:
    return {"pairs": len(rated), "tokens": sum(map(len, rated.values()))}


# Text


def table(found: dict) -> str:
    """What `compare` found, for the terminal."""
    parts = [
        _aligned(
            ["rater", "pairs", "tokens", "rated nonzero"],
            [[r[k] for k in ("rater", "pairs", "tokens", "nonzero")] for r in found["raters"]],
        )
    ]
    if (between := found["between"]) is not None:
        names = {
            "alpha_ordinal": "Krippendorff's alpha, ordinal", "alpha_interval": "Krippendorff's alpha, interval",
            "spearman": "Spearman, mean over pairs of raters",
        }  # fmt: skip
        rows = [[label, _text(between[name]), between["pairs"], between["tokens"]] for name, label in names.items()]
        parts.append(_aligned(["between raters", "", "pairs", "tokens"], rows))
    if found["contrast"]:
        rows = [
            [one["scored"], one["rater"], *(_text(one[name]) for name in ("auc", "spearman", "sign")), one["pairs"], one["tokens"]]
            for one in found["contrast"]
        ]
        parts.append(_aligned(["contrast r of", "rater", "AUC of |r|", "Spearman", "right sign", "pairs", "tokens"], rows))
    notes = [f"[ ]: 95 % of {RESAMPLES} bootstrap samples of the pairs. A token that was not touched in a pair that is done counts as 0."]
    if found["contrast"]:
        notes.append(
            "AUC: chance that a token rated nonzero has the larger |r|; right sign: share of these on which r has the rating's sign."
        )
    return "\n\n".join([*parts, "\n".join(notes)])


def _text(figure: dict) -> str:
    if figure["value"] is None:
        return "–"
    span = "" if figure["low"] is None else f" [{number(figure['low'], 2)}, {number(figure['high'], 2)}]"
    return number(figure["value"], 2) + span


def _aligned(head: list[str], rows: list[list]) -> str:
    """Columns apart by two spaces: texts to the left, numbers to the right."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [isinstance(cell, int) for cell in rows[0]]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" if numeric else f"{cell:<{width}}" for cell, width, numeric in zip(line, widths, right)).rstrip()
        for line in lines
    )
