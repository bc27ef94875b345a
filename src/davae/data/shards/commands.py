"""Programs that write shards to standard output: `pipe:COMMAND`, without a shell."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

PIPE = "pipe:"
OPERATORS = "();<>|&"


def split_command(text: str) -> list[list[str]]:
    """Return the programs of a command line, each as its words, two for `a x | b`.

    Quotes and backslashes group words as in a shell. Nothing else of a shell works: no variables, no patterns, no
    redirection, no second command.

    Raises:
        ValueError: an open quote, no program, or an operator of a shell other than `|`.
    """
    if "\0" in text:
        raise ValueError("it contains a NUL character")
    reader = shlex.shlex(text, posix=True, punctuation_chars=OPERATORS)
    reader.whitespace_split, reader.commenters = True, ""
    programs: list[list[str]] = [[]]
    for word in reader:
        if word == "|":
            programs.append([])
        elif word and not word.strip(OPERATORS):
            raise ValueError(
                f"'{word}' is for a shell, and davae starts programs without one; put quotes around it, or write a script"
            )
        else:
            programs[-1].append(word)
    if not all(programs):
        raise ValueError("a program is missing")
    return programs


@contextmanager
def open_command(text: str) -> Iterator[IO[bytes]]:
    """Start the programs of a command line, and yield what the last one writes.

    All of it must have been read when the block ends: then every program's exit status is checked.

    Raises:
        ValueError: a command line that `split_command` refuses.
        OSError: a program that is missing or fails, with the end of what it wrote to standard error.
    """
    programs = split_command(text)
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        running: list[subprocess.Popen[bytes]] = []
        source: IO[bytes] | int = subprocess.DEVNULL
        try:
            for words in programs:
                process = subprocess.Popen(words, stdin=source, stdout=subprocess.PIPE, stderr=errors)
                if running:
                    assert running[-1].stdout is not None
                    running[-1].stdout.close()  # the next program holds it; the one before sees it close
                running.append(process)
                assert process.stdout is not None
                source = process.stdout
            assert not isinstance(source, int)
            yield source
        except BaseException:
            for process in running:
                process.kill()
            raise
        finally:
            for process in running:
                assert process.stdout is not None
                process.stdout.close()
                process.wait()
        failed = next((p for p in running if p.returncode), None)
        if failed is not None:
            errors.seek(0)
            said = " ".join(errors.read()[-2000:].decode("utf-8", "replace").split())[-160:]
            raise OSError(f"{programs[running.index(failed)][0]} ended with status {failed.returncode}: {said}")
