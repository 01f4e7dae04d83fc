"""What the pages say of the program is true: keys, defaults, schemas, files, modules, links; and both languages say the same."""

import json
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


def test_the_map_names_every_page() -> None:
    named = {str((ROOT / "docs" / link).resolve().relative_to(ROOT)) for link in links("docs/README.md") if not link.startswith("http")}
    missing = {str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")} - named - {"docs/README.md"}
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


def test_every_schema_has_an_example_that_loads(tmp_path: Path) -> None:
    shown = set()
    for block in blocks("docs/data.md"):
        name = block.heading.strip("`")
        if block.language != "jsonl" or name not in SCHEMAS or block.name:
            continue
        path = tmp_path / f"{len(shown)}-{name}-{block.line}.jsonl"
        path.write_text(block.text, encoding="utf-8")
        problems = Problems()
        found, _, values = load_file(str(path), "auto", problems, [])
        problems.stop()
        assert found == name and len(values) >= len(block.text.splitlines()), f"{block}: read as {found}"
        shown.add(name)
    assert shown == set(SCHEMAS), set(SCHEMAS) - shown


def test_the_example_of_a_table_loads(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("docs/data.md") if block.language == "csv")
    (tmp_path / "x.csv").write_text(block.text, encoding="utf-8")
    assert len(load_conversations([str(tmp_path / "x.csv")])) == len(block.text.splitlines()) - 1


def test_the_table_of_uses_is_the_program_s() -> None:
    rows = {names_in(row[0])[0]: [cell == "yes" for cell in row[2:5]] for row in table("docs/data.md", "schema")}
    assert rows == {name: [use in schema.uses for use in ("answer", "pair", "prompt")] for name, schema in SCHEMAS.items()}


def test_loaders_of_the_examples_agree_with_that_table(tmp_path: Path) -> None:
    loaders = {"answer": load_conversations, "pair": load_preferences, "prompt": load_prompts}
    for block in blocks("docs/data.md"):
        name = block.heading.strip("`")
        if block.language == "jsonl" and name in SCHEMAS and not block.name:
            path = tmp_path / "example.jsonl"
            path.write_text(block.text.splitlines()[0] + "\n", encoding="utf-8")
            for use in SCHEMAS[name].uses:
                assert loaders[use]([str(path)]), f"{block}: {use}"


def test_the_map_of_the_tree_names_every_module() -> None:
    listed = {name for row in table("docs/tree.md", "module") for name in names_in(row[0])}
    there = {f"{name.replace('.', '/')}.py" for name in modules() if (ROOT / f"{name.replace('.', '/')}.py").is_file()} - _silent()
    assert listed == there, f"missing {sorted(there - listed)}, gone {sorted(listed - there)}"


def _silent() -> set[str]:
    return {f"{name.replace('.', '/')}/__init__.py" for name in modules()}


def test_families_are_those_of_the_program() -> None:
    assert {names_in(row[0])[0] for row in table("README.md", "`model_type`")} == set(FAMILIES)


def test_decoder_options_named_for_families_exist() -> None:
    named = {name for row in table("docs/families.md", "option") for name in names_in(row[0])}
    usual = {"qkv_bias", "o_bias", "mlp_bias", "rope", "rope_theta", "rope_dim", "tied_embeddings", "norm_eps"}
    newer = {"rope_scaling", "qk_norm", "post_norms", "windows"}
    assert named == usual | {"norm", "gated", "residual_scale", "rope_rows", "blocks", "prefix_shifts", *newer}
    assert named <= set(DecoderConfig.__dataclass_fields__)


def test_json_blocks_are_json() -> None:
    for block in all_blocks("json", "jsonl"):
        for line in [block.text] if block.language == "json" else [] if block.name else block.text.splitlines():
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
