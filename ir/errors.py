"""The one family of errors that users meet, and the wrapper that shows them as one line.

This module depends on nothing, so every package (the runtime included) may use it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn


class Qwen3Error(Exception):
    """Base of every error that a user can cause or must know about. The message is one line."""


class ConfigError(Qwen3Error):
    """config.json (or a command's argument) is missing, malformed or out of range."""


class CheckpointError(Qwen3Error):
    """A weight, tokenizer or shard is missing, truncated, or has the wrong shape or dtype."""


class GraphError(Qwen3Error):
    """A graph is not what it should be: failed verification, unreadable ONNX or .ir text."""


class UnsupportedError(Qwen3Error):
    """The input is well formed, but nothing here can compile or run it. Names what and why."""


class BuildError(Qwen3Error):
    """Emitting or compiling the engine failed (no compiler, read-only folder, compiler error)."""


class InfiniCoreError(Qwen3Error):
    """An InfiniCore call failed. Carries the call and the infiniStatus_t.

    Args:
        call: name of the C function, for example ``infiniopGemm``.
        status: the infiniStatus_t that it returned.
        detail: what the engine says about it.
    """

    def __init__(self, call: str, status: int, detail: str = "") -> None:
        super().__init__(f"{call} failed with status {status}" + (f": {detail}" if detail else ""))
        self.call = call
        self.status = status
        self.detail = detail


class Parser(argparse.ArgumentParser):
    """A command's arguments; bad ones are errors like all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help says more)")


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main(argv)``; a Qwen3Error becomes one line on stderr and exit status 2.

    ``--debug`` anywhere in the arguments is removed and shows the traceback as well.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # clean up as after Ctrl-C
    try:
        return main(args) or 0
    except Qwen3Error as error:
        if debug:
            traceback.print_exc()
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) went away: not an error. Keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # What no module has given a better text: a dump folder that is a file, a full disk.
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError:
        if debug:
            traceback.print_exc()
        print("error: out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
