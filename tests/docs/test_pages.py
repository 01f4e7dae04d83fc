"""What the pages say of the program is true: keys, defaults, schemas, files, modules, links; and both languages say the same."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import Block, all_blocks, anchors, blocks, folder_of, links, names_in, pages, prose, table, text_of
from tests.structure.tree import ROOT, modules
from trueline.config.describe import Key, describe
from trueline.config.schema import STAGES, GenerateConfig
from trueline.data.formats import SCHEMAS, load_conversations, load_file, load_preferences, load_prompts
from trueline.data.reader import Problems
from trueline.families.table import FAMILIES
from trueline.model.decoder import DecoderConfig

STAGE_PAGES = {"docs/sft.md": "sft", "docs/reward.md": "reward", "docs/dpo.md": "dpo", "docs/ppo.md": "ppo"}
FILES = (".py", ".md", ".yaml", ".json", ".jsonl", ".log", ".html", ".safetensors")
KEYS: dict[str, Key] = {name: key for schema in (GenerateConfig, *STAGES.values()) for name, key in describe(schema).items()}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (folder_of(page) / path).resolve() if path else ROOT / page
        if not target.exists():
            broken.append(link)
        elif anchor and target.exists() and anchor not in anchors(str(target.relative_to(ROOT))):
            broken.append(link)
    assert not broken, f"{page}: {broken}"


def linked(page: str) -> set[str]:
    """The pages that a page leads to, by their paths from the root."""
    return {os.path.normpath(f"{Path(page).parent}/{link.partition('#')[0]}") for link in links(page) if not link.startswith("http")}


def test_the_map_names_every_page() -> None:
    named = linked("docs/README.md") | linked("docs/models.md") | linked("docs/data.md")
    missing = {str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")} - named - {"docs/README.md"}
    assert not missing, missing


def test_the_map_names_the_configurations_of_the_stages() -> None:
    named = {names_in(row[0])[0] for row in table("docs/README.md", "file")}
    assert named == {f"configs/{p.name}" for family in ("qwen2", "glm4") for p in (ROOT / "configs").glob(f"{family}_*.yaml")}


def test_both_readmes_say_the_same() -> None:
    english, chinese = "README.md", "README.zh-CN.md"
    depths = [re.findall(r"^(#+) ", prose(page), flags=re.MULTILINE) for page in (english, chinese)]
    assert depths[0] == depths[1]
    code = [[(b.language, b.name, _uncommented(b.text)) for b in blocks(page)] for page in (english, chinese)]
    assert code[0] == code[1]
    rows = [[line.count("|") for line in prose(page).splitlines() if line.startswith("|")] for page in (english, chinese)]
    assert rows[0] == rows[1]
    points = [len(re.findall(r"^ *[*-] ", prose(page), flags=re.MULTILINE)) for page in (english, chinese)]
    assert points[0] == points[1]
    targets = [[link.replace("README.zh-CN.md", "README.md") for link in links(page)] for page in (english, chinese)]
    assert targets[0] == targets[1]


def _uncommented(text: str) -> str:
    return re.sub(r" *# .*", "", text)


@pytest.mark.parametrize("block", list(all_blocks("yaml")), ids=str)
def test_yaml_holds_known_keys(block: Block) -> None:
    value = yaml.safe_load(block.text)
    assert isinstance(value, dict), f"{block}: not a mapping"
    unknown = [name for name in _leaves(value) if name not in KEYS]
    assert not unknown, f"{block}: {unknown}"


def _leaves(value: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, item in value.items():
        found += _leaves(item, f"{prefix}{name}.") if isinstance(item, dict) else [prefix + name]
    return found


@pytest.mark.parametrize("page", pages())
def test_keys_in_the_text_exist(page: str) -> None:
    sections = {name.split(".")[0] for name in KEYS if "." in name}
    unknown = []
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        found = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:[:=].*)?", code)
        if found and found[1].split(".")[0] in sections and found[1] not in KEYS and not found[1].endswith(FILES):
            unknown.append(code)
    assert not unknown, f"{page}: no such keys: {unknown}"


@pytest.mark.parametrize("page", pages())
def test_paths_in_the_text_exist(page: str) -> None:
    named = re.findall(r"`((?:tests|trueline|configs|docs)/[^`\s*]*)`", prose(page))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", STAGE_PAGES)
def test_defaults_in_tables_are_the_schema_s(page: str) -> None:
    keys = describe(STAGES[STAGE_PAGES[page]])
    wrong = []
    for key, default, *_ in table(page, "key"):
        for name in names_in(key):
            wanted = "required" if keys[name].required else keys[name].default
            if default.strip("`*") != wanted:
                wrong.append(f"{name}: {default}, the schema says {wanted}")
    assert not wrong and table(page, "key"), "\n".join(wrong)


def test_every_schema_has_a_page_with_an_example_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example and what is refused, a command that trains on it; each record by every loader it is for."""
    assert {page.stem for page in (ROOT / "docs" / "data").iterdir()} == set(SCHEMAS)
    loaders = {"answer": load_conversations, "pair": load_preferences, "prompt": load_prompts}
    monkeypatch.chdir(tmp_path)
    for name, schema in SCHEMAS.items():
        found = blocks(f"docs/data/{name}.md")
        assert {block.name for block in found if block.name} >= {f"{name}.jsonl", "broken.jsonl"}
        assert re.search(rf"trueline (sft|reward|dpo|ppo) .*data.train=\[?{name}", "".join(b.text for b in found if b.language == "bash"))
        for block in (block for block in found if block.name == f"{name}.jsonl"):
            records = block.text.splitlines()
            for record in records:
                Path(block.name).write_text(record + "\n", encoding="utf-8")
                problems = Problems()
                seen, _, values = load_file(block.name, "auto", problems, [])
                problems.stop()
                assert seen == name and values, f"{block}: read as {seen}: {record}"
                for use in schema.uses:
                    assert loaders[use]([block.name]), f"{block}: {use}: {record}"


def test_every_family_has_a_page_that_says_what_the_program_does() -> None:
    for index in ("docs/models.md", "README.md"):
        rows = [row[0] for row in table(index, "family" if index == "docs/models.md" else "`model_type`")]
        assert {names_in(cell)[0] for cell in rows} == set(FAMILIES)
        assert all(f"models/{names_in(cell)[0]}.md)" in cell for cell in rows)
    assert {page.stem for page in (ROOT / "docs" / "models").iterdir()} == set(FAMILIES)
    for name, family in FAMILIES.items():
        page = f"docs/models/{name}.md"
        facts = dict(re.findall(r"^\* \*\*(.*?):\*\* (.*?)(?=^\* |^$)", text_of(page), flags=re.MULTILINE | re.DOTALL))
        assert names_in(facts["Stop tokens"]) == list(family.stop), page
        assert set(names_in(facts["Modules of a LoRA"])) == set(family.targets.values()), page
        classes = {family.architecture, family.scorer_architecture}
        assert set(names_in(facts["The export is read by"])) == (set() if name.startswith("chatglm") else classes), page
        assert {block.name for block in blocks(page) if block.name} == {"talk.jsonl", "sft.yaml"}, page
        typed = "".join(block.text for block in blocks(page) if block.language in ("bash", "console"))
        assert all(f"trueline {verb} " in typed for verb in ("check", "sft", "export", "generate", "chat")), page


def test_parity_is_measured_for_every_family_within_its_bounds() -> None:
    rows = table("docs/parity.md", "family")
    assert {names_in(row[0])[0] for row in rows} == set(FAMILIES)
    for row in rows:
        for cell in row[1:]:
            passed, of = map(int, re.findall(r"(\d+) of (\d+)", cell)[0])
            assert 0 < passed <= of, row
            measured = re.findall(r"(\S+) (float\d\d)", cell)
            assert all(size == "equal" or float(size) <= {"float32": 1e-5, "float64": 1e-6}[kind] for size, kind in measured), row


def test_the_example_of_a_table_loads(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("docs/data/columns.md") if block.language == "csv")
    (tmp_path / "x.csv").write_text(block.text, encoding="utf-8")
    assert len(load_conversations([str(tmp_path / "x.csv")])) == len(block.text.splitlines()) - 1


def test_the_table_of_uses_is_the_program_s() -> None:
    rows = {names_in(row[0])[0]: [cell == "yes" for cell in row[2:5]] for row in table("docs/data.md", "schema")}
    assert rows == {name: [use in schema.uses for use in ("answer", "pair", "prompt")] for name, schema in SCHEMAS.items()}


def test_the_map_of_the_tree_names_every_module() -> None:
    listed = {name for row in table("docs/tree.md", "module") for name in names_in(row[0])}
    there = {f"{name.replace('.', '/')}.py" for name in modules() if (ROOT / f"{name.replace('.', '/')}.py").is_file()} - _silent()
    assert listed == there, f"missing {sorted(there - listed)}, gone {sorted(listed - there)}"


def _silent() -> set[str]:
    return {f"{name.replace('.', '/')}/__init__.py" for name in modules()}


def test_decoder_options_named_for_families_exist() -> None:
    named = {name for row in table("docs/families.md", "option") for name in names_in(row[0])}
    usual = {"qkv_bias", "o_bias", "mlp_bias", "rope", "rope_theta", "rope_dim", "tied_embeddings", "norm_eps"}
    newer = {"rope_scaling", "qk_norm", "post_norms", "windows"}
    assert named == usual | {"norm", "gated", "residual_scale", "rope_rows", "blocks", "prefix_shifts", *newer}
    assert named <= set(DecoderConfig.__dataclass_fields__)


def test_json_blocks_are_json() -> None:
    for block in all_blocks("json", "jsonl"):
        for line in [block.text] if block.language == "json" else [] if block.name == "broken.jsonl" else block.text.splitlines():
            assert isinstance(json.loads(line), dict), f"{block}"


def test_no_number_without_a_source() -> None:
    """Speed, memory and accuracy are measured in docs/benchmarks.md and docs/real-data.md; elsewhere they would grow old unseen."""
    measured = re.compile(r"\d[\d.,]* ?(%|times faster|tokens/s|tokens per second|GiB|MiB|minutes)")
    found = []
    for page in pages():
        for line in prose(page).splitlines():
            if measured.search(line) and "benchmarks.md" not in line and "real-data.md" not in line and page != "docs/decisions.md":
                found.append(f"{page}: {line[:100]}")
    assert not found, "\n".join(found)


def test_pages_do_not_boast() -> None:
    words = re.compile(
        r"\b(blazing|seamless|powerful|cutting-edge|state-of-the-art|revolutionary|effortless|simply|just works|robust)\b", re.I
    )
    found = [f"{page}: {word}" for page in pages() for word in words.findall(text_of(page))]
    assert not found, found
