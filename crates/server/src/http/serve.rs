//! Listening, and stopping without cutting answers short.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::router;
use crate::app::App;

/// Time for connections to close after the last answer was made; what is left are clients that don't read.
const CLOSE_SECONDS: u64 = 2;

/// When and how to stop.
#[derive(Debug)]
pub struct Shutdown {
    /// Each message is a wish to stop: the first drains, the second stops at once.
    pub signals: mpsc::UnboundedReceiver<()>,
    /// Time that running requests have to finish.
    pub drain_timeout: Duration,
}

/// SIGTERM and SIGINT as messages.
///
/// # Errors
/// If the system refuses to deliver them. Must be called in a tokio runtime.
pub fn stop_signals() -> io::Result<mpsc::UnboundedReceiver<()>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if sender.send(()).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Serves until told to stop. While draining, connections are still taken: new requests are told 503, and running ones
/// finish. Then the engine is shut down.
///
/// # Errors
/// If the listener fails.
pub async fn serve(app: Arc<App>, listener: TcpListener, mut shutdown: Shutdown) -> io::Result<()> {
    let (close, closing) = tokio::sync::oneshot::channel::<()>();
    let server = axum::serve(listener, router(Arc::clone(&app))).with_graceful_shutdown(async {
        // A dropped sender closes as well.
        let _ = closing.await;
    });
    let mut server = tokio::spawn(server.into_future());

    tokio::select! {
        ended = &mut server => return ended?,
        _ = shutdown.signals.recv() => {}
    }
    app.lifecycle.drain();
    tracing::info!(in_flight = app.lifecycle.in_flight(), timeout = ?shutdown.drain_timeout, "draining");
    tokio::select! {
        () = app.lifecycle.idle() => tracing::info!("drained"),
        () = tokio::time::sleep(shutdown.drain_timeout) => {
            tracing::warn!(in_flight = app.lifecycle.in_flight(), "stopping before all requests have finished");
        }
        _ = shutdown.signals.recv() => tracing::warn!("stopping at once"),
    }
    app.engine.shutdown();
    drop(close);
    let close = Duration::from_secs(CLOSE_SECONDS);
    match tokio::time::timeout(close, &mut server).await {
        Ok(ended) => ended?,
        Err(_) => {
            server.abort();
            Ok(())
        }
    }
}
