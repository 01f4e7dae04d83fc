"""`trueline prepare`: a stage's files to tokens before anything is trained, and DPO's stored reference.

The work is what the stage itself would do first, so nothing here can differ from it.
"""

import time
from typing import Any

import numpy as np

from trueline.config.schema import DpoStageConfig, PpoStageConfig
from trueline.data.cache import lengths
from trueline.errors import UserError
from trueline.recipes import dpo
from trueline.recipes.assemble import open_text
from trueline.recipes.prepare import Prepared, cache_folder, preference_pairs, prompt_tokens, ptx_samples, sft_samples


def run(stage: str, config: Any) -> None:
    """Prints where each file's tokens are, how many records that is and how long it took; then what was left out or cut."""
    stores = isinstance(config, DpoStageConfig) and config.reference.kind == "stored"
    folder = cache_folder(config.data.cache)
    if folder is None and not stores:
        raise UserError("data.cache is off, so there is nothing to prepare; leave it out, or name a folder")
    began = time.perf_counter()
    family, tokenizer = open_text(config.model)
    source = (config.data, family, tokenizer)
    if folder is not None:
        if stage == "sft":
            _tell(sft_samples(*source, config.run.seed), began)
        elif isinstance(config, PpoStageConfig):
            _tell(prompt_tokens(*source, config.sampling.max_new_tokens, config.run.seed), began)
            _tell(ptx_samples(*source, config.run.seed), time.perf_counter())
        else:
            _tell(preference_pairs(*source, config.run.seed), began)
    if stores:
        path = dpo.prepare(config)
        print(f"{path}: reference log-probabilities, for dpo with the same configuration")


def _tell(prepared: Prepared[Any], began: float) -> None:
    if not prepared.files:
        return
    seconds = time.perf_counter() - began
    for path, kept in prepared.files.items():
        how = "made" if kept.made else "there already"
        count = sum(len(np.unique(block.records())) for block in kept.blocks)
        print(f"{path}: {count:,} records, {how}, in {kept.place}")
    records = sum(kept.tally.seen for kept in prepared.files.values())
    tokens = sum(int(lengths(items).sum()) for items in (prepared.train, prepared.held_out))
    print(f"{records:,} records, {tokens:,} tokens used, {seconds:.2f} s, {records / max(seconds, 1e-9):,.0f} records/s")
    for note in prepared.notes:
        print(note)
