"""The log as JSON, one document a line, with the fields that records of this package carry.

The package logs to the logger ``ckptengine``; records carry what they are about as ``record.ckptengine``, a dict (step,
stage, tier, target, error code, bytes, seconds).
"""

from __future__ import annotations

import datetime
import json
import logging


class JsonLines(logging.Formatter):
    """For any handler: ``handler.setFormatter(JsonLines())``."""

    def format(self, record: logging.LogRecord) -> str:
        """``{"time", "level", "message", ...fields of the record, "exception" where there is one}``."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        document = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields = getattr(record, "ckptengine", None)
        if isinstance(fields, dict):
            document |= {str(name): value for name, value in fields.items() if name not in document}
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)
