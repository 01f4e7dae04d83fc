"""`trueline check` counts what is there, names what is wrong, and shows a record as the model will see it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.recipes.toys import Toys
from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import UserError
from trueline.families.qwen2 import QWEN2
from trueline.recipes.check import check
from trueline.recipes.show import coloured, visible

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 folder without weights."""
    folder = tmp_path_factory.mktemp("model")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(["system user assistant"] * 9, trainer)
    engine.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": engine.get_vocab_size(), **sizes}))
    return folder


def write(folder: Path, *records: Any, name: str = "x.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)


def rows(printed: str) -> dict[str, list[str]]:
    """Table rows by their first column."""
    return {line.split("  ")[1]: line.split()[1:] for line in printed.splitlines() if line.startswith("  ") and len(line.split("  ")) > 2}


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        {"messages": [{"role": "system", "content": "ab"}, {"role": "user", "content": "abc"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "abcde"}, {"role": "assistant", "content": "a" * 1000}]},
    )
    assert check([path], None, None) == 0
    printed = capsys.readouterr().out
    assert f"{path}: schema messages, 2 conversations\n" in printed
    found = rows(printed)
    assert found["system"] == ["1", "0.50", "2", "2", "2", "2"]
    assert found["user"] == ["2", "1.00", "5", "5", "5", "8"]
    assert found["assistant"] == ["2", "1.00", "1,000", "1,000", "1,000", "1,001"]


def test_tokens_by_hand(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"prompt": "q", "chosen": "yes", "rejected": "no <|im_end|>"})
    assert check([path], str(model), None) == 0
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(model)
    lengths = {}
    for name, answer in (("chosen", "yes"), ("rejected", "no <|im_end|>")):
        sample = QWEN2.render(Conversation((Message("user", "q"), Message("assistant", answer))), tokenizer)
        lengths[name] = [str(n) for n in (1, *[len(sample)] * 4)]
        assert sum(sample.trained) == len(tokenizer.encode(answer)) + 1
    assert {name: rows(printed)[name] for name in lengths} == lengths
    assert f"data.max_length of at least {lengths['rejected'][1]} keeps every record whole" in printed
    assert f"1 record with text that looks like a control token; it is encoded as plain text: {path}:1 <|im_end|>" in printed


def test_markup_that_the_tokenizer_reads(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5's <tool_call> is no special token: a text has it as one, as published, and check says so."""
    folder = shutil.copytree(model, tmp_path / "marked")
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["added_tokens"].append(layout["added_tokens"][0] | {"id": 900, "content": "<tool_call>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.markup == ("<tool_call>",) and tokenizer.encode("<tool_call>") == [900] and "<tool_call>" not in tokenizer.specials
    path = write(tmp_path, {"prompt": "q <tool_call>", "chosen": "yes", "rejected": "no"})
    assert check([path], str(folder), None) == 0
    sentence = f"1 record with text that this model's tokenizer reads as markup, whoever typed it: {path}:1 <tool_call>"
    assert sentence in capsys.readouterr().out
    assert check([path], str(model), None) == 0 and "as markup" not in capsys.readouterr().out


def test_each_answer_of_its_own(tmp_path: Path, toys: Toys, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))]
    path = write(tmp_path, {"messages": talk}, {"messages": talk[:2]})
    assert check([path], str(toys.model("chatglm2")), 1) == 0
    printed = capsys.readouterr().out
    assert rows(printed)["answer"][0] == "3" and "conversation, trained" not in printed
    assert "⟦a1</s>⟧" in printed and "⟦a2</s>⟧" in printed


def test_show_marks_what_is_trained_and_ends_with_the_serving_prompt(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "你 [red]", "response": "好\x1b[31m"})
    check([path], str(model), 2)
    printed = capsys.readouterr().out
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你 [red]<|im_end|>\n<|im_start|>assistant\n"
    assert f"record 2 of 2, {path}:2\n" in printed
    assert f"{head}⟦好\\x1b[31m<|im_end|>⟧\n" in printed
    assert printed.endswith(f" tokens\n{head}\n") and "when serving: " in printed
    with pytest.raises(UserError, match="--show 3: the files hold 2 sound records; give a number from 1 to 2"):
        check([path], None, 3)


def test_show_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    path = write(tmp_path, {"conversations": [{"from": "human", "value": "q"}, call], "tools": '[{"name": "f"}]'})
    check([path], None, 1)
    printed = capsys.readouterr().out
    assert printed.endswith("user: q\nassistant calls f: {}\n") and "1 record with tools, 1 tool call" in printed


def test_tokens_have_their_roles_colour(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    conversation = Conversation((Message("system", "s"), Message("user", "u鑫"), Message("assistant", "a鑫")))
    sample = QWEN2.render(conversation, tokenizer)
    text = coloured(sample, tokenizer, plain=False)
    assert text.plain == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu鑫<|im_end|>\n<|im_start|>assistant\na鑫<|im_end|>"
    styles = {text.plain[span.start : span.end]: str(span.style).replace(" dim", "") for span in text.spans}
    assert styles["s"] == "magenta" and styles["u"] == "cyan" and styles["a"] == "green underline"
    assert styles["鑫"] == "green underline"  # three byte tokens, one character
    assert styles["<|im_end|>"] == "bold red underline" and styles["<|im_start|>"] == "bold red"  # the last ones
    long = "一二三 abc\n" * 50
    assert coloured(Sample(tokenizer.encode(long), [True] * len(tokenizer.encode(long))), tokenizer, plain=True).plain == f"⟦{long}⟧"
    assert coloured(Sample(tokenizer.encode("鑫")[:2], [True, True]), tokenizer, plain=True).plain == "⟦\ufffd⟧"


def test_every_problem_of_every_file_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"instruction": "a", "output": "b"}
    first = write(tmp_path, good, *[{"instruction": "a"}] * 60, name="a.jsonl")
    second = write(tmp_path, name="b.json")
    Path(second).write_text("[]")
    third = write(tmp_path, good, name="c.jsonl")
    with pytest.raises(UserError) as caught:
        check([first, second, third, str(tmp_path / "none.json")], None, None)
    assert len(caught.value.problems) == 62
    assert caught.value.problems[0] == f"{first}:2:1: output: missing, expected text"
    assert caught.value.problems[60] == f"{second}: no records, expected at least one"
    printed = capsys.readouterr().out
    assert f"{first}: schema alpaca, 1 conversation\n  60 problems, listed at the end\n" in printed
    assert f"1 prompt of {third} also in {first}: first {first}:1 and {third}:1\n" in printed


def test_equal_pairs_and_repeated_prompts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, pair = {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path, same, pair, pair, pair, pair | {"prompt": "r"})
    check([path], None, None)
    printed = capsys.readouterr().out
    assert f"{path}: schema preference, 4 pairs\n  1 pair left out, both answers are equal: {path}:1\n" in printed
    assert f"2 prompts in {path} more than once: first {path}:2 and {path}:3\n" in printed


def test_ranked_answers_of_one_record_repeat_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check([write(tmp_path, {"instruction": "a", "output": ["b", "c", "d"]})], None, None)
    printed = capsys.readouterr().out
    assert "3 pairs" in printed and "more than once" not in printed


def test_a_model_that_cannot_render(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check([write(tmp_path, {"prompt": "a"})], str(tmp_path / "none"), None)


def test_text_cannot_command_the_terminal() -> None:
    assert visible("a\x1b[2J\u202eb\n\t\x07　é") == "a\\x1b[2J\\x202eb\n\t\\x07　é"


def test_published_data_with_the_published_tokenizer(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The medians the data's own page gives: chosen 59, rejected 5 tokens, and here one stop token each."""
    path = str(shared / "data/comparison_gpt4_zh/comparison_gpt4_data_zh.json")
    check([path], str(shared / "data/tokenizers/qwen2"), None)
    printed = capsys.readouterr().out
    assert "schema preference, 2,383 pairs" in printed and "20 pairs left out" in printed
    trained = {line.split(",")[0].strip(): line.split()[3] for line in printed.splitlines() if ", trained" in line}
    assert trained == {"chosen": "60", "rejected": "6"}


def test_length_bias_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(4, 2), (6, 2), (5, 5), (1, 3)]
    path = write(tmp_path, *({"prompt": str(i), "chosen": "a" * c, "rejected": "b" * r} for i, (c, r) in enumerate(sizes)))
    assert check([path], None, None) == 0
    sentence = '50% of the pairs (median 5 and 3 characters); "the longer one wins" would be right in 62%'
    assert f"chosen is the longer answer in {sentence}" in capsys.readouterr().out


def test_warnings_do_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "What is the answer, please?", "response": "这个问题的答案是四十二。"}
    path = write(tmp_path, pair, pair, {"prompt": "q <|user|>", "response": "?"})
    assert check([path], None, None) == 0
    printed = capsys.readouterr().out
    assert f"1 prompt in {path} more than once: first {path}:1 and {path}:2\n1 record in {path} more than once" in printed
    assert f"1 record with an answer that says next to nothing: {path}:3\n" in printed
    assert f"2 records with an answer in another script than its prompt: {path}:1 (Latin and Han), {path}:2 (Latin and Han)\n" in printed
    assert f"1 record with text that looks like a control token; it is encoded as plain text: {path}:3 <|user|>\n" in printed


def test_overlap_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"prompt": "q", "response": name}, {"prompt": name, "response": "a"})
    check([str(tmp_path / "train"), str(tmp_path / "eval" / "*.jsonl")], None, None)
    one, other = (tmp_path / name / "x.jsonl" for name in ("train", "eval"))
    printed = capsys.readouterr().out
    assert f"1 prompt of {other} also in {one}: first {one}:1 and {other}:1\n" in printed and "1 record of" not in printed


def test_fix_and_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"prompt": "q", "response": "a\n"}, {"prompt": "q"}, {"prompt": "q2", "response": 3})
    out, aside = tmp_path / "out", tmp_path / "aside"
    with pytest.raises(UserError, match="2 problems in the data"):
        check([path], None, None, quarantine=str(aside))
    assert (aside / "x.jsonl").read_text() == '{"prompt": "q"}\n{"prompt": "q2", "response": 3}\n'
    assert f"{path}: 2 bad records copied to {aside / 'x.jsonl'}" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 problem cannot be fixed without a choice; correct them, or add --quarantine DIR") as caught:
        check([path], None, None, fix=str(out))
    assert caught.value.problems == [f"{path}:2: completion or response: missing, expected text"] and not list(out.iterdir())
    assert check([path], None, None, fix=str(out), quarantine=str(aside)) == 0
    printed = capsys.readouterr().out
    fixes = "  fixed 1 x blanks around a text\n  fixed 1 x number instead of text\n"
    assert f"{path}: 2 records copied to {out / 'x.jsonl'}\n{fixes}" in printed
    assert f"{out / 'x.jsonl'}: schema columns, 2 conversations" in printed
    assert (aside / "x.jsonl").read_text() == '{"prompt": "q"}\n'
    with pytest.raises(UserError, match="is the file itself; name another folder"):
        check([path], None, None, fix=str(tmp_path))
    with pytest.raises(UserError, match="several files would be written as x.jsonl"):
        check([path, str(out)], None, None, fix=str(tmp_path / "two"))
    assert check([path], None, None, fix=str(tmp_path / "single.jsonl"), quarantine=str(aside)) == 0


def test_a_record_as_a_page(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path, {"prompt": "<script>alert(1)</script>", "response": "b & c\x1b"})
    check([path], str(model), 1, html=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page and "&lt;" in page and "\x1b" not in page and "http" not in page
    assert page.count("<section>") == 2 and "when serving: " in page
    trained = "".join(re.findall(r"<u>(.*?)</u>", page))
    assert trained == "b &amp; c\\x1b&lt;|im_end|&gt;"
    check([path], None, 1, html=str(tmp_path / "plain.html"))
    assert "assistant: </b>b &amp; c\\x1b" in (tmp_path / "plain.html").read_text("utf-8")
    with pytest.raises(UserError, match="--html needs --show N"):
        check([path], None, None, html=str(tmp_path / "page.html"))
