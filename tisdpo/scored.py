"""Scored sets: tokenised rows with the raw contrast of every completion token, or a reference's log-probs, stored with where they come from
and checked when loaded.

A scored set is a directory of `Dataset.save_to_disk` with one file more, provenance.json: which models gave the scores, how these were
made, which tokenizer and template made the ids. Weights are made from the raw contrast when training starts, so that one scoring
serves every `tisdpo.Weighting`.
"""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, List, Value, load_from_disk

from tisdpo.cached import sequence_key
from tisdpo.data import SIDES, TOKEN_COLUMNS, Counts, check_token_values, ids_fingerprint, load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.files import beside, write_json
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.hf import load_tokenizer
from tisdpo.provenance import FORMAT, PROVENANCE, REQUIRED, check_provenance, load_provenance, make_provenance
from tisdpo.readers import ID_COLUMNS

__all__ = [
    "ids_fingerprint",
    "import_official_weights",
    "load_provenance",
    "load_scored",
    "load_tokenizer_of",
    "make_provenance",
    "save_scored",
    "scored_sets",
    "scores_of",
]


def save_scored(rows: Dataset, path: str | Path, provenance: dict, *, more: Callable[[Path], None] | None = None) -> None:
    """Store tokenised rows with *_contrast or *_ref_logps or both (and *_truth, if they carry it) in a new directory.

    more   writes further files into the directory before it appears (those of a `tisdpo.cached.ReferenceCache`)

    Written beside and renamed: after a crash there is either the whole set or none. The number of pairs, a fingerprint of all ids and the
    version of tisdpo are added to the provenance. Raises InputError where the directory exists, a column is missing or does not fit the
    ids, a score is not finite, or the provenance lacks a field.

    >>> save_scored(rows, "runs/scored/S", make_provenance(tokenizer, max_length=512, positive=p, negative=n, how={"construction": "S"}))
    """
    from tisdpo import __version__

    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists; remove it or give another path, a scored set is never overwritten")
    missing = [name for name in REQUIRED if name not in provenance]
    if f"{SIDES[0]}_ref_logps" in rows.column_names and "reference_model" not in provenance:
        missing.append("reference_model")
    if missing:
        raise InputError(f"the provenance lacks {', '.join(missing)}; make it with tisdpo.scored.make_provenance")
    rows = _checked(rows)
    content = {"format": FORMAT, "tisdpo": __version__, "pairs": len(rows), "ids": ids_fingerprint(rows), **provenance}
    with beside(path, directory=True) as folder:
        rows.save_to_disk(str(folder))
        if more is not None:
            more(folder)
        write_json(folder / PROVENANCE, content, ensure_ascii=False)


def _checked(rows: Dataset) -> Dataset:
    """The rows with ids as int32 and scores as float32, after every score was found to belong to a token."""
    kind = "ref_logps" if f"{SIDES[0]}_ref_logps" in rows.column_names and f"{SIDES[0]}_contrast" not in rows.column_names else "contrast"
    for column in (*ID_COLUMNS, *(f"{side}_{kind}" for side in SIDES)):
        if column not in rows.column_names:
            raise InputError(f"the rows have no column {column!r}, which a scored set needs; score them first")
    scores = [f"{side}_{name}" for name in TOKEN_COLUMNS for side in SIDES if f"{side}_{name}" in rows.column_names]
    for number, row in enumerate(rows):
        for column in scores:
            side, name = column.split("_", 1)
            check_token_values(row[column], len(row[f"{side}_ids"]), name, f"pair {row.get('index', number)}: {column}")
    features = {name: rows.features[name] for name in rows.column_names}
    features |= {name: List(Value("int32")) for name in ID_COLUMNS} | {name: List(Value("float32")) for name in scores}
    return rows.cast(Features(features))


def load_scored(path: str | Path, *, dataset: Dataset | None = None, expect: dict | None = None) -> Dataset:
    """The rows of a scored set, after it was found to be what is expected.

    dataset   tokenised rows that must have the same ids in the same order
    expect    fields of the provenance that must have these values, e.g. of `make_provenance`; a dict in it is compared by its own fields

    Raises InputError naming the first pair that differs, or every differing field with both values, and the remedy.

    >>> rows = load_scored("runs/scored/S", dataset=train, expect={"max_length": 512, "how": {"construction": "S"}})
    """
    path = Path(path)
    provenance = load_provenance(path)
    check_provenance(path, provenance, {"format": FORMAT, **(expect or {})})
    try:
        rows = load_from_disk(str(path))
        stored = ids_fingerprint(rows)
    except Exception as error:  # whatever a damaged Arrow file makes its reader raise
        raise InputError(f"the scored set in {path} cannot be read ({error}); remove the directory and score the pairs again") from error
    if stored != provenance["ids"]:
        raise InputError(
            f"the rows in {path} are not those that were stored (its ids have changed); remove the directory and score the pairs again"
        )
    if dataset is not None and ids_fingerprint(dataset) != stored:
        raise InputError(
            f"{path} was scored for other rows: {_first_difference(rows, dataset)}; score these rows, or load the rows it was scored for"
        )
    return rows


def load_contrast(path: str | Path) -> Dataset:
    """`load_scored` for who reads the contrast; InputError for a set of a reference's log-probs alone."""
    rows = load_scored(path)
    check_contrast(path, rows)
    return rows


def check_contrast(path: str | Path, rows: Dataset) -> None:
    if f"{SIDES[0]}_contrast" not in rows.column_names:
        raise InputError(
            f"{path} holds the log-probs of a reference alone, and no contrast; score the pairs with --positive and --negative"
        )


def scores_of(path: str | Path, dataset: Dataset, *, expect: dict | None = None) -> Dataset:
    """The rows of a scored set with a contrast for these tokenised rows, in their order; the set may hold other pairs as well.

    expect   as for `load_scored`

    Raises InputError as `load_scored` does, and where a row is not in the set.

    >>> rows = scores_of("scored/S", source.train, expect={"tokenizer": tokenizer_fingerprint(tokenizer)})
    """
    rows = load_scored(path, expect=expect)
    check_contrast(path, rows)
    places = {key: number for number, key in enumerate(_keys(rows))}
    found = [places.get(key) for key in _keys(dataset)]
    if None in found:
        raise InputError(
            f"{path} has no scores for {found.count(None)} of these {len(found)} rows, row {found.index(None)} for one; score these "
            f"pairs, with the tokenizer and the max_length that they are trained with (it was scored with "
            f"max_length={load_provenance(path)['max_length']})"
        )
    return rows.select(found)


def _keys(rows: Dataset):
    for row in rows.select_columns(list(ID_COLUMNS)):
        yield tuple(sequence_key(row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES)


def _first_difference(stored: Dataset, given: Dataset) -> str:
    if len(stored) != len(given):
        return f"it has {len(stored)} pairs, these are {len(given)}"
    for number, (a, b) in enumerate(zip(stored.select_columns(list(ID_COLUMNS)), given.select_columns(list(ID_COLUMNS)))):
        for column in ID_COLUMNS:
            if list(a[column]) != list(b[column]):
                return f"{column} of row {number} is {_short(a[column])} there and {_short(b[column])} here"
    return "their ids differ"


def _short(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}] ({len(ids)} tokens)"


def scored_sets(path: str | Path) -> list[Path]:
    """The scored set that `path` is, or those of the run that it is, as <run>/seed-<n>/scored/<construction>: by seed, then by name.

    Raises InputError where there is none.
    """
    path = Path(path)
    if (path / PROVENANCE).exists():
        return [path]
    found = [file.parent for file in path.glob(f"seed-*/scored/*/{PROVENANCE}")]
    if not found:
        raise InputError(f"{path} is no scored set, nor a run with one; make one with `tisdpo weights` or `tisdpo score`")
    return sorted(found, key=lambda one: (len(one.parts[-3]), one.parts[-3], one.name))  # seed-10 after seed-9


def load_tokenizer_of(path: str | Path, given: str | None = None):
    """The tokenizer of a scored set: the one given, or the first that fits of those in the run around the set.

    Raises InputError for another tokenizer than the set was scored with, and where none is found.
    """
    path = Path(path)
    fingerprint = load_provenance(path)["tokenizer"]
    if given is not None:
        tokenizer = load_tokenizer(given)
        if tokenizer_fingerprint(tokenizer) != fingerprint:
            raise InputError(f"--tokenizer {given}: {path} was scored with another tokenizer; give the one of the models that scored it")
        return tokenizer
    for place in _tokenizers_around(path):
        tokenizer = load_tokenizer(place)
        if tokenizer_fingerprint(tokenizer) == fingerprint:
            return tokenizer
    raise InputError(f"the tokenizer that {path} was scored with is not in the run around it; name it with --tokenizer")


def _tokenizers_around(path: Path):
    """Paths to try: models of the seed <run>/seed-<n>/scored/<construction> belongs to, then the base model in <run>/config.yaml."""
    seed = path.resolve().parents[1]
    found = (
        file.parent
        for pattern in ("base", "contrastive/*", "policy/*")
        for file in sorted(seed.glob(f"{pattern}/model/tokenizer_config.json"))
    )
    yield from map(str, found)
    if (seed.parent / "config.yaml").exists():
        from tisdpo.config import load_config

        model = load_config(seed.parent).model
        yield from (place for place in (model.tokenizer, model.path) if place is not None)


# The authors' files

NOT_ALIGNED = "tokens differ from the file's"


def import_official_weights(path: str | Path, tokenizer, *, max_length: int | None = 1024) -> tuple[Dataset, Counts]:
    """Rows with chosen_contrast and rejected_contrast from a JSONL file that the authors' token_weight_estimation.py (exlaw/TIS-DPO) wrote.

    path        lines of {"prompt", "chosen", "rejected", "chosen_weight", "rejected_weight"}: text, and a number for every token of the
                response
    tokenizer   of the models the file was made with

    Such a file holds log pi- minus log pi+, rounded to two digits, for both responses; it is turned round here, so that a positive
    contrast means that pi+ prefers the token. It has no value for EOS: its contrast is 0, weight 1 under the paper's rule. The authors
    tokenised the response alone, here it is tokenised after its prompt: where the ids are not the same, or their number is not that of
    the values, the pair is dropped and counted. The file names neither its tokenizer nor its models: another tokenizer with the same
    number of tokens goes unnoticed, and so do pi+ and pi- given in the wrong order.

    >>> rows, counts = import_official_weights("generated-data/train.jsonl", tokenizer)
    >>> counts.describe()
    '2 pairs: 2 kept'
    """
    pairs = load_pairs(path)
    missing = [column for column in ("prompt", "chosen_weight", "rejected_weight") if column not in pairs.column_names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)} (it has: {', '.join(pairs.column_names)}); "
            "it is not a file of token_weight_estimation.py"
        )
    rows, counts = tokenize_pairs(pairs, tokenizer, max_length=None)
    aligned = []
    for row in rows:
        pair = pairs[row["index"]]
        contrasts = {f"{side}_contrast": _official_contrast(pair, side, row, tokenizer) for side in SIDES}
        if None in contrasts.values():
            counts.drop(NOT_ALIGNED)
        else:
            aligned.append({**row, **contrasts})
    if not aligned:
        raise InputError(
            f"no pair of {path} can be used ({counts.describe()}); give the tokenizer of the models that the file was made with"
        )
    rows, cut = tokenize_pairs(aligned, tokenizer, max_length=max_length)
    counts.kept, counts.truncated = cut.kept, cut.truncated
    for reason, number in cut.dropped.items():
        counts.dropped[reason] = counts.dropped.get(reason, 0) + number
    return rows, counts


def _official_contrast(pair: dict, side: str, row: dict, tokenizer) -> list[float] | None:
    """Contrast of one completion, EOS included, or None where the file's values belong to other tokens."""
    values, ids = pair[f"{side}_weight"], row[f"{side}_ids"]
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise InputError(
            f"pair {row['index']}: {side}_weight must be a list with a number for every token; "
            "was it written by token_weight_estimation.py?"
        )
    alone = tokenizer(pair[side], add_special_tokens=False)["input_ids"]
    if list(alone) != list(ids[:-1]) or len(values) != len(alone):
        return None
    return [*(-float(value) for value in values), 0.0]
