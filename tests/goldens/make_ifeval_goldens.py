"""Writes ifeval.json: texts and what lm-evaluation-harness says of them, for each constraint of IFEval.

    python tests/goldens/make_ifeval_goldens.py --data=input_data.jsonl

Run where lm_eval 0.4.13, langdetect and nltk's punkt_tab are installed; `input_data.jsonl` has IFEval's 541 prompts
(google-research/instruction_following_eval). For each prompt texts are made that meet its constraints or narrowly do
not. The command prints how often ours and theirs agree, and keeps a few short texts of each constraint.
"""

import argparse
import json
import logging
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import langdetect
from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

from lightning_jax.rewards.ifeval import CONSTRAINTS, follows

GOLDEN = Path(__file__).with_name("ifeval.json")
TEXTS_PER_PROMPT, CASES = 12, 5  # cases kept of each constraint and verdict
SENTENCES = (
    "The river runs past the old mill.",
    "Mr. Lopez said it was late!",
    "Why should we wait, then?",
    "It costs 3.50 dollars, i.e. almost nothing.",
    "NASA and the BBC agree on this point.",
    "She came at 5 p.m. and left.",
    "Nobody knows (or cares) what happened.",
    '"Come in," he said.',
    "DON'T panic: it is only a test.",
    "They sell apples... and pears.",
    "A well-known X-RAY image of 1895.",
    "Dr. Wu lives in the U.S. today.",
    "We left early because of the rain",
    "Bring warm clothes - the nights are cold.",
)
OTHER_LANGUAGES = (
    "Der Zug nach Hamburg fährt heute leider erst am späten Abend.",
    "Le chat dort sur la chaise près de la fenêtre ouverte.",
    "Мы живём в большом городе на берегу реки.",
    "یہ ایک خوبصورت دن ہے اور ہم باہر جا رہے ہیں۔",
    "Ang mga bata ay naglalaro sa labas ng bahay.",
    "今日はとても良い天気なので散歩に行きます。",
    "12345",
)


def base(rng: random.Random) -> str:
    separator = rng.choice([" ", " ", "\n", "\n\n"])
    return separator.join(rng.choices(SENTENCES, k=rng.randint(1, 8)))


def aimed(text: str, constraint: str, given: dict[str, Any], rng: random.Random) -> str:
    """The text changed so that it meets the constraint, or misses it by little."""
    near = rng.choice([-1, 0, 0, 1])
    count = max(0, next((value for name, value in given.items() if isinstance(value, int)), 0) + near)
    match constraint.partition(":")[2]:
        case "existence":
            return f"{text} {' '.join(given['keywords'][: len(given['keywords']) + min(0, near)])}"
        case "frequency":
            return text + f" {given['keyword']}" * count
        case "forbidden_words":
            return text if near == 0 else f"{text} {given['forbidden_words'][0]}{rng.choice(['', 's', '.'])}"
        case "letter_frequency":
            given["letter"] = given["letter"] if given["letter"].isalpha() else "a"  # they take any letter for others
            others = text.translate({ord(given["letter"]): None, ord(given["letter"].upper()): None})
            return others + " " + given["letter"] * count
        case "response_language":
            return rng.choice([*OTHER_LANGUAGES, text])
        case "number_sentences":
            return " ".join(rng.choices(SENTENCES, k=max(1, count)))
        case "number_paragraphs":
            return rng.choice(["\n***\n", " *** ", "***"]).join([text] * max(1, count)) + rng.choice(
                ["", "\n***", "***"]
            )
        case "number_words":
            return " ".join(rng.choices(["one", "two-three", "4", "it's"], k=max(1, count)))
        case "nth_paragraph_first_word":
            paragraphs = [text.replace("\n\n", " ")] * max(1, given["num_paragraphs"] + near)
            place = min(given["nth_paragraph"], len(paragraphs)) - 1
            paragraphs[place] = rng.choice(['"', "", "'"]) + given["first_word"] + rng.choice([", ", " ", ". "]) + "so"
            return rng.choice(["\n\n", "\n\n", "\n\n\n\n"]).join(paragraphs)
        case "number_placeholders":
            return text + " [a place]" * count
        case "postscript":
            return text + rng.choice(
                [f"\n{given['postscript_marker']} More.", "\nP. P. S. more", "\np.s. more", "\nPS more"]
            )
        case "number_bullet_lists":
            return rng.choice([text + "\n", ""]) + rng.choice(["* one\n", "- two\n", " * three\n", "** four\n"]) * count
        case "constrained_response":
            return rng.choice(["My answer is yes.", " My answer is no. ", "my answer is maybe.", "My answer is maybe"])
        case "number_highlighted_sections":
            return text + rng.choice([" *part*", " **part**", " * *", "\n*a\nb*"]) * count
        case "multiple_sections":
            sections = range(1, count + 1)
            return "\n".join(f"{given['section_spliter']}{rng.choice([' ', ''])}{i}\n{text}" for i in sections)
        case "json_format":
            return rng.choice(
                ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]```", "{'a': 1}", f'Here: "{text}"', "12"]
            )
        case "title":
            return rng.choice([f"<<A title>>\n{text}", f"<<>>{text}", f"<< >>{text}", f"<A title>\n{text}"])
        case "two_responses":
            return rng.choice(
                [f"{text}******other", f"{text}******{text}", f"******{text}******b", f"{text}***b", "a******"]
            )
        case "repeat_prompt":
            return rng.choice(["", " ", "So: "]) + given["prompt_to_repeat"] + "\n" + text
        case "end_checker":
            return text + " " + rng.choice(["", "x "]) + given["end_phrase"] + rng.choice(["", '"', " ", "."])
        case "quotation":
            return rng.choice([f'"{text}"', f' "{text}" ', f'"{text}', '"', f"“{text}”"])
        case "capital_word_frequency":
            return (
                text + " " + " ".join(rng.choices(["NASA", "I", "A-B", "U.S.", "IT'S", "Ok", "(BBC)", "X2"], k=count))
            )
        case "english_capital":
            return rng.choice([text.upper(), text.upper(), text])
        case "english_lowercase":
            return rng.choice([text.lower(), text.lower(), text])
        case "no_comma":
            return rng.choice([text.replace(",", ""), text])
    raise ValueError(constraint)


def theirs(text: str, constraint: str, given: dict[str, Any]) -> bool:
    instruction = INSTRUCTION_DICT[constraint](constraint)
    instruction.build_description(**given)
    return bool(text.strip() and instruction.check_following(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    langdetect.DetectorFactory.seed = 0
    logging.disable(logging.ERROR)  # of each text without a language
    rng = random.Random(0)
    agreed, all_cases = defaultdict(lambda: [0, 0]), defaultdict(dict)
    assert set(CONSTRAINTS) == set(INSTRUCTION_DICT)
    for line in parser.parse_args().data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        for _ in range(TEXTS_PER_PROMPT):
            text = base(rng)
            for constraint, given in rng.sample(pairs, len(pairs)):
                text = aimed(text, constraint, given, rng)
            for constraint, given in pairs:
                expected, ours = theirs(text, constraint, given), follows(text, constraint, given)
                agreed[constraint][0] += expected == ours
                agreed[constraint][1] += 1
                if expected != ours and agreed[constraint][1] - agreed[constraint][0] <= 3:
                    print(f"theirs {expected}: {constraint} {given} {text!r}"[:600])
                if len(text) < 300 and any(map(str.isalpha, text)):  # what has no language is another matter
                    all_cases[constraint, expected][json.dumps([given, text])] = None
    for constraint, (same, total) in agreed.items():
        print(f"{constraint}: {same} of {total} agree")
    print(f"all: {sum(a for a, _ in agreed.values())} of {sum(b for _, b in agreed.values())}")
    golden = [
        [constraint, expected, *json.loads(case)]
        for (constraint, expected), cases in sorted(all_cases.items())
        for case in sorted(cases, key=len)[:: max(1, len(cases) // CASES)][:CASES]
    ]
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in golden)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
