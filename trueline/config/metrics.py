"""What `trueline evaluate` measures of a model's own answers, beside their length and score."""

from typing import Literal

from trueline.config.section import Config


class MetricsConfig(Config):
    text: Literal["none", "words", "characters"] = "none"
    """BLEU-4 and ROUGE against the file's answers, over words (Chinese is cut by jieba) or over characters; 0 to 100."""
    match: bool = False
    """How often the final answer is the reference's: numbers by their value, anything else by its text."""
    reference: str | None = None
    """Field of the record that holds the reference; none: the schema's own answer (of pairs and ranked answers, the best)."""
    against: str | None = None
    """Win rate over another model by reward: its folder or hub id, or the samples.jsonl of its evaluation on the same files."""
