//! Listening, and stopping without cutting answers short.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::router;
use crate::app::App;

/// Time for connections to close after the last answer was made; what is left are clients that don't read.
const CLOSE_SECONDS: u64 = 2;
/// Time after which a connection that could not be taken in is tried again.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

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

/// Takes connections in until `closing` is dropped, and waits for those that are open. HTTP/1.1 only: no client of such
/// an API speaks HTTP/2 without TLS, and its connections would need bounds of their own.
async fn accept(app: Arc<App>, listener: TcpListener, mut closing: oneshot::Receiver<()>) {
    let router = router(Arc::clone(&app));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.limits.header_time);
    let places = Arc::new(Semaphore::new(app.limits.connections));
    let open = GracefulShutdown::new();
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            next = next => next,
            _ = &mut closing => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most likely there are no more file descriptors, until a connection closes.
                tracing::warn!(%error, "cannot take a connection in");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                continue;
            }
        };
        // Tokens are small packets that should not wait for each other; where it is refused they do.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = open.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // A client that breaks off is no news.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// Serves until told to stop. While draining, connections are still taken: new requests are told 503, and running ones
/// finish. Then the engine is shut down.
///
/// # Errors
/// If the listener fails.
pub async fn serve(app: Arc<App>, listener: TcpListener, mut shutdown: Shutdown) -> io::Result<()> {
    let (close, closing) = oneshot::channel();
    let mut server = tokio::spawn(accept(Arc::clone(&app), listener, closing));

    tokio::select! {
        // It ends before it is told to only by a panic.
        ended = &mut server => return Ok(ended?),
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
        Ok(ended) => Ok(ended?),
        Err(_) => {
            server.abort();
            Ok(())
        }
    }
}
