"""Adapters on disk: `skim_config.json` and `skim_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skim.config import Config
from skim.huggingface.convert import attach, revert, use
from skim.huggingface.state import converted_layers, decoder_of, indexed_layers, state_of

CONFIG_FILE, WEIGHTS_FILE = "skim_config.json", "skim_model.safetensors"
SAMPLE = 64


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a converted model's indexers and Config: not the base, only what it is and a fingerprint of it.

    Under another pattern than the one that was converted with (`skim.use(model, pattern=...)`) the adapter is that
    pattern's: indexers that it leaves out are not written.

    Both files are written under temporary names and then renamed; the config names the weights' checksum, so a save
    that is cut off in between is found by `load`.

    Raises:
        ValueError: the model was not converted.
    """
    state = state_of(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = _indexer_weights(indexed_layers(model))
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        weights_path = Path(temporary) / WEIGHTS_FILE
        save_file({name: value.detach().contiguous().cpu() for name, value in weights.items()}, weights_path, metadata={"format": "pt"})
        described = {"config": asdict(state.config), "base": describe(model), "weights_sha256": _sha256(weights_path)}
        config_path = Path(temporary) / CONFIG_FILE
        config_path.write_text(json.dumps(described, indent=2) + "\n")
        os.replace(weights_path, directory / WEIGHTS_FILE)
        os.replace(config_path, directory / CONFIG_FILE)
    return directory


def load(model: nn.Module, source: str | os.PathLike[str]) -> Any:
    """Load trained indexers into `model` and read sparsely with them.

    Args:
        model: the base model, converted or not.
        source: a folder that `save` wrote, the name of a shipped adapter ("smollm2-135m"), or a hub id.

    Returns:
        The same model, in sparse mode.

    Raises:
        ValueError: no adapter there, a damaged one, or one that doesn't fit the model; by name.
    """
    directory = locate(source)
    described = _read(directory)
    config = Config.from_dict(described["config"])
    weights = load_file(directory / WEIGHTS_FILE)
    if not any(hasattr(m, "skim_state") for m in model.modules()):
        _check_shapes(model, described["base"])
        attach(model, config)
        try:
            _load_weights(model, weights)
        except ValueError:
            revert(model)  # what doesn't fit leaves the model as it was
            raise
    else:
        state = state_of(model)
        for name in ("index_n_heads", "index_head_dim", "rope_dim", "rope_layout"):
            if getattr(state.config, name) != getattr(config, name):
                raise ValueError(f"{name}: expected the adapter's {getattr(config, name)}, got {getattr(state.config, name)} in the converted model")
        _load_weights(model, weights)
    here, there = describe(model)["fingerprint"], described["base"]["fingerprint"]
    if here != there:
        warnings.warn(
            f"The adapter in {directory.name} was trained on other base weights ({described['base']['id']}); it may select worse here.", stacklevel=2
        )
    settings = ("budget", "mass", "min_budget", "keep_first", "keep_recent", "score_dtype", "latent_dtype", "scale_format", "workspace_mb")
    changes = {k: v for k, v in asdict(config).items() if k in settings}
    use(model, mode="sparse", **changes)
    return model


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of an adapter: a folder, a shipped adapter's name, or a hub id (fetched or from its cache)."""
    path = Path(source)
    if path.is_dir():
        return path
    shipped = Path(str(resources.files("skim") / "assets" / "indexers" / str(source)))
    if str(source) and shipped.is_dir():
        return shipped
    known = sorted(p.name for p in shipped.parent.iterdir() if p.is_dir()) if shipped.parent.is_dir() else []
    if str(source).count("/") != 1 or path.is_absolute():
        raise ValueError(f"source: expected a folder, a shipped adapter ({', '.join(known)}) or a hub id, got {str(source)!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:
        raise ValueError(f"source: {str(source)!r} is no folder, and fetching it as a hub id failed: {error}") from error


def describe(model: nn.Module) -> dict[str, Any]:
    """The base model that an adapter belongs to: id, revision, shapes and a fingerprint of its weights."""
    config = decoder_of(model).config
    digest = hashlib.sha256()
    for layer in converted_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.startswith("indexer.") or "lora_" in name:
                continue
            sample = parameter.detach().flatten()[:SAMPLE]
            digest.update(sample.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "id": getattr(model.config, "_name_or_path", "") or None,  # type: ignore[union-attr]
        "revision": getattr(model.config, "_commit_hash", None),  # type: ignore[union-attr]
        "model_type": config.model_type.removeprefix("skim_"),  # an exported model is its base with indexers
        "hidden_size": config.hidden_size,
        "layers": list(converted_layers(model)),
        "fingerprint": digest.hexdigest(),
    }


def _indexer_weights(layers: dict[int, Any]) -> dict[str, Tensor]:
    """The weights of these layers' indexers by their names in an adapter."""
    return {f"layers.{i}.self_attn.indexer.{name}": value for i, layer in layers.items() for name, value in layer.indexer.state_dict().items()}


def _load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = _indexer_weights({i: layer for i, layer in converted_layers(model).items() if hasattr(layer, "indexer")})
    in_use = _indexer_weights(indexed_layers(model))
    missing, extra = sorted(in_use.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{WEIGHTS_FILE}: expected the model's indexers, got {len(missing)} tensors missing {missing[:2]}, {len(extra)} extra {extra[:2]}"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{name}: expected {tuple(own[name].shape)}, got {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _check_shapes(model: nn.Module, base: dict[str, Any]) -> None:
    here = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name in ("model_type", "hidden_size"):
        if getattr(here, name, None) != base[name]:
            raise ValueError(f"{name}: expected {base[name]!r}, which the adapter was made for, got {getattr(here, name, None)!r}")
    if here.num_hidden_layers <= max(base["layers"]):
        raise ValueError(f"layers: expected at least {max(base['layers']) + 1}, which the adapter was made for, got {here.num_hidden_layers}")


def _read(directory: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"source: expected {CONFIG_FILE} and {WEIGHTS_FILE} in {directory.name!r}, got no {name}")
    try:
        described = json.loads((directory / CONFIG_FILE).read_text())
        checksum, _, _ = described["weights_sha256"], described["config"], described["base"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{CONFIG_FILE}: expected what skim.save writes in {directory.name!r}, got a file without it: {error!r}") from error
    if _sha256(directory / WEIGHTS_FILE) != checksum:
        raise ValueError(f"{WEIGHTS_FILE}: its checksum is not the one in {CONFIG_FILE}: a save or a copy of {directory.name!r} was cut off")
    return described


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
