"""The command line: finds the command's module and turns errors into one line and an exit status.

Exit status: 0 done or holds; 1 the check found what it looks for; 2 the request is unusable.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ckptengine.errors import CheckpointError
from ckptengine.version import version

COMMANDS = {
    "demo": "train a small GPT, kill it in a save, resume, and show that not a bit differs",
    "ls": "list the checkpoints of a root",
    "show": "show what is in a checkpoint",
    "verify": "check every byte of a checkpoint against its digest",
    "diff": "compare two checkpoints, whatever their layouts and formats",
    "convert": "convert a checkpoint to another format or layout",
    "prune": "delete checkpoints that are not worth keeping",
    "bench": "measure what checkpointing costs a training loop",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: ckptengine COMMAND [ARGUMENTS]   (ckptengine COMMAND --help tells more)\n\n"
        + "\n".join(lines)
        + "\n\n"
        + "ROOT is the directory or URL of a run. PATH is a root (its newest good step, or ROOT@STEP) or any other\n"
        + "checkpoint. Exit status: 0 done, or it holds; 1 damage or a difference was found; 2 it cannot be done.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status and never raises for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"ckptengine {version}\n")
        return 0
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"ckptengine: no command {arguments[0]!r}; commands are {', '.join(COMMANDS)}\n")
        return 2
    try:
        module = importlib.import_module(f"ckptengine.cli.{arguments[0]}")
        return int(module.main(arguments[1:]))
    except CheckpointError as error:
        sys.stderr.write(f"ckptengine {arguments[0]}: {error}\n")
        return 2
    except BrokenPipeError:
        # The reader of our output went away (head, less): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as refused:  # a path of the command line that the operating system refuses
        what = f"{refused.filename}: {refused.strerror}" if refused.filename is not None else str(refused)
        sys.stderr.write(f"ckptengine {arguments[0]}: {what}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


class _Parser(argparse.ArgumentParser):
    """Tells bad arguments in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells what there is\n")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The argument parser of one command."""
    return _Parser(prog=f"ckptengine {command}", description=description)
