//! Log lines on standard error, so that standard output stays clean for answers.
//!
//! A thread of its own writes them. Whoever logs never waits: when nobody reads standard error, its pipe fills up, and
//! then lines are lost rather than answers.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use super::failure::Failure;
use super::options::LogFormat;
use super::settings::LogSettings;

/// Lines that wait to be written, at most.
const LINES_MAX: usize = 8192;

/// Starts logging. What it returns writes the lines that are left when it is dropped, if somebody reads them within a
/// second.
///
/// # Errors
/// A filter that is none.
pub fn start(settings: &LogSettings) -> Result<WorkerGuard, Failure> {
    let wrong = |why: &str| Failure::input(format!("--log-level {:?}: {why}", settings.filter));
    // The filter would take a word that is no level for a crate, all of whose lines it then shows, and no others.
    let words = settings.filter.split(',').map(str::trim);
    if let Some(word) = words.into_iter().find(|word| !word.contains(['=', '[']) && !is_level(word)) {
        return Err(wrong(&format!("{word:?} is none of off, error, warn, info, debug and trace")));
    }
    let filter = EnvFilter::builder().parse(&settings.filter).map_err(|e| wrong(&e.to_string()))?;
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let writer = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX);
    let (writer, guard) = writer.finish(std::io::stderr());
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(writer);
    let started = match settings.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| Failure::runtime(format!("cannot start logging: {e}")))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(guard)
}

fn is_level(word: &str) -> bool {
    ["off", "error", "warn", "info", "debug", "trace"].iter().any(|level| word.eq_ignore_ascii_case(level))
}

/// A panic is a line of the log: the usual hook would wait for standard error.
fn log_panic(panic: &std::panic::PanicHookInfo) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let message = panic.payload_as_str().unwrap_or("no message");
    // Captured if `RUST_BACKTRACE` says so.
    let backtrace = std::backtrace::Backtrace::capture();
    match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => {
            tracing::error!(panic = message, place, thread, %backtrace, "panic");
        }
        _ => tracing::error!(panic = message, place, thread, "panic"),
    }
}
