"""The command line: genflow COMMAND, one module here for each of COMMANDS."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from genflow import __version__
from genflow.errors import UserError, nearest
from genflow.native.allocator import keep_freed_memory

COMMANDS = {
    "train": "train a model from a config, or go on with a run",
    "sample": "draw pictures with a trained model",
    "eval": "measure a trained model: distances, likelihood, alignment, nearest training pictures",
    "compare": "models side by side on one page: samples, distances at every cost, training",
    "edit": "edit real pictures with a trained model",
    "invert": "real pictures to noise and back: how well they survive it",
    "reflow": "straighten a velocity on pairs of its own noise and pictures",
    "tune": "learn the time grid that suits a trained model best",
    "plot": "look at a run: its training, its solves step by step, its errors",
    "convert": "SD3 checkpoints in and out: diffusers' folders, Stability's files, genflow's models",
    "data": "look at a data set, or prepare its latents and texts for training",
    "demo": "a page in the browser to play with one model, or with two side by side",
    "bench": "how fast training, sampling, attention and flows are here, beside other libraries",
    "info": "list what there is, or explain one thing",
}

# Errors that are the machine's to solve, or of a name that can be none of a file.
OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
OUTSIDE |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_OF_THE_LOCALE = "has letters that the locale's encoding, {}, lacks; set PYTHONUTF8=1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a person's mistake, 130 when interrupted."""
    if arguments is None:  # the process is ours
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by who began it: the next file would take its number
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        keep_freed_memory()
        if sys.argv[1:2] == ["convert"]:  # whose half a file, of gigabytes, would stay
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
            sys.stdout.reconfigure(errors="backslashreplace")
        if isinstance(sys.stderr, io.TextIOWrapper):
            sys.stderr = _Asides(sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _one_line  # type: ignore[assignment]
    try:
        for text in arguments:
            if any("\ud800" <= c <= "\udfff" for c in text):
                if (encoding := sys.getfilesystemencoding()) != "utf-8":
                    raise UserError(f"{text!r} {_OF_THE_LOCALE.format(encoding)}")
                raise UserError(f"{text!r} is not UTF-8 text; write it, or name the file, in UTF-8")
        code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not when Python has gone
        return code
    except UserError as error:
        print(f"genflow: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise
        print(f"genflow: {error.object!r} {_OF_THE_LOCALE.format(error.encoding)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        print(
            f"genflow: {error.filename2 or error.filename or 'a file or standard output'}: {error.strerror}",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch's own errors, by their words: torch may not be loaded
        words = str(error).partition("\n")[0]
        if "shared memory" in words:
            print(f"genflow: {words}; empty or enlarge /dev/shm, or do without: train.workers=0", file=sys.stderr)
            return 2
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", words):
            raise
        print(f"genflow: out of memory: {words}; ask for less at a time", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("genflow: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("genflow: train flows of images and draw with them\n")
        for name, summary in COMMANDS.items():
            print(f"  genflow {name:8}{summary}")
        print("\ngenflow COMMAND --help tells more.")
        return 0
    if arguments[0] == "--version":
        print(f"genflow {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}.{nearest(name, COMMANDS)}")
    module = importlib.import_module(f"genflow.cli.{name}")
    parser = _Parser(prog=f"genflow {name}", description=COMMANDS[name])
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments[1:]))


class _Asides(io.TextIOWrapper):
    """What is said beside the work, which goes on where nobody listens any more: a closed pipe, a terminal that is gone."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, like all others, and options by their whole names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Warnings as a person reads them: ours in one line, deprecations of libraries not at all."""
    if issubclass(category, UserWarning):
        print(f"genflow: {message}", file=sys.stderr)
