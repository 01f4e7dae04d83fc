"""How much of a reward model's accuracy a rule without any model has: "the longer answer wins", on the same held-out pairs.

`python examples/longer_wins.py RUN`: RUN is the folder of a `trueline reward` run with held-out pairs.
"""

import sys
from pathlib import Path

import trueline
from trueline.config.load import load_config
from trueline.config.schema import RewardConfig
from trueline.data.tokenizer import load_tokenizer
from trueline.families.folder import open_folder
from trueline.recipes.prepare import preference_pairs


def share(flags: list[float]) -> str:
    return f"{sum(flags) / len(flags):.3f} of {len(flags)}" if flags else "no pairs"


def sign(difference: float) -> float:
    """1 right, 0 wrong, a half for a tie: as `trueline reward` counts."""
    return 0.5 if difference == 0 else float(difference > 0)


def main(run: Path) -> None:
    config = load_config(RewardConfig, [run / "config.yaml"], [])
    model = run / "model"
    pairs = preference_pairs(config.data, open_folder(model).family, load_tokenizer(model), config.run.seed).held_out
    scores = trueline.load(str(model)).score([side.tokens for pair in pairs for side in (pair.chosen, pair.rejected)])
    learned = [sign(a - b) for a, b in zip(scores[0::2], scores[1::2], strict=True)]
    longer = [sign(sum(pair.chosen.trained) - sum(pair.rejected.trained)) for pair in pairs]
    agree = [float(a == b) for a, b in zip(learned, longer, strict=True)]
    print(f"reward model right            {share(learned)}")
    print(f"longer answer right           {share(longer)}")
    print(f"both say the same             {share(agree)}")
    print(f"model right, shorter is better {share([a for a, b in zip(learned, longer, strict=True) if b == 0])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
