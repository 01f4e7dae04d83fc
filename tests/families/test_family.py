import pytest

from trueline.families.family import stop_ids
from trueline.families.qwen2 import QWEN2


@pytest.mark.parametrize(("generation", "more"), [(None, set()), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8})])
def test_stop_ids_are_the_familys_and_the_folders(letters, generation, more):
    tokenizer = letters("<|im_end|>", "<|im_start|>")
    assert stop_ids(QWEN2, tokenizer, generation) == {tokenizer.specials["<|im_end|>"]} | more
