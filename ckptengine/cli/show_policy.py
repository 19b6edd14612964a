"""``ckptengine show ROOT --policy``: the policies of the newest job, and what its measured saves advise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ckptengine.errors import UnreadableFormat, UnusableRequest
from ckptengine.operations.levels.policy_record import read_policy
from ckptengine.policy.cost import SaveCost
from ckptengine.policy.interval import AutoInterval
from ckptengine.tiers.redact import is_url
from ckptengine.tiers.spec import Tier

_MTBF_S = (3600.0, 6 * 3600.0, 24 * 3600.0)


def show(path: str, as_json: bool) -> int:
    """Print the policies recorded beneath ``path``; the exit status."""
    directory = Tier(path).local_path
    if directory is None:
        raise UnusableRequest(
            f"{Tier(path).label if is_url(path) else path}: policies are recorded in directories; "
            f"name the directory that the job's tiers begin with"
        )
    document = {**read_policy(Path(directory)), "path": path}
    try:
        document["advice"] = _advice(document)
        text = _text(document)
    except (KeyError, TypeError, ValueError) as wrong:
        raise UnreadableFormat(f"{path}: its record of policies is damaged ({wrong!r})") from None
    sys.stdout.write(json.dumps(document) + "\n" if as_json else text)
    return 0


def _advice(document: dict[str, Any]) -> list[dict[str, float]]:
    """The interval that Young's formula gives for the measured cost, at some failure rates."""
    measured = document["cost"]
    if measured is None:
        return []
    cost = SaveCost(float(measured["stolen_s"]), float(measured["durable_s"]), int(measured["samples"]))
    return [{"mtbf_s": mtbf_s, "period_s": AutoInterval(mtbf_s=mtbf_s).period_s(cost)} for mtbf_s in _MTBF_S]


def _text(document: dict[str, Any]) -> str:
    lines = [f"{document['path']}", f"  saves       {document['interval']}", f"  on failure  {document['on_failure']}"]
    lines += [f"  tier        {line}" for line in document["tiers"]]
    cost = document["cost"]
    if cost is None:
        return "\n".join([*lines, "  measured    nothing yet"]) + "\n"
    lines.append(
        f"  measured    {cost['stolen_s'] * 1e3:.3g} ms of training for a save, safe after {cost['durable_s']:.3g} s "
        f"(median of {cost['samples']})"
    )
    for one in document["advice"]:
        lines.append(
            f"  advice      every {one['period_s']:.3g} s where the job fails once in {one['mtbf_s'] / 3600:g} h: "
            f"interval=AutoInterval(mtbf_s={one['mtbf_s']:g})"
        )
    return "\n".join(lines) + "\n"
