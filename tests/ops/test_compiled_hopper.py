"""What the Gluon kernels become on sm_90: the matrix products that they are written for, nothing spilled, shared memory that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_compiled import SHARED, found  # noqa: E402


@pytest.mark.slow
def test_attention_over_latents(tmp_path: Path) -> None:
    kernels = {row["call"]: row for row in found(90, ("hopper",), tmp_path) if row["kernel"] == "forward"}
    assert set(kernels) == {"128/1 576 attend", "64/1 512 attend", "100/1 576 attend", "16/1 576 attend"}
    for call, row in kernels.items():
        # A block of 64 keys: scores once, 16 channels at a time; then values, 16 keys at a time, in two halves.
        assert row["products"] == {"m64n64k16": 36 if " 576 " in call else 32, "m64n256k16": 8}, call
        assert row["spilled"] == 0, call
        assert row["shared"] <= SHARED[90] << 10, call
        assert row["warps"] == 12, call
