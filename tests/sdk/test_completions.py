"""Text completions."""

import pytest

PROMPT = "The capital of France is"


def ask(client, model, **change):
    request = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **change}
    return client.completions.create(model=model, **request)


def joined(chunks, index=0):
    return "".join(
        choice.text for chunk in chunks for choice in chunk.choices if choice.index == index
    )


def test_an_answer_has_all_its_parts(client, model):
    answer = ask(client, model)
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason in ("stop", "length")
    assert choice.logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_answer_in_pieces(client, model):
    whole = ask(client, model)
    *chunks, last = ask(client, model, stream=True, stream_options={"include_usage": True})
    assert joined(chunks) == whole.choices[0].text
    assert last.choices == [] and last.usage == whole.usage


def test_sixteen_tokens_are_the_default(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0)
    assert answer.usage.completion_tokens <= 16


def test_many_prompts_are_answered_in_order(client, model):
    prompts = [PROMPT, "One two three", "Once upon a time"]
    whole = ask(client, model, prompt=prompts, n=2)
    assert [choice.index for choice in whole.choices] == list(range(6))
    for idx, prompt in enumerate(prompts):
        alone = ask(client, model, prompt=prompt).choices[0].text
        # Alone or beside others: the same bits.
        assert [whole.choices[2 * idx + c].text for c in (0, 1)] == [alone, alone]
    assert joined(list(ask(client, model, prompt=prompts, stream=True)), 2) == whole.choices[4].text


def test_echo_gives_the_prompt_with_its_logprobs(client, model):
    answer = ask(client, model, echo=True, max_tokens=1, logprobs=1)
    (choice,) = answer.choices
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    n = answer.usage.total_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == n
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == n
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_token_ids_are_prompts_too(client, model):
    batch = [[1, 2, 3, 4], [5, 6]]
    answer = ask(client, model, prompt=batch, echo=True, max_tokens=1, logprobs=1)
    assert answer.usage.prompt_tokens == 6
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [5, 3]
    one = ask(client, model, prompt=[1, 2, 3, 4], max_tokens=1)
    assert one.usage.prompt_tokens == 4


def test_echo_of_the_prompt_alone(client, model):
    answer = ask(client, model, echo=True, max_tokens=0)
    assert answer.choices[0].text == PROMPT
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_off(client, model, stream):
    text = ask(client, model).choices[0].text
    stop = text[2:5]
    answer = ask(client, model, stop=[stop], stream=stream)
    got = joined(list(answer)) if stream else answer.choices[0].text
    assert got == text[: text.index(stop)]


def test_a_seed_repeats(client, model):
    def say(seed):
        return ask(client, model, temperature=1.2, top_p=0.95, seed=seed).choices[0].text

    assert say(3) == say(3)
    assert len({say(seed) for seed in range(8)}) > 1


def test_a_stream_can_be_left(client, model):
    for _ in range(5):
        with ask(client, model, max_tokens=200, stream=True) as stream:
            next(iter(stream))
