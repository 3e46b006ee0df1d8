//! Log lines on standard error, so that standard output stays clean for answers.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::failure::Failure;
use super::options::LogFormat;
use super::settings::LogSettings;

/// Starts logging.
///
/// # Errors
/// A filter that is none.
pub fn start(settings: &LogSettings) -> Result<(), Failure> {
    let filter = EnvFilter::builder()
        .parse(&settings.filter)
        .map_err(|e| Failure::input(format!("--log-level {:?}: {e}", settings.filter)))?;
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    let started = match settings.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| Failure::runtime(format!("cannot start logging: {e}")))
}
