"""Scored sets: tokenised rows with the raw contrast of every completion token, stored with where it comes from and checked when loaded.

A scored set is a directory of `Dataset.save_to_disk` with one file more, provenance.json: which models gave the scores, how these were
made, which tokenizer and template made the ids. Weights are made from the raw contrast when training starts, so that one scoring
serves every `tisdpo.Weighting`.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk

from tisdpo.data import SIDES, TOKEN_COLUMNS, Counts, check_token_values, load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.fingerprints import chat_template_fingerprint, model_fingerprint, tokenizer_fingerprint
from tisdpo.readers import ID_COLUMNS

FORMAT = 1
PROVENANCE = "provenance.json"
REQUIRED = ("tokenizer", "chat_template", "max_length", "positive_model", "negative_model", "how")

_REMEDIES = {
    "tokenizer": "use the tokenizer it was scored with, or score the pairs again",
    "chat_template": "use the chat template it was scored with, or score the pairs again",
    "max_length": "use the max_length it was scored with, or score the pairs again",
    "format": "score the pairs again with this version of tisdpo",
}


def make_provenance(
    tokenizer,
    *,
    max_length: int | None,
    positive: torch.nn.Module | str,
    negative: torch.nn.Module | str,
    how: dict,
    reference: torch.nn.Module | str | None = None,
) -> dict:
    """Where the scores of a set come from, for `save_scored` and for what `load_scored` is to expect.

    positive, negative   the models pi+ and pi-, or their fingerprints
    how                  how these were made, plain JSON: the construction, its prompts, steps, ...
    reference            the model of *_ref_logps; needed where the rows carry them

    >>> make_provenance(tokenizer, max_length=512, positive=chosen_model, negative=rejected_model, how={"construction": "S"})["how"]
    {'construction': 'S'}
    """

    def name(model) -> str | None:
        return model if model is None or isinstance(model, str) else model_fingerprint(model)

    provenance = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": chat_template_fingerprint(tokenizer),
        "max_length": max_length,
        "positive_model": name(positive),
        "negative_model": name(negative),
        "how": how,
    }
    return provenance if reference is None else provenance | {"reference_model": name(reference)}


def save_scored(rows: Dataset, path: str | Path, provenance: dict) -> None:
    """Store tokenised rows with chosen_contrast and rejected_contrast (and *_ref_logps, *_truth, if they carry them) in a new directory.

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
    beside = path.with_name(path.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    beside.mkdir(parents=True)
    rows.save_to_disk(str(beside))
    content = {"format": FORMAT, "tisdpo": __version__, "pairs": len(rows), "ids": ids_fingerprint(rows), **provenance}
    (beside / PROVENANCE).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.rename(path)


def _checked(rows: Dataset) -> Dataset:
    """The rows with ids as int32 and scores as float32, after every score was found to belong to a token."""
    for column in (*ID_COLUMNS, *(f"{side}_contrast" for side in SIDES)):
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
    differences = _differences(provenance, {"format": FORMAT, **(expect or {})})
    if differences:
        found = "; ".join(f"{name} is {stored!r} there and {wanted!r} here" for name, stored, wanted in differences)
        remedy = _REMEDIES.get(differences[0][0], "score the pairs again, or load the set that belongs to this run")
        raise InputError(f"{path} was scored under other conditions: {found}; {remedy}")
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


def load_provenance(path: str | Path) -> dict:
    """The provenance of a scored set; InputError if there is none.

    >>> load_provenance("runs/scored/S")["how"]["construction"]
    'S'
    """
    file = Path(path) / PROVENANCE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is no scored set ({PROVENANCE} is missing); score the pairs with save_scored or give another path"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove {path} and score the pairs again") from error


def _differences(stored: dict, wanted: dict, prefix: str = "") -> list[tuple]:
    """(field, stored, wanted) of every field that differs; fields of dicts as "how.construction"."""
    found = []
    for name, value in wanted.items():
        here = stored.get(name)
        if isinstance(value, dict) and isinstance(here, dict):
            found += _differences(here, value, f"{prefix}{name}.")
        elif here != json.loads(json.dumps(value)):  # tuples are stored as lists
            found.append((prefix + name, here, value))
    return found


def ids_fingerprint(rows: Dataset) -> str:
    """16 hexadecimal digits of all ids of tokenised rows, in their order."""
    parts = []
    for column in ID_COLUMNS:
        lengths, values = sha256(), sha256()
        for batch in rows.select_columns([column]).with_format("numpy").iter(1000):
            lists = [np.asarray(ids, dtype=np.int64) for ids in batch[column]]
            lengths.update(np.array([len(ids) for ids in lists], dtype=np.int64).tobytes())
            values.update(np.concatenate(lists).tobytes())
        parts += [lengths.hexdigest(), values.hexdigest()]
    return sha256(" ".join(parts).encode()).hexdigest()[:16]


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
