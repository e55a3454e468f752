"""`python -m recsys.cli`."""

from __future__ import annotations

from recsys.cli import main

main()
