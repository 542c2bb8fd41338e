"""Config: what it takes, what it refuses by name, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from skim import Config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget: expected an int >= 1, got 0"),
        ({"budget": 1.5}, "budget: expected an int >= 1, got 1.5"),
        ({"budget": "512"}, "budget: expected an int >= 1, got '512'"),
        ({"mass": 0.0}, "mass: expected None or a number above 0 and at most 1, got 0.0"),
        ({"mass": 1.5}, "mass: expected None or a number above 0 and at most 1, got 1.5"),
        ({"mass": "most"}, "mass: expected None or a number above 0 and at most 1, got 'most'"),
        ({"mass": True}, "mass: expected None or a number above 0 and at most 1, got True"),
        ({"min_budget": 0}, r"min_budget: expected an int from 1 to budget \(512\), got 0"),
        ({"min_budget": 9, "budget": 8}, r"min_budget: expected an int from 1 to budget \(8\), got 9"),
        ({"index_n_heads": 0}, "index_n_heads: expected an int >= 1"),
        ({"index_head_dim": -1}, "index_head_dim: expected an int >= 1"),
        ({"keep_first": -1}, "keep_first: expected an int >= 0, got -1"),
        ({"keep_recent": None}, "keep_recent: expected an int >= 0, got None"),
        ({"budget": 8, "keep_first": 5, "keep_recent": 4}, r"keep_first \+ keep_recent <= budget \(8\)"),
        ({"rope_dim": 7}, r"rope_dim: expected None or an even int from 2 to index_head_dim \(64\), got 7"),
        ({"rope_dim": 0}, "rope_dim"),
        ({"rope_dim": 128}, "rope_dim"),
        ({"rope_layout": "neox"}, "rope_layout: expected 'half' or 'interleaved', got 'neox'"),
        ({"score_dtype": "fp4"}, "score_dtype: expected 'bf16' or 'fp8', got 'fp4'"),
        ({"score_dtype": "fp8", "index_head_dim": 48}, "index_head_dim: expected a power of two with FP8 scores, got 48"),
        ({"pattern": "SX"}, "pattern: expected letters F, S and R, at least one, got 'SX'"),
        ({"pattern": ""}, "pattern"),
        ({"pattern": []}, "pattern"),
        ({"pattern": ["S", "sparse"]}, "pattern"),
        ({"workspace_mb": 0}, "workspace_mb: expected None or MiB >= 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(TypeError, match="top_k"):
        Config(top_k=5)
    with pytest.raises(ValueError, match=r"skim_config.json: expected fields of skim.Config, got unknown \['top_k'\]"):
        Config.from_dict({"top_k": 5})


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(budget=2048, index_n_heads=64, index_head_dim=128, rope_dim=64, score_dtype="fp8"),
        Config(budget=16, rope_layout="interleaved", pattern="FSRRR", keep_first=4, keep_recent=12, workspace_mb=64),
        Config(pattern=["F", "S", "R"]),
        Config(budget=64, mass=0.9, min_budget=16),
    ],
)
def test_json_gives_the_same_config_back(config):
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_fields_that_an_older_file_lacks_take_their_defaults():
    assert Config.from_dict({"budget": 7}) == Config(budget=7)


@pytest.mark.parametrize(
    ("pattern", "layers", "letters"),
    [("S", 3, "SSS"), ("FSRRR", 7, "FSRRRFS"), ("SR", 3, "SRS"), ("SSF", 3, "SSF"), ("F", 2, "FF"), (("F", "S"), 2, "FS")],
)
def test_a_pattern_is_repeated_over_the_layers(pattern, layers, letters):
    assert "".join(Config(pattern=pattern).letters(layers)) == letters


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("R", 2, "pattern: expected an 'S' before the first 'R', got 'R'"),
        ("FRS", 3, "pattern: expected an 'S' before the first 'R'"),
        (("S", "F"), 3, r"pattern: expected 3 letters, one an attention layer, got \('S', 'F'\)"),
    ],
)
def test_a_pattern_that_does_not_fit_the_layers_is_refused(pattern, layers, message):
    with pytest.raises(ValueError, match=message):
        Config(pattern=pattern).letters(layers)


def test_a_config_does_not_change():
    config = Config(pattern=["S", "F"])
    assert config.pattern == ("S", "F"), "a list is taken as it is now"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 3


def test_the_fewest_keys_that_are_read_are_the_budget_unless_it_adapts():
    assert Config(budget=64).fewest == 64 and Config(budget=64, min_budget=16).fewest == 64
    assert Config(budget=64, mass=0.9, min_budget=16).fewest == 16
