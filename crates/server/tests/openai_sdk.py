"""The official OpenAI client against a server that repeats what it is told.  usage: openai_sdk.py URL KEY"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0)
messages = [{"role": "user", "content": "polly wants"}]

assert client.models.list().data[0].id == "parrot"

answer = client.chat.completions.create(model="parrot", messages=messages, temperature=0, logprobs=True, top_logprobs=2)
assert answer.choices[0].message.content == "polly wants", answer
assert answer.choices[0].finish_reason == "stop"
assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
assert answer.usage.prompt_tokens_details.cached_tokens == 0

stream = client.chat.completions.create(
    model="parrot", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "polly wants"
assert chunks[-1].usage.completion_tokens > 0

answer = client.completions.create(model="parrot", prompt=["one", "two"], temperature=0, max_tokens=50)
assert [c.index for c in answer.choices] == [0, 1] and "two" in answer.choices[1].text

for wrong, error in [({"model": "other"}, openai.NotFoundError), ({"n": 2}, openai.BadRequestError)]:
    try:
        client.chat.completions.create(**{"model": "parrot", "messages": messages, **wrong})
    except error:
        continue
    sys.exit(f"{wrong} was not refused")
try:
    openai.OpenAI(base_url=sys.argv[1], api_key="wrong", max_retries=0).models.list()
    sys.exit("a wrong key was accepted")
except openai.AuthenticationError:
    pass
