"""What the Gluon kernels become on sm_90: the matrix products that they are written for, nothing spilled, shared memory that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_compiled import SHARED, found, most  # noqa: E402

# Of calls behind a release of Triton: which may spill, how many bytes at most, and why. With Triton 3.6 and 3.9 nothing is spilled between
# matrix products but for sums over queries; where 3.7 spills was not looked at.
SPILLS = [
    (r"attend_dense|decode", 32, "addresses from task to task"),
    (r"(100|128)/1 576 attend$", 88, "with Triton 3.9 (none with 3.6), addresses from task to task, where queries are held in registers"),
    (r" 656 ", 168, "addresses of queries and outputs, between tasks: 16 warps have 128 registers a thread where they share them out"),
    (r" 656 .*decode", 512, "addresses of the outputs' parts, likewise"),
    (r"attend_backward of_keys", 296, "with Triton 3.9 (none with 3.6): some 20 loads and stores a thread and task, of 2300 instructions"),
    (r"^3\.7 64/1 512 attend$", 8, "addresses from task to task"),
    (r"^3\.7 .* 656 ", 304, "addresses of queries and outputs"),
    (r"^3\.7 .* 656 .*decode", 648, "addresses of the outputs' parts, likewise"),
]


@pytest.mark.slow
def test_attention_over_latents(tmp_path: Path) -> None:
    kernels = {row["call"]: row for row in found(90, ("hopper",), tmp_path) if row["kernel"] == "forward"}
    assert len(kernels) == 16
    for call, row in kernels.items():
        packs = " 656 " in call
        # A block of 64 keys: scores once, 16 channels at a time; then values, 16 keys at a time, in two halves, or four where there are more warps.
        values = {"m64n128k16": 16} if packs else {"m64n256k16": 8}
        assert row["products"] == {"m64n64k16": 32 if " 512 " in call else 36, **values}, call
        assert row["spilled"] <= most(call, SPILLS), call
        assert row["shared"] <= SHARED[90] << 10, call
        assert row["warps"] == (16 if packs else 12), call
        if packs:  # the codes of half a block are read by all warps before latents are written over them
            assert row["overwritten"] == ["ld.shared.v4"] * 4 + ["bar.sync"], call
        # Of each group one thread arrives, for all that the group read or wrote: keys, probabilities, two halves, factors.
        assert row["handed_over"] == {"bar.sync": 5}, call


@pytest.mark.slow
def test_attention_over_unions(tmp_path: Path) -> None:
    kernels = {row["call"]: row for row in found(90, ("hopper_union",), tmp_path)}
    assert len(kernels) == 3
    for call, row in kernels.items():
        # In each of two groups of warps: scores of a block, 16 channels at a time; its values, 16 keys at a time, in the loop and behind it.
        wanted = {"m64n128k16": 2 * 4, "m64n64k16": 2 * (8 + 8)} if " 64 " in call else {"m64n128k16": 2 * (8 + 8 + 8)}
        assert row["products"] == wanted, call
        assert row["spilled"] == 0, call
        assert row["shared"] <= SHARED[90] << 10, call
        assert row["warps"] == 12, call


@pytest.mark.slow
def test_gradients_over_latents(tmp_path: Path) -> None:
    kernels = {
        f"{row['call']} {row['kernel']}": row for row in found(90, ("hopper_backward",), tmp_path) if row["kernel"] in ("scores_128", "of_keys_128")
    }
    assert len(kernels) == 4
    for name, row in kernels.items():
        # In each of two groups of warps, of 64 channels: scores, 16 channels at a time, or sums over 128 heads, 16 at a time; without values once.
        times, shape = (4, "m64n128k16") if "scores" in name else (8, "m64n64k16")
        assert row["products"] == {shape: 2 * times * (16 + (" 576 " in name))}, name
        assert row["spilled"] <= most(name, SPILLS), name
        assert row["shared"] <= SHARED[90] << 10, name
        assert row["warps"] == 12, name
