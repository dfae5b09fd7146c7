"""The examples: every command of examples/README.md as printed, and the errors of its scripts."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny
import yaml
from chains import make_chain
from fake_endpoint import Act, ChatEndpoint

from examples.notes_queries import headings, pairs, rows, texts
from examples.qmd_config import set_generate
from expander.prompt import user_message

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
GGUF = "outputs/gguf/qmd-query-expansion-qwen3-1.7b-q4_k_m.gguf"


@pytest.fixture
def ollama():
    """A local server in place of Ollama that has one model: (its address, the requests it received)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, asked))
            known = asked["model"] == "qmd-query-expansion"
            content = "lex: auth settings\nvec: how to sign in\nvec: configure auth\n"
            answer = {"message": {"role": "assistant", "content": content}, "done": True}
            body = json.dumps(answer if known else {"error": "model not found"}).encode()
            if self.path != "/api/chat":
                known, body = True, b"some other server"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Do not log."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "notes"
    (folder / "deep").mkdir(parents=True)
    for number in range(8):
        text = f"# Rotate key {number} of auth\n\nEvery key lives for *{number}* days.\n\n## Links\n\na\n"
        (folder / "deep" / f"{number}.md").write_text(text)
    return folder


def test_every_command_as_printed(run, hub, hub_root, ollama, notes, tmp_path):
    folder = tmp_path / "work"
    base = tiny.end_early(tiny.make_qwen3(tmp_path / "base", layers=1))
    published = make_chain(folder / "outputs", base)
    shutil.copytree(published, hub_root / "models" / "tester" / "expander" / "adapters")
    gguf = folder / GGUF
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF\3\0\0\0")
    home = notes.parent
    env = hub | {"HOME": str(home), "QMD_CONFIG_DIR": "", "XDG_CONFIG_HOME": ""}

    (block,) = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    commands = [line for line in block.splitlines() if line and not line.startswith("#")]
    printed = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        arguments = [str(notes) if word == "~/notes" else word for word in arguments]
        if program == "hf":
            words = [Path(sys.executable).with_name("hf"), *arguments]
            words[words.index("OWNER/NAME")] = "tester/expander"
            done = subprocess.run(
                words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
            )
        else:
            assert program == "python", command
            host = ["--host", ollama[0]] if "examples/ollama_client.py" in arguments else []
            done = run([*arguments, *host], cwd=folder, env=env, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[Path(arguments[0]).name] = done.stdout

    assert printed["expand.py"].splitlines()[0] == "auth config"
    assert printed["ollama_client.py"] == "lex: auth settings\nvec: configure auth\n"
    message = {"role": "user", "content": user_message("auth config")}
    assert ollama[1][0][0] == "/api/chat" and ollama[1][0][1]["messages"] == [message]
    assert f'+  generate: "{gguf}"' in printed["qmd_config.py"]
    assert not (home / ".config").exists()
    assert "queries for 8 of 8 notes" in printed["notes_queries.py"]
    assert "GRPO from outputs/published/adapters: 14 prompts, 28 steps" in printed["train.py"]
    sft = json.loads((folder / "outputs/notes/sft/adapter_config.json").read_text())
    assert sft["stage"] == "grpo"  # the published adapter, which has an SFT adapter below it
    assert "golden" in printed["eval.py"]


def test_every_file_is_in_the_table():
    names = {path.name for path in (ROOT / "examples").iterdir()} - {"README.md", "__init__.py"}
    hidden = {"__pycache__", "report.html"}  # the template of report.py
    assert [name for name in names - hidden if name not in GUIDE] == []


# QMD's configuration


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "models:\n  generate: NEW\n"),
        ("# mine\nx: {y: 1}", "# mine\nx: {y: 1}\nmodels:\n  generate: NEW\n"),
        ("models:\nx: {}\n", "models:\n  generate: NEW\nx: {}\n"),
        (
            "models:\n    embed: a # c\nx: 1\n",
            "models:\n    generate: NEW\n    embed: a # c\nx: 1\n",
        ),
        ("models:\n  generate: 'a' # c\n  x: b\n", "models:\n  generate: NEW # c\n  x: b\n"),
        ("models: {embed: a}\n", "models: {generate: NEW, embed: a}\n"),
    ],
)
def test_only_the_model_of_the_configuration_changes(before, after):
    assert set_generate(before, "/a b/ü.gguf") == after.replace("NEW", '"/a b/ü.gguf"')


@pytest.mark.parametrize(
    "text",
    [
        "- a list\n",
        "models: text\n",
        "a: b: c\n",
        "x: &m {generate: q}\nmodels: *m\n",
        "models:\n  generate: >-\n    folded\n  embed: a\n",
    ],
)
def test_a_configuration_that_cannot_be_edited_safely_is_refused(text):
    with pytest.raises(ValueError, match=r"by hand.*models: generate: "):
        set_generate(text, "/m.gguf")


def test_the_configuration_changes_only_with_write_and_keeps_a_backup(run, tmp_path):
    config, model = tmp_path / "index.yml", tmp_path / "m.gguf"
    config.write_text("models:\n  generate: hf:old/model\n")
    model.write_bytes(b"GGUF\3")
    env = {"QMD_CONFIG_DIR": str(tmp_path)}
    command = ["examples/qmd_config.py", "m.gguf"]

    assert "--write" in run(command, cwd=tmp_path, env=env).stdout
    assert list(tmp_path.glob("*.bak")) == []
    done = run([*command, "--write"], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(config.read_text()) == {"models": {"generate": str(model)}}
    (backup,) = tmp_path.glob("index.yml.*.bak")
    assert backup.read_text() == "models:\n  generate: hf:old/model\n"
    assert "already" in run([*command, "--write"], cwd=tmp_path, env=env).stdout

    model.write_bytes(b"not one")
    done = run([*command, "--write"], cwd=tmp_path, env=env)
    assert done.returncode == 2 and "not a GGUF file" in done.stderr


# Ollama


def test_errors_of_ollama_print_one_line(run, ollama):
    host = ollama[0]
    for options, reason in (
        (["--host", host, "--model", "other"], "model not found"),
        (["--host", "http://127.0.0.1:1"], "`ollama serve`"),
        (["--host", f"{host}/elsewhere"], "not Ollama"),
    ):
        done = run(["examples/ollama_client.py", "tls", *options])
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert reason in done.stderr


# Notes


def test_headings_are_paired_with_the_paragraph_below():
    note = """---
title: x
# no heading
---
# `proxy_pass` in C# ##

> Use **snake_case** here; see
[the docs](https://a.b/c) and [[Ops|the page]].

More.

## Code only

```bash
# no heading
```
"""
    assert list(headings(note)) == [
        ("proxy_pass in C#", "Use snake_case here; see the docs and the page.")
    ]


def test_headings_that_occur_in_several_notes_are_skipped(notes, tmp_path):
    read = texts(notes)
    found = rows(read, list(pairs(read)))
    headings = [row for row in found if row["query"].startswith("Rotate")]
    assert [row["query"] for row in headings] == [f"Rotate key {n} of auth" for n in range(8)]
    assert headings[2]["output"] == [["hyde", "Every key lives for 2 days."]]
    assert headings[2]["passage"].startswith("# Rotate key 2 of auth\n")
    # The first sentences differ as well; "Links" is in every note.
    assert len(found) == 16 and "Every key lives for 2 days" in [row["query"] for row in found]
    with pytest.raises(ValueError, match=r"no \.md file"):
        texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no note has"):
        rows(read, [("Links", path, "x") for path in read])


def test_the_text_of_a_link_is_a_query_for_the_note_it_points_to(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "old.md").write_text("# Old\n\nGone.\n")
    (tmp_path / "ops" / "keys.md").write_text("---\na: b\n---\nRotate by hand. Then rest.\n")
    (tmp_path / "todo.md").write_text("[the key chore](ops/keys.md), [[keys|spare]], [[todo]]\n")
    read = texts(tmp_path)
    answers = {query: path.name for query, path, _ in pairs(read)}
    assert answers["the key chore"] == answers["spare"] == answers["Rotate by hand"] == "keys.md"
    assert "todo" not in answers  # a note that links to itself
    assert len(read) == 2


def test_an_endpoint_writes_queries_in_other_words(run, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keys.md").write_text("# Keys\n\nRotate by hand.\n")
    output = tmp_path / "notes.jsonl"
    command = ["examples/notes_queries.py", tmp_path / "notes", "-o", output, "--model", "m"]
    with ChatEndpoint(lambda *_: Act("- spare passwords\n- the lock")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"OPENAI_API_KEY": "sk-hidden", "NO_PROXY": "127.0.0.1"}
        done = run([*command, "--url", f"{server.url}/v1"], env=env)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    written = [json.loads(line)["query"] for line in output.read_text().splitlines()]
    assert written == ["Keys", "Rotate by hand", "spare passwords", "the lock"]
    assert "sk-hidden" not in done.stdout + done.stderr + output.read_text()
    failed = run([*command, "--url", f"{server.url}/v1"], env=env, timeout=60)
    assert failed.returncode == 2 and "the endpoint wrote no query" in failed.stderr
