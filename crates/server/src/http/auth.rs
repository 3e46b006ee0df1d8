//! API keys.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::openai::ApiError;

/// What load balancers and humans may see without a key: nothing of it depends on requests.
const OPEN_PATHS: [&str; 4] = ["/", "/health", "/ready", "/version"];

/// Lets requests with a known key pass, all of them if the server has no keys.
pub async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let open = app.api_keys.is_empty() || OPEN_PATHS.contains(&request.uri().path());
    if open || is_known(request.headers(), &app.api_keys) {
        return Ok(next.run(request).await);
    }
    Err(ApiError {
        code: Some("invalid_api_key"),
        ..ApiError::new(
            StatusCode::UNAUTHORIZED,
            "Incorrect or missing API key; send `Authorization: Bearer KEY`.",
        )
    })
}

/// Compares with every key and all their bytes, so that the time taken tells nothing but the keys' lengths.
fn is_known(headers: &HeaderMap, keys: &[String]) -> bool {
    let header = headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let (scheme, key) = header.split_at(header.len().min("Bearer ".len()));
    let equal = keys.iter().fold(Choice::from(0), |found, known| found | known.as_bytes().ct_eq(key));
    scheme.eq_ignore_ascii_case(b"Bearer ") && bool::from(equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let keys = ["first".to_owned(), "second".to_owned()];
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            is_known(&headers, &keys)
        };
        assert!(check("Bearer first") && check("bearer second"));
        for wrong in ["", "Bearer", "Bearer ", "first", "Basic first", "Bearer firs", "Bearer firstsecond"] {
            assert!(!check(wrong), "{wrong}");
        }
        assert!(!is_known(&HeaderMap::new(), &keys));
    }
}
