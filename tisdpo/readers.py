"""Preference pairs from files, memory or the hub, read through `datasets`; what cannot be read is named by file, line and remedy."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from tisdpo.errors import InputError

FILE_TYPES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXT_COLUMNS = ("chosen", "rejected")  # `prompt` may be implicit


def load_pairs(source, *, split: str = "train", streaming: bool = False, limit: int | None = None) -> Dataset | IterableDataset:
    """Preference pairs as a `datasets.Dataset`, or as an `IterableDataset` that reads while it is iterated if `streaming`.

    source     a file (.json, .jsonl, .parquet, also .gz), a directory of `Dataset.save_to_disk` or of such files, a list of dicts, a
               `Dataset`, or the id of a dataset on the hub
    split      of a hub dataset or a `DatasetDict`; "train[:1000]" and the like work where nothing is streamed
    limit      the first so many pairs only

    A pair has the columns `chosen` and `rejected`, and mostly `prompt`, as text or as lists of {"role", "content"}; or `prompt_ids`,
    `chosen_ids` and `rejected_ids`. See `tokenize_pairs` for the forms and for the optional columns with a value for every token.

    Raises InputError for a missing, empty or damaged file, broken JSON (with its line), a missing column, an unknown hub id.

    >>> pairs = load_pairs([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    >>> pairs[0]["chosen"]
    '4'
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"limit must be a positive whole number or None, got {limit!r}")
    if isinstance(source, str | Path):
        name = str(source)
        pairs = _from_path(Path(source), split, streaming) if _is_path(name) else _from_hub(name, split, streaming)
    else:
        name = "the data"
        pairs = _from_memory(source, split)
    if streaming and isinstance(pairs, Dataset):
        pairs = pairs.to_iterable_dataset()
    _check_columns(pairs, name)
    if limit is not None:
        pairs = pairs.take(limit) if streaming else pairs.select(range(min(limit, len(pairs))))
    return pairs


def _is_path(name: str) -> bool:
    """Whether a string means a path of this machine: something is there, or it is written like one."""
    return Path(name).exists() or _file_type(Path(name)) is not None or name.startswith((".", "/", "~")) or name.count("/") > 1


def _file_type(path: Path) -> str | None:
    return FILE_TYPES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _from_path(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of a .json, .jsonl, .jsonl.gz or .parquet file with preference pairs")
    if path.is_dir():
        return _from_directory(path, split, streaming)
    kind = _file_type(path)
    if kind is None:
        raise InputError(f"{path} is of an unknown type; preference pairs are read from .json, .jsonl, .jsonl.gz and .parquet files")
    if _is_empty(path):
        raise InputError(f"{path} is empty; give a file with at least one preference pair")
    if kind == "json" and streaming:
        return IterableDataset.from_generator(_json_rows, gen_kwargs={"path": str(path)})
    if kind == "json":
        for _ in _json_rows(str(path)):  # the loader repairs or hides some faults, and names the line of none
            pass
    base = re.match(r"\w*", split).group() or "train"
    try:
        return datasets.load_dataset(kind, data_files={base: str(path)}, split=split, streaming=streaming)
    except Exception as error:  # the loaders raise whatever their parsers raise
        raise InputError(f"{path} could not be read as {kind} ({_reason(error)}); write it again or correct it") from error


def _from_directory(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _from_memory(datasets.load_from_disk(str(path)), split)
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the directory {path} holds no dataset that can be read ({_reason(error)}); give one file in it") from error


def _from_hub(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:
        raise InputError(
            f"split {split!r} of {name!r} is neither a file here nor could it be loaded from the hub ({_reason(error)}); "
            "check the name, the split and the network, or give the path of a file"
        ) from error


def _from_memory(source, split: str) -> Dataset | IterableDataset:
    if isinstance(source, DatasetDict):
        if split not in source:
            raise InputError(f"the data has no split {split!r} (it has: {', '.join(source)}); choose one of them")
        return source[split]
    if isinstance(source, Dataset | IterableDataset):
        return source
    if not isinstance(source, list | tuple):
        raise InputError(f"pairs must be a path, a hub id, a list of dicts or a Dataset, got {type(source).__name__}")
    if not source:
        raise InputError("the data is empty; give at least one preference pair")
    types: dict[str, type] = {}
    for number, row in enumerate(source):
        _check_row(row, f"pair {number}", types)
    return Dataset.from_list(list(source))


def _check_columns(pairs: Dataset | IterableDataset, name: str) -> None:
    columns = pairs.column_names
    if columns is None:  # a stream that has not been looked at
        columns = list(next(iter(pairs), {}))
    if not columns or (isinstance(pairs, Dataset) and len(pairs) == 0):
        raise InputError(f"{name} is empty; give at least one preference pair")
    needed = ID_COLUMNS if any(c in columns for c in ID_COLUMNS) and not all(c in columns for c in TEXT_COLUMNS) else TEXT_COLUMNS
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(
            f"{name} has no column {' and no column '.join(map(repr, missing))} (it has: {', '.join(columns)}); "
            "rename the column that holds it"
        )


# JSON, line by line: streaming, and finding out what is wrong with a file


def _open(path: str | Path):
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


def _is_empty(path: Path) -> bool:
    try:
        with _open(path) as file:
            while block := file.read(1 << 16):
                if block.strip():
                    return False
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is damaged ({_reason(error)}); copy or download it again") from error
    return True


def _json_rows(path: str) -> Iterator[dict]:
    """The rows of a JSON-lines file, or of a JSON file that is one list; InputError with the line of the first fault."""
    types: dict[str, type] = {}
    try:
        with _open(path) as file:
            if _is_list(file):
                rows = _parse(file.read(), path, None)
                for number, row in enumerate(rows):
                    _check_row(row, f"{path}, entry {number} of the list", types)
                    yield row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = _parse(line, path, number)
                    _check_row(row, f"{path}, line {number}", types)
                    yield row
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is damaged ({_reason(error)}); copy or download it again") from error


def _is_list(file) -> bool:
    """Whether the first character is a bracket; the file is left at its start."""
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    return character == b"["


def _parse(text: bytes, path: str, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno if line is None else line}"
        raise InputError(f"{path}, {where}: broken JSON ({error.msg} at column {error.colno}); correct or remove that line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {line or 1}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _check_row(row, where: str, types: dict[str, type]) -> None:
    """A row must be an object whose columns have the types they had before; `types` remembers them."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a preference pair must be an object with chosen and rejected, got {_kind(row)}")
    for column in ("prompt", *TEXT_COLUMNS, *ID_COLUMNS):
        if column not in row and column in types:
            raise InputError(f"{where}: {column} is missing; add it or remove the pair")
        if column in row:
            expected = types.setdefault(column, type(row[column]))
            if type(row[column]) is not expected:
                raise InputError(
                    f"{where}: {column} is {_kind(row[column])}, but {_NAMES.get(expected, expected.__name__)} in the pairs before; "
                    "correct or remove the pair"
                )


_NAMES = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _kind(value) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
