from __future__ import annotations

from pathlib import Path

import torch

from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.evaluation.continuations import NEW_TOKENS, continuations, prompts_for
from spinecli.evaluation.models import load_model, open_subjects
from spinecli.evaluation.session import open_session


def test_a_continuation_is_what_greedy_generation_writes() -> None:
    (subject,) = open_subjects([("builtin:tiny", None)])
    model, tokenizer = load_model(subject, device="cpu", dtype="float32"), subject.tokenizer
    prompts = prompts_for(subject)
    found = continuations(subject, model, prompts)
    assert [each.prompt for each in found] == list(prompts)
    for each in found:
        ids = torch.tensor([tokenizer(each.prompt)["input_ids"]])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        assert each.text
        assert tokenizer.decode(whole[0], skip_special_tokens=True) == f"{each.prompt} {each.text}".replace(" .", ".")


def test_loaded_models_are_asked_the_same_and_say_it_again(dense: Path, thinner: Path) -> None:
    generation = GenerationConfig(prompt_length=8, new_tokens=2, repeats=1)
    config = EvaluateConfig(model=str(thinner), against=(str(dense),), latency=True, generation=generation)
    one, two = (open_session(config).measure() for _ in range(2))
    (subject,) = open_subjects([(str(dense), None)])
    said = [model.continuations for model in one.models]
    assert said == [model.continuations for model in two.models]
    assert [[each.prompt for each in answers] for answers in said] == [list(prompts_for(subject))] * 2


def test_without_a_tokenizer_nothing_is_said(dense: Path, tmp_path: Path) -> None:
    for file in dense.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (subject,) = open_subjects([(str(tmp_path), None)])
    assert continuations(subject, load_model(subject, device="cpu", dtype="float32"), ("x",)) == ()
