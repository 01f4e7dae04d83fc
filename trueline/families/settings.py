"""config.json to sizes: each key with the default transformers gives it. What this decoder cannot do is refused, never ignored."""

from typing import Any

from trueline.errors import UserError


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

    def rope(self, partial: float) -> tuple[float, float]:
        """Base of the rotary angles, and the rotated share of a head (`partial` by default).

        Older files have `rope_theta` and `partial_rotary_factor` beside `rope_scaling`, newer ones inside `rope_parameters`; inside wins.
        """
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        inner = self.config.get(key) or {}
        if not isinstance(inner, dict):
            self.problems.append(f"{key}: {inner!r}, expected an object")
            inner = {}
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default":
            self.problems.append(
                f"{key}: rope_type {kind!r} is not supported, only 'default' (without {key}, the model's original context)"
            )
        theta = inner.get("rope_theta", self.config.get("rope_theta"))
        share = inner.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        return self._number("rope_theta", theta, 1e4), self._number("partial_rotary_factor", share, partial)

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
