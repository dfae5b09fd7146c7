"""The rubric that scores a query expansion by rules alone: no model, no network, no dependency.

    python reward.py                                      self-test; exits 1 and names what differs
    python reward.py --query "auth config" expansion.txt  score one text (`-` reads stdin)

GRPO trains on this score and `eval.py` reports it; SCORING.md explains every part with worked
examples. It judges form and word overlap only: nothing here knows whether an expansion finds the
right documents.

Every check returns its deductions, one for each fault, and the points follow from their number.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

STOP_WORDS = frozenset("the a an is are to for of in and or it this that be with as on by".split())
# Words of a query that carry no topic: neither key terms nor entities.
KEY_STOP_WORDS = frozenset(
    """
    what is how to the a an in on for of and or with my your do does can i me we who where when
    why which find get show tell about from into between through during after before like than
    then that this their its was were has had been being have not but just also very so if at by
    up out all some any no each every both few more most other only same such here there asked
    said notes meeting email discussion conversation call
    """.split()
)
# Words that open a query with a capital letter without being a name.
OPENING_WORDS = frozenset(
    """
    configure setup install build create make run start stop check test debug fix update change
    add remove delete use using need want should would could help please best good new old latest
    recent setting settings compare comparing implement implementing deploy deploying migrate
    migrating optimize optimizing understand understanding explain list describe define convert
    connecting performance overview introduction tutorial example difference between about review
    resolve resolving troubleshoot troubleshooting monitor monitoring manage managing enable
    disable set write read search possible common typical recommended alternative
    """.split()
)
GENERIC_PHRASES = (
    "find information about", "search for", "look up", "get information", "learn about",
    "information on", "details about", "find out about", "what is", "how to", "guide to",
    "help with",
)  # fmt: skip
FILLERS = frozenset(["overview", "basics"])
TECHNICAL = frozenset(".+-#@")
END_MARKER = "<|im_end|>"
CHAT_MARKERS = ("<|im_start|>", END_MARKER, "<|endoftext|>", "\nassistant\n", "\nuser\n")
PARTS = ("format", "diversity", "hyde", "quality", "entity", "think_bonus")
RATINGS = ((80, "Excellent"), (60, "Good"), (40, "Acceptable"), (20, "Poor"))

ONLY_SUFFIX = re.compile(r"\s+/only:(lex|vec|hyde)\s*$", re.IGNORECASE)
THINK_BLOCK = re.compile(r"<think>.*?</think>", re.DOTALL)
LONG_WORD = re.compile(r"\w{3,}")

Part = tuple[int, list[str]]  # points, deductions


def only_mode(query: str) -> tuple[str, str | None]:
    """Split a query into its base and the one type it asks for.

    >>> only_mode("auth config /only:lex"), only_mode("auth config")
    (('auth config', 'lex'), ('auth config', None))
    """
    match = ONLY_SUFFIX.search(query)
    if match is None:
        return query, None
    return query[: match.start()].strip(), match.group(1).lower()


def clean_expansion(text: str) -> tuple[str, bool]:
    """The text without end markers and think blocks, and whether the model was thinking."""
    text = text.strip().replace(END_MARKER, "").strip()
    if "<think>" in text and "</think>" in text:
        return THINK_BLOCK.sub("", text).strip(), True
    return text, False


def parse_expansion(text: str) -> dict[str, list[str]]:
    r"""Sort the lines of an expansion by prefix. A line ends at "\n" and nowhere else.

    >>> parse_expansion("lex: auth settings\nSure!")
    {'lex': ['auth settings'], 'vec': [], 'hyde': [], 'invalid': ['Sure!']}
    """
    parsed: dict[str, list[str]] = {"lex": [], "vec": [], "hyde": [], "invalid": []}
    for line in map(str.strip, text.split("\n")):
        kind, colon, content = line.partition(":")
        if colon and kind in ("lex", "vec", "hyde"):
            parsed[kind].append(content.strip())
        elif line:
            parsed["invalid"].append(line)
    return parsed


def extract_named_entities(query: str) -> set[str]:
    """Names, acronyms and technical terms of a query, in lower case. The first rule to apply wins.

    >>> sorted(extract_named_entities("configure AWS Lambda with node.js"))
    ['aws', 'lambda', 'node.js']
    """
    entities = set()
    follows_entity = False
    for position, token in enumerate(query.split()):
        word = token.strip(".,!?:;()[]\"'")
        lower = word.lower()
        capital, topical = word[:1].isupper(), lower not in KEY_STOP_WORDS
        if word.isupper() and len(word) >= 2:
            is_entity = True
        elif capital and topical:
            is_entity = position > 0 or lower not in OPENING_WORDS
        elif len(word) >= 2 and not TECHNICAL.isdisjoint(word):
            is_entity = True
        else:
            is_entity = capital and any(map(str.isupper, word[1:]))
        # The word after a name is its second half; a third word does not follow from that.
        if is_entity or (word and follows_entity and topical):
            entities.add(lower)
        follows_entity = is_entity
    return entities


def words(text: str) -> set[str]:
    return set(text.lower().split())


def echoes(line: str, query: str) -> bool:
    """Whether the line is the query again, with fewer than ten characters added."""
    line, query = line.lower(), query.lower().strip()
    return query in line and len(line) < len(query) + 10


def is_generic(line: str) -> bool:
    """Whether a stock phrase is all there is: fewer than three characters left without its words."""
    line = line.lower()
    for phrase in GENERIC_PHRASES:
        phrase_words = phrase.split()
        if phrase in line or line.startswith(phrase_words[0]):
            rest = line
            for word in phrase_words:
                rest = rest.replace(word, "", 1).strip()
            if len(rest) < 3:
                return True
    return False


def keeps_entity(line: str, entities: set[str]) -> bool:
    lower = line.lower()
    return any(entity in lower for entity in entities)


def find_similar(kind: str, lines: Sequence[str], query: str) -> list[str]:
    """Pairs of lines that say the same. At most three: the third has lost every point there is."""
    distance = 3 if len(query.split()) >= 5 else 2
    lowered = [(line, line.lower(), words(line)) for line in lines]
    pairs = (
        f'two {kind} lines say the same: "{a}" and "{b}"'
        for (a, a_lower, a_words), (b, b_lower, b_words) in combinations(lowered, 2)
        if a_lower in b_lower or b_lower in a_lower or len(a_words ^ b_words) < distance
    )
    return list(islice(pairs, 3))


def quote(fault: str, lines: Sequence[str]) -> list[str]:
    return [f'{fault}: "{line}"' for line in lines]


def find_echoes(kind: str, lines: Sequence[str], query: str) -> list[str]:
    return quote(f"{kind} line repeats the query", [x for x in lines if echoes(x, query)])


def find_without_key_term(lex: Sequence[str], query: str) -> list[str]:
    terms = words(query) - KEY_STOP_WORDS
    astray = [line for line in lex if terms and terms.isdisjoint(words(line))]
    return quote("lex line keeps no key word of the query", astray)


def find_without_entity(kind: str, lines: Sequence[str], entities: set[str]) -> list[str]:
    astray = [line for line in lines if not keeps_entity(line, entities)]
    return quote(f"{kind} line keeps none of {', '.join(sorted(entities))}", astray)


def find_filler(lex: Sequence[str], query: str) -> list[str]:
    unasked = FILLERS - words(query)
    padded = [line for line in lex if not unasked.isdisjoint(words(line))]
    return quote("lex line has filler the query does not ask for", padded)


def find_generic(lex: Sequence[str]) -> list[str]:
    return quote("lex line is only a stock phrase", [line for line in lex if is_generic(line)])


def find_unnatural(vec: Sequence[str]) -> list[str]:
    short = [line for line in vec if " " not in line or len(line) <= 15]
    return quote("vec line is too short for a sentence", short)


def grade(faults: Sequence[str], lines: Sequence[str], every: int, some: int, none: int) -> int:
    """Points by how many of the lines, at least one, are free of a fault."""
    return every if not faults else some if len(faults) < len(lines) else none


def score_format(lex: list[str], vec: list[str]) -> Part:
    faults = [f"no {kind} line" for kind, lines in (("lex", lex), ("vec", vec)) if not lines]
    return 30 - 10 * len(faults), faults


def score_diversity(query: str, lex: list[str], vec: list[str]) -> Part:
    same_lex, same_vec = find_similar("lex", lex, query), find_similar("vec", vec, query)
    echo_lex, echo_vec = find_echoes("lex", lex, query), find_echoes("vec", vec, query)
    points = (10 if lex and vec else 0) + (5 if len(lex) + len(vec) >= 2 else 0)
    points += max(0, 5 - 2 * len(same_lex)) + max(0, 5 - 2 * len(same_vec))
    points += max(-10, 5 - 10 * len(echo_lex) - 3 * len(echo_vec))
    return points, same_lex + same_vec + echo_lex + echo_vec


def score_hyde(hyde: list[str]) -> Part:
    """Only the first hyde line counts."""
    if not hyde:
        return 0, []
    passage = hyde[0]
    points = 10  # 5 for the line, 5 for no newline in it: a parsed line never has one
    faults = []
    if 50 <= len(passage) <= 200:
        points += 5
    else:
        points += 2 if len(passage) < 50 else 0
        faults.append(f"hyde has {len(passage)} characters: 50-200 wanted")
    repetition = 0
    for word, count in Counter(LONG_WORD.findall(passage.lower())).items():
        if count >= 3 and word not in STOP_WORDS:
            repetition += 2 * (count - 2)
            faults.append(f'hyde says "{word}" {count} times')
    return points + max(0, 5 - repetition), faults


def score_quality(query: str, lex: list[str], vec: list[str]) -> Part:
    points = 5
    faults = []
    if lex and vec:
        lex_mean, vec_mean = (sum(map(len, lines)) / len(lines) for lines in (lex, vec))
        if lex_mean <= vec_mean:
            points += 5
        else:
            faults.append("lex lines are longer than vec lines on average")
    if vec:
        unnatural = find_unnatural(vec)
        points += 2 if unnatural else 5
        faults += unnatural
    if lex:
        astray, filler = find_without_key_term(lex, query), find_filler(lex, query)
        points += grade(astray, lex, every=5, some=2, none=0) - 3 * len(filler)
        faults += astray + filler
        if any('"' in line for line in lex) and len(query.split()) >= 2:
            points += 3
    return points, faults


def score_entity(entities: set[str], lex: list[str], vec: list[str]) -> Part:
    """May be negative: the total takes it as it is."""
    if not entities:
        return 10, []
    if not lex:
        return 0, ["no lex line to keep the query's entities"]
    astray, generic = find_without_entity("lex", lex, entities), find_generic(lex)
    everything = " ".join(lex + vec).lower()
    lost = [entity for entity in sorted(entities) if entity not in everything]
    missing = quote("entity is in no lex or vec line", lost)
    points = grade(astray, lex, every=15, some=5, none=-30)
    points -= 20 * len(missing) + 15 * len(generic)
    faults = astray + missing + generic
    if any(keeps_entity(line, entities) for line in vec):
        points += 5
    else:
        faults.append("no vec line keeps an entity of the query")
    return points, faults


def score_only_format(kind: str, parsed: dict[str, list[str]]) -> Part:
    faults = []
    for other, lines in parsed.items():
        if other != kind:
            faults += quote(f"{other} line where only {kind} is asked for", lines)
    return max(0, 30 - 10 * len(faults)), faults


def score_only_diversity(query: str, kind: str, lines: list[str]) -> Part:
    same, echo = find_similar(kind, lines, query), find_echoes(kind, lines, query)
    points = 30 - 5 * len(same)
    if len(lines) == 1:
        points, same = 15, [f"only one {kind} line: a second one would add points"]
    return max(0, points - 5 * len(echo)), same + echo


def score_only_quality(query: str, kind: str, lines: list[str]) -> Part:
    if kind == "lex":
        astray, generic = find_without_key_term(lines, query), find_generic(lines)
        filler = find_filler(lines, query)
        points = 10 + (0 if astray else 5) + (0 if generic else 5) - 3 * len(filler)
        return points, astray + generic + filler
    if kind == "vec":
        unnatural = find_unnatural(lines)
        return 15 if unnatural else 20, unnatural
    length = len(lines[0])
    if 50 <= length <= 200:
        return 20, []
    fault = f"hyde has {length} characters: 50-200 wanted"
    return 15 if 30 <= length <= 300 else 10, [fault]


def score_only_entity(entities: set[str], kind: str, lines: list[str]) -> Part:
    if not entities:
        return 10, []
    astray = find_without_entity(kind, lines, entities)
    return grade(astray, lines, every=20, some=15, none=0), astray


def score_expansion_detailed(query: str, expansion: str) -> dict:
    """Score one expansion: every part, and in words every fault that cost something.

    Keys: those of PARTS, `total`, `max_possible`, `percentage` (0-100), `rating`, `deductions`,
    `parsed`, `entities_detected`, `only_mode`.
    """
    base, kind = only_mode(query)
    text, thinking = clean_expansion(expansion)
    parsed = parse_expansion(text)
    fatal = [f"chat marker in the text: {marker!r}" for marker in CHAT_MARKERS if marker in text]
    fatal += [f'line without lex:, vec: or hyde: "{line}"' for line in parsed["invalid"]]
    if fatal:
        parsed = parse_expansion(expansion)
    elif kind and not parsed[kind]:
        fatal = [f"no {kind} line, and only {kind} is asked for"]

    entities = set() if fatal else extract_named_entities(base)
    lex, vec, hyde = parsed["lex"], parsed["vec"], parsed["hyde"]
    think = (0, ["think block in the output"]) if thinking else (20, [])
    if fatal:
        max_possible = 100
        parts = {"format": (0, fatal)}
    elif kind:
        max_possible = 120
        parts = {
            "format": score_only_format(kind, parsed),
            "diversity": score_only_diversity(base, kind, parsed[kind]),
            "quality": score_only_quality(base, kind, parsed[kind]),
            "entity": score_only_entity(entities, kind, parsed[kind]),
            "think_bonus": think,
        }
    else:
        max_possible = 140 if hyde else 120
        parts = {
            "format": score_format(lex, vec),
            "diversity": score_diversity(query, lex, vec),
            "hyde": score_hyde(hyde),
            "quality": score_quality(query, lex, vec),
            "entity": score_entity(entities, lex, vec),
            "think_bonus": think,
        }

    points = dict.fromkeys(PARTS, 0) | {part: earned for part, (earned, _) in parts.items()}
    deductions = [fault for _, faults in parts.values() for fault in faults]
    total = max(0, sum(points.values()))
    percentage = min(100.0, total / max_possible * 100)
    if percentage > 50 and not kind and any(echoes(line, query) for line in lex):
        percentage = 50.0
        deductions.append("percentage held at 50: a lex line repeats the query")
    return points | {
        "entity": max(0, points["entity"]),
        "total": total,
        "max_possible": max_possible,
        "percentage": round(percentage, 1),
        "rating": next((name for least, name in RATINGS if percentage >= least), "Failed"),
        "deductions": deductions,
        "parsed": parsed,
        "entities_detected": sorted(entities),
        "only_mode": kind,
    }


def score_expansion(query: str, expansion: str) -> float:
    """total / max_possible in [0, 1]. The echo cap of `percentage` does not touch it."""
    result = score_expansion_detailed(query, expansion)
    return min(1.0, result["total"] / result["max_possible"])


def text_of(value: str | list[dict]) -> str:
    """A string as it is; of chat messages, the content of the last one."""
    is_chat = isinstance(value, list) and value and isinstance(value[-1], dict)
    text = value[-1].get("content") if is_chat else value
    if not isinstance(text, str):
        raise ValueError(f"expected text or chat messages with text, found {value!r:.80}")
    return text


def query_of_prompt(prompt: str | list[dict]) -> str:
    """The query in a rendered prompt, in chat messages, or in a prompt that is the query itself."""
    # Scoring needs this file alone; only reading a prompt needs to know how prompts are written.
    from expander.prompt import IM_END, IM_START, query_of

    turn = text_of(prompt).rpartition(f"{IM_START}user\n")[2].partition(IM_END)[0].strip()
    query = query_of(turn)
    # A prompt may carry the row's intent on a second line; it is no part of the query.
    return turn if query is None else query.partition("\nQuery intent:")[0].strip()


class QMDRewardFunction:
    """`score_expansion` as a reward function for TRL's GRPOTrainer, which logs it by `__name__`."""

    __name__ = "qmd_reward"

    def __call__(self, completions, prompts=None, **kwargs) -> list[float]:
        """One reward in [0, 1] a completion; completions and prompts are strings or chat messages.

        The queries are the data set's column `query` or `queries` if TRL hands one over, else they
        are read from the prompts; with neither they are empty, and little but the form is scored.
        Raises ValueError when the numbers differ or an entry holds no text.
        """
        queries = kwargs.get("query", kwargs.get("queries"))
        if queries is None:
            queries = [""] * len(completions) if prompts is None else prompts
            queries = [query_of_prompt(prompt) for prompt in queries]
        if len(queries) != len(completions):
            raise ValueError(f"{len(completions)} completions but {len(queries)} queries")
        return list(map(score_expansion, queries, map(text_of, completions)))


SELF_TEST_KEYS = (*PARTS, "total", "max_possible", "percentage", "rating")
SELF_TEST = (  # name, query, expansion, worked by hand: the figures of SELF_TEST_KEYS
    ("no fault", "auth config",
     "hyde: Set the auth provider and the signing key in config.yaml, then restart the server.\n"
     "lex: auth settings file\nlex: login config options\n"
     "vec: how to configure user authentication\nvec: where are the sign-in settings stored",
     (30, 30, 20, 20, 10, 20, 130, 140, 92.9, "Excellent")),
    ("echo, short lines, think block", "auth config",
     "<think>hm</think>hyde: code code code\nlex: auth config\nlex: auth config setup guide\nvec: auth",
     (30, 18, 15, 12, 10, 0, 85, 140, 50.0, "Acceptable")),
    ("entities lost", "Configure AWS Lambda timeouts",
     "lex: AWS Lambda limits\nlex: search for\nvec: how to raise the execution limit of a function",
     (30, 30, 0, 17, 0, 20, 67, 120, 55.8, "Acceptable")),
    ("no vec line, filler, quotes", "fix DNS", 'lex: DNS "server failure" overview',
     (20, 15, 0, 10, 15, 20, 80, 120, 66.7, "Good")),
    ("a line without prefix", "auth config", "Sure!\nlex: auth settings",
     (0, 0, 0, 0, 0, 0, 0, 100, 0.0, "Failed")),
    ("only lex", "auth config /only:lex", "lex: auth keys\nlex: auth keys\nvec: how to sign in",
     (20, 25, 0, 20, 10, 20, 95, 120, 79.2, "Good")),
    ("only vec", "auth config /only:vec", "vec: where the sign-in settings are\nvec: auth",
     (30, 30, 0, 15, 10, 20, 105, 120, 87.5, "Excellent")),
    ("only hyde", "Redis eviction /only:hyde", "hyde: Least recently used keys go first.",
     (30, 15, 0, 15, 0, 20, 80, 120, 66.7, "Good")),
    ("only hyde, none given", "auth config /only:hyde", "lex: auth settings",
     (0, 0, 0, 0, 0, 0, 0, 100, 0.0, "Failed")),
)  # fmt: skip


def self_test() -> list[str]:
    """Score the hand-worked cases: one line for each figure that differs."""
    differences = []
    for name, query, expansion, figures in SELF_TEST:
        result = score_expansion_detailed(query, expansion)
        for key, expected in zip(SELF_TEST_KEYS, figures, strict=True):
            if result[key] != expected:
                differences.append(f"{name}: {key} is {result[key]}, expected {expected}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an expansion, or test the rubric itself.")
    parser.add_argument("--query", help="the query that was expanded, with its /only: suffix")
    parser.add_argument("file", nargs="?", help="the expansion as UTF-8 text; - reads stdin")
    args = parser.parse_args()
    if (args.query is None) != (args.file is None):
        parser.error("--query and a file go together; give neither for the self-test")
    if args.query is None:
        differences = self_test()
        print(f"self-test: {len(SELF_TEST)} cases, {len(differences)} figures differ")
        sys.exit("\n".join(differences) or None)
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        result = score_expansion_detailed(args.query, data.decode())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read the expansion: {error}")
    for key in SELF_TEST_KEYS:
        print(f"{key:13}{result[key]}")
    for deduction in result["deductions"]:
        print(f"- {deduction}")


if __name__ == "__main__":
    main()
