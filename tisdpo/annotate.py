"""A page on which a person rates the tokens of some pairs of a scored set, blind to what was estimated for them.

The page is one file without any outside resource; it exports the file that `tisdpo.agreement` reads.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from tisdpo.agreement import SCALE, ratings_file
from tisdpo.data import SIDES
from tisdpo.errors import InputError
from tisdpo.files import write_json
from tisdpo.heatmap import readable
from tisdpo.report import render, write_html
from tisdpo.scored import load_contrast, load_provenance, load_tokenizer_of, scored_sets
from tisdpo.summary import pieces


def write(
    scored: str | Path, out: str | Path, *, pairs: int = 20, seed: int = 0, tokenizer: str | None = None, truth: str | Path | None = None
) -> list[Path]:
    """Write the page for a sample of a scored set, and with `truth` the ratings that its known truth gives; the paths written.

    scored     directory of a scored set; of a run its first seed, whose constructions all have the same pairs
    pairs      how many are drawn, in random order and without repetition, by `seed`
    tokenizer  that of the set (default: found in the run around it)

    Raises InputError where the set has fewer pairs, no tokenizer is found, or the truth is asked for and not known.

    >>> write("runs/demo", "annotate.html", pairs=20)
    [PosixPath('annotate.html')]
    """
    scored = scored_sets(scored)[0]
    provenance, rows = load_provenance(scored), load_contrast(scored)
    if pairs > len(rows):
        raise InputError(f"--pairs {pairs}: {scored} has {len(rows)}; ask for at most as many")
    picked = random.Random(seed).sample(range(len(rows)), pairs)
    derived = None
    if truth is not None:
        if f"{SIDES[0]}_truth" not in rows.column_names:
            raise InputError(
                f"--from-truth: {scored} has no known truth, which only runs on a world of data.source=synthetic or arithmetic have; "
                "leave it out"
            )
        derived = ratings_file(provenance, "known truth", ratings_from_truth(rows, picked))
    written = [write_html(page(rows, picked, load_tokenizer_of(scored, tokenizer), provenance), out)]
    if derived is not None:
        write_json(truth, derived)
        written.append(Path(truth))
    return written


def page(rows, picked: Sequence[int], tokenizer, provenance: dict) -> str:
    """The page for these rows of a scored set, as HTML; nothing of their scores is in it."""
    shown = []
    for row in picked:
        prompt = readable(tokenizer.decode(rows[row]["prompt_ids"], skip_special_tokens=True)).replace("⏎\n", "\n")
        shown.append(
            {"row": row, "prompt": prompt, **{side: [readable(t) for t in pieces(tokenizer, rows[row][f"{side}_ids"])] for side in SIDES}}
        )
    return render("annotate.html.j2", {"data": ratings_file(provenance, "", shown), "scale": SCALE})


def ratings_from_truth(rows, picked: Sequence[int], *, missed: float = 0.0, seed: int = 0) -> list[dict]:
    """The pairs of a file of ratings as a rater would give them who knows the truth of a world: nobody's opinion.

    rows    of a scored set with chosen_truth and rejected_truth, the known reward of every token (`tisdpo.world.KnownTruth`)
    missed  share of the tokens with a reward that the rater overlooks (rates 0), drawn by `seed`; so derived raters can be made to differ

    A reward becomes the rating of its sign and of its size relative to the largest one of these rows: the largest is 2, the smallest 1.
    """
    if not 0 <= missed <= 1:
        raise ValueError(f"missed={missed} is a share between 0 and 1")
    drawn = random.Random(seed)
    known = [{side: rows[row][f"{side}_truth"] for side in SIDES} for row in picked]
    largest = max((abs(x) for pair in known for side in SIDES for x in pair[side]), default=0.0)

    def rating(reward: float) -> int:
        if reward == 0 or drawn.random() < missed:
            return 0
        return (1 if reward > 0 else -1) * max(1, round(2 * abs(reward) / largest))

    return [{"row": row, "done": True, **{side: [rating(x) for x in pair[side]] for side in SIDES}} for row, pair in zip(picked, known)]
