"""The official Python client against a server whose model repeats what it is told.

Usage: openai_sdk.py BASE_URL API_KEY. Run by the test `the_python_client`.
"""

import sys

import openai

base_url, api_key = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=20)
ask = {"model": "parrot", "temperature": 0}


def user(text):
    return [{"role": "user", "content": text}]


answer = client.chat.completions.create(messages=user("Hello 🦀 world"), stop=[" world"], logprobs=True,
                                        top_logprobs=3, seed=1, **ask)
assert answer.choices[0].message.content == "Hello 🦀", answer
assert answer.choices[0].finish_reason == "stop", answer
assert all(len(token.top_logprobs) == 3 for token in answer.choices[0].logprobs.content), answer
assert answer.usage.prompt_tokens_details.cached_tokens == 0, answer

stream = client.chat.completions.create(messages=user("one 🦀 two"), stream=True,
                                        stream_options={"include_usage": True}, **ask)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == "one 🦀 two", chunks
assert chunks[-1].usage.completion_tokens > 0, chunks

turns = user("a") + [answer.choices[0].message] + user("b")
assert client.chat.completions.create(messages=turns, **ask).choices[0].message.content == "b"

many = client.completions.create(prompt=["a b", "c d"], logprobs=2, echo=True, max_tokens=10, **ask)
assert [choice.text for choice in many.choices] == ["a ba b", "c dc d"], many
assert many.choices[0].logprobs.token_logprobs[0] is None, many
ids = client.completions.create(prompt=[1, 60, 61], max_tokens=2, extra_body={"return_token_ids": True}, **ask)
assert ids.choices[0].token_ids == [60, 61], ids

assert [model.id for model in client.models.list()] == ["parrot", "org/parrot"]
assert client.models.retrieve("org/parrot").id == "org/parrot"


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind} expected")


error = refused(openai.BadRequestError, lambda: client.chat.completions.create(messages=user("a"), n=2, **ask))
assert error.param == "n" and "`n`" in error.message, error
refused(openai.NotFoundError, lambda: client.chat.completions.create(messages=user("a"), model="other"))
refused(openai.UnprocessableEntityError, lambda: client.completions.create(prompt=7, **ask))
wrong = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
refused(openai.AuthenticationError, wrong.models.list)
print("ok")
