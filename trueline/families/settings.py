"""config.json to sizes: each key with the default transformers gives it. What this decoder cannot do is refused, never ignored."""

import math
from typing import Any

from trueline.errors import UserError
from trueline.model.rotary import RopeScaling


class Settings:
    """The keys of one config.json; reading a key notes what is wrong with it, and `check` refuses everything noted at once."""

    def __init__(self, config: dict[str, Any], family: str):
        self.config, self.family = config, family
        self.problems: list[str] = []

    def size(self, key: str, default: int, least: int = 1) -> int:
        """A whole number."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.problems.append(f"{key}: {value!r}, expected a whole number of at least {least}")
            return default
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        return self._number(key, self.config.get(key), default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problems.append(f"{key}: {value!r}, expected true or false")
        return bool(value)

    def only(self, key: str, default: Any, supported: Any) -> None:
        """The key may have just this one value here."""
        value = self.config.get(key)
        value = default if value is None else value
        if value != supported:
            self.problems.append(f"{key}: {value!r} is not supported for {self.family}, only {supported!r}")

    def refuse(self, problem: str) -> None:
        self.problems.append(problem)

    def rope(self, partial: float) -> tuple[float, float, RopeScaling | None]:
        """Base of the rotary angles, the rotated share of a head (`partial` by default), and how the angles were stretched.

        Older files have `rope_theta` and `partial_rotary_factor` beside `rope_scaling`, newer ones inside `rope_parameters`; inside wins.
        """
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        inner = self.config.get(key) or {}
        if not isinstance(inner, dict):
            self.problems.append(f"{key}: {inner!r}, expected an object")
            inner = {}
        theta = inner.get("rope_theta", self.config.get("rope_theta"))
        share = inner.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        scaling = self._scaling(key, inner)
        return self._number("rope_theta", theta, 1e4), self._number("partial_rotary_factor", share, partial), scaling

    def _scaling(self, key: str, inner: dict[str, Any]) -> RopeScaling | None:
        """As transformers reads it: what is not said is its default, or derived from the rest."""
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind == "default":
            return None

        def number(name: str, default: float | None = None) -> float:
            if inner.get(name) is None and default is None:
                self.problems.append(f"{key}.{name}: missing, expected a number above 0")
                return 1.0
            return self._number(f"{key}.{name}", inner.get(name), default or 1.0)

        if kind == "linear":
            return RopeScaling("linear", number("factor"))
        if kind not in ("yarn", "llama3"):
            known = "default, linear, yarn and llama3"
            self.problems.append(f"{key}: rope_type {kind!r} is not supported, only {known} (without {key}, the model's original context)")
            return None
        # a key beside it wins over one inside, and without either the model was not lengthened since: transformers does both
        original = self.config.get("original_max_position_embeddings") or inner.get("original_max_position_embeddings")
        if original is None:
            original = self.size("max_position_embeddings", 32768)
        original = int(self._number(f"{key}.original_max_position_embeddings", original, 1.0))
        if kind == "llama3":
            return RopeScaling("llama3", number("factor"), original, number("low_freq_factor"), number("high_freq_factor"))
        stretched = self.config.get("max_position_embeddings")
        factor = number("factor", stretched / original if isinstance(stretched, int) and stretched > original else None)
        two = inner.get("mscale") and inner.get("mscale_all_dim")
        amplitude = _strength(factor, number("mscale")) / _strength(factor, number("mscale_all_dim")) if two else _strength(factor, 1.0)
        ramp = (number("beta_slow", 1.0), number("beta_fast", 32.0), number("attention_factor", amplitude))
        return RopeScaling("yarn", factor, original, *ramp, truncate=inner.get("truncate", True) is not False)

    def windows(self, sliding: int | None, first: int, layers: int) -> tuple[int | None, ...]:
        """The window of each layer from number `first` on, or as `layer_types` says; empty when none has one."""
        usual = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
        kinds = self.config.get("layer_types") or usual
        if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
            self.problems.append(f"layer_types: expected sliding_attention or full_attention for each of {layers} layers")
        elif "sliding_attention" in kinds:
            window = self.size("sliding_window", 4096)
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return ()

    def heads(self, heads: int, kv_heads: int | None, hidden_size: int, head_dim: int | None = None) -> tuple[int, int, int]:
        """Query heads, key/value heads (default None: as many) and the size of a head (default None: the width shared out)."""
        heads = self.size("num_attention_heads", heads)
        kv_heads = self.size("num_key_value_heads", kv_heads or heads)
        if heads % kv_heads:
            self.problems.append(f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
        if self.config.get("head_dim") is None and head_dim is None and hidden_size % heads:
            self.problems.append(f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}")
        return heads, kv_heads, self.size("head_dim", head_dim or max(hidden_size // heads, 1))

    def check(self) -> None:
        """Raises one UserError with everything noted so far."""
        self.only("hidden_act", "silu", "silu")
        if self.problems:
            raise UserError(f"config.json of this {self.family} model cannot be used as it is:", self.problems)

    def _number(self, key: str, value: Any, default: float) -> float:
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problems.append(f"{key}: {value!r}, expected a number above 0")
            return default
        return float(value)


def _strength(factor: float, scale: float) -> float:
    """YaRN's recommended amplitude (arXiv:2309.00071 eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
