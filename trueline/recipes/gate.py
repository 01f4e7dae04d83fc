"""The export gate's other side: a process of its own that knows nothing but the written folder, and says what it finds there.

`python -m trueline.recipes.gate FOLDER DTYPE` prints one JSON object. This is the only place of the product that may load transformers, and
only here, in the child: to ask another program what the folder is. No code of the folder is ever run.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.config.schema import ModelConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import sample_of
from trueline.data.stream import key
from trueline.families.peft import is_adapter
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import Opened, make_scorer, open_model

PROBES, LENGTH = 8, 24
TALK = (Message("user", "你好, what is 2 + 3?\n"), Message("assistant", "5。"), Message("user", "<|im_end|> and 再加 1?"))


def probe_rows(vocabulary: int) -> list[list[int]]:
    """Fixed pseudo-random token sequences."""
    return [[key(0, "probe", i, t) % vocabulary for t in range(LENGTH)] for i in range(PROBES)]


@torch.no_grad()
def probe(opened: Opened) -> Tensor:
    """Log-probabilities (a reward model: scores) of the probes' tokens `[PROBES * LENGTH]`, as far as float64."""
    config = opened.folder.decoder_config
    rows = probe_rows(config.vocab_size)
    batch = pack([sample_of(row, [True] * len(row), config.blocks) for row in rows]).to(opened.decoder.embed.weight.device)
    if opened.score is not None:
        return make_scorer(opened.decoder, opened.role, opened.score).eval()(batch).double().cpu()
    return LanguageModel(opened.decoder, opened.role).eval()(batch).double().cpu()


def rendered(opened: Opened) -> list[int] | None:
    """Tokens of a fixed conversation as a prompt; None without a tokenizer."""
    if opened.tokenizer is None:
        return None
    return opened.folder.family.render(Conversation(TALK), opened.tokenizer, open=True).tokens


def findings(folder: str, dtype: str) -> dict[str, Any]:
    """What the folder is to our loader and, where it has the class, to transformers."""
    opened = open_model(ModelConfig.model_validate({"path": folder, "dtype": dtype}), 0)
    return {"probes": probe(opened).tolist(), "template": rendered(opened), "transformers": _theirs(folder, opened)}


def _theirs(folder: str, opened: Opened) -> dict[str, Any] | None:
    """Version and probes by transformers; None where it is not installed, has no such class, or the folder is an adapter."""
    name = opened.folder.family.architecture if opened.score is None else opened.folder.family.scorer_architecture
    if is_adapter(Path(folder)) or importlib.util.find_spec("transformers") is None:
        return None
    library: Any = importlib.import_module("transformers")
    kind = getattr(library, name, None)
    if kind is None:
        return None
    model = kind.from_pretrained(folder, dtype=opened.decoder.embed.weight.dtype, local_files_only=True).eval()
    rows = torch.tensor(probe_rows(opened.folder.decoder_config.vocab_size))
    with torch.no_grad():
        if opened.score is not None:
            # theirs scores the last token that is no pad, ours every token: compared are sequences that end in an ordinary one
            model.config.pad_token_id = None
            found = torch.cat([model(row[None]).logits[:, 0] for row in rows])
            return {"version": library.__version__, "last": found.double().tolist()}
        table = model(rows).logits.double().log_softmax(-1)
        picked = table[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    return {"version": library.__version__, "probes": torch.nn.functional.pad(picked, (1, 0)).flatten().tolist()}


if __name__ == "__main__":
    print(json.dumps(findings(sys.argv[1], sys.argv[2])))
