"""Models and health."""

import httpx2 as httpx  # the one that openai brings


def test_the_model_is_listed_and_found(client, model):
    listed = {one.id: one for one in client.models.list()}
    assert model in listed
    one = client.models.retrieve(model)
    assert one == listed[model]
    assert one.object == "model" and one.created > 0 and one.owned_by
    assert one.model_extra["ready"] is True
    assert isinstance(one.model_extra["deterministic"], bool)


def test_every_response_has_an_id(client, model):
    raw = client.models.with_raw_response.list()
    assert raw.request_id
    answer = client.completions.with_raw_response.create(model=model, prompt="x", max_tokens=1)
    assert answer.request_id != raw.request_id


def test_health_and_metrics(base_url):
    assert httpx.get(f"{base_url}/livez").status_code == 200
    ready = httpx.get(f"{base_url}/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "ready"
    text = httpx.get(f"{base_url}/metrics").text
    for name in (
        "evener_requests_total",
        "evener_requests_running",
        "evener_prompt_tokens_total",
        "evener_generation_tokens_total",
        "evener_time_to_first_token_seconds_bucket",
        "evener_inter_token_latency_seconds_bucket",
        "evener_request_duration_seconds_bucket",
    ):
        assert name in text
