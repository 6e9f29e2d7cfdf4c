"""A few seconds of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "DISTURB_EVERY", 1.0)
    run = soak.soak(tmp_path, 6)
    assert run.failures == []
    assert run.done["reload"] and run.done["kill_worker"] and run.done["upgrade"] and run.done["stop_by_hand"]
