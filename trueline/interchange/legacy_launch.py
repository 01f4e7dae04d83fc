"""MindRLHF's launch scripts: what each of their arguments is, by its place. One rule: an argument is named as the flag that it becomes."""

from collections.abc import Sequence

_MODELS = ("SFT_PATH", "RM_PATH", "CRITIC_PATH")
_REST = (
    "only_save_strategy", "save_ckpt_dir", "enable_compile_cache", "worker_num", "use_parallel", "load_sft_checkpoint",
    "load_rm_checkpoint", "load_critic_checkpoint", "load_ref_checkpoint",
)  # fmt: skip
_G, _T = (tuple(f"{side}_{model}" for model in _MODELS) for side in "GT")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "run_glm4_rlhf.sh": (*_G, *_T, "save_data_file", "mind_dataset_dir", *_REST),
    "run_glm4_generate.sh": (*_G, "save_data_file", "mind_dataset_dir", *_REST),
    "run_glm4_train.sh": (*_T, "save_data_file", *_REST),
}
"""Of rollouts (G) and training (T): the model files come first."""
MODEL_FILES = ("G_SFT_PATH", "T_SFT_PATH", "sft_path", "sft_path_infer", "sft_path_train")
NAMED = {**dict.fromkeys((*MODEL_FILES, "config"), ""), "dataset_dir": "dataset_info.json"}
"""Keys that name a file with more keys: themselves, or the file of that name in their folder."""


def name_arguments(script: str, values: Sequence[str], notes: list[str], where: str) -> list[str]:
    """A name for each of a known script's `values`; what is wrong with them is added to `notes`.

    The published example leaves `enable_compile_cache` out, so that all behind it came one place early.
    """
    names = list(ARGUMENTS[script])
    place = names.index("enable_compile_cache")
    if len(values) > place and values[place].isdigit():
        names.pop(place)
        notes.append(
            f"{where}: argument {place + 1} of {script} is COMPILE_CACHE, True or False, but is {values[place]} here, as in the published "
            "example: every later argument was taken for the one before it, and the script stopped. They are read as they were meant"
        )
    needed = names.index("only_save_strategy")
    if len(values) < needed:
        notes.append(f"{where}: {script} has {len(values)} arguments, expected at least {needed} (from {names[0]} to {names[needed - 1]})")
    return names[: len(values)] + [f"{script}[{i + 1}]" for i in range(len(names), len(values))]
