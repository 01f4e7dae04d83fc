"""Recorded steps: which sizes there are, what fills them up, when a recording ends.

The recording here runs its step on the held inputs, as a CUDA graph does, without a device; what only a device can show was never run.
"""

import pytest
import torch

from trueline.config.schema import AdapterConfig
from trueline.data.sample import Blocks
from trueline.model.adapters import add_adapter
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.graphs import Graphs, bucket, graphs_for
from trueline.rollout.memory import Decode, Slots
from trueline.rollout.sampling import Sampling

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_size": 24}
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2], [8, 9], [1, 1, 1]]


class Held:
    """A recording that knows the step and the addresses of its inputs, and no more."""

    made: list[int]

    def __init__(self, step, inputs, pool):
        self.step, self.inputs = step, inputs
        self.made.append(len(inputs[0]))

    def replay(self):
        return self.step(*self.inputs)


@pytest.fixture
def held():
    return type("Held", (Held,), {"made": []})


def make(dtype=torch.float64, **choices):
    decoder = Decoder(DecoderConfig(**SIZES, init_std=0.4, **choices)).to(dtype)
    init_weights(decoder, torch.Generator().manual_seed(0))
    return LanguageModel(decoder)


def test_sizes_are_powers_of_two_and_all():
    assert [bucket(n, 48) for n in (1, 2, 3, 5, 8, 9, 31, 32, 33, 48)] == [1, 2, 4, 8, 8, 16, 32, 32, 48, 48]


@pytest.mark.parametrize(
    ("choices", "prefix"),
    [({}, False), ({}, True), ({"windows": (4, None)}, False), ({"blocks": Blocks(start=1, masks=(3, 9)), "rope_rows": True}, False)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_answers_are_those_without_recordings(held, choices, prefix, dtype):
    model = make(dtype, **choices)
    if prefix:
        add_adapter(model.decoder, "policy", AdapterConfig(kind="ptuning", tokens=3), 0)
        model.role = "policy"
    sampling = Sampling(12, stop=frozenset({0, 11, 17}))
    prompts = PROMPTS if "blocks" not in choices else [[3, *p, 1] for p in PROMPTS]
    answers = []
    for graphs in (None, Graphs(held)):
        engine = Engine(model, 6)
        engine.graphs = graphs
        with engine.hold():
            answers.append(engine.generate(prompts, sampling, list(range(len(prompts)))))
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    for ours, theirs in zip(answers[1], answers[0], strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-12 if dtype == torch.float64 else 1e-4)
    # a learned prefix is read where the model has it, not in the memory: such steps are not recorded
    assert not held.made if prefix else set(held.made) <= {1, 2, 4, 6} and len(held.made) > 1


def test_filling_up_harms_no_request(held):
    """Three requests in a batch of four: what is stored of them, and of the free rows all but the first column, is what it was."""
    model, graphs = make(), Graphs(held)
    memory = Slots(model.decoder.config, torch.float64, torch.device("cpu"))
    memory.reserve(6, [8], limit=8)
    memory.keys.normal_()
    memory.values.normal_()
    newest, position = torch.tensor([5, 6, 7]), torch.tensor([2, 0, 7])

    def step(tokens, at):
        return model.decoder(tokens, Decode.of(at, 8, memory, {None}))

    with torch.inference_mode():
        before = memory.keys.clone()
        found = graphs(step, (newest, position), 6, "key")
        changed = (memory.keys != before).any(-1).any(2).any(0).nonzero().tolist()  # [row, column]
        assert changed == [[0, 2], [1, 0], [2, 7], [3, 0]] and held.made == [4]
        torch.testing.assert_close(found, step(newest, position), rtol=0, atol=1e-12)


def test_a_recording_outlives_an_update_in_place_and_no_move(held):
    weight, graphs = torch.ones(3, 2), Graphs(held)

    def run(key, rows=2):
        return graphs(lambda x: x @ weight, (torch.ones(rows, 3),), 4, key).clone()

    assert run("here")[0, 0] == 3
    with torch.no_grad():
        weight.mul_(2)
    assert run("here")[0, 0] == 6 and held.made == [2]
    assert run("here", 3).shape == (3, 2) and held.made == [2, 4]
    assert run("there")[0, 0] == 6 and held.made == [2, 4, 2]  # all of the old key's are gone
    run("here")
    assert held.made == [2, 4, 2, 2]


def test_engine_keeps_recordings_from_hold_to_hold_only_while_addresses_stay(held):
    model = make()
    engine = Engine(model, 4)
    engine.graphs = Graphs(held)
    keys = []
    for _ in range(2):
        with engine.hold():
            engine.generate(PROMPTS[:3], Sampling(6, temperature=0), [0, 0, 0])
            keys.append(engine.graphs.key)
            memory = (engine.memory.keys.data_ptr(), engine.memory.values.data_ptr())
            assert all(address in keys[-1] for address in (*memory, *(p.data_ptr() for p in model.decoder.parameters())))
        with torch.no_grad():
            model.decoder.embed.weight.add_(0.1)
    assert len(held.made) <= 2 * len(set(held.made))
    model.decoder.embed.weight = torch.nn.Parameter(model.decoder.embed.weight.clone())
    with engine.hold():
        engine.generate(PROMPTS[:3], Sampling(6, temperature=0), [0, 0, 0])
    assert engine.graphs.key not in keys


def test_what_cannot_be_recorded_is_run():
    tried = []

    def refuse(step, inputs, pool):
        tried.append(len(inputs[0]))
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(refuse)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        assert graphs(lambda x: x + 1, (torch.zeros(3),), 4, 0).tolist() == [1, 1, 1]
    assert graphs(lambda x: x + 1, (torch.zeros(2),), 4, 0).tolist() == [1, 1] and tried == [4]


def test_no_memory_is_no_reason_to_go_on():
    def starve(step, inputs, pool):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(starve)(lambda x: x, (torch.zeros(3),), 4, 0)


def test_no_graphs_on_a_cpu():
    assert graphs_for(make().decoder) is None
