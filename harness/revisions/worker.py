"""The process that measures: workloads of the suite on whatever revision comes first on the path of imports.

    python -P -m harness.revisions.worker REQUEST.json

REQUEST holds {"subject": folder, "workloads": [names], "counts": bool, "seconds": float, "threads": int,
"output": file}. The output gets a line of JSON for each event, at once, so that a crash loses nothing: {"start": name},
then {"name", "figures"}, {"name", "missing": why, "lacks": whether the revision does} or {"name", "error": traceback}.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(path: str) -> None:
    """Measure what a request file asks for."""
    request = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(request["threads"])
    import sparsecore

    expected, found = Path(request["subject"]).resolve(), Path(sparsecore.__file__).resolve()
    if expected not in found.parents:
        raise SystemExit(f"sparsecore was to come from {expected}, but comes from {found}")
    from harness.suite.measure import Effort, measure
    from harness.suite.registry import WORKLOADS
    from harness.suite.workload import Lacks, Missing

    effort = Effort(request["counts"], request["seconds"])
    with Path(request["output"]).open("a", encoding="utf-8") as output:

        def tell(**event: Any) -> None:
            output.write(json.dumps(event) + "\n")
            output.flush()

        for name in request["workloads"]:
            tell(start=name)
            try:
                tell(name=name, figures=measure(WORKLOADS[name], effort))
            except Missing as missing:
                tell(name=name, missing=str(missing), lacks=isinstance(missing, Lacks))
            except ImportError as error:
                # The suite is newer than the revision and asks for what that does not have yet, or has lost.
                ours = (error.name or "").partition(".")[0] in ("sparsecore", "recsys")
                told = {"missing": str(error), "lacks": True} if ours else {"error": traceback.format_exc()}
                tell(name=name, **told)
            except Exception:
                tell(name=name, error=traceback.format_exc())


if __name__ == "__main__":
    main(sys.argv[1])
