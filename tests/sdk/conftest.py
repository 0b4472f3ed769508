"""The real `openai` package against a running Evener.

EVENER_URL is the server's base URL (http://127.0.0.1:8080), EVENER_MODEL the model to ask. Nothing
here depends on what a model says: tests compare answers with each other, not with a text.
"""

import os

import openai
import pytest


def _need(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"set {name}: these tests speak to a running server", returncode=2)
    return value


@pytest.fixture(scope="session")
def base_url() -> str:
    return _need("EVENER_URL").rstrip("/")


@pytest.fixture(scope="session")
def model() -> str:
    return _need("EVENER_MODEL")


@pytest.fixture(scope="session")
def client(base_url: str):
    # No retries: a test is to see the first answer.
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="session")
def context_length(client: openai.OpenAI, model: str) -> int:
    return client.models.retrieve(model).model_extra["context_length"]


@pytest.fixture(autouse=True)
def still_alive(client: openai.OpenAI, model: str):
    """After each test, whatever it did, the next request works."""
    yield
    answer = client.completions.create(model=model, prompt="Hello", max_tokens=1)
    assert answer.usage.completion_tokens == 1
