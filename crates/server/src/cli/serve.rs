//! `sparseserve serve`: the server.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sparseserve::app::{App, Lifecycle, Limits};
use sparseserve::http::{HttpMetrics, Shutdown, serve, stop_signals};
use sparseserve::text::Sandbox;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::commands::ServeArgs;
use super::failure::Failure;
use super::load::{self, EngineThread, MAX_LOGPROBS, Prepared};
use super::log;
use super::options::{ConfigFile, LogFormat};
use super::screen::Screen;
use super::settings::{EngineSettings, LogSettings, ModelChoice, ServerSettings};
use super::text::TextSide;

/// Requests that run at once unless told otherwise.
const MAX_NUM_SEQS: usize = 64;
/// How long the engine's thread has to end when everything is answered. It may be loading a model, which cannot be
/// interrupted and need not be waited for.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the command.
pub fn run(args: ServeArgs) -> Result<(), Failure> {
    let file = ConfigFile::read(args.common.config.as_deref())?;
    let log_settings = LogSettings::resolve(args.common.or(file.common), "info");
    let _log = log::start(&log_settings)?;
    let model = ModelChoice::resolve(args.model.as_deref().or(file.model.as_deref()))?;
    let settings = EngineSettings::resolve(args.engine.complete(file.engine), MAX_NUM_SEQS)?;
    settings.sparse.check_clients()?;
    let server = ServerSettings::resolve(args.server.or(file.server), &model)?;
    let source = load::source(&model)?;
    let text = TextSide::read(&source)?;
    let prepared = Prepared::new(source, &settings)?;
    prepared.check_engine(&settings, server.max_waiting)?;

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let listener = listen(&server).await?;
        let address = format!("http://{}", listener.local_addr()?);
        let screen = Screen { model: &model, prepared: &prepared, settings: &settings };
        match log_settings.format {
            LogFormat::Json => {
                screen.log();
                tracing::info!(address, "listening");
            }
            // Nobody may be there to read it, and the server serves nevertheless.
            LogFormat::Text => {
                let _ = writeln!(std::io::stderr(), "{screen}{}", invitation(&address, &server, &model));
            }
        }
        warn_if_open(&listener, &server);
        answer(listener, server, settings, text, prepared).await
    });
    runtime.shutdown_background();
    result
}

async fn listen(server: &ServerSettings) -> Result<TcpListener, Failure> {
    let (host, port) = (server.host.as_str(), server.port);
    TcpListener::bind((host, port)).await.map_err(|e| {
        let cure = match e.kind() {
            std::io::ErrorKind::AddrInUse => "; --port 0 takes a free one",
            _ => "",
        };
        Failure::runtime(format!("cannot listen on {host}, port {port}: {e}{cure}"))
    })
}

fn warn_if_open(listener: &TcpListener, server: &ServerSettings) {
    let loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    if !loopback && server.api_keys.is_empty() {
        tracing::warn!("everyone who reaches this address may use the server; --api-key asks for a key");
    }
}

/// The end of the start screen: where to ask, and how.
fn invitation(address: &str, server: &ServerSettings, model: &ModelChoice) -> String {
    let question = match model {
        ModelChoice::Demo => super::demo::QUESTION,
        _ => "Hello!",
    };
    let key = if server.api_keys.is_empty() { "" } else { " -H 'Authorization: Bearer KEY'" };
    let name = &server.served_model_names[0];
    let body = serde_json::json!({"model": name, "messages": [{"role": "user", "content": question}]});
    // As a shell takes it.
    let body = body.to_string().replace('\'', r"'\''");
    format!(
        "\n  listening on {address}\n\n  \
         curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
    )
}

/// Serves until told to stop, or until the engine ends because it could not load the model.
async fn answer(
    listener: TcpListener,
    server: ServerSettings,
    settings: EngineSettings,
    text: TextSide,
    prepared: Prepared,
) -> Result<(), Failure> {
    let shutdown = Shutdown { signals: stop_signals()?, drain_timeout: server.drain_timeout };
    let (max_context, vocab_size) = (prepared.max_context, prepared.config.vocab_size);
    let hbm_page_bytes = prepared.tier.map(|_| prepared.geometry.page_bytes() as u64);
    let engine = EngineThread::start(prepared, &settings, server.max_waiting)?;
    let sandbox = text.template.map(Sandbox::of_this_program).transpose()?;
    let limits = Limits { top_logprobs: MAX_LOGPROBS, ..Limits::for_context(max_context) };
    let app = App {
        engine: engine.handle.clone(),
        http_metrics: HttpMetrics::new(&engine.registry).map_err(Failure::runtime)?,
        registry: engine.registry.clone(),
        tokenizer: text.tokenizer,
        template: sandbox,
        names: server.served_model_names,
        max_context,
        vocab_size,
        defaults: text.defaults,
        hbm_page_bytes,
        policies: settings.sparse.served,
        budget: settings.sparse.budget,
        reuses_answers: settings.reuses_answers,
        body_memory: limits.body_memory(),
        limits,
        api_keys: server.api_keys.into_iter().map(|key| key.0).collect(),
        cors_origins: server.cors_origins,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        lifecycle: Arc::new(Lifecycle::default()),
        // Two at least: one long text must not hold up all the others.
        text_workers: Semaphore::new((settings.compute.threads / 2).max(2)),
    };
    let mut end = tokio::task::spawn_blocking(|| engine.join());
    let ended = |result: Result<Result<(), Failure>, tokio::task::JoinError>| {
        result.unwrap_or_else(|e| Err(Failure::runtime(e)))
    };
    tokio::select! {
        served = serve(Arc::new(app), listener, shutdown) => served?,
        // Only a failure ends it before the server.
        result = &mut end => return ended(result),
    }
    tokio::time::timeout(END_TIMEOUT, end).await.map_or(Ok(()), ended)
}
