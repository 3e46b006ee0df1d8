"""Makes needles.json: long prompts for the demo model, and what transformers answers. See README.md.

python needles.py DEMO_MODEL_DIR OUT_DIR
"""

import copy
import json
import pathlib
import sys

import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

SEED = 20_250
NUM_QUESTIONS = 5  # answered by the context, from its beginning to its end
PREFILL_CHUNK = 2048
QUESTION_TOKENS_MAX = 12
ANSWER_TOKENS_MAX = 12
# Name, prompt length in tokens at most, facts, share of filler sentences with other names, numbers or random tokens.
CASES = [
    ("easy-8k", 8192, 16, 0.0),
    ("hard-8k", 8192, 24, 0.15),
    ("hard-32k", 32768, 24, 0.15),
]


def fitting_context(gen, prompt_tokens: int, num_facts: int, distractors: float):
    """The longest tried context whose text, tokenized again, leaves room for a question and its answer."""
    context_tokens = prompt_tokens
    while True:
        text, questions = context_and_questions(gen, context_tokens, num_facts, distractors)
        excess = len(gen.tok.encode(text).ids) + QUESTION_TOKENS_MAX + ANSWER_TOKENS_MAX - prompt_tokens
        if excess <= 0:
            return text, questions
        context_tokens -= excess


def context_and_questions(gen, context_tokens: int, num_facts: int, distractors: float):
    """Text, and [(question, expected answer, depth in 0..1)]; the last question's fact is absent."""
    sentences, _, facts, where, _ = gen.context(context_tokens, num_facts, p_dis=distractors)
    sentences[0] = sentences[0].copy()
    if sentences[0][0] == gen.t[" The"]:
        sentences[0][0] = gen.t["The"]
    text = decode(gen.tok, numpy.concatenate(sentences))
    by_depth = sorted(range(len(facts)), key=lambda fact: where[fact])
    asked = [by_depth[i] for i in numpy.linspace(0, len(facts) - 1, NUM_QUESTIONS).round().astype(int)]
    ends = numpy.cumsum([len(sentence) for sentence in sentences])
    questions = [
        (
            decode(gen.tok, gen.question(name, attribute)),
            decode(gen.tok, gen.answer(value)),
            float(ends[where[fact]] / ends[-1]),
        )
        for fact in asked
        for name, attribute, value in [facts[fact]]
    ]
    absent = next(name for name in range(len(gen.name)) if name not in {fact[0] for fact in facts})
    questions.append((decode(gen.tok, gen.question(absent, facts[0][1])), " unknown.<|eos|>", None))
    return text, questions


def decode(tokenizer, tokens) -> str:
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


@torch.no_grad()
def prefill(model, tokens: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        model(input_ids=torch.tensor([tokens[start : start + PREFILL_CHUNK]]), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def answer(model, cache: DynamicCache, tail: list[int]) -> tuple[list[int], float]:
    """Greedy tokens up to and including the end token, and the smallest gap between the top two logits."""
    tokens, gaps, inputs = [], [], torch.tensor([tail])
    while len(tokens) < ANSWER_TOKENS_MAX and (not tokens or tokens[-1] != model.config.eos_token_id):
        top = model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        inputs = top.indices[None, :1]
    return tokens, min(gaps)


def main():
    demo_model, out = map(pathlib.Path, sys.argv[1:])
    sys.path.insert(0, str(demo_model / "training"))
    from common import Gen, load_tok  # the generator of the demo model's training data

    transformers.logging.disable_progress_bar()
    tokenizer = load_tok(str(demo_model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, attn_implementation="sdpa").eval()
    gen = Gen(tokenizer, SEED)

    cases = []
    for name, prompt_tokens, num_facts, distractors in CASES:
        text, asked = fitting_context(gen, prompt_tokens, num_facts, distractors)
        context = tokenizer.encode(text + "\n").ids  # begins with bos
        cache = prefill(model, context)
        questions = []
        for question, expected, depth in asked:
            prompt = tokenizer.encode(text + "\n" + question).ids
            assert prompt[: len(context)] == context, "the question must begin at a token border"
            greedy, gap = answer(model, copy.deepcopy(cache), prompt[len(context) :])
            greedy_text = decode(tokenizer, greedy)
            assert greedy_text == expected, f"{name}: {question} {greedy_text!r}, expected {expected!r}"
            assert len(prompt) + len(greedy) <= model.config.max_position_embeddings
            questions.append(
                dict(
                    question=question,
                    depth=depth and round(depth, 4),
                    num_prompt_tokens=len(prompt),
                    greedy_ids=greedy,
                    greedy_text=greedy_text,
                    min_top2_gap=round(gap, 4),
                )
            )
            print(f"{name:9} {len(prompt):6} tokens  {question!r} -> {greedy_text!r}  gap {gap:.2f}", flush=True)
        cases.append(dict(name=name, context=text, questions=questions))
    meta = dict(
        seed=SEED,
        prompt="context + '\\n' + question, tokenized with bos",
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    (out / "needles.json").write_text(json.dumps(dict(meta=meta, cases=cases), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
