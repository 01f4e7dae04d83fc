"""Every key of every stage, with its default and its sentence. Frozen; a key that is not here is an error; there are no aliases."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from trueline.config.adapter import AdapterConfig as AdapterConfig
from trueline.config.metrics import MetricsConfig
from trueline.config.section import Config as Config
from trueline.config.section import refuse_conflicts

Format = Literal["auto", "cvalues", "preference", "sharegpt", "messages", "ranked", "alpaca", "columns", "prompt"]
Files = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Config):
    path: str
    """Model folder or hub id (config.json, safetensors, tokenizer files); a finished adapter folder works too."""
    base: str | None = None
    """Model folder or hub id under the adapter in model.path, when it is not where the adapter says."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when the model folder has none or another is wanted."""
    template: str = "auto"
    """How conversations are written down: auto is the model's own way, or another family's by name (chatml, llama3, qwen3, ...)."""
    init: Literal["load", "random"] = "load"
    """Read the weights, or draw them at random from the model's config (experiments)."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Number format of the weights; auto: bfloat16 on an accelerator, and to train on a CPU with AMX from width 256 on."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained."""
    recompute: Literal["auto"] | bool = "auto"
    """Recompute layers in the backward pass instead of keeping their activations: less memory, up to a third more time; true: all layers;
    auto: as many as the free memory asks for, which is measured before the first step."""
    compile: bool = False
    """Training: compile what the layers do around attention; fewer passes over memory, after a start of up to a minute; needs g++, on a
    GPU Triton too."""


class DataConfig(Config):
    train: Files = ()
    """Training files, folders or patterns: .json, .jsonl, .csv, .tsv (each also .gz), .parquet or .mindrecord, in any known schema."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One for each entry of data.train: how often its records occur in a pass (2: twice, 0.5: a drawn half); empty: once."""
    eval: Files = ()
    """Held-out files."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the training records held out for evaluation when `data.eval` is empty (drawn with run.seed)."""
    format: Format = "auto"
    """Schema of the files; auto recognises it from the fields of the first record."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training records."""
    max_length: int = Field(1024, ge=8)
    """Longest sample in tokens, prompt and answer together."""
    overlength: Literal["error", "drop", "truncate"] = "error"
    """What to do with a longer one: stop with its line; leave it out, counted; or cut the answer, which then trains no stop token."""
    ranked: Literal["all", "best"] = "all"
    """Ranked answers: every pair, or the best against each of the rest."""
    train_on: Literal["all", "last"] = "all"
    """SFT: train on every assistant turn, or on the last one only."""
    cache: str | None = None
    """Folder that keeps every file's tokens; none: `~/.cache/trueline/tokens`; `off`: nothing is kept, and everything rendered anew."""

    def conflicts(self) -> list[str]:
        found = {
            "data.eval and data.eval_fraction exclude each other; keep the held-out files or the fraction":
                self.eval and self.eval_fraction,
            f"data.weights has {len(self.weights)} numbers for {len(self.train)} entries of data.train; give one for each":
                self.weights and len(self.weights) != len(self.train),
        }
        return [sentence for sentence, wrong in found.items() if wrong]


class BatchConfig(Config):
    sequences: int = Field(8, ge=1)
    """Samples (SFT) or pairs (reward, DPO) per optimizer step, over all ranks."""
    max_tokens: int = Field(8192, ge=8)
    """Tokens per packed micro-batch; any value gives the same gradients, it bounds memory."""
    memory: int | None = Field(None, ge=1)
    """Bytes that model.recompute: auto counts on, for all that training adds to the weights; none: what the device has free."""


class OptimizerConfig(Config):
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW); never on biases and norms."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's two averaging factors."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator floor."""
    max_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is made, and drop that; needs max_norm: null and one micro-batch a step."""
    warmup: float = Field(0.05, ge=0)
    """Linear warm-up: a share of all steps below 1, a number of steps from 1 on."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    floor: float = Field(0.0, ge=0, le=1)
    """Share of the peak learning rate the schedule ends at."""
    states: Literal["float32", "bfloat16", "int8"] = "float32"
    """How bfloat16 weights are updated; float32: exactly, in 16 bits beside them; bfloat16, int8: moments so, weights rounded at random."""

    def conflicts(self) -> list[str]:
        needless = "optimizer.in_backward updates before the norm of all gradients is known; set optimizer.max_norm=null too"
        return [needless] if self.in_backward and self.max_norm is not None else []


class MeshConfig(Config):
    data: int = Field(1, ge=1)
    """Processes that share the data; only 1 so far."""
    tensor: int = Field(1, ge=1)
    """Processes that share each weight; only 1 so far."""


class RunConfig(Config):
    output: Path
    """Folder of this run; made if missing."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Every random draw is keyed by this, a purpose, a step and an index."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps (PPO: iterations); or give epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training records; or give steps."""
    log_every: int = Field(1, ge=1)
    """Steps between lines in metrics.jsonl and on the terminal."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves at the end and when interrupted."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    resume: Literal["auto", "never"] | Annotated[int, Field(ge=0)] = "auto"
    """auto: go on from the newest checkpoint that verifies; never: refuse a folder with checkpoints; N: go on from step N."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Also write the metrics for this tracker."""


class DpoConfig(Config):
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: arXiv:2305.18290 eq. 7; ipo: arXiv:2310.12036 eq. 17 (length-averaged log-probabilities); hinge: arXiv:2305.10425."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; IPO's tau."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO); sigmoid only."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answers' mean negative log-likelihood per token, added to the loss."""
    share_prefix: Literal["auto"] | bool = "auto"
    """Run each pair's prompt once for both answers; auto: where that saves more than a tenth of the data's tokens."""

    def conflicts(self) -> list[str]:
        return ["dpo.label_smoothing needs dpo.loss: sigmoid"] if self.label_smoothing and self.loss != "sigmoid" else []


class ReferenceConfig(Config):
    kind: Literal["auto", "adapters_off", "frozen", "stored"] = "auto"
    """Where reference log-probabilities come from; auto: adapters off when an adapter is trained, a frozen copy otherwise."""
    path: str | None = None
    """frozen: another model folder than model.path; stored: the file `prepare` wrote."""

    def conflicts(self) -> list[str]:
        if self.path and self.kind in ("auto", "adapters_off"):
            return [f"reference.path is not used with reference.kind: {self.kind}; set reference.kind to frozen or stored"]
        missing = self.kind == "stored" and not self.path
        return ["reference.kind: stored needs reference.path, the file `trueline prepare` wrote"] if missing else []


class RankingConfig(Config):
    loss: Literal["last", "tokenwise"] = "last"
    """last: Bradley-Terry on the scores of the last tokens; tokenwise: on every token after the answers part (MindRLHF's)."""
    share_prefix: Literal["auto"] | bool = "auto"
    """Run each pair's prompt once for both answers; auto: where that saves more than a tenth of the data's tokens."""


class CriticConfig(Config):
    path: str | None = None
    """Model the critic starts from; none: the policy's own trunk (with an adapter of its own) or a copy of it (full)."""
    adapter: AdapterConfig | None = None
    """What of the critic is trained; none: as the policy's. full on a policy with adapters needs its own path or a copy of the trunk."""
    optimizer: OptimizerConfig | None = None
    """None: as the policy's."""


class RewardSourceConfig(Config):
    model: str | None = None
    """Reward model folder (from `trueline reward`), or its adapter folder; or give function."""
    function: str | None = None
    """`same_answer` (1 if the final answer is the record's, else 0), or
    `file.py:name`, called with the list of answers (and, if it has such parameters, prompts= and records=); returns one number each."""
    timeout: float = Field(60.0, gt=0)
    """Seconds one call of the function may take before its process is killed and the run stops."""
    overlap: bool = True
    """PPO has a prompt's answers scored while others are still generated, in several calls of the function;
    false: one call with all of them, for a function that compares answers to different prompts."""
    scale: float = 1.0
    """The score is multiplied by this."""
    clip: float | None = Field(None, gt=0)
    """Scores are clipped to [-clip, clip] after scaling."""

    def conflicts(self) -> list[str]:
        return ["give exactly one of reward.model and reward.function"] if (self.model is None) == (self.function is None) else []


class RolloutConfig(Config):
    prompts: int = Field(8, ge=1)
    """Prompts per iteration."""
    samples: int = Field(1, ge=1)
    """Answers sampled per prompt."""
    running: int = Field(64, ge=1)
    """Answers generated at the same time (continuous batching)."""
    memory: float | None = Field(None, gt=0)
    """GiB for keys and values; none is half of what is free. Answers that do not fit wait."""
    packed: bool = True
    """Answers of 16 tokens and more come from matrices with LoRA merged, made anew in every iteration: on a GPU where a quarter of the
    free memory holds them, on a CPU in float32, and with AMX in bfloat16. In bfloat16, and where there is no C compiler (`cc`), a CPU
    needs copies of all other matrices too. false: from the trained weights themselves, which is slower."""
    logprob_gap: float = Field(1e-4, ge=0)
    """Up to this mean difference from training's, the rollout's own log-probabilities are taken and the policy is not run again to score
    its answers."""
    logprob_check: int = Field(10, ge=1)
    """The difference is measured in the first iteration and again after so many."""

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else int(self.memory * 2**30)


class SamplingConfig(Config):
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Logits are divided by this before anything else; 0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from the k most likely tokens; 0 is all."""


class GreedySamplingConfig(SamplingConfig):
    temperature: float = Field(0.0, ge=0)
    """Logits are divided by this before anything else; 0 takes the most likely token."""


class GenerateConfig(SamplingConfig):
    """`trueline generate` and `trueline chat`: keys without a section, given on the command line."""

    temperature: float = Field(0.0, ge=0)
    """Logits are divided by this before anything else; 0 takes the most likely token."""
    n: int = Field(1, ge=1)
    """Answers per prompt."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Every draw is keyed by this, the prompt and the answer's number."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when the model folder has none or another is wanted."""
    template: str = "auto"
    """How conversations are written down: auto is the model's own way, or another family's by name (chatml, llama3, qwen3, ...)."""


class PpoConfig(Config):
    kl_coefficient: float = Field(0.02, ge=0)
    """Reward per token is reduced by this times log p - log reference."""
    kl_target: float | None = Field(None, gt=0)
    """Adaptive coefficient (arXiv:1909.08593 sect. 2.2): wanted KL per answer, in nats summed over its tokens; none keeps it fixed."""
    kl_horizon: int = Field(10000, ge=1)
    """Adaptive coefficient: answers over which it reacts."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's decay (arXiv:1506.02438)."""
    whiten: bool = True
    """Advantages are brought to mean 0 and deviation 1 over all answer tokens of the iteration."""
    epochs: int = Field(1, ge=1)
    """Passes over each iteration's rollouts."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    clip: float = Field(0.2, gt=0)
    """The policy ratio counts only within 1 +- clip."""
    value_clip: float = Field(0.2, gt=0)
    """The critic's change counts only within +- value_clip of its old value."""
    target_kl: float | None = Field(None, gt=0)
    """Stop the passes over an iteration's rollouts when mean KL per token from the rollout policy exceeds this; none never stops."""
    ptx_coefficient: float = Field(0.0, ge=0)
    """Weight of the supervised loss on `data.ptx`, added to the policy loss (arXiv:2203.02155 eq. 2)."""
    no_stop_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score of an answer that did not stop within max_new_tokens."""


class StageConfig(Config):
    """What every training stage has."""

    model: ModelConfig
    """The model to train."""
    data: DataConfig = DataConfig()
    """What it is trained on."""
    batch: BatchConfig = BatchConfig()
    """Size of a step and of a micro-batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    mesh: MeshConfig = MeshConfig()
    """How ranks are arranged."""
    run: RunConfig
    """Where, how long, how often."""

    @model_validator(mode="after")
    def _sound(self) -> "StageConfig":
        refuse_conflicts(self)
        return self

    def conflicts(self) -> list[str]:
        problems = []
        if not self.data.train:
            problems.append("data.train is empty; name at least one file")
        if (self.run.steps is None) == (self.run.epochs is None):
            problems.append("give exactly one of run.steps and run.epochs")
        if self.run.eval_every and not (self.data.eval or self.data.eval_fraction):
            problems.append("run.eval_every needs held-out records: data.eval or data.eval_fraction")
        return problems + _states_conflicts(self.model, self.optimizer, "optimizer")


class SftConfig(StageConfig):
    """`trueline sft`."""


class RewardConfig(StageConfig):
    """`trueline reward`."""

    ranking: RankingConfig = RankingConfig()
    """The ranking loss."""


class DpoStageConfig(StageConfig):
    """`trueline dpo`."""

    dpo: DpoConfig = DpoConfig()
    """The preference loss."""
    reference: ReferenceConfig = ReferenceConfig()
    """The model it is measured against."""

    def conflicts(self) -> list[str]:
        return [*super().conflicts(), *_reference_conflicts(self.model, self.reference)]


class PpoDataConfig(DataConfig):
    ptx: Files = ()
    """Supervised files for the pretraining-loss mix."""


class PpoStageConfig(StageConfig):
    """`trueline ppo`."""

    data: PpoDataConfig = PpoDataConfig()
    """Prompts, and the files of the pretraining-loss mix."""
    critic: CriticConfig = CriticConfig()
    """The value model."""
    reward: RewardSourceConfig = RewardSourceConfig()
    """Where scores come from."""
    reference: ReferenceConfig = ReferenceConfig()
    """The model the policy is held to."""
    rollout: RolloutConfig = RolloutConfig()
    """How much is generated per iteration."""
    sampling: SamplingConfig = SamplingConfig()
    """How it is sampled."""
    ppo: PpoConfig = PpoConfig()
    """The algorithm."""

    def conflicts(self) -> list[str]:
        ppo, adapters = self.ppo, (self.model.adapter, self.critic.adapter or self.model.adapter)
        found = {
            "ppo.ptx_coefficient and data.ptx need each other; give both or neither": bool(ppo.ptx_coefficient) != bool(self.data.ptx),
            "ppo.kl_target adapts ppo.kl_coefficient, which must then start above 0": ppo.kl_target is not None and not ppo.kl_coefficient,
            "optimizer.in_backward is for sft, reward and dpo; PPO's passes are in several micro-batches":
                any(o is not None and o.in_backward for o in (self.optimizer, self.critic.optimizer)),
            "reference.kind: stored is for dpo; rollouts are new each iteration": self.reference.kind == "stored",
            "sampling.temperature: 0 never explores; PPO needs a positive temperature": self.sampling.temperature == 0,
            "ppo.minibatches exceeds rollout.prompts x rollout.samples": ppo.minibatches > self.rollout.prompts * self.rollout.samples,
            "model.adapter.dropout and critic.adapter.dropout must be 0 in ppo, or rollout and training would differ":
                any(adapter.dropout for adapter in adapters),
        }
        sentences = [sentence for sentence, wrong in found.items() if wrong]
        if self.critic.optimizer is not None:
            sentences += _states_conflicts(self.model, self.critic.optimizer, "critic.optimizer")
        return [*super().conflicts(), *_reference_conflicts(self.model, self.reference), *sentences]


def _states_conflicts(model: ModelConfig, optimizer: OptimizerConfig, where: str) -> list[str]:
    if optimizer.states == "float32" or model.dtype in ("auto", "bfloat16"):
        return []
    return [f"{where}.states: {optimizer.states} is for bfloat16 weights, not model.dtype: {model.dtype}; set one of the two"]


def _reference_conflicts(model: ModelConfig, reference: ReferenceConfig) -> list[str]:
    wrong = reference.kind == "adapters_off" and model.adapter.kind == "full"
    sentence = "reference.kind: adapters_off needs an adapter to switch off; set model.adapter.kind to lora or ptuning, or use frozen"
    return [sentence] if wrong else []


class EvaluateConfig(Config):
    """`trueline evaluate`: loss on held-out data, and answers for its prompts."""

    model: ModelConfig
    """The model to evaluate; a reward model is evaluated on pairs."""
    data: DataConfig = DataConfig()
    """Held-out files in data.eval."""
    batch: BatchConfig = BatchConfig()
    """Size of a micro-batch."""
    sampling: GreedySamplingConfig = GreedySamplingConfig()
    """How answers are generated."""
    generate: bool = True
    """Also answer the prompts."""
    reward: RewardSourceConfig | None = None
    """Score the answers with this."""
    metrics: MetricsConfig = MetricsConfig()
    """What is measured of the answers."""
    run: RunConfig
    """Where results go (metrics.jsonl, samples.jsonl); steps and epochs are not used."""

    @model_validator(mode="after")
    def _sound(self) -> "EvaluateConfig":
        refuse_conflicts(self)
        return self

    def conflicts(self) -> list[str]:
        held_out = self.data.eval or (self.data.train and self.data.eval_fraction)
        return [] if held_out else ["data.eval is empty; name the held-out files, or data.train with data.eval_fraction"]


STAGES: dict[str, type[Config]] = {
    "sft": SftConfig, "reward": RewardConfig, "dpo": DpoStageConfig, "ppo": PpoStageConfig, "evaluate": EvaluateConfig
}
