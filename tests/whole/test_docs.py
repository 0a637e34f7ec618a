"""What README and docs show must compose, exist and be linked right."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anemoi_dist.config.anemoi.audit import FIXED, LEFT_OUT, READ, TRANSLATED
from anemoi_dist.config.compose import Composed, compose
from anemoi_dist.config.overrides import available_groups
from anemoi_dist.config.parse import schema_keys
from anemoi_dist.config.schema import FREE_FORM
from anemoi_dist.config.tree import is_below, leaves
from anemoi_dist.errors import ExitCode
from anemoi_dist.launch.commands.parser import build_parser
from anemoi_dist.launch.commands.sweep import expand
from anemoi_dist.launch.status.run_status import STATES
from anemoi_dist.optimizers import AdEMAMix, create_optimizer
from anemoi_dist.optimizers.learning_rate import create_scheduler, scaled_rate

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RST = sorted(path for path in DOCS.rglob("*.rst") if "_build" not in path.parts)
MARKDOWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*RST, *MARKDOWN]
GROUPS = available_groups()

_RST_BLOCK = re.compile(r"^( *)\.\. code(?:-block)?:: (\w+)\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
_MD_BLOCK = re.compile(r"^()```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_OVERRIDE = re.compile(r"(\+{0,2}|~)[a-z_]+([./]\w+)*(=.*)?")


def blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of one language in a page."""
    pattern = _RST_BLOCK if path.suffix == ".rst" else _MD_BLOCK
    text = path.read_text(encoding="utf-8")
    return [textwrap.dedent(block) for _, found, block in pattern.findall(text) if found == language]


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the commands of a page's shell blocks, in words."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


#: Commands of ``anemoi-dist`` that take overrides; ``resume`` has the run before them.
COMPOSES = ("train", "plan", "config", "submit", "doctor", "resume")


def overrides_of(words: list[str]) -> list[str] | None:
    """Return the overrides of a command that composes a configuration, None for any other command."""
    if words[0] == "make" and words[1:2] == ["train"]:
        rest = [override for word in words[2:] for override in shlex.split(word.removeprefix("ARGS="))]
    elif words[0].endswith("anemoi-dist") and words[1] in COMPOSES:
        rest = words[3 if words[1] == "resume" else 2 : words.index("--") if "--" in words else None]
    elif "anemoi_dist.train" in words:
        rest = words[words.index("anemoi_dist.train") + 1 :]
    else:
        return None
    takes_value = ("--config", "--num-parameters", "--device-memory-gib", "--after", "--after-any")
    values = {index + 1 for index, word in enumerate(rest) if word in takes_value}
    found = [word for index, word in enumerate(rest) if index not in values and not word.startswith("-")]
    return expand(found)[-1] if "--multirun" in rest else found


#: Each once, with a page that shows it.
SHOWN = {
    tuple(overrides): f"{path.name}-{index}"
    for path in PAGES
    for index, words in enumerate(commands(path))
    if (overrides := overrides_of(words)) is not None
}
COMPOSING = [pytest.param(list(overrides), id=name) for overrides, name in SHOWN.items()]


def test_examples_were_found():
    assert len(COMPOSING) >= 40
    assert len(blocks(DOCS / "how-to/optimizer.rst", "yaml")) == 4
    assert len(YAML) >= 7
    assert len({word for path in PAGES for word in mentioned_keys(path)}) >= 50
    assert {page.relative_to(DOCS).parts[0] for page in RST} == {
        "index.rst",
        "tutorial",
        "how-to",
        "reference",
        "explanation",
    }


@pytest.mark.parametrize("overrides", COMPOSING)
def test_commands_compose(overrides: list[str]):
    assert compose(overrides).config.run.id


def test_commands_exist():
    parser = build_parser()
    [known] = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    used = {w[1] for p in PAGES for w in commands(p) if w[0].endswith("anemoi-dist")}
    used |= {name for p in PAGES for name in re.findall(r"`anemoi-dist ([a-z]+)", p.read_text(encoding="utf-8"))}
    assert {"train", "config", "report"} <= used <= set(known)


def snippet(tmp_path: Path, text: str) -> Composed:
    file = tmp_path / "snippet.yaml"
    file.write_text(text, encoding="utf-8")
    return compose([], config_file=file)


YAML = [pytest.param(text, id=f"{path.name}-{i}") for path in PAGES for i, text in enumerate(blocks(path, "yaml"))]


@pytest.mark.filterwarnings("ignore:training.*(is longer than|has no effect with)")
@pytest.mark.parametrize("text", YAML)
def test_snippets_compose_and_build(tmp_path: Path, text: str):
    composed = snippet(tmp_path, text)
    training = composed.config.training
    parameters = [torch.nn.Parameter(torch.ones(3))]
    optimizer = create_optimizer(training.optimizer, parameters, lr=scaled_rate(training.lr, 2))
    scheduler = create_scheduler(training.scheduler, optimizer, lr=training.lr, max_steps=training.max_steps)
    assert scheduler is not None
    if "_target_" in text:
        written = set(re.findall(r"_target_: (\S+)", text))
        assert written & {training.optimizer["_target_"], training.scheduler["_target_"]}
    if "AdEMAMix" in text:
        assert type(optimizer) is AdEMAMix
        assert f"alpha: {optimizer.param_groups[0]['alpha']}" in text


def test_switching_from_adamw(tmp_path: Path):
    [text, _] = blocks(DOCS / "how-to/optimizer.rst", "python")
    model = torch.nn.Linear(2, 1)
    adamw = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    adamw.step()
    names = {"model": model, "adamw": adamw, "AdEMAMix": AdEMAMix}
    exec(compile(text, "optimizer.rst", "exec"), names)
    state = names["new"].state[model.weight]
    assert torch.equal(state["exp_avg_fast"], adamw.state[model.weight]["exp_avg"])
    assert torch.equal(state["exp_avg_sq"], adamw.state[model.weight]["exp_avg_sq"])
    names["new"].step()
    assert state["exp_avg_slow"].abs().sum() > 0
    assert names["new"].param_groups[0]["schedule_start"] == 20_000


def mentioned_keys(path: Path) -> Iterator[str]:
    """Yield what stands in the text as a literal and begins with a section of the configuration or a group."""
    text = path.read_text(encoding="utf-8")
    sections = {key.partition(".")[0] for key in schema_keys()}
    for literal in re.findall(r"``([^`\n]+)``|(?<!`)`([^`\n]+)`(?!`)", text):
        word = "".join(literal)
        if _OVERRIDE.fullmatch(word) and not word.endswith((".yaml", ".json", ".py", ".zarr")):
            key = word.lstrip("+~").partition("=")[0]
            if re.split(r"[./]", key)[0] in sections and ("." in key or "=" in word):
                yield word


#: Keys of anemoi-training that pages may name.
THEIRS = (*READ, *TRANSLATED, *LEFT_OUT, *FIXED)


@functools.cache
def known_keys() -> set[str]:
    return {*schema_keys(), *(key for key, _ in leaves(compose([]).container()))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_keys_in_the_text_exist(path: Path):
    known = known_keys()
    foreign = ("training.optimizer.kwargs", "training.optimizer.zero", "training.optimization")
    for word in mentioned_keys(path):
        key, _, value = word.lstrip("+~").partition("=")
        if key in GROUPS:
            assert not value or value in GROUPS[key] or value == "mine", f"{path.name}: {word}"
        elif not key.startswith(foreign) and not is_below(key, THEIRS):
            assert key in known or key.startswith(FREE_FORM), f"{path.name}: {word}"


def test_every_option_of_every_group_is_described():
    text = (DOCS / "reference/configuration.rst").read_text(encoding="utf-8")
    for group, options in GROUPS.items():
        assert f"``{group}=``" in text
        for option in options:
            assert f"``{option}``" in text, f"{group}={option}"


def test_every_exit_code_is_described():
    table = (DOCS / "reference/exit-codes.rst").read_text(encoding="utf-8")
    described = {int(code) for code in re.findall(r"^(\d+) {2,}\S", table, re.MULTILINE)}
    assert described == {int(code) for code in ExitCode}


def test_every_event_is_described():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "anemoi_dist").rglob("*.py"))
    written = set(re.findall(r'(?:recorder\.event|log\.write|self\._append)\(\s*"(\w+)"', sources))
    table = (DOCS / "reference/run-directory.rst").read_text(encoding="utf-8").partition("events.jsonl\n==")[2]
    assert written == set(re.findall(r"^``(\w+)`` ", table, re.MULTILINE))


def test_every_state_is_described():
    [_, table, *_] = re.split(r"^=+ =+$", (DOCS / "how-to/watch.rst").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(STATES) == set(re.findall(r"^``(\w+)``", table, re.MULTILINE))


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_of_markdown_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            text = (path.parent / file).read_text(encoding="utf-8")
            headings = {
                re.sub(r"\W+", "-", line.strip("# ").lower()) for line in re.findall(r"^#+ .*", text, re.MULTILINE)
            }
            assert not anchor or anchor in headings, target


@pytest.mark.parametrize("path", RST, ids=lambda path: path.name)
def test_links_of_pages_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    labels = {label for page in RST for label in re.findall(r"^\.\. _([\w-]+):", page.read_text(), re.MULTILINE)}
    for target in re.findall(r":doc:`(?:[^`<]*<)?([^`<>]+)>?`", text):
        base = DOCS if target.startswith("/") else path.parent
        assert (base / f"{target.lstrip('/')}.rst").is_file(), target
    assert set(re.findall(r":ref:`(?:[^`<]*<)?([^`<>]+)>?`", text)) <= labels
    for target in re.findall(r":(?:class|func|mod|meth):`~?(anemoi_dist[\w.]+)`", text):
        assert _exists(target), target


def test_what_the_api_lists_exists():
    listed = re.findall(
        r"automodule:: (\S+)\n(?: +:members: *(.*)\n)?", (DOCS / "reference/api.rst").read_text(encoding="utf-8")
    )
    assert len(listed) >= 20
    for module, members in listed:
        for member in re.split(r"[, ]+", members):
            assert _exists(f"{module}.{member}".rstrip(".")), f"{module}: {member}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines.index("make train") < lines.index("make test") < 15


def test_the_readme_shows_the_default_job():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- figures -->")[2].partition("<!-- end of figures -->")[0]
    config = compose([]).config
    assert set(re.findall(r"era5_sample-\S+", shown)) == {config.run.id}
    assert f"step {config.training.max_steps}/{config.training.max_steps} " in shown
    assert f"starts: {config.engine.spec.name} on 2 ranks" in shown


def _exists(target: str) -> bool:
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = __import__(".".join(parts[:end]), fromlist=["_"])
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_every_page_is_in_the_index():
    index = (DOCS / "index.rst").read_text(encoding="utf-8")
    for path in RST:
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or re.search(rf"^ +{re.escape(name)}$", index, re.MULTILINE), name


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path: Path):
    application = pytest.importorskip("sphinx.application")
    app = application.Sphinx(
        DOCS, DOCS, tmp_path / "html", tmp_path / "doctrees", "html", status=None, warningiserror=True
    )
    app.build()
    assert app.statuscode == 0
    assert (tmp_path / "html" / "how-to" / "optimizer.html").is_file()
    keys = (tmp_path / "html" / "reference" / "keys.html").read_text(encoding="utf-8")
    known = list(schema_keys())
    leaves_of_schema = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    assert all(f">{key}<" in keys for key in leaves_of_schema)
