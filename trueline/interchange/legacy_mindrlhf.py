"""MindRLHF: model files for PPO, DPO and the reward model, and the keys of its PPOConfig. Defaults and mistakes are from its code."""

from trueline.interchange.legacy import Conversion, Old, by_reason

TITLES = {"ppo": "MindRLHF PPO", "dpo": "MindRLHF DPO", "reward": "MindRLHF reward model"}
MODEL = "model.model_config."
DATA = "train_dataset", "train_dataset.data_loader.dataset_dir", "mind_dataset_dir"
HELD_OUT = "eval_dataset", "eval_dataset.data_loader.dataset_dir"
PPO_KEYS = (
    "kl_coef",
    "init_kl_coef",
    "ppo_epochs",
    "cliprange",
    "cliprange_value",
    "num_rollouts",
    "pretrain_coef",
    "vf_coef",
    "chunk_size",
)
REASONS = by_reason({
    "read from the model's own config.json, for training and rollouts alike": "model.model_config",
    "batch.sequences and rollout.running say it": "model.model_config.batch_size",
    "rollouts are not penalised: the penalty would make their log-probabilities those of another model":
        "model.model_config.repetition_penalty",
    "a MindSpore checkpoint; `trueline convert` makes a model folder of it, --model names that":
        "model.model_config.checkpoint_name_or_path load_checkpoint",
    "there is no padding": "model.model_config.pad_token_id",
    "the stop tokens are the family's": "model.model_config.eos_token_id",
    "model.dtype: auto": "model.model_config.param_init_type model.model_config.compute_dtype",
    "rollouts always keep keys and values": "model.model_config.use_past",
    "belongs to DPO": "model.model_config.alpha model.model_config.beta",
    "told by the verb and the model's folder": "model.arch arch",
    "the verb says it": "trainer metric run_mode task",
    "the tokenizer is the one in the model's folder": "processor",
    "there are no strategy files": "src_strategy src_strategy_path_or_dir auto_trans_ckpt only_save_strategy",
    "run.resume: auto goes on from the newest checkpoint that verifies": "resume_training",
    "how MindSpore ran; one process or torchrun, nothing to set":
        "use_parallel context parallel micro_batch_interleave_num runner_config profile profile_start_step profile_stop_step "
        "init_start_profile profile_communication profile_memory auto_tune filepath_prefix autotune_per_step remote_save_url "
        "enable_compile_cache device_target worker_num local_worker_num master_addr master_port join log_dir cluster_time_out node_rank "
        "device_id mode dp mp pp micro_batch_num",
    "sharding is set by mesh.*": "parallel_config",
    "no mixture of experts": "moe_config",
    "model.recompute covers whole layers": "recompute_config",
    "no loss scale is needed in bfloat16 and float32": "runner_wrapper",
    "data.train and data.eval take files, folders and patterns, and shuffle them":
        "train_dataset train_dataset_task eval_dataset eval_dataset_task",
    "the model file of rollouts": "G_SFT_PATH",
    "the model file of training": "T_SFT_PATH",
    "reward.model names the folder": "G_RM_PATH T_RM_PATH",
    "critic.path names a folder, if the critic has one of its own": "G_CRITIC_PATH T_CRITIC_PATH",
    "the model file given here": "config",
    "the tokenizer is the one in the model's folder ": "vocab_file merges_file",
    "`trueline generate` answers": "predict_data",
    "held-out files are named in data.eval": "do_eval",
    "run.eval_every, once data.eval is set": "eval_step_interval eval_epoch_interval",
    "losses, checkpoints and reports are written by every run": "callbacks eval_callbacks",
    "AdamW with float32 masters is the optimizer": "optimizer.type",
    "from the data and run.epochs": "lr_schedule.total_steps",
    "the old program never read it": "layer_scale layer_decay lr_scale lr_scale_factor",
})  # fmt: skip
PPO_REASONS = by_reason({
    "its controller was never called; ppo.kl_target turns ours on": "init_kl_coef target",
    "its controller was never called; ppo.kl_horizon sets ours": "horizon",
    "rollout.running answers are generated at a time": "chunk_size",
    "it pulled more batches and replayed none; epochs are the passes": "ppo_epochs",
    "the critic's parameters are its own (critic.optimizer.lr), and AdamW does not feel the scale of a loss": "vf_coef",
    "AdamW with float32 masters is the optimizer": "optimizer",
    "how MindSpore ran; one process or torchrun, nothing to set": "sink_size",
    "the critic has an adapter of its own on the policy's trunk, or the model in critic.path": "is_shared_backbone",
    "experience is not written to disk": "save_data_file",
    "the model file given here": "sft_path sft_path_infer sft_path_train",
    "reward.model names the folder": "reward_path",
    "critic.path names a folder, if the critic has one of its own": "critic_path",
    "a MindSpore checkpoint; `trueline convert` makes a model folder of it, --model names that":
        "load_sft_checkpoint load_sft_checkpoint_infer load_sft_checkpoint_train",
    "critic.path names a Hugging Face folder": "load_critic_checkpoint",
    "the reference is the model as training starts": "load_ref_checkpoint",
    "a prompt may have data.max_length - sampling.max_new_tokens tokens": "max_prompt_length",
    "PPO never read the model file's schedule": "lr_schedule",
    "the old program never read it":
        "lr weight_decay sceduler_name T_max eta_min scale_reward ref_mean ref_std gen_experience_kwargs total_steps "
        "checkpoint_interval eval_interval inference_micro_size",
})  # fmt: skip


def stage_of(found: dict[str, list[Old]], scripts: str) -> str:
    """Which of its stages the files are for: told by the architecture's name, the data set's and the program's."""
    names = " ".join(str(old.value) for name in ("model.arch.type", "train_dataset_task.type") for old in found.get(name, []))
    return "reward" if "Reward" in names or "reward_" in scripts else "dpo" if "DPO" in names or "_dpo" in scripts else "ppo"


def convert(it: Conversion, devices: int, given: dict[str, list[Old]], scripts: str) -> None:
    """Fills `it`; `given` holds also what a later file overrode, for rollout and training had a file each. `scripts` are the programs."""
    told = it.get(MODEL + "type", it.get("trainer.model_name", scripts))
    glm = "glm" in str(told).lower() or "G_SFT_PATH" in it.olds or "T_SFT_PATH" in it.olds
    nearest = "THUDM/glm-4-9b-chat-hf" if glm else "Qwen/Qwen2-7B-Instruct"
    it.add("model.path", nearest, "the nearest published folder; --model names another")
    it.move("seed", "run.seed")
    if str(it.get("save_ckpt_dir")) in (".", "./", str(it.get("load_sft_checkpoint"))):
        it.drop("save_ckpt_dir", "where it was started, or its old checkpoints are; run.output is a folder of its own")
    it.move("save_ckpt_dir", "run.output")
    for keys, ours in ((DATA, "data.train"), (HELD_OUT, "data.eval")):
        for key in keys:
            if it.get(key) and ours not in it.settings:
                it.move(key, ours, lambda value: [str(value)], "MindRecord is read as it is, with the tokenizer it was made with")
    it.drop("output_dir", "save_ckpt_dir goes before it") if "run.output" in it.settings else it.move("output_dir", "run.output")
    it.move("recompute_config.recompute", "model.recompute")
    for name in [name for name in it.olds if name.startswith("callbacks[")]:
        new = {"save_checkpoint_steps": "run.save_every", "keep_checkpoint_max": "run.keep"}.get(name.rpartition(".")[2])
        if new:
            it.move(name, new)
    longest = MODEL + "seq_length" if MODEL + "seq_length" in it.olds else "seq_length"
    it.move(longest, "data.max_length")
    it.add("data.overlength", "truncate", "the old program cut longer samples without a word; cuts are counted now")
    {"ppo": _ppo, "dpo": _dpo, "reward": _reward}[it.stage](it, devices)
    _known_mistakes(it, given, glm)
    it.drop_all(REASONS)
    it.add("data.train", ["train.jsonl"], "the old files name no data; JSON lines and MindRecord files are read")


def _ppo(it: Conversion, devices: int) -> None:
    rollouts, batch = int(it.number("num_rollouts", 8)), int(it.number("batch_size", 2))
    it.move("num_rollouts", "rollout.prompts", lambda value: rollouts)
    it.add("rollout.prompts", rollouts, "MindRLHF's default")
    it.move("batch_size", "ppo.minibatches", lambda value: max(1, rollouts // max(batch, 1)), f"{rollouts} rollouts in batches of {batch}")
    it.add("ppo.minibatches", max(1, rollouts // max(batch, 1)), "MindRLHF's default batch_size 2")
    it.move("epochs", "ppo.epochs", remark="passes over an iteration's rollouts")
    it.add("ppo.epochs", 2, "MindRLHF's default")
    it.add("run.steps", 10, "the driver script's ten rounds; prompts are new in each now, so many more are useful")
    for old, new, default in (
        ("kl_coef", "ppo.kl_coefficient", 0.02),
        ("gamma", "ppo.gamma", 1.0),
        ("lam", "ppo.lam", 0.95),
        ("cliprange", "ppo.clip", 0.2),
        ("cliprange_value", "ppo.value_clip", 0.2),
        ("eps", "optimizer.eps", 1e-8),
    ):
        it.move(old, new)
        it.add(new, default, "MindRLHF's default")
    it.add("ppo.whiten", False, "its advantages were not whitened")
    _pretrain(it)
    _ppo_rate(it)
    _sampling(it)
    it.move("load_rm_checkpoint", "reward.model", lambda value: "runs/reward/model", "a reward model's folder belongs here")
    it.add("reward.model", "runs/reward/model", "where `trueline reward` leaves it with run.output=runs/reward")
    it.add("run.output", "runs/ppo", "a place for it")
    it.drop("optimizer", PPO_REASONS["optimizer"])
    it.drop_all(
        PPO_REASONS | {"runner_config": "PPO never read the model file's run", "optimizer": "PPO never read the model file's optimizer"}
    )


def _pretrain(it: Conversion) -> None:
    share = it.number("pretrain_coef", 0.9)
    why = f"{share:g} of the loss was pretraining and {1 - share:g} policy"
    if not 0 < share < 1:
        it.drop("pretrain_coef", "no mix of two losses: ppo.ptx_coefficient stays 0")
        return
    it.move("pretrain_coef", "ppo.ptx_coefficient", lambda value: round(share / (1 - share), 6), why)
    it.add("ppo.ptx_coefficient", round(share / (1 - share), 6), f"MindRLHF's default: {why}")
    it.add("data.ptx", list(it.settings.get("data.train", ["train.jsonl"])), "its samples were the prompts with their preferred answers")
    it.warn(
        f"pretraining mix: {why}; remove data.ptx and ppo.ptx_coefficient for PPO alone. "
        "Its mask was padded with the pad token's id, so that padding outweighed the text; here a mask is 0 or 1"
    )


def _ppo_rate(it: Conversion) -> None:
    start, end = it.number("start_lr", 9e-6), it.number("end_lr", 1e-10)
    warmup, decay = it.number("warmup_step", 3200), it.number("decay_steps", 200000)
    it.move("start_lr", "optimizer.lr")
    it.add("optimizer.lr", start, "MindRLHF's default start_lr")
    it.move("end_lr", "optimizer.floor", lambda value: round(end / max(start, 1e-30), 9), "as a share of the peak")
    share = f"{warmup:g} of {decay:g} steps, as a share of this run's"
    it.move("warmup_step", "optimizer.warmup", lambda value: round(warmup / max(decay, 1), 6), share)
    it.add("optimizer.warmup", round(warmup / max(decay, 1), 6), f"MindRLHF's default: {share}")
    it.part("decay_steps", "optimizer.warmup", share)
    betas = [it.number("beta1", 0.9), it.number("beta2", 0.95)]
    it.move("beta1", "optimizer.betas", lambda value: betas)
    it.move("beta2", "optimizer.betas", lambda value: betas)
    it.add("optimizer.weight_decay", 0.1, "fixed in its code, whatever weight_decay said")
    it.add("optimizer.max_norm", 10.0, "fixed in its code")
    it.warn("learning rate: each round began its schedule again and never left the warm-up; checkpoints hold it now")


def _sampling(it: Conversion) -> None:
    flat = {
        name: MODEL + name if MODEL + name in it.olds else name
        for name in ("max_decode_length", "do_sample", "top_k", "top_p", "temperature")
    }
    it.move(flat["max_decode_length"], "sampling.max_new_tokens")
    if it.get(flat["do_sample"]):
        for name in ("top_k", "top_p", "temperature"):
            it.move(flat[name], f"sampling.{name}")
        it.drop(flat["do_sample"], "answers are always sampled")
        return
    it.warn(
        "rollouts were greedy, and of the same first prompts in every round: nothing was explored. Prompts are shuffled and "
        "answers sampled now (sampling.temperature 1.0)"
    )
    it.add("sampling.temperature", 1.0, "greedy rollouts explore nothing")
    for name in ("do_sample", "top_k", "top_p", "temperature"):
        it.drop(flat[name], "greedy rollouts explore nothing; answers are sampled from all tokens")
    for name in ("top_k", "top_p", "do_sample", "max_decode_length"):
        it.drop(name, "the model file's value goes before it")


def _supervised(it: Conversion, devices: int) -> None:
    """Epochs, batch and schedule of DPO and of the reward model."""
    each, times = int(it.number("runner_config.batch_size", 1)), int(it.number("runner_config.gradient_accumulation_steps", 1))
    spread = int(it.number("parallel_config.data_parallel", devices))
    sum_of = f"{each} per device x {times} accumulated x {spread} data-parallel"
    it.move("runner_config.epochs", "run.epochs")
    it.add("run.epochs", 1, "MindRLHF's default")
    it.move("runner_config.batch_size", "batch.sequences", lambda value: each * times * spread, sum_of)
    it.add("batch.sequences", each * times * spread, sum_of)
    it.part("parallel_config.data_parallel", "batch.sequences", sum_of)
    it.part("runner_config.gradient_accumulation_steps", "batch.sequences", sum_of)
    rate = it.number("lr_schedule.learning_rate", it.number("optimizer.learning_rate", 1e-5))
    it.move("lr_schedule.learning_rate", "optimizer.lr")
    if "optimizer.lr" in it.settings:
        it.drop("optimizer.learning_rate", "lr_schedule.learning_rate goes before it")
    it.move("optimizer.learning_rate", "optimizer.lr")
    it.move("lr_schedule.lr_end", "optimizer.floor", lambda value: round(float(value) / max(rate, 1e-30), 9), "as a share of the peak")
    it.move("lr_schedule.warmup_steps", "optimizer.warmup")
    it.move("lr_schedule.warmup_ratio", "optimizer.warmup", remark="share of all steps")
    kind = str(it.get("lr_schedule.type", "Cosine")).lower()
    it.move(
        "lr_schedule.type", "optimizer.schedule", lambda value: next((k for k in ("cosine", "linear", "constant") if k in kind), "cosine")
    )
    it.move("optimizer.weight_decay", "optimizer.weight_decay")
    it.move("optimizer.eps", "optimizer.eps")
    betas = [it.number("optimizer.beta1", 0.9), it.number("optimizer.beta2", 0.95)]
    for name in ("optimizer.beta1", "optimizer.beta2"):
        it.move(name, "optimizer.betas", lambda value: betas)
    it.move("optimizer.betas", "optimizer.betas")
    it.move("runner_wrapper.use_clip_grad", "optimizer.max_norm", lambda on: 1.0 if on else 1e9)
    it.add("run.output", f"runs/{it.stage}", "a place for it")


def _dpo(it: Conversion, devices: int) -> None:
    _supervised(it, devices)
    alpha, beta = it.number(MODEL + "alpha", 1.0), it.number(MODEL + "beta", 0.1)
    if alpha == 1.0 and beta < 1.0:
        it.move(MODEL + "beta", "dpo.beta", remark="and the SFT term's weight")
        it.move(MODEL + "alpha", "dpo.sft_weight", lambda value: beta, "loss = alpha DPO + beta SFT")
        it.warn(
            f"beta {beta:g} was both DPO's temperature and the weight of the SFT term in the version of October 2024, to which these "
            "values belong; both are set to it. Set dpo.sft_weight to 0 for DPO alone"
        )
    else:
        it.move(MODEL + "alpha", "dpo.sft_weight", remark="loss = DPO + alpha SFT")
        it.move(MODEL + "beta", "dpo.beta", lambda value: 0.1, f"{beta:g} of means per token; see the warning")
        it.warn(
            f"beta {beta:g} multiplied means per token in the later version, to which these values belong; here sums count. "
            f"dpo.beta is set to 0.1, as is usual; for answers of n tokens {beta:g} / n is the old strength"
        )
    it.warn("reference: its log-probabilities carried no name of their model; they are computed and fingerprinted as training starts")
    it.warn(
        "templates: Qwen2's conversations got GLM's markers, and GLM-4's CValues got Qwen2's; each family has its own now"
    )


def _reward(it: Conversion, devices: int) -> None:
    _supervised(it, devices)
    it.add("ranking.loss", "tokenwise", "its loss compared scores token by token; `last` is the usual one")
    if it.settings.get("data.max_length", 0) > 2048:
        it.warn("the end of an answer was found with 16-bit numbers, wrong beyond 2048 tokens; accuracies of long answers were wrong")
    it.warn("the reward model was trained on a template that PPO did not use; training and scoring share one now")


def _known_mistakes(it: Conversion, given: dict[str, list[Old]], glm: bool) -> None:
    layers = given.get(MODEL + "num_layers", [])
    for old in layers:
        if glm and old.value != 40 and any(size.value == 4096 for size in given.get(MODEL + "hidden_size", [])):
            it.warn(
                f"{old.where}: num_layers {old.value}, but GLM-4-9B has 40; half a model was trained. The model's own config.json is used"
            )
    ratios = given.get(MODEL + "rope_ratio", [])
    if len({old.value for old in ratios}) > 1:
        places = " and ".join(f"{old.value} in {old.where}" for old in ratios)
        it.warn(f"rope_ratio is {places}: rollouts and training were different models. The model's own config.json is used")
    elif glm and any(old.value == 1 for old in ratios):
        it.warn(f"{ratios[0].where}: rope_ratio 1, but GLM-4-9B-chat has 500. The model's own config.json is used")
    stops = it.get(MODEL + "eos_token_id")
    if it.get(MODEL + "pad_token_id") in (stops if isinstance(stops, list) else [stops]) and stops is not None:
        it.warn(
            f"pad_token_id {it.get(MODEL + 'pad_token_id')} is also a stop token, so the end of an answer was taken for padding and never "
            "trained; there is no padding now"
        )
    if it.stage == "ppo":
        it.warn("KL: kl_coef was added to the reward, so moving away from the reference was rewarded; ppo.kl_coefficient is subtracted")
        if it.settings.get("ppo.gamma") != 1.0 or it.settings.get("ppo.lam") != 0.95:
            it.warn("gamma and lam were ignored (1 and 0.95 counted); they are in effect now")
        it.warn(
            "critic: a critic of its own ended in a sigmoid, which no reward outside 0 and 1 fits; ours is linear. 0.1 was subtracted from "
            "every score; set nothing for it, as a constant does not change the ranking"
        )
