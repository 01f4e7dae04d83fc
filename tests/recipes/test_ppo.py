"""PPO's loop: which way every term pushes, who shares whose memory, and that what is learned from is what the policy said."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import metrics, records
from tests.recipes.toys import KINDS, Toys
from trueline.config.load import from_any
from trueline.config.schema import PpoStageConfig
from trueline.data.sample import Sample
from trueline.model.batch import pack
from trueline.parallel.world import World
from trueline.recipes import actors as ppo
from trueline.recipes.actors import PARTS, Actors, PolicyBatch, burn_in, count_policy, policy_objective
from trueline.recipes.judges import Reward
from trueline.recipes.ppo import replay
from trueline.recipes.prepare import prompt_tokens, ptx_samples
from trueline.recipes.roles import open_roles
from trueline.train.budget import Budget
from trueline.train.experience import appraise, pack_experience
from trueline.train.losses import adaptive_kl
from trueline.train.optimizer import make_optimizer
from trueline.train.step import count_items, sum_loss


class Loop:
    """PPO on the toys with some settings changed."""

    def __init__(self, trueline: Commands, toys: Toys, home: Path):
        self.trueline, self.toys, self.home, self.count = trueline, toys, home, 0

    def __call__(self, *settings: str) -> Path:
        self.count += 1
        folder = self.home / f"run-{self.count}"
        self.trueline("ppo", self.toys.config("ppo"), f"run.output={folder}", *settings).ok()
        return folder


@pytest.fixture
def loop(trueline: Commands, toys: Toys, tmp_path: Path) -> Loop:
    return Loop(trueline, toys, tmp_path)


def function(toys: Toys, name: str) -> str:
    return f"reward.function={toys.data('judges.py')}:{name}"


@pytest.fixture(scope="module")
def judges(trueline: Commands, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reward models: an adapter and a whole one on the policy's base, and one of another family with its own tokenizer."""
    home = tmp_path_factory.mktemp("judges")
    made = {"adapter": ("qwen2", "lora"), "whole": ("qwen2", "full"), "other": ("glm", "full")}
    for name, (family, kind) in made.items():
        trueline("reward", toys.config("reward"), f"run.output={home / name}", f"model.path={toys.model(family)}", *KINDS[kind]).ok()
    return {name: home / name / "model" for name in made}


def config_of(toys: Toys, tmp_path: Path, **sections: Any) -> PpoStageConfig:
    return from_any(PpoStageConfig, toys.dictionary("ppo", **{"run": {"output": str(tmp_path / "x")}, **sections}))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_where_the_policy_is(loop: Loop, kind: str, dtype: str, rounding: float) -> None:
    """The first ratio is one, the first KL zero; and every iteration learns from the distribution that was sampled."""
    tempered = ["rollout.logprob_check=1", "sampling.temperature=0.7", "sampling.top_p=0.9", "sampling.top_k=50"]
    folder = loop(*KINDS[kind], f"model.dtype={dtype}", "ppo.epochs=1", "ppo.minibatches=1", "run.steps=3", *tempered)
    first, second, third = metrics(folder)
    for line in (first, second, third):
        assert line["logprob_gap_max"] < rounding  # also after updates: no stale weights
        assert abs(line["policy_kl"]) < rounding / 100 and line["clip_fraction"] == 0 and line["updates"] == 1
        assert abs(line["policy_loss"]) < 1e-5  # minus the mean of whitened advantages
    assert first["kl"] == 0 and second["kl"] != 0 and third["kl"] > 0


def test_the_rollouts_own_log_probabilities_serve_where_they_are_the_same(loop: Loop) -> None:
    """Measured first and every so often; what is learned is what is learned from training's, to rounding."""
    settings = ["model.dtype=float64", "run.steps=5"]
    served, scored, strict = (
        loop(*settings, more) for more in ("rollout.logprob_check=3", "rollout.logprob_check=1", "rollout.logprob_gap=1e-30")
    )
    assert [line["rollout_logprobs"] for line in metrics(served)] == [0, 1, 1, 0, 1]
    assert [line["rollout_logprobs"] for line in metrics(scored)] == [line["rollout_logprobs"] for line in metrics(strict)] == [0] * 5
    for line, other in zip(metrics(served), metrics(scored), strict=True):
        for name in ("kl", "reward", "policy_loss", "value_loss", "policy_kl", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
        assert 0 < line["logprob_gap"] <= line["logprob_gap_max"] < 1e-10


def test_memory_and_packing_change_no_answer(loop: Loop) -> None:
    settings = ["model.dtype=float64", "sampling.max_new_tokens=20", "run.steps=2"]
    plain, small = (
        [(line["prompt"], line["tokens"]) for line in records(loop(*settings, *more) / "samples.jsonl")]
        for more in ([], ["rollout.packed=false", "rollout.memory=0.00004"])
    )
    assert plain == small
    refused = loop.trueline("ppo", loop.toys.config("ppo"), f"run.output={loop.home / 'none'}", *settings, "rollout.memory=1e-9")
    assert "rollout.memory" in refused.refused(1)


def test_every_answer_is_in_samples(loop: Loop, toys: Toys) -> None:
    """Scaled and clipped as the config says, of several samples for each prompt, new in every iteration."""
    lines = records(loop("reward.scale=0.5", "reward.clip=3", "run.steps=2") / "samples.jsonl")
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    tokenizer = api.load(str(toys.model())).opened.text()
    for line in lines:
        assert line["response"] == tokenizer.decode(line["tokens"]) and len(line["logprobs"]) == len(line["tokens"])
        assert line["score"] == max(-3.0, -0.5 * len(line["response"]))
        assert (line["finish"] == "stop") == (line["tokens"][-1] in (0, 2))
    first = [(line["prompt"], tuple(line["tokens"])) for line in lines[:8]]
    assert all(first[2 * i][0] == first[2 * i + 1][0] and first[2 * i][1] != first[2 * i + 1][1] for i in range(4))
    assert len({prompt for prompt, _ in first}) == 4


def test_a_function_may_see_prompts_and_records(loop: Loop, toys: Toys) -> None:
    for line in records(loop(function(toys, "asked"), "run.steps=1") / "samples.jsonl"):
        answer_length = len(" ".join(reversed(line["prompt"][4:].split())))
        assert line["score"] == answer_length + len(line["prompt"])


def test_drifting_from_the_reference_costs_reward(loop: Loop, toys: Toys) -> None:
    """The penalty is subtracted, at the coefficient in force; and a policy with nothing else to gain goes back to its reference."""
    reference = loop.home / "reference"
    loop.trueline("sft", toys.config("sft"), f"run.output={reference}", "run.steps=20").ok()
    settings = ["run.steps=24", "rollout.samples=6", "sampling.max_new_tokens=4", "batch.max_tokens=4000"]
    settings += ["ppo.kl_coefficient=1", "optimizer.lr=0.007", "optimizer.schedule=constant"]
    settings += ["reference.kind=frozen", f"reference.path={reference / 'model'}"]
    lines = metrics(loop(function(toys, "constant"), *settings))
    for line in lines:
        assert line["reward"] == pytest.approx(1.0 - line["kl"], abs=1e-4)
    first, last = (sum(line["kl"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert first > 5 and last < 0.75 * first


def test_an_answer_that_does_not_stop_pays(loop: Loop, toys: Toys) -> None:
    line = metrics(loop(function(toys, "constant"), "ppo.no_stop_penalty=2.5", "ppo.kl_coefficient=0", "run.steps=1"))[0]
    assert line["score"] == 1.0 and line["stopped"] < 1
    assert line["reward"] == pytest.approx(1.0 - 2.5 * (1 - line["stopped"]), abs=1e-6)


def test_the_coefficient_adapts_by_its_formula(loop: Loop) -> None:
    settings = {"target": 0.05, "horizon": 32, "count": 8}
    folder = loop("run.steps=5", "ppo.kl_target=0.05", "ppo.kl_horizon=32", "optimizer.lr=0.003")
    lines, expected = metrics(folder), 0.02
    for line in lines:
        assert line["kl_coefficient"] == pytest.approx(expected, rel=1e-12)
        expected = adaptive_kl(expected, line["kl"], **settings)
    assert len({line["kl_coefficient"] for line in lines}) == 5


def test_the_passes_stop_at_the_target(loop: Loop) -> None:
    stopped = metrics(loop("ppo.epochs=6", "ppo.minibatches=1", "ppo.target_kl=0.001", "run.steps=1", "optimizer.lr=0.02"))[0]
    assert 2 <= stopped["updates"] < 6
    assert metrics(loop("ppo.epochs=6", "ppo.minibatches=1", "run.steps=1", "optimizer.lr=0.02"))[0]["updates"] == 6


@pytest.mark.parametrize(("answers", "minibatches"), [(8, 2), (7, 3), (5, 4), (2, 4)])
def test_each_pass_learns_from_every_answer_once(toys: Toys, tmp_path: Path, answers: int, minibatches: int) -> None:
    seen: list[list[int]] = []

    class Noted:
        config = config_of(toys, tmp_path, ppo={"epochs": 3, "minibatches": minibatches}, rollout={"prompts": 8})

        def update(self, chosen: Sequence[int], mixed: Sequence[Sample], step: int, number: int, total: int) -> dict[str, float]:
            seen.append(list(chosen))
            return {"policy_kl": 0.0}

    values = replay(cast(Actors, Noted()), cast(Any, list(range(answers))), [], step=2, total=5)
    batches = min(answers, minibatches)
    assert values["updates"] == len(seen) == 3 * batches
    for i in range(3):
        parts = seen[i * batches : (i + 1) * batches]
        assert sorted(n for part in parts for n in part) == list(range(answers))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert seen[:batches] != seen[batches : 2 * batches]


def test_the_last_iteration_takes_the_prompts_that_are_left(loop: Loop) -> None:
    folder = loop("run.steps=null", "run.epochs=1", "rollout.prompts=8", "rollout.samples=1", "ppo.minibatches=8", "ppo.epochs=1")
    assert [line["updates"] for line in metrics(folder)] == [8, 8, 4]
    prompts = [line["prompt"] for line in records(folder / "samples.jsonl")]
    assert len(prompts) == len(set(prompts)) == 20


def test_the_supervised_mix_adds_its_gradient(toys: Toys, tmp_path: Path) -> None:
    """Policy loss over its tokens, plus the coefficient times the supervised loss over its own."""
    config = config_of(
        toys,
        tmp_path,
        ppo={"ptx_coefficient": 0.3},
        data={"ptx": [str(toys.data("messages.jsonl"))]},
        model={"path": str(toys.model()), "dtype": "float64"},
    )
    roles = open_roles(config)
    model, opened = roles.model, roles.policy
    prompts = prompt_tokens(config.data, opened.folder.family, opened.text(), 8, 0).train[:4]
    mixed = pack(ptx_samples(config.data, opened.folder.family, opened.text(), 0).train[:3])
    actors = Actors(config, roles, {}, NOTHING, World(), Budget(8192, print))
    rollouts = actors.answer(prompts, [1, 2, 3, 4]).rollouts
    seen, _ = appraise(
        rollouts, [0.0, 1.0, 2.0, 3.0], model, roles.reference, roles.critic,
        ppo=config.ppo, kl_coefficient=0.0, temperature=1.0, max_tokens=8192, world=World(),
    )  # fmt: skip
    experience = pack_experience(seen)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        parameters = list(roles.policy_parameters.values())
        return torch.cat([g.to_dense().flatten() for g in torch.autograd.grad(loss, parameters)])

    batches = [PolicyBatch(experience), PolicyBatch(None, mixed)]
    items = count_items(batches, count_policy, World())
    objective = policy_objective(model, config.ppo, 1.0)
    torch.testing.assert_close(objective(batches[1])[0]["ptx tokens"], -0.3 * model(mixed).sum(), rtol=1e-12, atol=0)  # not its own way
    together = gradient(torch.stack([sum_loss(objective(batch)[0], items, 1) for batch in batches]).sum())
    ratio = (model(experience.batch) - experience.logprobs).exp()
    policy = gradient(-(ratio * experience.advantages)[experience.batch.trained].mean())
    supervised = gradient(-model(mixed)[mixed.trained].mean())
    torch.testing.assert_close(together, policy + 0.3 * supervised, rtol=0, atol=1e-12)
    assert supervised.norm() > 0.1 and policy.norm() > 0.1


NOTHING = Reward(lambda rollouts, asked: [0.0] * len(rollouts), lambda scores: scores)


def actors_of(config: PpoStageConfig, said: list[str]) -> Actors:
    roles = open_roles(config)
    parameters = {"policy": roles.policy_parameters, "critic": roles.critic_parameters}
    optimizers = {name: make_optimizer(trained, config.optimizer) for name, trained in parameters.items()}
    return Actors(config, roles, optimizers, NOTHING, World(), Budget(config.batch.max_tokens, said.append))


def hold_at_most(actors: Actors, tokens: int) -> None:
    """The machine has room for so many tokens in a forward pass."""

    def refuse(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments[0].tokens) > tokens:
            raise MemoryError

    for module in (actors.roles.model, actors.roles.critic):
        module.register_forward_pre_hook(refuse)


def test_a_step_in_smaller_micro_batches_is_the_same_step(toys: Toys, tmp_path: Path) -> None:
    """Scores and updates on a machine that holds 40 tokens, against one that holds them all."""
    config = config_of(toys, tmp_path, ppo={"ptx_coefficient": 0.3}, data={"ptx": [str(toys.data("messages.jsonl"))]})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float64"})})
    weights, lines = [], []
    for tokens in (10_000, 40):
        said: list[str] = []
        actors = actors_of(config, said)
        opened = actors.roles.policy
        prompts = prompt_tokens(config.data, opened.folder.family, opened.text(), 8, 0).train[:6]
        mixed = list(ptx_samples(config.data, opened.folder.family, opened.text(), 0).train[:3])
        rollouts = actors.answer(prompts, list(range(6))).rollouts
        hold_at_most(actors, tokens)
        sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]
        experience, _ = actors.budget.fit(sizes, lambda n, a=actors, r=rollouts: a.appraise(r, [0.5, 1.0, 2.0, 3.0, 4.0, 5.0], 0.1, n))
        actors.update(experience, mixed, 1, 0, 10)
        weights.append({name: p.detach() for name, p in (actors.roles.policy_parameters | actors.roles.critic_parameters).items()})
        lines.append(said)
    assert lines[0] == [] and lines[1] and all("out of memory with" in line and "same loss" in line for line in lines[1])
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-9)


def test_burn_in_rehearses_the_longest_answers_there_can_be(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "TRIVIAL", 1)
    config = config_of(toys, tmp_path, sampling={"max_new_tokens": 30}, batch={"max_tokens": 200})
    said: list[str] = []
    actors = actors_of(config, said)
    opened = actors.roles.policy
    prompts = prompt_tokens(config.data, opened.folder.family, opened.text(), 30, 0).train
    before = {name: p.detach().clone() for name, p in actors.roles.policy_parameters.items()}
    sizes: list[int] = []
    for module in (actors.roles.model, actors.roles.critic):
        module.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0].tokens)))
    hold_at_most(actors, 120)
    burn_in(actors, prompts, [])
    longest = sorted((len(p) + 30 for p in prompts), reverse=True)
    assert max(sizes) > 120 and longest[0] <= sizes[-1] <= 120 and actors.budget.tokens <= 120
    assert [line.split(";")[0] for line in said[:1]] == ["model.recompute: auto recomputes 0 of 2 layers"]
    assert "recomputing all layers from now on (model.recompute), same loss" in said[2]
    assert all("going on with" in line for line in said[3:]) and len(said) > 3
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in actors.roles.policy_parameters.items())
    assert not actors.optimizers["policy"].state() and not actors.optimizers["critic"].state()


def test_the_mix_is_logged_and_counts(loop: Loop, toys: Toys) -> None:
    mixed = loop("ppo.ptx_coefficient=1", f"data.ptx={toys.data('messages.jsonl')}", "run.steps=6")
    alone = loop("run.steps=6")
    losses = [line["ptx_loss"] for line in metrics(mixed)]
    assert losses[-1] < 0.5 * losses[0] and "ptx_loss" not in metrics(alone)[0]


def test_held_out_prompts(loop: Loop, toys: Toys) -> None:
    lines = metrics(loop("data.eval_fraction=0.3", "run.eval_every=1", "run.steps=2"), "eval")
    assert [line["step"] for line in lines] == [1, 2] and all({"score", "response_length", "stopped"} <= line.keys() for line in lines)


# one trunk for all


def held(roles: Any) -> int:
    """Numbers in memory, each weight counted once."""
    modules = [roles.model, roles.reference, roles.critic, *([roles.reward] if roles.reward else [])]
    return sum({p.data_ptr(): p.numel() for module in modules for p in module.parameters()}.values())


def test_with_adapters_one_trunk_is_held(toys: Toys, tmp_path: Path, judges: dict[str, Path], trueline: Commands) -> None:
    lora = {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q", "v", "gate", "down"]}
    ptuning = {"kind": "ptuning", "tokens": 4}
    base = {"path": str(toys.model()), "dtype": "float32"}
    trunk = sum(p.numel() for p in api.load(str(toys.model())).opened.decoder.parameters())
    adapter = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 48) + (48 + 32))
    prefix = 2 * 2 * 4 * 2 * 8

    def roles_of(adapter: dict[str, Any] | None, path: Path, judge: Path | None, init: str = "load", **more: Any) -> Any:
        reward = {"function": None, "model": str(judge)} if judge else {}
        model = base | {"path": str(path), "init": init} | ({"adapter": adapter} if adapter else {})
        return open_roles(config_of(toys, tmp_path, model=model, reward=reward, **more))

    fresh = roles_of(lora, toys.model(), judges["adapter"])
    assert fresh.trunks == 1 and held(fresh) == trunk + 3 * adapter + 2 * 32  # policy, critic, reward; two scalar heads
    prefixed = roles_of(ptuning, toys.model(), judges["adapter"])
    assert prefixed.trunks == 1 and held(prefixed) == trunk + 3 * prefix + adapter + 2 * 32  # the reference keeps its own prefix
    tuned = tmp_path / "sft"
    trueline("sft", toys.config("sft"), f"run.output={tuned}", *KINDS["lora"]).ok()
    loaded = roles_of(lora, tuned / "model", judges["adapter"])
    assert loaded.trunks == 1 and held(loaded) == trunk + 4 * adapter + 2 * 32
    assert roles_of(lora, toys.model(), judges["whole"]).trunks == 2
    assert roles_of(lora, toys.model(), judges["adapter"], init="random").trunks == 2  # not its base
    assert roles_of(lora, toys.model(), None, critic={"adapter": {"kind": "full"}}).trunks == 2
    assert roles_of(None, toys.model(), None).trunks == 3
    assert roles_of(None, toys.model(), judges["adapter"]).trunks == 4
    assert roles_of(None, tuned / "model", None).trunks == 3  # merged first
    assert roles_of(None, tuned / "model", None, critic={"adapter": lora}).trunks == 3
    for roles in (fresh, prefixed, loaded):
        named = dict(roles.policy.decoder.named_parameters())
        learning = {name for name, p in named.items() if p.requires_grad}
        assert learning == {*roles.policy_parameters, *roles.critic_parameters} - {"score.weight"} and learning
        assert not any(".found." in name for name in named)


@pytest.mark.parametrize("judge", ["adapter", "whole", "other"])
def test_the_reward_models_scores_are_its_own(loop: Loop, toys: Toys, judges: dict[str, Path], judge: str) -> None:
    """Sharing the trunk or not, the answer as it was sampled; one of another family sees its own template and tokens."""
    folder = loop(*KINDS["lora"], "reward.function=null", f"reward.model={judges[judge]}", "run.steps=2")
    policy, scorer = api.load(str(toys.model())), api.load(str(judges[judge]))
    for line in records(folder / "samples.jsonl"):
        asked = [{"role": "user", "content": line["prompt"]}]
        tokens = policy.render(asked).tokens + line["tokens"]
        if judge == "other" and line["response"].strip():
            tokens = scorer.render([*asked, {"role": "assistant", "content": line["response"].strip()}]).tokens
        if judge != "other" or line["response"].strip():
            assert line["score"] == pytest.approx(scorer.score([tokens])[0], abs=1e-4)


@pytest.mark.parametrize("path", ["adapter", "whole"])
def test_a_critic_may_start_from_the_reward_model(loop: Loop, judges: dict[str, Path], path: str) -> None:
    kind = KINDS["lora"] if path == "adapter" else KINDS["full"]
    first = metrics(loop(*kind, f"critic.path={judges[path]}", "run.steps=1"))[0]
    assert abs(first["value"]) > 1e-3  # a fresh critic says 0
    assert first["kl"] == 0


def test_the_critic_has_its_own_optimizer_and_learns(loop: Loop) -> None:
    settings = ["critic.optimizer.lr=0.02", "critic.optimizer.warmup=0", "critic.optimizer.schedule=constant", "ppo.value_clip=100"]
    lines = metrics(loop(*settings, "run.steps=8", "optimizer.lr=1e-6", "ppo.whiten=false"))
    assert all(line["critic_lr"] == 0.02 and line["lr"] < 1e-6 + 1e-12 for line in lines)
    assert lines[-1]["value_loss"] < 0.3 * lines[0]["value_loss"]


def test_the_reward_rises(loop: Loop) -> None:
    """With a reward for short answers the policy learns to stop."""
    settings = ["rollout.samples=4", "batch.max_tokens=4000", "optimizer.lr=0.02", "optimizer.schedule=constant", "ppo.kl_coefficient=0"]
    lines = metrics(loop("run.steps=15", *settings))
    assert sum(line["score"] for line in lines[-3:]) / 3 > 0.3 * lines[0]["score"]
    assert lines[-1]["response_length"] < 0.6 * lines[0]["response_length"]


# beside generation


def test_overlap_changes_no_bit(loop: Loop, toys: Toys, judges: dict[str, Path]) -> None:
    """A function, and a reward model whose tokens are other ones: scored while others are generated, or all at once at the end."""
    for reward in ([function(toys, "counted")], ["reward.function=null", f"reward.model={judges['other']}"]):
        settings = [*reward, *KINDS["lora"], "run.steps=3", "rollout.running=2", "data.eval_fraction=0.3", "run.eval_every=1"]
        beside, after = (loop(*settings, f"reward.overlap={value}") for value in ("true", "false"))
        assert (beside / "samples.jsonl").read_bytes() == (after / "samples.jsonl").read_bytes()
        timed = {"tokens_per_second", "peak_memory_mb", "seconds"}
        plain = [
            [{k: v for k, v in line.items() if k not in timed and not k.endswith("_seconds")} for line in records(f / "metrics.jsonl")]
            for f in (beside, after)
        ]
        assert plain[0] == plain[1]
        for path in (beside / "checkpoints").rglob("*.safetensors"):
            assert path.read_bytes() == (after / path.relative_to(beside)).read_bytes()
    calls = [int(line.split()[1]) for line in (loop.home / "run-2" / "reward.log").read_text().splitlines()]
    assert calls == [8, 6] * 3  # answers, then held-out ones: once with all of them
    calls = [int(line.split()[1]) for line in (loop.home / "run-1" / "reward.log").read_text().splitlines()]
    assert sum(calls) == 3 * (8 + 6)


def test_answers_are_scored_while_others_go_on(toys: Toys, tmp_path: Path) -> None:
    """Whole prompts at a time, before the last answer has ended; and each token's rollout is what the reward saw."""
    model = {"path": str(toys.model()), "dtype": "float64"}
    config = config_of(toys, tmp_path, rollout={"prompts": 4, "samples": 2, "running": 2}, model=model)
    roles = open_roles(config)
    assert roles.model.decoder.head is not None
    calls: list[tuple[float, list[Any], list[Any]]] = []

    def slowly(*args: Any) -> None:
        time.sleep(0.01)

    def prepare(rollouts: Sequence[Any], asked: Sequence[Any]) -> list[Any]:
        calls.append((time.perf_counter(), [r.text for r in rollouts], [p.tokens for p in asked]))
        return [r.tokens for r in rollouts]

    roles.model.decoder.head.register_forward_hook(slowly)
    actors = Actors(config, roles, {}, Reward(prepare, lambda found: [0.0] * len(found)), World(), Budget(8192, print))
    prompts = prompt_tokens(config.data, roles.policy.folder.family, roles.policy.text(), 8, 0).train[:4]
    asked = [p for p in prompts for _ in range(2)]
    answers = actors.answer(asked, list(range(8)), 2)
    ended = time.perf_counter()
    assert answers.prepared == [r.tokens for r in answers.rollouts]
    assert len(calls) > 1 and calls[0][0] < ended - 0.02
    for _, texts, tokens in calls:
        assert len(texts) % 2 == 0 and all(tokens[i] == tokens[i + 1] for i in range(0, len(tokens), 2))
    assert sorted(text for _, texts, _ in calls for text in texts) == sorted(r.text or "" for r in answers.rollouts)


def test_the_parts_of_an_iteration_add_up(loop: Loop) -> None:
    folder = loop("run.steps=3", "run.save_every=1", "data.eval_fraction=0.3", "run.eval_every=1")
    lines, facts = metrics(folder), records(folder / "metrics.jsonl")
    for i, line in enumerate(lines):
        assert {f"{part}_seconds" for part in PARTS} <= line.keys() and line["peak_memory_mb"] > 10
        assert all(line[f"{part}_seconds"] >= 0 for part in PARTS) and (line["save_seconds"] > 0) == (i > 0)
        working = sum(line[f"{part}_seconds"] for part in ("generate", "reward", "score", "update"))
        assert working <= line["tokens"] / line["tokens_per_second"] * 1.001
        assert working > 0.5 * line["tokens"] / line["tokens_per_second"]
    assert all(line["seconds"] > 0 for line in facts if line["split"] == "eval")


def test_a_function_that_fails_ends_the_run_though_others_go_on(trueline: Commands, toys: Toys, tmp_path: Path) -> None:
    said = trueline("ppo", toys.config("ppo"), f"run.output={tmp_path / 'run'}", function(toys, "raises"), "rollout.running=2").refused(1)
    assert "ZeroDivisionError" in said and "judges.py" in said
