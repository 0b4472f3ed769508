"""Chat completions."""

import math

import pytest

QUESTION = [{"role": "user", "content": "Count from one to ten in words."}]


def ask(client, model, **change):
    request = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, **change}
    return client.chat.completions.create(model=model, **request)


def joined(chunks, index=0):
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_an_answer_has_all_its_parts(client, model):
    answer = ask(client, model)
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.refusal is None
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_answer_in_pieces(client, model):
    whole = ask(client, model)
    chunks = list(ask(client, model, stream=True))
    assert joined(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert all(reason is None for reason in reasons[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_ends_a_stream_that_asks_for_it(client, model):
    whole = ask(client, model)
    *before, last = ask(client, model, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in before)
    assert all("usage" in chunk.model_fields_set for chunk in before)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_is_bounded(client, model, name):
    answer = client.chat.completions.create(model=model, messages=QUESTION, **{name: 3})
    assert answer.usage.completion_tokens <= 3


def test_choices_are_told_apart(client, model):
    whole = ask(client, model, n=3, temperature=1.0, seed=11)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    chunks = list(ask(client, model, n=3, temperature=1.0, seed=11, stream=True))
    for choice in whole.choices:
        assert joined(chunks, choice.index) == choice.message.content
        ends = [
            c.finish_reason
            for chunk in chunks
            for c in chunk.choices
            if c.index == choice.index and c.finish_reason
        ]
        assert ends == [choice.finish_reason]


def test_a_seed_repeats_and_another_differs(client, model):
    def say(seed):
        return ask(client, model, temperature=1.5, seed=seed).choices[0].message.content

    assert say(5) == say(5)
    assert say(-5) == say(-5)
    assert len({say(seed) for seed in range(8)}) > 1


def test_a_stop_string_is_cut_off(client, model):
    text = ask(client, model).choices[0].message.content
    assert len(text) > 6, "the model says too little for this test"
    stop = text[3:6]
    answer = ask(client, model, stop=[stop, "\u0000never"])
    cut = text[: text.index(stop)]
    assert answer.choices[0].message.content == cut
    assert answer.choices[0].finish_reason == "stop"
    assert joined(list(ask(client, model, stop=stop, stream=True))) == cut


def test_logprobs_describe_each_token(client, model):
    answer = ask(client, model, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in content)
    assert text.decode() == answer.choices[0].message.content
    for token in content:
        assert token.logprob <= 0 and math.isfinite(token.logprob)
        assert len(token.top_logprobs) == 4
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
    streamed = [
        token
        for chunk in ask(client, model, logprobs=True, top_logprobs=4, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == content
    bare = ask(client, model, logprobs=True)
    assert all(token.top_logprobs == [] for token in bare.choices[0].logprobs.content)
    assert ask(client, model).choices[0].logprobs is None


def test_greedy_takes_the_best(client, model):
    answer = ask(client, model, logprobs=True, top_logprobs=1)
    for token in answer.choices[0].logprobs.content:
        assert token.top_logprobs[0].token == token.token


def test_a_conversation_of_all_roles_is_taken(client, model):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Say a word."}], "name": "ada"},
        ask(client, model).choices[0].message,
        {"role": "user", "content": "And another. <|im_end|> é 日本語 🦙"},
    ]
    assert ask(client, model, messages=messages).usage.completion_tokens > 0


def test_fields_that_ask_for_nothing_are_taken(client, model):
    answer = ask(
        client,
        model,
        user="someone",
        metadata={"k": "v"},
        store=False,
        tools=[],
        response_format={"type": "text"},
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        extra_body={"top_k": 5},
    )
    assert answer.choices[0].message.content is not None
