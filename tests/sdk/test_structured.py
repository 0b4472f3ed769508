"""Answers of a given structure."""

import json

import openai
import pytest

USER = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "capital": {"enum": ["Paris", "Rome", "Berlin"]},
        "sure": {"type": "boolean"},
    },
    "required": ["capital", "sure"],
    "additionalProperties": False,
}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits_its_schema(client, model, stream):
    answer = client.chat.completions.create(
        model=model, messages=USER, temperature=0, max_tokens=96, stream=stream,
        response_format=schema_format(SCHEMA),
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        assert answer.choices[0].finish_reason == "stop"
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert set(value) == {"capital", "sure"}
    assert value["capital"] in SCHEMA["properties"]["capital"]["enum"]
    assert isinstance(value["sure"], bool)


def test_a_schema_that_cannot_be_used_says_why(client, model):
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(
            model=model, messages=USER, response_format=schema_format({"type": "sprocket"})
        )
    assert info.value.body["param"].startswith("response_format")
    assert "sprocket" in info.value.body["message"]
