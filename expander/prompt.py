"""The prompt, and the frames in which models write chats.

Training, GRPO rollouts, evaluation, the Modelfile and QMD use exactly these bytes, here in ChatML:

    <|im_start|>user
    /no_think Expand this search query: {query}<|im_end|>
    <|im_start|>assistant
    hyde: ...
    lex: ...
    vec: ...
    <|im_end|>

The frame is written here rather than by a model's chat template, which may add a system turn or an
empty think block, and is third-party Jinja code. docs/bases.md has the other frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reward import LINE_TYPES

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
EXPAND = "Expand this search query: "
# What QMD asks every model.
INSTRUCTION = f"/no_think {EXPAND}"

# In the order of a target's lines, which is alphabetical: hyde, lex, vec.
TYPES = tuple(sorted(LINE_TYPES))


@dataclass(frozen=True)
class Frame:
    """How a model writes a chat. Each turn is `start`, a role, `after_role`, a text and `end`.

    Attributes:
        end: also the last token of a completion.
        after_role: a newline, or a token.
        bos: the token in front of the first turn; empty if there is none.
        assistant: the role of the model's own turns.
        system_role: False if the text of a system turn opens the next user turn instead.
        instruction: what a user turn without a system turn asks. QMD always sends a system turn and
            INSTRUCTION.
    """

    start: str = IM_START
    end: str = IM_END
    after_role: str = "\n"
    bos: str = ""
    assistant: str = "assistant"
    system_role: bool = True
    instruction: str = INSTRUCTION

    def opening(self, role: str) -> str:
        """A turn up to its text."""
        return f"{self.start}{role}{self.after_role}"

    def jinja(self) -> str:
        """The frame as a Jinja chat template, without tools and thinking, for two readers:

        - QMD: if node-llama-cpp 3.20.0 finds a template equal to one of its own wrappers, it uses
          that wrapper, which may put a BOS token in front. This template differs in one place: no
          newline follows an assistant's turn, as training ends at `end`. So node-llama-cpp renders
          the template itself, and the trained bytes arrive. The template keeps the system turn that
          node-llama-cpp adds, because it rejects a template that drops a message.
        - Ollama 0.30 and later ignores a Modelfile's TEMPLATE if the file's own template has more
          capabilities, as the stock Qwen3 template does (tools, thinking).
        """
        role, text, opening, closing = "message.role", "message.content", "", ""
        if self.assistant != "assistant":
            role = f"('{self.assistant}' if message.role == 'assistant' else message.role)"
        if not self.system_role:
            opening = (
                "{% if message.role == 'system' %}{% set chat.system = message.content + '\n\n' %}"
                "{% else %}"
            )
            text = "(chat.system if message.role == 'user' else '') + message.content"
            closing = (
                "{% if message.role == 'user' %}{% set chat.system = '' %}{% endif %}{% endif %}"
            )
        return (
            f"{self.bos}"
            + ("" if self.system_role else "{% set chat = namespace(system='') %}")
            + f"{{% for message in messages %}}{opening}"
            + f"{{{{ '{self.start}' + {role} + '{self.after_role}' + {text} + '{self.end}' }}}}"
            + "{% if message.role != 'assistant' %}{{ '\n' }}{% endif %}"
            + f"{closing}{{% endfor %}}"
            + f"{{% if add_generation_prompt %}}{{{{ '{self.opening(self.assistant)}' }}}}{{% endif %}}"
        )


CHATML = Frame()
GEMMA = Frame("<start_of_turn>", "<end_of_turn>", bos="<bos>", assistant="model", system_role=False)
GRANITE = Frame("<|start_of_role|>", "<|end_of_text|>", after_role="<|end_of_role|>")
# Liquid's models have no /no_think; the original trains them without it.
LFM2 = Frame(bos="<|startoftext|>", instruction=EXPAND)


def frame_of(tokenizer) -> Frame:
    """The frame of a tokenizer from `load_tokenizer`, which keeps it as transformers keeps a chat
    template; ChatML for any other tokenizer."""
    return getattr(tokenizer, "frame", CHATML)


def user_message(query: str, intent: str | None = None, instruction: str = INSTRUCTION) -> str:
    """Content of the user turn; `intent` goes on a second line."""
    return f"{instruction}{query}" + (f"\nQuery intent: {intent}" if intent else "")


def query_of(message: str) -> str | None:
    """The query in a user turn written by `user_message`, or None for any other text."""
    message = message.strip()
    for instruction in (INSTRUCTION, EXPAND):
        if message.startswith(instruction.rstrip()):
            return message[len(instruction.rstrip()) :].strip()
    return None


def render_prompt(
    query: str, system: str | None = None, intent: str | None = None, frame: Frame = CHATML
) -> str:
    """The prompt as text, up to the first character of the expansion.

    >>> render_prompt("auth config")
    '<|im_start|>user\\n/no_think Expand this search query: auth config<|im_end|>\\n<|im_start|>assistant\\n'
    """
    if system is None:
        turns = [("user", user_message(query, intent, frame.instruction))]
    elif frame.system_role:
        turns = [("system", system), ("user", user_message(query, intent))]
    else:
        turns = [("user", f"{system}\n\n{user_message(query, intent)}")]
    framed = "".join(f"{frame.opening(role)}{text}{frame.end}\n" for role, text in turns)
    return f"{frame.bos}{framed}{frame.opening(frame.assistant)}"


def encode_prompt(
    tokenizer, query: str, system: str | None = None, intent: str | None = None
) -> list[int]:
    """The token ids of `render_prompt`'s text, without special tokens added by the tokenizer."""
    text = render_prompt(query, system, intent, frame_of(tokenizer))
    return tokenizer.encode(text, add_special_tokens=False)


def render_lines(lines: Sequence[tuple[str, str]]) -> str:
    """The expansion as text, one line per (type, text) pair, without a final newline.

    >>> render_lines([("lex", "auth settings"), ("vec", "how to configure authentication")])
    'lex: auth settings\\nvec: how to configure authentication'
    """
    return "\n".join(f"{kind}: {text}" for kind, text in lines)


def render_target(
    lines: Sequence[tuple[str, str]], final_newline: bool = True, frame: Frame = CHATML
) -> str:
    """The completion to learn: the expansion and the end token.

    QMD's grammar lets a model stop only after a newline, so the last line ends with one by default.

    >>> render_target([("lex", "auth settings")])
    'lex: auth settings\\n<|im_end|>'
    """
    return f"{render_lines(lines)}{chr(10) if final_newline else ''}{frame.end}"
