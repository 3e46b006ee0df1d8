//! The `sparseserve` binary.
#![forbid(unsafe_code)]

mod cli;

fn main() -> std::process::ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == sparseserve::text::RENDER_VERB) {
        return sparseserve::text::render_main();
    }
    cli::main()
}
