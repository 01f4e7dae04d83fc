"""Every mistake in a configuration is told at once, with its place and what was expected; what is right comes back as typed."""

from pathlib import Path

import pytest

from trueline.config.describe import describe
from trueline.config.load import from_any, load_config, save_config
from trueline.config.schema import (
    STAGES,
    AdapterConfig,
    Config,
    DpoStageConfig,
    EvaluateConfig,
    GenerateConfig,
    PpoStageConfig,
    SftConfig,
)
from trueline.errors import UserError

GOOD = "model: {path: base}\ndata: {train: [a.jsonl]}\nrun: {output: out, steps: 10}\n"
GOOD_SETTINGS = ("model.path=base", "data.train=a.jsonl", "run.output=out", "run.steps=10")
NEEDED = {
    SftConfig: GOOD_SETTINGS,
    STAGES["reward"]: GOOD_SETTINGS,
    DpoStageConfig: GOOD_SETTINGS,
    PpoStageConfig: (*GOOD_SETTINGS, "reward.model=judge"),
    EvaluateConfig: ("model.path=base", "data.eval=a.jsonl", "run.output=out"),
}


def write(folder: Path, text: str, name: str = "c.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(schema: type[Config], files: list[str], *settings: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(schema, files, settings)
    return caught.value.problems or [str(caught.value)]


def test_files_and_settings_override_from_left_to_right(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD + "optimizer: {lr: 1e-5, betas: [0.9, 0.99]}\n", "a.yaml")
    second = write(tmp_path, "optimizer: {lr: 2e-5}\ndata: {train: [b.jsonl, c.jsonl]}\n", "b.yaml")
    config = load_config(SftConfig, [first, second], ["optimizer.eps=1e-9", "run.seed=1", "run.seed=2", "optimizer.schedule=linear"])
    assert config.optimizer.lr == 2e-5 and config.optimizer.eps == 1e-9 and config.optimizer.schedule == "linear"
    assert config.optimizer.betas == (0.9, 0.99)  # a section is merged key by key
    assert config.data.train == ("b.jsonl", "c.jsonl")  # a list is replaced
    assert config.run.seed == 2 and config.run.output == Path("out")


def test_one_file_name_stands_for_a_list_of_one() -> None:
    assert load_config(SftConfig, [], GOOD_SETTINGS).data.train == ("a.jsonl",)


def test_unset_again(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_config(SftConfig, [path], ["run.steps=null", "run.epochs=2"]).run.epochs == 2.0


def test_section_given_in_part_keeps_its_other_defaults() -> None:
    config = load_config(EvaluateConfig, [], [*NEEDED[EvaluateConfig], "sampling.top_p=0.9"])
    assert config.sampling.temperature == 0.0 and config.sampling.top_p == 0.9


def test_all_problems_in_one_pass_each_at_its_line_and_column(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model:\n"
        "  path: base\n"
        "  dtyp: float32\n"
        "  adapter: {kind: lorra, targets: [q, x]}\n"
        "optimizer:\n"
        "  lr: abc\n"
        "  betas: [0.9]\n"
        "  lr: 2\n"
        "data:\n"
        "  train: [a.jsonl, 5]\n"
        "run:\n"
        "  steps: 0\n"
        "  keep: yes\n"
        "  resume: sometimes\n"
        "lr: 1e-5\n",
    )
    assert sorted(problems_of(SftConfig, [path], "run.log_every=-1", "batch.max_tokens=many")) == sorted(
        [
            f"{path}:8:3: lr: given twice, first at {path}:6:3; keep one",
            f"{path}:3:3: model.dtyp: unknown key (did you mean model.dtype?)",
            f"{path}:15:1: lr: unknown key (did you mean optimizer.lr?)",
            f"{path}:4:13: model.adapter.kind: found 'lorra', expected one of full, lora or ptuning (did you mean lora?)",
            f"{path}:4:39: model.adapter.targets[1]: found 'x', expected one of q, k, v, o, gate, up or down",
            f"{path}:6:3: optimizer.lr: found 'abc', expected a number above 0",
            f"{path}:7:3: optimizer.betas: found a list of 1, expected a list of 2, each a number from 0 and below 1",
            f'{path}:10:20: data.train[1]: found 5, expected text (put text in quotes: "5")',
            f"{path}:11:1: run.output: missing; expected a path: Folder of this run; made if missing.",
            f"{path}:12:3: run.steps: found 0, expected a whole number from 1 or null",
            f"{path}:13:3: run.keep: found 'yes', expected a whole number from 1",
            f"{path}:14:3: run.resume: found 'sometimes', expected auto or never or a whole number from 0",
            "override run.log_every=-1: found -1, expected a whole number from 1",
            "override batch.max_tokens=many: found 'many', expected a whole number from 8",
        ]
    )


def test_one_problem_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError) as caught:
        load_config(SftConfig, [path], ["optimizer.lr=abc"])
    assert str(caught.value) == "override optimizer.lr=abc: found 'abc', expected a number above 0"
    assert "pydantic" not in str(caught.value)


def test_mistakes_do_not_hide_conflicts_between_other_keys() -> None:
    found = problems_of(PpoStageConfig, [], "optimizer.lr=x", "ppo.minibatches=100", "sampling.temperature=0", "ppo.ptx_coefficient=1")
    for words in ("optimizer.lr=x", "model.path: missing", "run.output: missing", "data.train is empty", "run.steps and run.epochs"):
        assert any(words in problem for problem in found), words
    for words in ("reward.model and reward.function", "ppo.ptx_coefficient and", "temperature: 0 never", "ppo.minibatches exceeds"):
        assert any(words in problem for problem in found), words


def test_refused_value_brings_no_follow_up() -> None:
    settings = [s for s in GOOD_SETTINGS if not s.startswith("run.steps")]
    assert problems_of(SftConfig, [], *settings, "run.steps=many") == [
        "override run.steps=many: found 'many', expected a whole number from 1 or null"
    ]
    assert problems_of(SftConfig, [], *settings, "run.stpes=5") == ["override run.stpes=5: unknown key (did you mean run.steps?)"]
    assert problems_of(SftConfig, [], *GOOD_SETTINGS[1:], "modle.path=x") == [
        "override modle.path=x: modle: unknown key (did you mean model?)"
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_typo_in_any_key_names_the_key(stage: str) -> None:
    """Swapped, dropped and doubled letters; keys of under four letters have no near ones and are left out."""
    wrong = []
    keys = describe(STAGES[stage])
    for name in keys:
        section, _, last = name.rpartition(".")
        if len(last) < 4:
            continue
        for typo in (last[0] + last[2] + last[1] + last[3:], last[:-1], last[:2] + last[1:], last + "s"):
            full = f"{section}.{typo}".lstrip(".")
            if full in keys or sum(key.startswith(full) for key in keys) > 1:  # top_ is as near to top_k as to top_p
                continue
            messages = problems_of(STAGES[stage], [], *NEEDED[STAGES[stage]], f"{full}=1")  # type: ignore[index]
            meant = [m for m in messages if m.startswith(f"override {full}=1") and f"(did you mean {name}?)" in m]
            if not meant:
                wrong.append((full, messages))
    assert not wrong, wrong


def test_key_of_another_command_says_so() -> None:
    assert problems_of(SftConfig, [], *GOOD_SETTINGS, "dpo.beta=1") == [
        "override dpo.beta=1: dpo: unknown key here; it belongs to `trueline dpo`"
    ]


def test_dotted_key_in_a_file_says_how_to_write_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "run.seed: 3\nmodel.adapter.rank: 4\n")
    assert problems_of(SftConfig, [path]) == [
        f"{path}:4:1: run.seed: unknown key; write it as a section: run: {{seed: ...}}",
        f"{path}:5:1: model.adapter.rank: unknown key; write it as a section: model: {{adapter: {{rank: ...}}}}",
    ]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("run.keep=true", "found true, expected a whole number"),  # Python would take it for 1
        ("optimizer.lr=.inf", "found inf, expected a number above 0"),
        ("optimizer.floor=.nan", "found nan"),
        ("model=3", "found 3, expected a section"),
        ("model.adapter=", "found nothing, expected a section"),
        ("model.adapter.targets=[]", "found a list of 0"),
        ("optimizer.lr.x=3", "optimizer.lr: found a section, expected a number above 0"),
        ("run.output=2024", 'put text in quotes: "2024"'),
        ("run.steps=1.5", "found 1.5, expected a whole number"),
        ("run.seed=" + "9" * 30, "below 2^63"),
        ("run.seed=" + "9" * 5000, "not a number trueline can hold"),
        ("model.path=[", "not valid YAML"),
        ("model.path=!!python/name:os.system x", "YAML tags"),
    ],
)
def test_unfit_values(setting: str, words: str) -> None:
    found = problems_of(SftConfig, [], *GOOD_SETTINGS, setting)
    assert any(words in problem and problem.startswith("override ") for problem in found), found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty, expected sections"),
        (b"# only a comment\n", "empty, expected sections"),
        (b"null\n", ":1:1: expected sections"),
        (b"- a\n", ":1:1: expected sections such as `model:`, `data:` and `run:`, found a list of 1"),
        (b"just words", ":1:1: expected sections"),
        (b"model:\n\tpath: x\n", ":2:1: not valid YAML: a tab; indent with spaces"),
        (b"model: {path: x\n", "not valid YAML"),
        (b"model: a: b\n", ":1:9: not valid YAML: a second `:` on one line"),
        (b"a: 1\n---\nb: 2\n", ":2:1: not valid YAML: a second document"),
        (b"a: 1\nb: \xff\n", ":2: byte 0xff is not UTF-8"),
        (b"a: 1\nb: \x01\n", ":2: character U+0001 may not stand in YAML"),
        (b"a: " + b"[" * 1000, "nested too deeply"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    (problem,) = problems_of(SftConfig, [str(path)])
    assert problem.startswith(str(path)) and words in problem, problem


def test_missing_files_are_told_together(tmp_path: Path) -> None:
    found = problems_of(SftConfig, [str(tmp_path / "none.yaml"), str(tmp_path)], "x")
    assert [part.split(": ", 1)[1].split(",")[0].split(" (")[0] for part in found] == [
        "no such file", "is a folder", "expected key.path=value",
    ]  # fmt: skip


def test_aliases_and_odd_keys_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "batch: &b {sequences: 2}\noptimizer: *b\n1: x\n? [k]\n: y\n")
    found = problems_of(SftConfig, [path])
    assert any("YAML aliases" in problem for problem in found)
    assert sum("as a key, expected a name" in problem for problem in found) == 2


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(SftConfig, [path]).model.path == "base"


def test_python_configurations(tmp_path: Path) -> None:
    path = Path(write(tmp_path, GOOD))
    as_dict = {"model": {"path": Path("base")}, "data": {"train": ["a.jsonl"]}, "run": {"output": Path("out"), "steps": 10}}
    config = from_any(SftConfig, path)
    assert from_any(SftConfig, str(path)) == from_any(SftConfig, as_dict) == config and from_any(SftConfig, config) is config
    with_section = {**as_dict, "model": {"path": "base", "adapter": AdapterConfig(kind="lora")}}
    assert from_any(SftConfig, with_section).model.adapter.kind == "lora"
    with pytest.raises(UserError, match=r"^config: model.pth: unknown key \(did you mean model.path\?\)$"):
        from_any(SftConfig, {**as_dict, "model": {"pth": "base"}})
    with pytest.raises(UserError, match="expected a YAML file, a dictionary or a DpoStageConfig, found a SftConfig"):
        from_any(DpoStageConfig, config)


@pytest.mark.parametrize("stage", STAGES)
def test_saved_configuration_is_complete_and_loads_equal(stage: str, tmp_path: Path) -> None:
    schema = STAGES[stage]
    config = load_config(schema, [], [*NEEDED[schema], "model.dtype=float64", "model.path='1e-5'", "run.seed=7"])  # type: ignore[index]
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(schema, [path]) == config
    text = path.read_text(encoding="utf-8")
    for key in describe(schema).values():
        spelled_out = not any(f"{key.name}.".startswith(f"{none}.") for none in ("critic.adapter", "critic.optimizer", "reward"))
        assert not spelled_out or f"{key.name.rpartition('.')[2]}:" in text, key.name
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    config = load_config(GenerateConfig, [])
    path = tmp_path / "config.yaml"
    path.mkdir()  # the rename must fail
    with pytest.raises(OSError):
        save_config(config, path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"] and path.is_dir()
