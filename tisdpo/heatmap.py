"""Token weights over the text they belong to, as data for the HTML page and as a picture in the terminal.

One response is a dict of parallel lists, one entry per completion token:

    tokens     decoded pieces of text whose concatenation is the response (a leading space belongs to its token)
    weights    the weights w_t >= 0 of the loss
    contrast   optional, the raw contrast r_t = log pi+ - log pi- in nats
    truth      optional, the known reward of the token (0: the token does not matter)

The colour is the log weight on a diverging scale around weight 1, blue below and orange above, the same in both responses
of a pair: orange tokens are those the loss listens to.
"""

import math
import os
import sys
from collections.abc import Iterable

from tisdpo.errors import InputError

SMALLEST_LIMIT = math.log(1.25)  # nearly equal weights must look nearly equal, so the scale never gets finer than this
LARGEST_LIMIT = math.log(20.0)  # one enormous weight must not bleach all others
NEUTRAL = math.log(1.1)  # in plain text, weights this close to 1 are not printed

BLUE, PALE_BLUE = (0, 114, 178), (211, 231, 244)
ORANGE, PALE_ORANGE = (213, 94, 0), (253, 228, 207)


def check_response(response: dict, name: str) -> None:
    """Raise InputError unless the lists of `response` are parallel and its weights finite and not negative."""
    tokens = response["tokens"]
    for key in ("weights", "contrast", "truth"):
        values = response.get(key)
        if values is None and key != "weights":
            continue
        if values is None or len(values) != len(tokens):
            found = "none" if values is None else len(values)
            raise InputError(f"heat map of the {name} response: {len(tokens)} tokens, but {found} {key}; score the pair again")
    for position, weight in enumerate(response["weights"]):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"heat map of the {name} response: the weight of token {position} is {weight}; score the pair again")


def colour_limit(responses: Iterable[dict]) -> float:
    """|log weight| that gets the full colour: the largest one of all `responses`, kept within a sensible range."""
    logs = [abs(math.log(weight)) for response in responses for weight in response["weights"] if weight > 0]
    return min(max([SMALLEST_LIMIT, *logs]), LARGEST_LIMIT)


def intensity(weight: float, limit: float) -> float:
    """Place of `weight` on the colour scale: -1 (full blue) .. 0 (weight 1, no colour) .. 1 (full orange)."""
    return max(-1.0, min(1.0, math.log(weight) / limit)) if weight > 0 else -1.0


def readable(token: str) -> str:
    """`token` as it should appear on a page or in a terminal: spaces as spaces, line ends visible, no control characters."""
    if token[:1] in ("Ġ", "▁"):  # the space of byte-level and SentencePiece vocabularies
        token = " " + token[1:]
    token = token.replace("Ċ", "\n").replace("\r\n", "\n")
    pieces = []
    for character in token:
        code = ord(character)
        if character == "\n":
            pieces.append("⏎\n")
        elif code < 0x20:
            pieces.append(chr(0x2400 + code))
        else:
            pieces.append("␡" if 0x7F <= code < 0xA0 else character)
    return "".join(pieces) or "◌"


def is_important(truth: float | None) -> bool:
    """True where the known reward of a token is not zero (a rounding error is zero)."""
    return truth is not None and abs(truth) > 1e-6


def signed(value: float, digits: int = 2) -> str:
    """`value` with its sign and a true minus; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def token_views(response: dict, limit: float) -> list[dict]:
    """What the page needs of every token: {"lead" (uncoloured space before it), "text", "side", "alpha", "truth", "title"}."""
    views = []
    contrast = response.get("contrast") or [None] * len(response["tokens"])
    truth = response.get("truth") or [None] * len(response["tokens"])
    for token, weight, r, reward in zip(response["tokens"], response["weights"], contrast, truth):
        level = intensity(weight, limit)
        title = [f"weight {weight:.3g}"]
        if r is not None:
            title.append(f"contrast {signed(r)} nats")
        if reward is not None:
            title.append(f"true reward {signed(reward)}")
        text = readable(token)
        core = text.lstrip(" ") or text
        views.append(
            {
                "lead": text[: len(text) - len(core)],
                "text": core,
                "side": "up" if level > 0 else "down",
                "alpha": f"{abs(level):.2f}",
                "truth": ("good" if reward > 0 else "bad") if is_important(reward) else "",
                "title": " · ".join(title),
            }
        )
    return views


def scale_ticks(limit: float) -> list[str]:
    """Weights at five equidistant places of the colour bar, from full blue to full orange."""
    return [f"{math.exp(share * limit):.2g}" for share in (-1.0, -0.5, 0.0, 0.5, 1.0)]


def heatmap_groups(heatmaps: list[dict]) -> list[dict]:
    """Heat maps of the same pair and seed together, in order of appearance, on ONE colour scale for all of them.

    Returns [{"prompt", "seed", "rows": [{"construction", "chosen": token views, "rejected": token views}], "truth": bool}].
    """
    sides = ("chosen", "rejected")
    for heatmap in heatmaps:
        for side in sides:
            check_response(heatmap[side], side)
    limit = colour_limit(heatmap[side] for heatmap in heatmaps for side in sides)
    groups = {}
    for heatmap in heatmaps:
        key = (heatmap.get("seed"), heatmap["prompt"], *(tuple(heatmap[side]["tokens"]) for side in sides))
        group = groups.setdefault(key, {"prompt": heatmap["prompt"], "seed": heatmap.get("seed"), "rows": [], "truth": False})
        group["rows"].append({"construction": heatmap["construction"], **{side: token_views(heatmap[side], limit) for side in sides}})
        group["truth"] |= any(heatmap[side].get("truth") is not None for side in sides)
    return list(groups.values())


def heatmap_terminal(prompt: str, chosen: dict, rejected: dict, *, color: bool = True) -> str:
    """Text of a pair with its weights, ready to print: prompt, chosen over rejected, a legend.

    With `color`, on a terminal and without NO_COLOR in the environment, the background of a token is its log weight
    (24-bit where COLORTERM says so, else the 256-colour cube) and truly important tokens are underlined. Otherwise the
    weight stands in braces behind every token that is more than 10 % away from 1, and a star before the important ones.
    Control characters of the text are made visible, never sent to the terminal.
    Raises InputError for lists that are not parallel or a weight that is no number.
    """
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        check_response(response, name)
    limit = colour_limit((chosen, rejected))
    coloured = color and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    token_text = _coloured_token if coloured else _plain_token
    bold, plain = ("\x1b[1m", "\x1b[0m") if coloured else ("", "")
    lines = [f"{bold}prompt{plain}    {readable(prompt)}"]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        truth = response.get("truth") or [None] * len(response["tokens"])
        text = "".join(
            token_text(readable(token), weight, is_important(reward), limit)
            for token, weight, reward in zip(response["tokens"], response["weights"], truth)
        )
        lines.append(f"{bold}{name:<10}{plain}{text.lstrip() if not coloured else text}")
    known = any(response.get("truth") is not None for response in (chosen, rejected))
    if coloured:
        steps = (-1.0, -0.5, 0.0, 0.5, 1.0)
        swatches = "".join(_coloured_token(f" {math.exp(step * limit):.2g} ", math.exp(step * limit), False, limit) for step in steps)
        lines.append(f"{bold}weight{plain}    {swatches}" + ("  underlined: truly important" if known else ""))
    else:
        lines.append("weight    in braces; without one it is within 10 % of 1" + ("; *: truly important" if known else ""))
    return "\n".join(lines)


def _plain_token(text: str, weight: float, important: bool, limit: float) -> str:
    del limit  # numbers need no scale
    core = text.strip()
    if not core:
        return text
    lead, tail = text[: text.index(core)], text[text.index(core) + len(core) :]
    number = "" if weight > 0 and abs(math.log(weight)) <= NEUTRAL else f"{{{weight:.2g}}}"
    return f"{lead}{'*' if important else ''}{core}{number}{tail}"


def _coloured_token(text: str, weight: float, important: bool, limit: float) -> str:
    level = intensity(weight, limit)
    codes = ["4"] if important else []
    if abs(level) >= 0.08:  # a token at weight 1 keeps the terminal's own background
        pale, full = (PALE_ORANGE, ORANGE) if level > 0 else (PALE_BLUE, BLUE)
        background = tuple(round(a + (b - a) * abs(level)) for a, b in zip(pale, full))
        luminance = (0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2]) / 255
        codes += [_ansi(background, 48), _ansi((0, 0, 0) if luminance > 0.45 else (255, 255, 255), 38)]
    if not codes:
        return text
    start = f"\x1b[{';'.join(codes)}m"
    return text.replace("\n", f"\x1b[0m\n{start}").join((start, "\x1b[0m"))  # a colour left on at a line end paints the whole line


def _ansi(rgb: tuple[int, int, int], ground: int) -> str:
    """SGR parameters of a colour; `ground` 38: text, 48: background."""
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return f"{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}"
    red, green, blue = (round(channel / 255 * 5) for channel in rgb)
    return f"{ground};5;{16 + 36 * red + 6 * green + blue}"
