"""How a command ends: an error is one line and an exit code, a signal 128+n; no traceback unless asked."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import typer

from steerlens.errors import HeadError, MethodError, RecipeError, SpanError, SteerlensError

T = TypeVar("T")
SAMPLE_ERRORS = 3
_BROKEN_PIPE = 128 + 13
_USAGE = (MethodError, HeadError, SpanError, RecipeError)


class UsageError(SteerlensError, ValueError):
    """Options that do not fit together or hold an impossible value."""

    exit_code = 2


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


_stop: Stopped | None = None


def catch_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped`; a second one ends the process at once."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # an ignored signal (nohup, a shell's background job) stays ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _stop
    _stop = Stopped(number)
    signal.signal(number, signal.SIG_DFL)
    raise _stop


def check_stop() -> None:
    """Raise again a stop that arrived where Python swallows exceptions, such as a destructor."""
    if _stop is not None:
        raise _stop


def leave_quietly() -> None:
    """Flush what was written so far; a reader that is gone is no reason to complain."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def guarded(function: Callable[..., T]) -> Callable[..., T]:
    """The command with its exit codes: the number that it returns, or what its exception stands for."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> T:
        try:
            result = function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            # nobody reads on: end as SIGPIPE would, without a complaint when the interpreter flushes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            leave_quietly()
            raise typer.Exit(128 + signal.SIGINT) from None
        except Exception as error:
            if os.environ.get("STEERLENS_DEBUG") == "1":
                raise
            typer.echo(f"steerlens: {message(error)}", err=True)
            raise typer.Exit(exit_code(error)) from None
        if isinstance(result, int) and result:
            raise typer.Exit(result)
        return result

    return command


def exit_code(error: Exception) -> int:
    """2 for what the user can fix in the call, else 1."""
    return int(getattr(error, "exit_code", 2 if isinstance(error, _USAGE) else 1))


def message(error: Exception) -> str:
    """What to say about an error: our own messages as they are, others on one line with their type."""
    if isinstance(error, SteerlensError):
        return str(error)
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:500]} (STEERLENS_DEBUG=1 shows where)"


def quiet() -> None:
    """Keep libraries from writing into a run's output; what the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("STEERLENS_DEBUG") != "1":
        warnings.filterwarnings("ignore")
