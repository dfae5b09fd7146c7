"""Measure expansions scored per second of CPU time: python -m tests.bench.reward_speed"""

import time

from reward import SELF_TEST, score_expansion

CASES = 9_000
ROUNDS = 5


def numbered(text: str, number: int) -> str:
    """Append the number to every line, so that no line is repeated."""
    return "\n".join(f"{line} {number}" for line in text.split("\n"))


def main() -> None:
    rates = []
    for round_number in range(ROUNDS):
        cases = [
            (query, numbered(expansion, round_number * CASES + number))
            for number in range(CASES // len(SELF_TEST))
            for _, query, expansion, _ in SELF_TEST
        ]
        start = time.process_time()
        for query, expansion in cases:
            score_expansion(query, expansion)
        rates.append(len(cases) / (time.process_time() - start))
    print(
        f"{min(rates):,.0f} to {max(rates):,.0f} expansions per second, {ROUNDS} rounds of {CASES}"
    )


if __name__ == "__main__":
    main()
