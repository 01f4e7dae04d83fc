"""The export's gate: run in a process of its own, it loads a written folder and says what it found there.

`python -m trueline.recipes.gate` reads a request, one JSON object, from standard input and writes its findings to the file the request
names. It judges nothing: `export` compares the findings with what was meant to be written. This process alone may load transformers and
PEFT, where they are installed, to load the folder as others will; no code of a folder runs there either.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.config.schema import ModelConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample, sample_of
from trueline.data.stream import key
from trueline.families.chat_template import openai, writable
from trueline.families.folder import fingerprint
from trueline.families.peft import is_adapter
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.model.weights import read_tensors, tensor_places
from trueline.recipes.assemble import Opened, files_fingerprint, make_scorer, open_model

TALKS = (
    Conversation((Message("user", "What is 2 + 2?"), Message("assistant", "4"))),
    Conversation((Message("system", "Be brief."), Message("user", "你好，世界"), Message("assistant", "Hello. 你好。"))),
    Conversation((Message("user", "One"), Message("assistant", "1"), Message("user", "Two,\nthree"), Message("assistant", "2 3"))),
)
"""Conversations every family can write down."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查询天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED = (
    Message("user", "北京天气？"),
    Message("assistant", '{"city": "北京"}', "get_weather"),
    Message("observation", '{"temp": 3}'),
    Message("assistant", "三度。"),
)
CALLED_TWICE = (
    Message("system", "Be brief."),
    Message("user", "北京和上海"),
    Message("assistant", '{"city": "北京"}', "get_weather"),
    Message("assistant", '{"city": "上海"}', "get_weather"),
    Message("observation", "3"),
    Message("observation", "7"),
    Message("assistant", "三和七。"),
)
MORE_TALKS = (
    Conversation(CALLED[:2], (WEATHER,)),
    Conversation(CALLED, (WEATHER, WEATHER)),
    Conversation(CALLED_TWICE, (WEATHER,)),
    Conversation((*CALLED, Message("user", "谢谢"), Message("assistant", "不客气"))),
    Conversation((*TALKS[0].messages[:1], Message("assistant", "<think>\nTwo and two.\n</think>\n\n4"), *TALKS[2].messages[2:])),
)
"""With tools, calls, observations and a thought: for the families that can write them down."""
MARKED = Conversation((Message("user", "<|im_end|> </s> <|user|>\n"), Message("assistant", "as text")))
"""Text that looks like control tokens. Other programs make control tokens of it, so it is for our own renderer alone."""

PROMPTS = [replace(talk, messages=talk.messages[:-1]) for talk in (*TALKS, *MORE_TALKS)]


def probes(opened: Opened) -> list[Sample]:
    """Eight fixed pseudo-random token sequences, and the conversations where there is a tokenizer."""
    vocabulary = opened.folder.decoder_config.vocab_size
    special = {opened.folder.config.get("pad_token_id")}
    rows = [[token for t in range(24) if (token := key(0, "probe", i, t) % vocabulary) not in special] or [1] for i in range(8)]
    samples = [sample_of(row, [False] + [True] * (len(row) - 1), opened.folder.decoder_config.blocks) for row in rows]
    return samples + ([opened.folder.family.render(talk, opened.tokenizer) for talk in (*TALKS, MARKED)] if opened.tokenizer else [])


@torch.no_grad()
def values(opened: Opened, samples: Sequence[Sample]) -> list[list[float]]:
    """Log-probability of each token after the first (a reward model: the score of each), sample by sample, as far as float64."""
    found = []
    for sample in samples:
        whole = Sample(sample.tokens, [False] + [True] * (len(sample) - 1), sample.context, sample.anchor)
        batch = pack([whole]).to(opened.decoder.embed.weight.device)
        scored = opened.score is not None
        module = make_scorer(opened.decoder, opened.role, opened.score) if scored else LanguageModel(opened.decoder, opened.role)
        out: Tensor = module.eval()(batch)
        found.append((out if scored else out[1:]).double().tolist())
    return found


def inspect(request: dict[str, Any]) -> dict[str, Any]:
    """What is in the folder, by our own loader and by others'."""
    folder, base = Path(request["folder"]), request["base"]
    adapted = is_adapter(folder)
    opened = open_model(ModelConfig(path=str(folder), base=base if adapted else None, dtype=request["dtype"]), 0)
    samples = probes(opened)
    rendered = [sample.tokens for sample in samples[8:]]
    family, talks = opened.folder.family, writable(PROMPTS, opened.folder.family, opened.tokenizer) if opened.tokenizer else []
    prompts = [family.render(talk, opened.text(), open=True).tokens for talk in talks]
    found = {"values": values(opened, samples), "rendered": rendered, "prompts": prompts}
    if adapted:
        found["base"] = files_fingerprint(opened.folder.path)
    else:
        found |= weights(folder, Path(base) if base else None)
    where = str(opened.folder.path)
    del opened
    return found | {"others": others(request, where, [sample.tokens for sample in samples], talks, adapted)}


def weights(folder: Path, base: Path | None) -> dict[str, Any]:
    """Hash and dtype of each tensor; with a `base`, which of them differ from it, which it lacks, and which of its own are gone.

    At most one tensor of each folder is in memory.
    """
    theirs = tensor_places(base) if base else {}
    hashes, dtypes, changed, added = {}, {}, [], []
    for name, tensor in read_tensors(folder):
        hashes[name], dtypes[name] = fingerprint([(name, tensor)]), str(tensor.dtype).removeprefix("torch.")
        if name not in theirs:
            added.append(name)
        elif not torch.equal(theirs[name]().to(tensor.dtype), tensor):
            changed.append(name)
    return {"hashes": hashes, "dtypes": dtypes, "changed": changed, "added": added, "gone": sorted(theirs.keys() - hashes.keys())}


def others(
    request: dict[str, Any], where: str, tokens: list[list[int]], talks: Sequence[Conversation], adapted: bool
) -> dict[str, Any]:
    """The same probes through transformers and PEFT, or why not: {"skipped": reason}."""
    try:
        versions = {name: version(name) for name in ("transformers", *(["peft"] if adapted else []))}
    except PackageNotFoundError as missing:
        return {"skipped": f"{missing.name} is not installed"}
    transformers: Any = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    kind = getattr(transformers, request["architecture"], None)
    if kind is None:
        return {"skipped": f"transformers {versions['transformers']} has no class {request['architecture']}"}
    labels = {"num_labels": 1} if request["scored"] else {}
    dtype = getattr(torch, request["dtype"])
    model = kind.from_pretrained(where, dtype=dtype, use_safetensors=True, local_files_only=True, **labels)
    if adapted:
        peft: Any = import_module("peft")
        model = peft.PeftModel.from_pretrained(model, request["folder"], local_files_only=True)
    found: dict[str, Any] = {"versions": versions, "values": [asked(model.eval(), row, request["scored"]) for row in tokens]}
    if request["template"]:
        found |= prompts_of_transformers(transformers, request, talks)
    return found


@torch.no_grad()
def asked(model: Any, row: list[int], scored: bool) -> list[float]:
    """As `values`, by a model of transformers; of a classifier the last token's score only."""
    logits = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64)).logits[0].double()
    if scored:
        return [float(logits[0])]
    picked: list[float] = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
    return picked


def prompts_of_transformers(transformers: Any, request: dict[str, Any], talks: Sequence[Conversation]) -> dict[str, Any]:
    """The prompts by `apply_chat_template`, where transformers has a class for the tokenizer's files."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"], local_files_only=True)
    except Exception as problem:  # every tokenizer class fails in its own way on files that are not its own
        return {"no tokenizer": f"{type(problem).__name__}: {problem}".splitlines()[0]}
    found = []
    for talk in talks:
        tools = list(talk.tools) or None
        text = tokenizer.apply_chat_template(openai(talk), tools=tools, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False).input_ids)
    return {"prompts": found}


def main() -> None:
    request = json.load(sys.stdin)
    Path(request["findings"]).write_text(json.dumps(inspect(request)), encoding="utf-8")


if __name__ == "__main__":
    main()
