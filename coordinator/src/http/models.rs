//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};

use super::App;
use super::error::Error;
use super::openai::{ModelList, ModelObject};
use crate::group::handle::{Directory, Model};

/// Every deployed model, ready or not.
pub async fn list(State(app): State<App>) -> Json<ModelList> {
    let directory = app.directory.borrow().clone();
    let data = directory.models.values().map(|model| show(model, &directory)).collect();
    Json(ModelList { object: "list", data })
}

/// One of them.
pub async fn retrieve(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelObject>, Error> {
    let id = id.map(|Path(id)| id).unwrap_or_default();
    let model = app.model(&id)?;
    let directory = app.directory.borrow().clone();
    Ok(Json(show(&model, &directory)))
}

fn show(model: &Model, directory: &Directory) -> ModelObject {
    let mut groups = directory.groups.iter().filter(|group| group.model == model.name).peekable();
    let ready = groups.peek().is_some();
    ModelObject {
        id: model.name.to_string(),
        object: "model",
        created: model.created_unix_s,
        owned_by: "evener",
        context_length: model.context_length,
        architecture: model.architecture.clone(),
        quantization: model.quantization.clone(),
        licence: Some(model.licence.clone()).filter(|licence| !licence.is_empty()),
        n_parameters: model.n_parameters,
        fingerprint: model.fingerprint.clone(),
        ready,
        deterministic: ready.then(|| groups.all(|group| group.deterministic)),
    }
}
