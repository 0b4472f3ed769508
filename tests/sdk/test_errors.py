"""Errors, as the SDK's classes."""

import httpx2 as httpx  # the one that openai brings
import openai
import pytest

USER = [{"role": "user", "content": "Hello"}]


def refused(error: openai.APIStatusError, status: int):
    assert error.status_code == status
    assert error.request_id
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.body["message"]
    return error


def test_an_unknown_model_is_not_found(client, model):
    for create in (
        lambda: client.chat.completions.create(model="nope", messages=USER),
        lambda: client.completions.create(model="nope", prompt="x"),
        lambda: client.models.retrieve("nope"),
    ):
        with pytest.raises(openai.NotFoundError) as info:
            create()
        error = refused(info.value, 404)
        assert error.code == "model_not_found"
        assert error.param == "model"
        assert model in error.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1000}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_of_chat_is_named(client, model, change, param, stream):
    if "stream_options" in change and stream:  # where they are allowed, they can still be wrong
        change, param = {"stream_options": {"include_usage": 3}}, "stream_options.include_usage"
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(
            **{"model": model, "messages": USER, "stream": stream, **change}
        )
    error = refused(info.value, 400)
    assert error.param == param
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_bad_field_of_completions_is_named(client, model, change, param):
    with pytest.raises(openai.BadRequestError) as info:
        client.completions.create(**{"model": model, "prompt": "x", **change})
    assert refused(info.value, 400).param == param


def test_what_is_longer_than_the_context_says_so(client, model, context_length):
    for create in (
        lambda: client.completions.create(model=model, prompt=[1] * context_length),
        lambda: client.completions.create(model=model, prompt="x", max_tokens=context_length),
        lambda: client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "word " * context_length}]
        ),
    ):
        with pytest.raises(openai.BadRequestError) as info:
            create()
        error = refused(info.value, 400)
        assert error.code == "context_length_exceeded"
        assert f"maximum context length is {context_length} tokens" in error.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"a":' * 50000, b"[" * 100000, b'{"n":NaN}', b"\xff\xfe"],
    ids=["empty", "open", "array", "null", "deep objects", "deep arrays", "nan", "no utf-8"],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_is_no_request_is_refused(base_url, body, path):
    answer = httpx.post(f"{base_url}/v1/{path}", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused(client, model):
    messages = [{"role": "user", "content": "x" * (100 << 20)}]
    with pytest.raises(openai.APIStatusError) as info:
        client.chat.completions.create(model=model, messages=messages)
    assert refused(info.value, 413)


def test_paths_and_methods_are_refused_in_json(base_url):
    assert httpx.get(f"{base_url}/v1/nothing").status_code == 404
    answer = httpx.get(f"{base_url}/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json()["error"]["message"]
