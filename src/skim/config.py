"""Config: every choice of a DSA model in one dataclass."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Config:
    """How a model reads sparsely. Saved as `skim_config.json`.

    Attributes:
        budget: K, the keys that each query reads.
        mass: None reads `budget` keys; a share above 0 and at most 1 reads only the fewest of them that hold this share of
            the indexer's softmax over all visible keys.
        min_budget: so many are read at least, with `mass`. Rows that see no more read everything.
        index_n_heads: J, the indexer's heads.
        index_head_dim: E, channels of an index head.
        rope_dim: rotated channels, the first of `index_head_dim`; None is half of them, or
            the next number below that divides what the model rotates.
        rope_layout: "half" rotates channel i with channel i + rope_dim / 2 (DeepSeek-V3.2), "interleaved" 2i with
            2i + 1 (GLM-5).
        pattern: one letter an attention layer, repeated: "S" selects with its own indexer, "F" reads everything, "R"
            reuses the selection of the last "S" layer. Saved as the explicit list.
        keep_first: so many of the first visible tokens are always kept; they count against the budget.
        keep_recent: so many of the last visible tokens are always kept; they count against the budget.
        score_dtype: "bf16" scores in the model's own dtype, "fp8" in e4m3 (index keys are cached so, E + 4 bytes).
        latent_dtype: how an MLA model caches its latents: "bf16" in the model's own dtype, "fp8" in DeepSeek-V3.2's 656
            bytes a token (512 + 64 channels only).
        scale_format: of everything in FP8: "float32" scales, or "ue8m0" for powers of two.
        workspace_mb: scratch memory of an operator, MiB; None is a default of the device.
    """

    budget: int = 512
    mass: float | None = None
    min_budget: int = 1
    index_n_heads: int = 4
    index_head_dim: int = 64
    rope_dim: int | None = None
    rope_layout: str = "half"
    pattern: str | tuple[str, ...] = "S"
    keep_first: int = 0
    keep_recent: int = 0
    score_dtype: str = "bf16"
    latent_dtype: str = "bf16"
    scale_format: str = "float32"
    workspace_mb: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "index_n_heads", "index_head_dim"):
            self._expect(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an int >= 1")
        for name in ("keep_first", "keep_recent"):
            self._expect(name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an int >= 0")
        self._expect("keep_first", self.keep_first + self.keep_recent <= self.budget, f"keep_first + keep_recent <= budget ({self.budget})")
        share = type(self.mass) in (int, float) and 0 < self.mass <= 1  # type: ignore[operator]
        self._expect("mass", self.mass is None or share, "None or a number above 0 and at most 1")
        least = type(self.min_budget) is int and 1 <= self.min_budget <= self.budget
        self._expect("min_budget", least, f"an int from 1 to budget ({self.budget})")
        even = isinstance(self.rope_dim, int) and self.rope_dim % 2 == 0 and 2 <= self.rope_dim <= self.index_head_dim
        self._expect("rope_dim", self.rope_dim is None or even, f"None or an even int from 2 to index_head_dim ({self.index_head_dim})")
        self._expect("rope_layout", self.rope_layout in ("half", "interleaved"), "'half' or 'interleaved'")
        for name in ("score_dtype", "latent_dtype"):
            self._expect(name, getattr(self, name) in ("bf16", "fp8"), "'bf16' or 'fp8'")
        self._expect("scale_format", self.scale_format in ("float32", "ue8m0"), "'float32' or 'ue8m0'")
        power_of_two = self.index_head_dim & (self.index_head_dim - 1) == 0
        self._expect("index_head_dim", self.score_dtype != "fp8" or power_of_two, "a power of two with FP8 scores")
        letters = isinstance(self.pattern, (str, list, tuple)) and len(self.pattern) > 0 and set(self.pattern) <= set("FSR")
        self._expect("pattern", letters, "letters F, S and R, at least one")
        mb = self.workspace_mb
        self._expect("workspace_mb", mb is None or (type(mb) is int and mb >= 1), "None or MiB >= 1")
        object.__setattr__(self, "pattern", self.pattern if isinstance(self.pattern, str) else tuple(self.pattern))

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def fewest(self) -> int:
        """How many keys a query reads at least, where it sees as many: rows that see no more read everything."""
        return self.budget if self.mass is None else self.min_budget

    def letters(self, layers: int) -> tuple[str, ...]:
        """The pattern written out for so many attention layers.

        Raises:
            ValueError: an explicit list of another length, or an "R" with no "S" before it.
        """
        if isinstance(self.pattern, str):
            letters = tuple(self.pattern[i % len(self.pattern)] for i in range(layers))
        else:
            letters = self.pattern
        self._expect("pattern", len(letters) == layers, f"{layers} letters, one an attention layer")
        first = letters.index("S") if "S" in letters else layers
        self._expect("pattern", "R" not in letters[:first], "an 'S' before the first 'R'")
        return letters

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """A Config from `asdict`'s dictionary.

        Raises:
            ValueError: a field that this version doesn't know, or a value out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"skim_config.json: expected fields of skim.Config, got unknown {sorted(unknown)}")
        pattern = values.get("pattern", "S")
        return cls(**{**values, "pattern": pattern if isinstance(pattern, str) else tuple(pattern)})
