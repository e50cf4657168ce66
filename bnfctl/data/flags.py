"""Which flags of build go together: one that would change nothing is refused, with what to type in its place."""

from __future__ import annotations

from collections.abc import Iterable

from bnfctl.config import BuildConfig
from bnfctl.errors import UsageError
from bnfctl.options import flag_name, refuse

_OF_RULES = {
    "top_k": "top-bottom", "good": "threshold", "bad": "threshold", "scope": "threshold", "length_balance": "best-worst",
}  # fmt: skip
_OF_PAIRS = ("pairing_ratio", "min_margin", "max_margin", "min_edit", "length_balance")
_OF_THE_OTHER = {
    "preference": ("response_column", "label_column"), "unpaired": ("chosen_column", "rejected_column"),
}  # fmt: skip
_OF_SCORES = ("also", "weights", "combine", "filter", "filter_min", "filter_max", "choose", "top_k", "good", "bad", "scope",
              "length_balance")  # fmt: skip
_OF_SETS = ("split", "subset", "format", "prompt_column", "chosen_column", "rejected_column", "response_column",
            "label_column")  # fmt: skip


def check(config: BuildConfig, scored: bool) -> None:
    """UsageError for the first flag that does not apply, or two that contradict each other.

    scored: the input is a score artifact, not a set that is read.
    """
    if scored:
        _refuse(config, _OF_SETS, "is for a set that is read, not for scores")
        _check_scorers(config)
        _check_rule(config)
    else:
        _refuse(config, _OF_SCORES, "needs scores, not a set that is read")
        if config.format == "unpaired":
            _refuse(config, _OF_PAIRS, "is about pairs; --format unpaired has none")
        if config.format != "auto":
            check_columns(config, config.format)
    _check_order("--min-margin", config.min_margin, "--max-margin", config.max_margin, equal=False)
    _check_order("--min-chars", config.min_chars, "--max-chars", config.max_chars)


def check_columns(config: BuildConfig, kind: str) -> None:
    """UsageError for a column that a set of this kind, "preference" or "unpaired", has no use for."""
    _refuse(config, _OF_THE_OTHER[kind], f"is for another kind of set: this one is {kind}")


def check_no_pairs(config: BuildConfig) -> None:
    """UsageError for what needs pairs, once a set turns out to have none."""
    _refuse(config, _OF_PAIRS, "is about pairs, and this set has single responses")


def _check_scorers(config: BuildConfig) -> None:
    if not config.also:
        _refuse(config, ("weights", "combine"), "is for several scorers: it needs --also")
    if config.weights and len(config.weights) != 1 + len(config.also):
        what = f"{len(config.weights)} weights for {1 + len(config.also)} scorers"
        raise UsageError(what, where="--weights", hint="one for INPUT, then one for each --also: --weights 1,0.5")
    if config.weights and not any(config.weights):
        raise UsageError("all weights are 0", where="--weights", hint="--weights 1,0.5")
    if config.filter is None:
        _refuse(config, ("filter_min", "filter_max"), "needs --filter, the scores that it looks at")
    elif config.filter_min is None and config.filter_max is None:
        raise UsageError(
            "nothing says which candidates pass", where="--filter", hint="add --filter-min or --filter-max"
        )
    _check_order("--filter-min", config.filter_min, "--filter-max", config.filter_max)


def _check_rule(config: BuildConfig) -> None:
    for name, rule in _OF_RULES.items():
        if config.choose != rule:
            _refuse(config, (name,), f"is for --choose {rule}, not {config.choose}", f"--choose {rule}")
    if config.choose != "threshold":
        return
    _refuse(config, _OF_PAIRS, "is about pairs; --choose threshold makes none")
    if config.good is None and config.bad is None:
        raise UsageError("threshold needs to know what is good or bad", where="--choose", hint="--good 0.5 --bad -0.5")
    _check_order("--bad", config.bad, "--good", config.good, equal=False)


def _refuse(config: BuildConfig, names: Iterable[str], why: str, instead: str | None = None) -> None:
    for name in names:
        leave = f"leave {flag_name(name)} out"
        refuse(config, [name], why, f"{instead}, or {leave}" if instead else f"{leave}; see bnfctl build --help")


def _check_order(low_flag: str, low: float | None, high_flag: str, high: float | None, equal: bool = True) -> None:
    if low is None or high is None or low < high or (equal and low == high):
        return
    what = f"{low_flag} {low:g} is {'above' if low > high else 'no less than'} {high_flag} {high:g}"
    raise UsageError(what, where=low_flag, hint=f"{low_flag} has to be {'at most' if equal else 'below'} {high_flag}")
