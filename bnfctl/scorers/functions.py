"""The user's own rule: `--rule python:MODULE:FUNCTION`, from the working directory or installed."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnfctl.config import ScoreConfig
from bnfctl.data.records import Prompt, Reward
from bnfctl.digests import hash_file
from bnfctl.errors import BnfctlError, UsageError, nearest

PREFIX = "python:"
_EXAMPLE = "def FUNCTION(prompt, response, answer): return 1.0"


def version_of(name: str) -> str:
    """The digest of the module's file, and of the function's where that is another one; of nothing else that they import.

    UsageError as `own_rule`.
    """
    return ", ".join(f"sha256 {hash_file(file)}" for file in _files(_function(name), name))


def own_rule(name: str) -> Callable[[Prompt, str, ScoreConfig], Reward]:
    """`python:MODULE:FUNCTION` as a rule.

    The function is called as f(prompt, response, answer): the text of the last user turn, the response, the known
    answer or None.  It returns a number, a bool, None (it could not tell) or a Reward.  Whatever it raises, and
    anything else that it returns, is a BnfctlError that names the prompt.  A number that is not finite is null.

    Raises UsageError where there is no such module or function, or where it can't be called like that.
    """
    function = _function(name)

    def rule(prompt: Prompt, response: str, config: ScoreConfig) -> Reward:
        try:
            returned = function(prompt.text, response, prompt.answer)
        except (Exception, SystemExit) as error:
            what = f"{name} raised {type(error).__name__}: {error}"
            raise BnfctlError(what, where=f"prompt {prompt.id}", hint=f"see {_line(error, function)}") from error
        return _reward(returned, name, prompt)

    return rule


def _reward(returned: Any, name: str, prompt: Prompt) -> Reward:
    reward = returned if isinstance(returned, Reward) else Reward(returned)
    if reward.value is None and _is_json(reward.extra):
        return reward
    try:
        if isinstance(reward.value, str) or not _is_json(reward.extra):
            raise TypeError
        value = float(reward.value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise BnfctlError(
            f"{name} returned {returned!r:.200}", where=f"prompt {prompt.id}",
            hint="return a number, True, False, None, or a Reward whose extra is JSON",
        ) from None  # fmt: skip
    # a reward that is no number can be neither stored nor compared
    return Reward(value, reward.extra) if math.isfinite(value) else Reward(None, {"not_finite": str(value)})


def _is_json(extra: Any) -> bool:
    try:
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):  # half an emoji is a ValueError, and cannot be stored either
        return False
    return isinstance(extra, dict)


def _function(name: str) -> Callable[..., Any]:
    module_name, separator, function_name = name.removeprefix(PREFIX).partition(":")
    if not (separator and module_name and function_name):
        raise UsageError(f"'{name}' is not python:MODULE:FUNCTION", where="--rule", hint="--rule python:rewards:score")
    module = _module(module_name, function_name)
    function = getattr(module, function_name, None)
    file = getattr(module, "__file__", None) or module_name
    example = _EXAMPLE.replace("FUNCTION", function_name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"{module_name} has no function '{function_name}'{nearest(function_name, known)}", where=file, hint=example
        )
    try:
        inspect.signature(function).bind("", "", None)
    except ValueError:  # a builtin that does not say
        pass
    except TypeError as error:
        raise UsageError(f"{module_name}:{function_name} {error}", where=file, hint=example) from None
    return function


def _module(name: str, function_name: str) -> Any:
    with _working_directory_first():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise UsageError(f"{name} imports {error.name}, which is missing", where="--rule",
                                 hint=f"pip install {error.name}") from error  # fmt: skip
            path = Path(*name.split(".")).with_suffix(".py")
            raise UsageError(
                f"no module '{name}' here or installed", where="--rule",
                hint=f"write {path} with `{_EXAMPLE.replace('FUNCTION', function_name)}`",
            ) from None  # fmt: skip
        except Exception as error:
            what = f"{name} cannot be imported: {type(error).__name__}: {error}"
            raise UsageError(what, where="--rule", hint=f"python -c 'import {name}'") from error


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """For this import; afterwards last, so that a file of the user's hides nothing from what is imported later."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _files(function: Callable[..., Any], name: str) -> list[Path]:
    module_name = name.removeprefix(PREFIX).partition(":")[0]
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        raise UsageError(f"{module_name} has no file of its own", where="--rule", hint="put the function in a .py file")
    home = sys.modules.get(getattr(inspect.unwrap(function), "__module__", None) or "")
    return [Path(found) for found in dict.fromkeys((file, getattr(home, "__file__", None))) if found]


def _line(error: BaseException, function: Callable[..., Any]) -> str:
    """file:line of the innermost frame of the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else repr(function)
