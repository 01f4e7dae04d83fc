"""What is left to train on when records are too long, and what is said when nothing is."""

import re
from pathlib import Path

import pytest

from tests.recipes.toys import Toys
from trueline.config.schema import DataConfig
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import UserError
from trueline.families.qwen2 import QWEN2
from trueline.recipes.prepare import Prepared, sft_samples


def prepared(toys: Toys, **settings: object) -> Prepared:
    data = DataConfig.model_validate({"train": str(toys.data("messages.jsonl")), **settings})
    return sft_samples(data, QWEN2, load_tokenizer(toys.model()), seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_files_of_which_all_records_are_too_long_say_so(toys: Toys, fraction: float) -> None:
    sentence = f"nothing is left to train on in {toys.data('messages.jsonl')}: 12 of 12 records left out: longer than 8 tokens"
    with pytest.raises(UserError, match=re.escape(sentence)):
        prepared(toys, max_length=8, overlength="drop", eval_fraction=fraction)


def test_every_record_is_trained_on_or_held_out(toys: Toys) -> None:
    whole, split = prepared(toys), prepared(toys, eval_fraction=0.25)
    assert (len(split.train), len(split.held_out)) == (9, 3)
    assert sorted(s.tokens for s in [*split.train, *split.held_out]) == sorted(s.tokens for s in whole.train)


def test_one_record_cannot_be_divided(toys: Toys, tmp_path: Path) -> None:
    single = tmp_path / "single.jsonl"
    single.write_text(toys.data("messages.jsonl").read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="data.eval_fraction needs at least 2 records, found 1"):
        prepared(toys, train=str(single), eval_fraction=0.5)
