"""Results files: a JSON document with everything, and a Markdown page to read, both with command and machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from recsys.files import replacing, writing
from recsys.machine import describe_machine

__all__ = ["save_results"]


def save_results(output: Path, program: str, lines: list[str], document: dict[str, Any]) -> None:
    """Write ``OUTPUT.json`` and ``OUTPUT.md``.

    Args:
        output: path without suffix; its folder is made.
        program: what the running command begins with, such as ``recsys``; its arguments are added.
        lines: the page, without command and machine.
        document: the figures; ``command`` and ``machine`` are added.

    Raises:
        RecsysError: they cannot be written.
    """
    # Places of this user's folders say nothing on another machine.
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    command = f"{program} {shlex.join(arguments)}"
    machine = describe_machine()
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    page = "\n".join([*lines, "", f"Command: `{command}`", "", f"Machine: {facts}.", ""])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    whole = {"command": command, "machine": machine, **document}
    for suffix, text in ((".json", json.dumps(whole, indent=1) + "\n"), (".md", page)):
        with replacing(output.with_name(output.name + suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
