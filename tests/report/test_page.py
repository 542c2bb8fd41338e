"""The file: what is in it, what can't be, and that it is written whole."""

import base64
import hashlib
import json
import math
import os
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from reads import COST, made_up

from skim.report import pieces, quality_of, write_page
from skim.report.encode import encode

HOSTILE = ["</script>", "<script>alert(1)</script>", "<!--", "]]>", "&lt;b&gt;", "<img src=x onerror=alert(1)>", "\u2028", "\u202e", "\x00", "😀"]
EVALUATION = {
    "model": "tiny",
    "results": [{"text": "a.txt"}, {"text": "b.txt"}],
    "overall": [
        {
            "budget": budget,
            "windows": 4,
            "rows": [
                {"pattern": "dense", "over_dense": None},
                {"pattern": "dsa", "over_dense": {"mean": 0.02, "low": 0.01, "high": 0.03}},
                {"pattern": "window", "over_dense": {"mean": 0.5, "low": None, "high": None}},
            ],
        }
        for budget in (64, 128)
    ],
}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what stands in its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def written(tmp_path, words, **choices) -> str:
    read = made_up(len(words), choices.pop("layers", 2), 8)
    named = {"model": "tiny", "text": "a.txt", "device": "a CPU"} | choices
    return write_page(tmp_path / "page.html", read, words, COST, **named).read_text(encoding="utf-8")


def unpacked(packed: str) -> list[bytes]:
    raw = zlib.decompress(base64.b64decode(packed), -zlib.MAX_WBITS)
    lengths = np.frombuffer(raw[:28], "<u4")
    assert len(raw) == 28 + lengths.sum()
    return [raw[28 + end - size : 28 + end] for size, end in zip(lengths, lengths.cumsum())]


def numbers(data: bytes) -> list[int]:
    found, shift = [0], 0
    for byte in data:
        found[-1] |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(0)
            shift = 0
    return found[:-1]


def test_a_layer_survives_its_encoding():
    T = 300
    (layer,) = made_up(T, 1, 200).layers
    counts, gaps, marks, dense, kept, cells, reads = unpacked(encode(layer, torch.arange(T)))
    distances, n = numbers(gaps), 0
    for t in range(T):
        real = layer.keys[t] >= 0
        keys = (t - np.cumsum(distances[n : n + counts[t]])).tolist()
        assert keys == layer.keys[t][real].tolist()[::-1]
        for key, mark, other in zip(keys, marks[n:], dense[n:]):
            at = layer.keys[t].tolist().index(key)
            assert (mark < 128) == bool(layer.read[t, at])
            code = (other + (mark if mark < 128 else 0)) % 256
            for found, truth in ((mark & 127, float(layer.weights[t, at])), (code, float(layer.dense[t, at]))):
                assert found == 127 or math.isclose(2 ** (-found / 4), truth, rel_tol=0.1)
                assert found < 127 or truth < 2**-31
        n += counts[t]
    assert n == len(marks) == len(dense) == len(distances)
    assert np.abs(np.frombuffer(kept, np.uint8).reshape(3, T) / 250 - layer.kept.numpy()).max() <= 0.002 + 1e-6
    lower = layer.cells.numpy()[np.tril_indices(300)]
    assert np.abs((np.frombuffer(cells, np.uint8) / 63) ** 2 - lower).max() < 0.04
    assert numbers(reads) == layer.counts.tolist()


def test_nothing_in_the_text_or_in_a_name_becomes_markup(tmp_path):
    plain, hostile = Elements(written(tmp_path, ["a"] * len(HOSTILE))), Elements(written(tmp_path, HOSTILE, model="</title><b>", text='"><i>'))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert json.loads(hostile.scripts[0])["pieces"] == HOSTILE
    assert not any(name.startswith("on") or name in ("src", "href", "style") for _, attributes in hostile.tags for name in attributes)


def test_only_the_page_s_own_script_and_style_may_run(tmp_path):
    html = written(tmp_path, ["a"] * 20, quality=quality_of(EVALUATION))
    page = Elements(html)
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in (page.scripts[-1], style)]
    assert policy == f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; base-uri 'none'; form-action 'none'"
    executed = [attributes for tag, attributes in page.tags if tag == "script" and "type" not in attributes]
    assert len(executed) == 1
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")


def test_quality_against_budget_comes_from_skim_eval(tmp_path):
    html = written(tmp_path, ["a"] * 20, quality=quality_of(EVALUATION))
    assert "+2.02 % [+1.01, +3.05]" in html and "+64.87 %</td>" in html and "tiny with a.txt, b.txt, 4 windows" in html
    assert "Quality against budget" not in written(tmp_path, ["a"] * 20)
    with pytest.raises(ValueError, match="eval: expected what `skim eval --json` writes"):
        quality_of({"results": []})


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")
    monkeypatch.setattr("skim.report.page.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, ["a"] * 20)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_pieces_are_one_a_token(tmp_path):
    with pytest.raises(ValueError, match="pieces: expected 20, one a token, got 3"):
        write_page(tmp_path / "x.html", made_up(20, 1, 8), ["a"] * 3, COST, model="m", text="t", device="d")


def test_pieces_join_to_the_text_and_split_characters_are_the_first_token_s():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert pieces(fast, "a😀\nb", 9) == ["a", "😀", "", "", "", "\n", "b"]
    assert pieces(fast, "a😀\nb", 3) == ["a", "😀", ""]
