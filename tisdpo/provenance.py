"""Where scores come from: written beside them, compared when they are used. A set that belongs to something else is refused by name.

The provenance of a scored set is provenance.json in its directory. Rows read from the set know their directory (it is that of their
Arrow files, also after selecting, shuffling, splitting or adding columns), so that a trainer finds and checks what they come from.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset

from tisdpo.errors import InputError
from tisdpo.fingerprints import chat_template_fingerprint, model_fingerprint, tokenizer_fingerprint

FORMAT = 2  # 2: fingerprints of models without the ids of special tokens
PROVENANCE = "provenance.json"
REQUIRED = ("tokenizer", "chat_template", "max_length", "positive_model", "negative_model", "how")

_REMEDIES = {
    "tokenizer": "use the tokenizer it was scored with, or score the pairs again",
    "chat_template": "use the chat template it was scored with, or score the pairs again",
    "max_length": "use the max_length it was scored with, or score the pairs again",
    "reference_model": "train from the model that was the reference there (in the same dtype; also to go on from a checkpoint, whose "
    "weights the Trainer loads), or score the pairs again with this one",
    "format": "score the pairs again with this version of tisdpo",
}


def make_provenance(
    tokenizer,
    *,
    max_length: int | None,
    positive: torch.nn.Module | str | None,
    negative: torch.nn.Module | str | None,
    how: dict,
    reference: torch.nn.Module | str | None = None,
) -> dict:
    """Where the scores of a set come from, for `save_scored` and for what `load_scored` is to expect.

    positive, negative   the models pi+ and pi-, or their fingerprints; None where the rows have no contrast
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
            f"{path} is no scored set ({PROVENANCE} is missing); make one with `tisdpo score` (in Python save_scored), or give another path"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove {path} and score the pairs again") from error


def check_provenance(path: str | Path, provenance: dict, expect: dict) -> None:
    """InputError naming every expected field that differs, with both values and the remedy; a dict is compared by its own fields."""
    differences = _differences(provenance, expect)
    if differences:
        found = "; ".join(f"{name} is {stored!r} there and {wanted!r} here" for name, stored, wanted in differences)
        remedy = _REMEDIES.get(differences[0][0], "score the pairs again, or load the set that belongs to this run")
        raise InputError(f"{path} was scored under other conditions: {found}; {remedy}")


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


def home_of(rows) -> Path | None:
    """The directory of the scored set that these rows were read from, or None if they come from elsewhere."""
    files = getattr(rows, "cache_files", None) or []
    homes = {Path(file["filename"]).parent for file in files if (Path(file["filename"]).parent / PROVENANCE).exists()}
    return homes.pop() if len(homes) == 1 else None


def check_rows(rows: Dataset, home: Path, tokenizer, *, max_length: int | None, reference: str | None = None) -> None:
    """InputError unless the scored set in `home`, which `rows` come from, belongs to this tokenizer, template, truncation and reference.

    max_length   refused where it would have cut other rows than the set's did: rows of the set were cut shorter, or are longer
    reference    fingerprint of the reference that the rows' values have to be of; None where they use none, or it cannot be known
    """
    provenance = load_provenance(home)
    expect = {"tokenizer": tokenizer_fingerprint(tokenizer), "chat_template": chat_template_fingerprint(tokenizer)}
    if reference is not None:
        expect["reference_model"] = reference
    if provenance.get("max_length") != max_length and _cut_otherwise(rows, provenance.get("max_length"), max_length, tokenizer):
        expect["max_length"] = max_length
    check_provenance(home, provenance, expect)


def _cut_otherwise(rows: Dataset, stored: int | None, wanted: int | None, tokenizer) -> bool:
    """Whether rows truncated at `stored` tokens differ from those truncated at `wanted`, as far as these can show it."""
    ids = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    for row in ids:
        for side in ("chosen_ids", "rejected_ids"):
            length = len(row["prompt_ids"]) + len(row[side])
            was_cut = length == stored and row[side][-1] != tokenizer.eos_token_id
            if (wanted is not None and length > wanted) or was_cut:
                return True
    return False
