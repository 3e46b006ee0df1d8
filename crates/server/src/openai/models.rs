//! `GET /v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::ApiError;
use crate::app::App;

/// `GET /v1/models`: the names of the model.
pub async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let cards: Vec<Value> = app.names.iter().map(|name| card(&app, name)).collect();
    Json(json!({"object": "list", "data": cards}))
}

/// `GET /v1/models/{name}`; names may contain slashes.
///
/// # Errors
/// 404 for a model that is not served.
pub async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    if !app.names.contains(&name) {
        return Err(ApiError::no_such_model(&name));
    }
    Ok(Json(card(&app, &name)))
}

fn card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "sparseserve",
        "root": app.names[0],
        "parent": null,
        "max_model_len": app.max_context,
    })
}
