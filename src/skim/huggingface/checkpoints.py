"""Checkpoints of latent attention models as DeepSeek and Z.ai publish them: shards of FP8 weights with a scale for each block.

transformers reads these files too, but where it dequantises them (no GPU, or one without FP8) it refuses weights that whole
blocks don't tile, which the 576 rows of `kv_a_proj_with_mqa` are; where it doesn't, the absorbed form lacks a plain
`kv_b_proj`; and what a file lacks it fills with random numbers. Here a tensor that is missing or misshapen is an error, and
each one goes from its file to its place on the device before the next is read. Layout: spec section 6.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FAMILIES = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FP8, PLAIN = "F8_E4M3", ("BF16", "F16", "F32")  # as safetensors names them
SCALE = "_scale_inv"


class Header(NamedTuple):
    """Where a tensor lies on disk, and what it is."""

    file: Path
    shape: list[int]
    dtype: str


def read_checkpoint(folder: Path, config: Any, *, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The causal language model of a checkpoint folder, on `device`, dequantised; the memory taken is its own and a tensor's.

    Layers of multi-token prediction, which transformers' models have no place for, are named in a warning and left out; the
    model's config says that it has none.

    Args:
        folder: `config.json` and safetensors, one file or shards with their index.
        config: the folder's configuration; its model type is one of `FAMILIES`.
        dtype: of the weights; those that the family keeps in float32 (the index head weights among them) stay so.
        device: where each tensor goes as it is read.

    Raises:
        ValueError: a shard or tensor that is missing, damaged, of another shape or dtype; by name. Or a quantisation other than FP8 in blocks.
    """
    block = _block(config)
    model = _empty(config, dtype, torch.device(device))
    places = dict(_places(model))
    held = _headers(folder)
    _check(places, held, block)
    _name_unread({name for name in held if name.removesuffix(SCALE) not in places}, config.num_hidden_layers)
    if hasattr(config, "num_nextn_predict_layers"):
        config.num_nextn_predict_layers = 0  # or a copy that is saved would promise them
    with torch.no_grad():
        for file in sorted({header.file for header in held.values()}):
            with _opened(file, device) as shard:
                for name in places:
                    if held[name].file == file:
                        places[name].copy_(_read(name, shard, held, block, device))
    return model.eval()


def _read(name: str, shard: Any, held: dict[str, Header], block: tuple[int, int], device: str | torch.device) -> Tensor:
    """A tensor of an open shard, dequantised. Its scale may be in another one."""
    tensor, scale = shard.get_tensor(name), name + SCALE
    if scale not in held:
        return tensor
    if held[scale].file == held[name].file:
        return dequantise(tensor, shard.get_tensor(scale), block)
    with _opened(held[scale].file, device) as other:
        return dequantise(tensor, other.get_tensor(scale), block)


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 `values * scale` of FP8 values `[N, M]` and a scale `[ceil(N / n), ceil(M / m)]` for each block of n x m.

    The name on disk, `weight_scale_inv`, says inverse; it is multiplied all the same.
    """
    rows, columns = values.shape
    wide = scale.float().repeat_interleave(block[1], dim=1)[:, :columns]
    return values.float().mul_(wide.repeat_interleave(block[0], dim=0)[:rows])


def _block(config: Any) -> tuple[int, int]:
    """Rows and columns that share a scale, taken from the config, which then describes a model of plain weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return 128, 128
    block = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or found.get("fmt", "e4m3") != "e4m3" or block is None:
        raise ValueError(f"quantization_config: expected fp8 of e4m3 with a weight_block_size, got {found}")
    del config.quantization_config
    return block[0], block[1]


def _empty(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its weights allocated on `device` and not yet written."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype.itemsize < 4 and any(part in name for part in kept):
            tensor.data = tensor.data.float()
    model.to_empty(device=device)
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)  # its frequencies are in no file
    for name, module in decoder.named_modules():  # transformers leaves these at 1e-6, and GLM was trained with another (its issue 48762)
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = config.rms_norm_eps
    return model


def _places(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Where the tensor of each name on disk belongs. transformers holds a layer's experts as two tensors, files each for itself."""
    for name, tensor in model.state_dict().items():
        layer, experts, part = name.partition("mlp.experts.")
        if not experts:
            yield name, tensor
            continue
        for i, expert in enumerate(tensor):
            if part == "down_proj":
                yield f"{layer}{experts}{i}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{layer}{experts}{i}.gate_proj.weight", gate
                yield f"{layer}{experts}{i}.up_proj.weight", up


def _headers(folder: Path) -> dict[str, Header]:
    """What the files hold, by name, none of it read."""
    index = folder / INDEX_FILE
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [SINGLE_FILE]
    held = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{file}: expected in {folder}, got no such file")
        with _opened(folder / file, "cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 (it is no dictionary)
                part = shard.get_slice(name)
                held[name] = Header(folder / file, part.get_shape(), part.get_dtype())
    return held


@contextmanager
def _opened(file: Path, device: str | torch.device) -> Iterator[Any]:
    try:
        shard = safe_open(file, framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file.name}: expected a whole safetensors file, got {error}") from error
    with shard:
        yield shard


def _check(places: dict[str, Tensor], held: dict[str, Header], block: tuple[int, int]) -> None:
    """Every tensor is there, as large as it should be, before the first is read."""
    for name, place in places.items():
        _check_shape(name, held, list(place.shape))
        if held[name].dtype == FP8:
            _check_shape(name + SCALE, held, [-(-size // side) for size, side in zip(place.shape, block)])
        elif held[name].dtype not in PLAIN:
            raise ValueError(f"{name}: expected one of {FP8}, {', '.join(PLAIN)}, got {held[name].dtype} in the checkpoint")


def _check_shape(name: str, held: dict[str, Header], expected: list[int]) -> None:
    if name not in held:
        raise ValueError(f"{name}: expected {expected}, got no such tensor in the checkpoint")
    if held[name].shape != expected:
        raise ValueError(f"{name}: expected {expected}, got {held[name].shape} in the checkpoint")


def _name_unread(names: set[str], layers: int) -> None:
    """Say what the files hold beyond the model: layers behind its last one by their number, the rest by name."""
    unread = set()
    for name in names:
        prefix, _, rest = name.partition("model.layers.")
        number = rest.partition(".")[0]
        unread.add(f"model.layers.{number} (multi-token prediction)" if not prefix and number.isdigit() and int(number) >= layers else name)
    if unread:
        warnings.warn(f"The model has no place for {', '.join(sorted(unread))} of the checkpoint; not read.", stacklevel=4)
