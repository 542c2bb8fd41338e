"""Whole models through `generate`, tiny: the rows of K10 and K11, and that what is measured is what they say."""

import pytest
import torch

pytest.importorskip("transformers")

from skim.bench import models, run  # noqa: E402
from skim.bench.registry import Setting  # noqa: E402
from skim.huggingface import use  # noqa: E402
from skim.huggingface.attention import by_indexer  # noqa: E402

CPU = torch.device("cpu")


def setting(kind: str = "random", n: int = 64) -> Setting:
    return Setting(n, kind, CPU, quick=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_first_token_hooks_and_decoding_are_measured(device):
    rows = run(["K10", "K11"], device=device, quick=True)["rows"]
    assert [(row["case"], row["part"], row["kind"]) for row in rows] == [
        ("K10", "hooks", "random"),
        ("K10", "prefill", "random"),
        ("K10", "prefill", "overlapping"),
        ("K11", "decode", "random"),
    ]
    assert all(row["ms"] > 0 and row["baseline_ms"] > 0 for row in rows)
    assert rows[0]["overhead"] == pytest.approx(rows[0]["ms"] / rows[0]["baseline_ms"] - 1)
    assert set(rows[3]["baselines"]) == {"skim.attend_dense", "transformers"} and rows[3]["tokens_per_second"] > 0


def test_overlapping_selections_overlap_more_than_a_random_models():
    model, config = models.build("qwen3-tiny", CPU), models.config(quick=True)
    embeds = models.prompt(model, setting("random", 256))
    assert embeds.shape == (1, 256, 64)
    found = {}
    for kind in ("random", "overlapping"):
        with torch.no_grad(), models.converted(model, config):
            found[kind] = models._unions(model, embeds, models.selector(setting(kind, 256), config))
    assert 1 <= found["overlapping"] < 0.8 * found["random"]


def test_decoding_reads_the_whole_prompt_and_no_more_than_the_budget():
    model, s = models.build("qwen3-tiny", CPU), setting()
    seen = []

    def watched(inputs, start, end):
        selection = by_indexer(inputs, start, end)
        if inputs.q.shape[1] == 1:
            seen.append((int(end.max()), int(selection.counts.max()), int(selection.indices.max())))
        return selection

    with torch.no_grad(), models.converted(model, models.config(quick=True)), use(model, selector=watched):
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=s.n + 7)
        model(inputs_embeds=models.prompt(model, s), past_key_values=cache, use_cache=True)
        assert models._token_seconds(model, cache, s, 6) > 0
    visible = [end for end, _, _ in seen]
    assert visible[:2] == [65, 65] and visible == sorted(visible) and max(visible) <= 71
    assert all(count == 16 and last < end for end, count, last in seen)


def test_the_model_is_left_as_it_was():
    model = models.build("qwen3-tiny", CPU)
    with models.converted(model, models.config(quick=True)):
        assert any("indexer" in name for name, _ in model.named_parameters())
    assert not any("indexer" in name for name, _ in model.named_parameters())


def test_a_model_by_folder(tmp_path):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    models.build("qwen3-tiny", CPU).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(tmp_path)
    rows = run(model=str(tmp_path), tokens=40, device="cpu", quick=True)["rows"]
    assert [row["part"] for row in rows] == ["hooks", "prefill", "decode", "prefill"] and rows[1]["n"] == 40
