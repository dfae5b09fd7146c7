"""Expand a query with Ollama through its API, using only the standard library.

    ollama create qmd-query-expansion -f outputs/gguf/Modelfile
    python examples/ollama_client.py "auth config"

The message is the prompt's user turn. The Modelfile adds the chat template and the sampling settings.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.prompt import user_message
from expander.qmd import kept_lines


def chat(host: str, model: str, message: str) -> str:
    """The model's answer to one message.

    Raises:
        ValueError: Ollama cannot be reached, does not have the model, or the server is not Ollama.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "stream": False,
    }
    request = urllib.request.Request(
        f"{host.rstrip('/')}/api/chat",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["message"]["content"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{host}: {error}: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise ValueError(f"{host}: {error}; is `ollama serve` running?") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{host}: the server is not Ollama") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Expand a search query with Ollama.")
    parser.add_argument("query")
    parser.add_argument("--model", default="qmd-query-expansion", help="default: %(default)s")
    parser.add_argument("--host", default="http://127.0.0.1:11434", help="default: %(default)s")
    arguments = parser.parse_args()
    text = chat(arguments.host, arguments.model, user_message(arguments.query))
    for kind, line in kept_lines(arguments.query, text):
        print(f"{kind}: {line}")


if __name__ == "__main__":
    cli.run(main)
