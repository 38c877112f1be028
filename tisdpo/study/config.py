"""The YAML file of a study, as dataclasses; everything that can be refused is refused when it is read."""
# ruff: noqa: RUF009 (`option` is dataclasses.field with a help text)

import itertools
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tisdpo.config import CONSTRUCTIONS, RunConfig, config_from, option
from tisdpo.errors import InputError
from tisdpo.settings import build, leaves, merged, nearest, read_yaml, settings_text, with_overrides

# metrics of a claim: of two frontiers, of the policy at the best search point, of the weights
OF_TWO = {
    "lead": "mean lead of the first frontier over the second, over all KL that both reach (area between them / width, root-of-KL axis)",
    "lead_at_kl": "lead of the first frontier over the second at one KL: `kl`, or the largest that both reach",
}
OF_ONE = {
    "reward": "true reward of the sampled responses, at the arm's best search point",
    "right": "share of right answers, at the best search point",
    "accuracy": "held-out accuracy, at the best search point",
    "kl": "KL to the base model, at the best search point",
    "length": "response length, at the best search point",
    "finished": "share of responses that end by themselves, at the best search point",
    "chosen_reward": "implicit reward of the chosen responses in the last fifth of training, at the best search point",
    "rejected_reward": "the same of the rejected responses",
    "auc": "chance that the contrast is larger in size on a token with reward than on one without (0.5: it says nothing)",
    "spearman": "rank correlation of contrast and true token reward",
    "signal_to_noise": "mean |log w| of the weights w on tokens with reward, over the mean elsewhere",
    "effective_size": "effective sample size of the weights, as a share of the tokens (mean of both sides)",
    "flop": "floating-point operations of one policy, weight estimation included",
}
_SET_BY_THE_STUDY = ("name", "description", "output_dir", "seeds", "methods")


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One of the things that are compared: a method with its settings."""

    method: str = option("a method of `tisdpo run`: dpo, P, S, D, R, random, swapped, equal, truth or oracle")
    overrides: dict = option("settings of the run, such as {objective.kl: reverse}; none that `search` varies", default_factory=dict)
    search: dict = option(
        "other values for settings that the study's `search` varies, as many of each: no arm is searched more than another",
        default_factory=dict,
    )
    note: str = option("one sentence for the reader of the report", default="")
    against: str | None = option("arm whose frontier this one is compared with; null: `baseline`", default=None)
    group: str = option("arms of a group share a figure of the report (with what they are compared with)", default="")


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """One sentence that the study tests. It is confirmed where all its comparisons are, and depends on them where some are."""

    text: str = option("the claim")
    compare: str | list[str] = option('"A - B" of two arms, "A - 0.5", or "A" alone (against 0); or several of them')
    metric: str | list[str] = option("what is compared; or several", default="lead")
    expect: Literal["higher", "lower", "equal", "rising", "falling"] = option(
        "the sign of every difference; or that the differences rise (fall) from each comparison to the next, in the order of the list",
        default="higher",
    )
    within: float | None = option("for expect: equal, the largest difference that counts as equal", default=None)
    kl: float | None = option("for lead_at_kl", default=None)

    def __post_init__(self):
        if (self.expect == "equal") != (self.within is not None):
            raise InputError("within belongs to expect: equal (the largest difference that counts as equal); give both or neither")
        if self.within is not None and not self.within > 0:
            raise InputError(f"within must be positive, got {self.within}")
        if self.kl is not None and (not self.kl > 0 or "lead_at_kl" not in _list(self.metric)):
            raise InputError("kl must be positive and belongs to metric: lead_at_kl")
        if self.trend and (len(_list(self.compare)) < 2 or len(_list(self.metric)) > 1):
            raise InputError(f"expect: {self.expect} needs a list of two or more comparisons, of one metric")
        for metric in _list(self.metric):
            if metric not in OF_TWO and metric not in OF_ONE:
                hint = nearest(metric, [*OF_TWO, *OF_ONE])
                known = ", ".join([*OF_TWO, *OF_ONE])
                raise InputError(f"metric is {metric!r}, which is none of {known}" + (f"; did you mean {hint}?" if hint else ""))

    @property
    def trend(self) -> bool:
        return self.expect in ("rising", "falling")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: every arm is trained at every point of the search with every seed."""

    name: str = option("name of the study, and of its directory; without it, the name of the file")
    description: str = option("what is asked, for the report", default="")
    output_dir: str = option("directory of the study; empty: runs/studies/<name>", default="")
    seeds: int | list[int] = option("a number n of seeds (0 .. n-1), or a list of them", default=3)
    jobs: int = option("policies trained at a time, each in a process with one thread of torch (base.threads)", default=2)
    base: dict = option("the run that all arms start from: `run` (a YAML file, seen from this one), and settings on top of it")
    arms: dict = option("name: {method, overrides, search, note, against, group}")
    search: dict = option(
        "settings of the run with the values to try, the same for all arms: {objective.beta: [0.1, 0.3], ...}", default_factory=dict
    )
    baseline: str | None = option("arm that the others are compared with; null: the first", default=None)
    claims: list[dict] = option("list of {text, compare, metric, expect, within, kl}", default_factory=list)
    full: dict = option("keys of this file that --full replaces", default_factory=dict)

    def __post_init__(self):
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise InputError(f"name must be a plain name without a path, got {self.name!r}; directories go into output_dir")
        if self.jobs < 1:
            raise InputError(f"jobs must be at least 1, got {self.jobs}")
        if not self.seed_list or min(self.seed_list) < 0 or len(set(self.seed_list)) < len(self.seed_list):
            raise InputError(f"seeds must be a number of at least 1 or a list of different seeds of at least 0, got {self.seeds}")
        if not self.arms:
            raise InputError("arms is empty; name at least one, such as DPO: {method: dpo}")
        if "base" in self.arms:
            raise InputError("arms.base: base is the model that all arms start from; give the arm another name")
        for key, values in leaves(self.search).items():
            if not isinstance(values, list) or not values:
                raise InputError(f"search.{key} must be a list of the values to try, got {values!r}")
        if self.baseline is not None and self.baseline not in self.arms:
            raise InputError(f"baseline is {self.baseline!r}, which is none of the arms ({', '.join(map(str, self.arms))})")

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclass(frozen=True)
class Study:
    """A study with everything resolved: `runs` holds the configuration of every (arm, number of the search point)."""

    config: StudyConfig
    command: str
    arms: dict[str, ArmConfig]
    claims: list[ClaimConfig]
    points: list[dict[str, Any]]
    runs: dict[tuple[str, int], RunConfig]

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir or f"runs/studies/{self.config.name}")

    @property
    def baseline(self) -> str:
        return self.config.baseline or next(iter(self.arms))

    def point(self, arm: str, number: int) -> dict[str, Any]:
        """The settings of an arm at a point of the search."""
        return _own_points(self.arms[arm], self.config)[number]

    def against(self, arm: str) -> str:
        """The arm that this one is compared with."""
        return self.arms[arm].against or self.baseline

    @cached_property
    def settings(self) -> dict:
        """The study as plain data."""
        return asdict(self.config)


# --smoke: the most of everything that takes time
SMOKE = {
    "data.limit": 24, "data.heldout": 8, "contrast.data.limit": 24, "contrast.data.heldout": 8,
    "evaluation.data.limit": 24, "evaluation.data.heldout": 8,
    "model.hidden_size": 16, "model.pretrain.steps": 2, "model.pretrain.warmup_steps": 0,
    "contrast.model.hidden_size": 16, "contrast.model.pretrain.steps": 2, "contrast.model.pretrain.warmup_steps": 0,
    "contrast.sft.steps": 2, "contrast.dpo.steps": 2, "contrast.pairs": 2, "contrast.checkpoints": 2,
    "train.steps": 4, "train.batch_size": 4, "evaluation.prompts": 4, "evaluation.max_new_tokens": 8, "evaluation.checkpoints": 2,
}  # fmt: skip
PLACES = (Path("examples/studies"), Path(__file__).parents[2] / "examples" / "studies")


def find_study(name: str | Path) -> Path:
    """The file of a study: a path, or the name of one in examples/studies."""
    if Path(name).suffix:
        return Path(name)
    for place in PLACES:
        if (place / f"{name}.yaml").exists():
            return place / f"{name}.yaml"
    known = sorted({path.stem for place in PLACES for path in place.glob("*.yaml")})
    hint = nearest(str(name), known)
    listed = f"there are {', '.join(known)}" if known else "there are none here"
    raise InputError(
        f"{name!r} is no study of examples/studies ({listed}); give one of these or the path of a YAML file"
        + (f"; did you mean {hint}?" if hint else "")
    )


def load_study(path: str | Path, overrides: list[str] | tuple[str, ...] = (), full: bool = False, smoke: bool = False) -> Study:
    """The study in a YAML file (or of a name in examples/studies), with `key.sub=value` overrides, which win.

    `full` puts its section `full` on top of the file. `smoke` makes it as small as it can be: two seeds, the first value of everything
    that is searched and at most `SMOKE` of what takes time, which shows in seconds that everything runs.

    Raises InputError for whatever `load_config` refuses in the settings of an arm, and for arms, claims and search points that do not
    belong together.
    """
    given_as, path = path, find_study(path)
    if full and smoke:
        raise InputError("--full and --smoke contradict each other; give one of them")
    values = _undotted({"name": path.stem, **read_yaml(path)})
    if full:
        if not values.get("full"):
            raise InputError(f"{path} has no section full, so --full means nothing; leave it out")
        values = merged(values, _undotted(values["full"]))
        values["name"] = f"{values['name']}-full"
    if smoke:
        first = {key: tried[:1] if isinstance(tried, list) else tried for key, tried in leaves(values.get("search") or {}).items()}
        arms = {name: _smoke_arm(arm) for name, arm in (values.get("arms") or {}).items()}
        values |= {"name": f"{values['name']}-smoke", "seeds": 2, "arms": arms, "search": first}
    values, given = with_overrides(values, overrides)
    config = build(StudyConfig, values, file=str(path), overridden=given)
    arms = {str(n): build(ArmConfig, a or {}, place=f"arms.{n}", file=str(path), overridden=given) for n, a in config.arms.items()}
    claims = [build(ClaimConfig, c, place=f"claims[{n}]", file=str(path)) for n, c in enumerate(config.claims)]
    base, limits = _base(config, path), SMOKE if smoke else {}
    for n, arm in arms.items():
        _check_search(arm, config, f"{path}: arms.{n}")
    runs = {
        (n, p): _run(base, config, n, arm, point, path, given, limits)
        for n, arm in arms.items()
        for p, point in enumerate(_own_points(arm, config))
    }
    for n, arm in arms.items():
        if arm.against is not None and arm.against not in arms:
            raise InputError(f"{path}: arms.{n}.against is {arm.against!r}, which is none of the arms ({', '.join(arms)})")
    for n, claim in enumerate(claims):
        for compare, metric in comparisons(claim):
            _, other = sides(compare, arms, f"{path}: claims[{n}].compare")
            if metric in OF_TWO and not isinstance(other, str):
                raise InputError(f"{path}: claims[{n}].compare is {compare!r}, but {metric} needs two arms: A - B")
    words = [str(given_as), *overrides, *(["--full"] if full else []), *(["--smoke"] if smoke else [])]
    command = " ".join(["tisdpo study", *(f'"{w}"' if " " in w else w for w in words)])
    return Study(config, command, arms, claims, _points(leaves(config.search)), runs)


def _smoke_arm(arm):
    """An arm as it is written, with the first value of what it searches."""
    if not isinstance(arm, dict) or not isinstance(arm.get("search"), dict):
        return arm
    return arm | {"search": {key: tried[:1] if isinstance(tried, list) else tried for key, tried in leaves(arm["search"]).items()}}


def _points(search: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(search, values)) for values in itertools.product(*search.values())]


def _own_points(arm: ArmConfig, config: StudyConfig) -> list[dict[str, Any]]:
    """The points of the search of one arm, as many as those of every other."""
    return _points(leaves(config.search) | leaves(arm.search))


def _check_search(arm: ArmConfig, config: StudyConfig, place: str) -> None:
    search = leaves(config.search)
    for key, values in leaves(arm.search).items():
        if key not in search:
            raise InputError(
                f"{place}.search has {key}, which the study's search ({', '.join(search) or 'empty'}) does not vary; leave it out"
            )
        if not isinstance(values, list) or len(values) != len(search[key]):
            raise InputError(f"{place}.search.{key} must be a list of {len(search[key])} values, as many as the study's search has")


def _undotted(values: dict) -> dict:
    """Dotted keys of `base` and `search` as sections, so that a later value of the same key replaces an earlier one, however written."""
    return {key: merged({}, value) if key in ("base", "search") and isinstance(value, dict) else value for key, value in values.items()}


def _base(config: StudyConfig, path: Path) -> dict:
    """The settings of the run that all arms start from."""
    settings = dict(config.base)
    run = settings.pop("run", None)
    if run is not None and not isinstance(run, str):
        raise InputError(f"{path}: base.run must be the path of a run's YAML file, got {run!r}")
    for key in _SET_BY_THE_STUDY:
        if key in settings:
            raise InputError(f"{path}: base.{key} is set by the study itself; use the study's own keys (seeds, arms, output_dir)")
    start = {} if run is None else read_yaml(path.parent / run)
    return merged({key: value for key, value in start.items() if key not in _SET_BY_THE_STUDY}, settings)


def _run(base: dict, config: StudyConfig, name: str, arm: ArmConfig, point: dict, path: Path, given, limits: dict) -> RunConfig:
    """The configuration of an arm at a point of the search."""
    own = leaves(merged({}, arm.overrides))
    for key in own:
        for searched in point:
            if f"{key}.".startswith(f"{searched}.") or f"{searched}.".startswith(f"{key}."):
                raise InputError(f"{path}: arms.{name} sets {key}, which search varies for all arms; take it out of one of them")
        if key.split(".")[0] in _SET_BY_THE_STUDY:
            raise InputError(f"{path}: arms.{name} sets {key}, which the study itself sets; leave it out")
    values = merged(merged({"threads": 1, **base}, arm.overrides), point)
    contrast = dict(values.get("contrast") or {})
    constructions = contrast.get("constructions", ["P", "S", "D"])
    if arm.method in CONSTRUCTIONS:
        constructions = [arm.method]
    elif arm.method not in ("random", "swapped"):
        constructions = []
    values |= {"name": config.name, "seeds": 1, "methods": [arm.method], "contrast": contrast | {"constructions": constructions[:1]}}
    found = leaves(values)
    values = merged(values, {key: min(found[key], most) for key, most in limits.items() if isinstance(found.get(key), int | float)})
    changed = {key.removeprefix("base.") for key in given if key.startswith("base.")}
    file = f"{path}, arm {name!r}"
    run = config_from(values, file, changed)
    if run.evaluation.checkpoints < 1:
        raise InputError(f"{file}: evaluation.checkpoints must be at least 1: a frontier is drawn through the checkpoints")
    for place, stage in run.stages.items():
        if stage.tokens_per_batch is not None:
            raise InputError(f"{file}: a study counts its costs from batch_size, so {place}.tokens_per_batch is not for it; set batch_size")
    return run


def comparisons(claim: ClaimConfig) -> list[tuple[str, str]]:
    """(compare, metric) of all comparisons of a claim."""
    return list(itertools.product(_list(claim.compare), _list(claim.metric)))


def sides(compare: str, arms, place: str = "compare") -> tuple[str, str | float]:
    """The two sides of "A - B": an arm, and an arm or a number (0 where there is none). Names of arms may hold " - " themselves."""
    if compare in arms:
        return compare, 0.0
    at = compare.find(" - ")
    while at >= 0:
        first, second = compare[:at].strip(), compare[at + 3 :].strip()
        if first in arms and second in arms:
            return first, second
        if first in arms:
            try:
                return first, float(second)
            except ValueError:
                pass
        at = compare.find(" - ", at + 1)
    raise InputError(f"{place}: {compare!r} is no comparison A - B of two arms, or of an arm and a number; the arms are {', '.join(arms)}")


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def describe_study() -> str:
    """Every key of a study with its default and meaning, as --help prints it."""
    arm, claim = settings_text(ArmConfig, "arms.<name>"), settings_text(ClaimConfig, "claims[n]")
    metrics = "\n".join(f"  {name:<18}{text}" for name, text in {**OF_TWO, **OF_ONE}.items())
    return f"{settings_text(StudyConfig)}\n\n{arm}\n\n{claim}\n\nmetrics of a claim\n{metrics}"
