"""lm-evaluation-harness on tasks that the test writes: chat with pictures, texts, likelihoods."""

import json
import shutil

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

QUESTIONS = [
    ("What is in this image?", "There is a red circle and a blue triangle on a white background."),
    ("How many shapes are there?", "There are two shapes."),
]
# Reads a picture as the tasks of lm-eval do, by a function beside the task.
UTILS = """\
from pathlib import Path

from PIL import Image


def pictures(doc):
    return [Image.open(Path(doc["picture"])).convert("RGB")]
"""
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
TASKS = {
    "greetings": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [EXACT],
    },
    "pictures": {
        "output_type": "generate_until",
        "doc_to_image": "!function utils.pictures",
        "doc_to_text": "<image>{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32, "temperature": 0},
        "metric_list": [EXACT],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "There is a red",
        "doc_to_choice": [" circle", " background", "zebra"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture
def tasks(tmp_path, request):
    """Folder with the three tasks and their data, for lm-eval's own index."""
    picture = request.config.rootpath.parents[1] / "examples" / "shapes.png"
    shutil.copy(picture, tmp_path / "shapes.png")
    (tmp_path / "utils").with_suffix(".py").write_text(UTILS)
    rows = [
        {"question": question, "answer": answer, "picture": str(tmp_path / "shapes.png")}
        for question, answer in QUESTIONS
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        splits = {"data_files": {"test": str(data)}}
        of_all = {"task": name, "dataset_path": "json", "dataset_kwargs": splits}
        whole = of_all | {"test_split": "test", "fewshot_split": "test"} | task
        text = yaml.safe_dump(whole, sort_keys=False)
        # A tag, which a text in quotes is not.
        text = text.replace("'!function utils.pictures'", "!function utils.pictures")
        (tmp_path / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(tasks, name, kind, url, model, **options):
    route = "chat/completions" if "chat" in kind else "completions"
    place = {"base_url": f"{url}/v1/{route}", "model": model, "num_concurrent": 2}
    extra = options.pop("model_args", {})
    report = lm_eval.simple_evaluate(
        model=kind,
        model_args=place | {"max_retries": 1} | extra,
        tasks=[name],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return report["results"][name], report["samples"][name]


def test_pictures_are_asked_about_in_chat(tasks, url, model):
    kind = "local-chat-completions"
    results, samples = evaluated(tasks, "pictures", kind, url, model, apply_chat_template=True)
    answers = [sample["resps"][0][0] for sample in samples]
    assert answers == [answer for _, answer in QUESTIONS]
    assert results["exact_match,none"] == 1


@pytest.mark.parametrize("as_turns", [True, False])
def test_examples_are_turns_before_the_question(tasks, url, model, as_turns):
    more = {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": as_turns}
    kind = "local-chat-completions"
    _, samples = evaluated(tasks, "greetings", kind, url, model, **more)
    assert len(samples) == len(QUESTIONS)
    assert all(sample["resps"][0][0] for sample in samples)


def test_texts_are_continued(tasks, url, model, tokenizer):
    more = {"model_args": {"tokenizer": str(tokenizer), "tokenizer_backend": "huggingface"}}
    _, samples = evaluated(tasks, "greetings", "local-completions", url, model, **more)
    assert len(samples) == len(QUESTIONS)


@pytest.mark.parametrize("as_tokens", [True, False])
def test_likelihoods_choose_among_continuations(tasks, url, model, tokenizer, as_tokens):
    more = {"tokenizer": str(tokenizer), "tokenizer_backend": "huggingface"}
    more |= {"tokenized_requests": as_tokens, "batch_size": 2}
    kind = "local-completions"
    results, samples = evaluated(tasks, "choices", kind, url, model, model_args=more)
    assert results["acc,none"] == 1
    for sample in samples:
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert scores[0] == max(scores) < 0
