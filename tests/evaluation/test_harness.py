"""The harness's three requests against the plain forward and greedy decoding; and a task of the harness itself."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny_evaluation import BOS, EOS, greedy_alone, log_probs_alone, scorer

from lightning_jax.errors import UserError
from lightning_jax.evaluation import TextModel, load_tasks, run_task
from lightning_jax.evaluation.harness import _as_harness_model, problems_of_tasks
from lightning_jax.input_pipeline.chat_template import ChatTemplate

PLAIN = {"num_fewshot": None, "limit": None, "system": None}
GREEDY = {"do_sample": False, "temperature": 0.0}


TEMPLATE = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"


def model(context_length=64, chat_template=None):
    return TextModel(scorer(), context_length, chat_template)


@pytest.fixture
def chat_model():
    with ChatTemplate(TEMPLATE) as template:
        yield model(chat_template=template)


def greedy(text, tokens):
    return greedy_alone([BOS, *text.encode()], tokens)


def decoded(ids):
    return bytes(token for token in ids if token < 256).decode(errors="replace").rstrip("\ufffd")


def test_log_likelihoods_are_those_of_a_plain_forward():
    pairs = [("alpha", " beta"), ("alpha ", "beta"), ("", "alpha"), ("a", "é"), ("the cat sat on the", " mat")]
    for (context, continuation), (value, is_greedy) in zip(pairs, model().log_likelihoods(pairs), strict=True):
        ids = [BOS, *(context + continuation).encode()]
        log_probs, likeliest = log_probs_alone(ids, 1 + len(context.rstrip().encode()))
        assert value == pytest.approx(log_probs.sum(dtype=np.float64), abs=1e-4)
        assert is_greedy == likeliest.all()


def test_the_greedy_flag_is_set_for_the_greedy_continuation():
    contexts = ["alpha", "beta", "gamma delta", "epsilon", "zeta", "eta", "theta"]
    texts = [(context, bytes(ids).decode("ascii")) for context in contexts if max(ids := greedy(context, 2)) < 128]
    assert texts, "no context has a greedy continuation that is text; choose others"
    assert all(is_greedy for _, is_greedy in model().log_likelihoods(texts))
    assert not any(is_greedy for _, is_greedy in model().log_likelihoods([(a, b + "!?") for a, b in texts]))


def test_a_context_that_is_too_long_loses_its_beginning():
    context = "one two three four five six seven"
    ((value, _),) = model(16).log_likelihoods([(context, " eight")])
    ids = [*(context + " eight").encode()][-17:]
    assert value == pytest.approx(log_probs_alone(ids, 17 - 6)[0].sum(dtype=np.float64), abs=1e-4)
    with pytest.raises(UserError, match="a continuation of 17 tokens cannot be scored in a context of 16"):
        model(16).log_likelihoods([("a", " " + 16 * "b")])


def test_rolling_windows_are_the_harness_s():
    texts = ["short", "one two three four five six seven eight", "exactly sixteen!"]
    for text, value in zip(texts, model(16).rolling_log_likelihoods(texts), strict=True):
        ids, expected = [BOS, *text.encode()], 0.0
        for first in range(1, len(ids), 16):
            end = min(first + 16, len(ids))
            begin = max(end - 17, 0)
            expected += log_probs_alone(ids[begin:end], first - begin)[0].sum(dtype=np.float64)
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_generation_ends_at_until_at_eos_and_at_its_length():
    contexts = ["alpha", "the cat sat on the", "b"]
    whole = [decoded(greedy(context, 6)) for context in contexts]
    settings = GREEDY | {"max_gen_toks": 6}
    assert model().generate_until([(context, settings) for context in contexts]) == whole
    stops = [text[1] for text in whole]
    requests = [(context, settings | {"until": [stop]}) for context, stop in zip(contexts, stops, strict=True)]
    expected = [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert model().generate_until(requests) == expected
    assert model().generate_until([(contexts[0], settings | {"until": stops[0]})]) == expected[:1]


def test_a_prompt_is_cut_at_the_left_to_leave_room():
    text = "one two three four five six seven"
    (generated,) = model(24).generate_until([(text, GREEDY | {"max_gen_toks": 4})])
    ids = [*text.encode()][-20:]
    assert generated == decoded(greedy_alone(ids, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no room for a prompt in a context of 64 tokens"),
        ({"beams": 4}, "generation_kwargs: beams: not known"),
        ({"do_sample": True, "top_p": 2.0}, "generation_kwargs: top_p: 2.0 is no share"),
    ],
)
def test_settings_that_cannot_be_have_their_line(settings, message):
    with pytest.raises(UserError, match=message):
        model().generate_until([("a", {"max_gen_toks": 4} | settings)])


def test_sampling_is_asked_for_by_a_temperature():
    sampling = model()._sampling
    assert sampling({"until": ["\n"]}).temperature == 0
    assert sampling({"temperature": 0.5}).temperature == 0.5
    assert sampling({"do_sample": True}).temperature == 1
    assert sampling({"do_sample": False, "temperature": 0.5}).temperature == 0
    assert sampling({}).stop_ids == (EOS,)
    assert sampling({"max_new_tokens": 7}).max_new_tokens == 7


def test_a_chat_is_a_context_whose_special_tokens_are_the_templates_alone(chat_model):
    messages = [{"role": "user", "content": "a</s>b"}]
    context = chat_model.render_chat(messages, add_generation_prompt=True)
    ((value, _),) = chat_model.log_likelihoods([(context, "c</s>")])
    # No second bos; the space before the answer is the answer's, as the harness splits them.
    ids = [BOS, *b"[a</s>b]<a> c</s>"]
    expected, _ = log_probs_alone(ids, ids.index(ord(" ")))
    assert value == pytest.approx(expected.sum(dtype=np.float64), abs=1e-4)
    messages.append({"role": "assistant", "content": "It is"})
    assert chat_model.render_chat(messages[1:], add_generation_prompt=False) == "<s>[It is"


@pytest.fixture
def harness(monkeypatch):
    """What the harness has of our side, without the harness: the class that models inherit from."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_the_harness_s_requests_reach_the_model(harness, chat_model):
    asked, chat = _as_harness_model(model()), _as_harness_model(chat_model)

    def requests(*arguments):
        return [SimpleNamespace(args=each) for each in arguments]

    pair = ("alpha", " beta")
    assert asked.loglikelihood(requests(pair)) == model().log_likelihoods([pair])
    assert asked.loglikelihood_rolling(requests(("alpha",))) == model().rolling_log_likelihoods(["alpha"])
    messages = [{"role": "user", "content": "hi"}]
    assert chat.apply_chat_template(messages) == "<s>[hi]<a> "
    assert chat.apply_chat_template(messages, add_generation_prompt=False) == "<s>[hi"
    assert (asked.chat_template(), chat.chat_template(True)) == ("", TEMPLATE)
    assert asked.tokenizer_name != chat.tokenizer_name


QUESTIONS = [
    {"question": "alpha", "choices": ["one", "two", "three"], "gold": 1},
    {"question": "beta", "choices": ["four", "five", "six"], "gold": 0},
]
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]
""",
    "generated": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def task_files(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = []
    for kind, task in KINDS.items():
        head = f"task: toy_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'data.jsonl'}}}\n"
        files.append(tmp_path / f"{kind}.yaml")
        files[-1].write_text(head + "test_split: train" + task)
    return list(map(str, files))


@pytest.mark.slow
def test_tasks_of_the_harness_run_from_local_files(task_files):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    results = {}
    for objects in load_tasks(task_files).values():
        results |= run_task(model(), objects, **PLAIN)["results"]
    right = 0
    for each in QUESTIONS:
        sums = [
            log_probs_alone([BOS, *f"{each['question']} {choice}".encode()], 1 + len(each["question"]))[0].sum()
            for choice in each["choices"]
        ]
        right += np.argmax(sums) == each["gold"]
    assert results["toy_choices"]["acc,none"] == right / 2
    assert results["toy_generated"]["exact_match,none"] == 0
    nats = -sum(log_probs_alone([BOS, *each["question"].encode()], 1)[0].sum(dtype=np.float64) for each in QUESTIONS)
    assert results["toy_rolling"]["bits_per_byte,none"] == pytest.approx(nats / 9 / np.log(2), rel=1e-5)


@pytest.mark.slow
def test_the_harness_asks_in_chats(task_files, chat_model, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    contexts = []
    whole = TextModel.log_likelihoods
    monkeypatch.setattr(TextModel, "log_likelihoods", lambda self, pairs: contexts.extend(pairs) or whole(self, pairs))
    (objects,) = load_tasks(task_files[:1]).values()
    run_task(chat_model, objects, num_fewshot=1, limit=None, system="Be brief.")
    assert contexts[0] == ("<s>[Be brief.][beta][four][alpha]<a> ", "one")
    assert len(contexts) == 6


def test_a_task_that_does_not_fit_its_data_has_its_line(task_files, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    path = tmp_path / "choices.yaml"
    # The harness tries the first question when it loads the task.
    path.write_text(path.read_text().replace("{{question}}", "{{ 1 // gold }}"))
    (objects,) = load_tasks([str(path)]).values()
    with pytest.raises(UserError) as error:
        run_task(model(), objects, **PLAIN)
    (line,) = str(error.value).splitlines()
    assert line.startswith("toy_choices: the harness cannot run it: ")


def test_a_task_that_the_harness_cannot_load_has_its_line(task_files, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: [\n")
    assert problems_of_tasks([*task_files, "missing.yaml"]) == ["missing.yaml: there is no such file"]
    with pytest.raises(UserError) as error:
        load_tasks([str(tmp_path / "broken.yaml")])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'broken.yaml'}: the harness cannot load it: ")


def test_without_the_harness_its_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems_of_tasks(["a.yaml", "arc_easy"]) == [
        "a.yaml, arc_easy: tasks of lm-evaluation-harness need it: pip install lm_eval"
    ]
    assert problems_of_tasks([]) == []
