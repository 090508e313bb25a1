"""Generated ids, compared with transformers' ``generate`` on the same model."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_llmjp.generation.settings import GenerationSettings
from tests.support.forks import warm_context

PROMPTS = [[5, 9, 13], [7], [3, 8, 22, 41, 9, 77, 2], [50] * 61]
"""Of different lengths; the last one fills the model's 64 positions, with 3 more."""
NEW = 12
VOCABULARY = 101


def generate_all(cases: list[tuple[str, list[dict[str, Any]]]]) -> list[list[list[list[int]]]]:
    """Generate with each model and each case in this process, which megatron-core changes."""
    from megatron_llmjp.generation.checkpoints import find_native_checkpoint
    from megatron_llmjp.generation.decoding import generate_tokens
    from megatron_llmjp.generation.prompts import AllowedIds
    from megatron_llmjp.inference.native_model import load_native_model

    def generate(model: Any, case: dict[str, Any]) -> list[list[int]]:
        allowed = AllowedIds(frozenset(case.get("end", ())), case.get("vocabulary", VOCABULARY))
        settings = GenerationSettings(NEW, **case.get("settings", {}))
        prompts = case["prompts"]
        seeds = case.get("seeds", [0] * len(prompts))
        cached = case.get("use_cache", True)
        steps = generate_tokens(model, prompts, settings, allowed, seeds, cached)
        return [[i for i in row if i is not None] for row in zip(*steps, strict=True)]

    found = []
    before = torch.get_rng_state()
    for folder, runs in cases:
        model = load_native_model(find_native_checkpoint(Path(folder)))
        found.append([generate(model, case) for case in runs])
    assert torch.equal(torch.get_rng_state(), before)  # the user's random numbers
    return found


SAMPLED = {"settings": {"do_sample": True, "temperature": 2.0, "top_k": 20}}
CASES: list[dict[str, Any]] = [
    {"prompts": PROMPTS},
    {"prompts": PROMPTS, "use_cache": False},
    {"prompts": PROMPTS[:3], "vocabulary": 40, "settings": {"repetition_penalty": 1.5}},
    {"prompts": PROMPTS[:3], **SAMPLED, "seeds": [1, 2, 3]},
    {"prompts": PROMPTS[2:3], **SAMPLED, "seeds": [3]},
]


@pytest.fixture(scope="module")
def generated(checkpoints):
    """The ids of all models and cases, from one process."""
    cases = [(str(folder / "native"), CASES) for folder in checkpoints.values()]
    with ProcessPoolExecutor(1, mp_context=warm_context()) as pool:
        found = pool.submit(generate_all, cases).result()
    return dict(zip(checkpoints, found, strict=True))


def transformers_generate(folder: Path, prompts: list[list[int]], **options: Any) -> Any:
    """Return the ids that transformers generates, without the prompts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    length = max(map(len, prompts))
    padded = [[0] * (length - len(ids)) + ids for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    ids = model.generate(
        torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=False, **options
    )
    return ids[:, length:].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_greedy_ids_are_those_of_transformers(name, checkpoints, generated):
    batch, without_cache, penalized, _, _ = generated[name]
    hf = checkpoints[name] / "hf"
    expected = transformers_generate(hf, PROMPTS[:3])
    assert len({tuple(ids) for ids in expected}) == 3  # else the test shows little
    long = transformers_generate(hf, PROMPTS[3:], max_new_tokens=3)
    assert batch == without_cache == expected + long
    assert penalized == transformers_generate(
        hf, PROMPTS[:3], repetition_penalty=1.5, suppress_tokens=list(range(40, VOCABULARY))
    )


def test_a_text_ends_at_the_end_of_document(checkpoints):
    hf, native = (str(checkpoints["llama"] / name) for name in ("hf", "native"))
    first = transformers_generate(Path(hf), PROMPTS[:3])
    end = first[0][3]
    with ProcessPoolExecutor(1, mp_context=warm_context()) as pool:
        cases = [(native, [{"prompts": PROMPTS[:3], "end": [end]}])]
        ((found,),) = pool.submit(generate_all, cases).result()
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in first]
    assert found == expected
    assert len(found[0]) < len(found[2])


def test_random_numbers_do_not_depend_on_the_batch(generated):
    for _, _, _, together, alone in generated.values():
        assert together[2:] == alone
        assert together[0] != together[1]
