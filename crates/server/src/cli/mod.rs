//! The command line: what the user typed ([`options`]) becomes settings ([`settings`]), a memory plan ([`plan`]) and a
//! loaded model ([`load`]), and one of the verbs runs.

mod bench;
mod cache;
mod cgroup;
mod commands;
mod demo;
mod eval;
mod failure;
mod hub;
mod inspect;
mod ladder;
mod load;
mod log;
mod metadata;
mod options;
mod plan;
mod presets;
mod profile;
mod run;
mod screen;
mod serve;
mod settings;
mod size;
mod sparse;
mod text;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use commands::{Cli, Command};
use failure::Failure;

/// Runs the command that the arguments of the process name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Run(args) => run::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(line) = failure.line() {
                complain(&line);
            }
            failure.exit_code()
        }
    }
}

/// Help goes out as it is; a wrong flag becomes one line, like any other error.
fn usage(error: &clap::Error) -> ExitCode {
    let help = [
        ErrorKind::DisplayHelp,
        ErrorKind::DisplayVersion,
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
    ];
    if help.contains(&error.kind()) {
        // A reader that has gone is no error.
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
    }
    let text = error.to_string();
    // The first paragraph; tips and usage follow.
    let cause = text.split("\n\n").next().unwrap_or_default();
    let failure = Failure::input(cause.trim_start_matches("error: "));
    complain(&format!("{} (see --help)", failure.line().unwrap_or_default()));
    failure.exit_code()
}

/// One line on standard error, if somebody is left to read it.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "error: {line}");
}
