//! `GET /livez`: this process answers. `GET /readyz`: it can serve, or what is missing.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::error::Error;

pub async fn livez() -> Json<Value> {
    Json(json!({"status": "alive"}))
}

/// Ready while every model that is known has a group. What else is missing (a second group, say) is
/// told, but does not take this server out of service.
pub async fn readyz(State(app): State<App>) -> Response {
    let directory = app.directory.borrow().clone();
    let mut missing = directory.missing.clone();
    if app.is_draining() {
        missing.insert(0, "this server is shutting down".to_owned());
    }
    let unserved: Vec<_> = directory
        .models
        .keys()
        .filter(|model| !directory.groups.iter().any(|group| group.model == **model))
        .collect();
    let ready = !app.is_draining() && unserved.is_empty() && !directory.groups.is_empty();
    if ready {
        let body = json!({
            "status": "ready",
            "models": directory.models.keys().map(ToString::to_string).collect::<Vec<_>>(),
            "groups": directory.groups.len(),
            "missing": missing,
        });
        return Json(body).into_response();
    }
    if missing.is_empty() {
        missing.extend(unserved.iter().map(|model| format!("no group serves {model}")));
    }
    if missing.is_empty() {
        missing.push("no model is served yet".to_owned());
    }
    let error = Error::NotReady { missing: missing.clone() };
    let mut body = error.body();
    body["status"] = json!("not ready");
    body["missing"] = json!(missing);
    // Status and headers are the error's; the body has the list beside OpenAI's object.
    let (mut parts, _) = error.into_response().into_parts();
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    Response::from_parts(parts, body.to_string().into())
}
