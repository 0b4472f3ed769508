//! `GET /status`: workers, ranks, groups and load, as the cluster side tells them.

use axum::Json;
use axum::extract::State;
use serde_json::Value;

use super::App;

pub async fn show(State(app): State<App>) -> Json<Value> {
    let status = app.status.borrow().clone();
    Json(Value::clone(&status))
}
