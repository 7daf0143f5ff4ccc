"""What the product has logged."""

from __future__ import annotations

import pytest


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lora_da")]
