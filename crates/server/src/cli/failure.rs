//! How a command ends when it does not succeed.

use std::fmt;
use std::process::ExitCode;

/// Why a command stopped, by exit code. Shown as one line.
#[derive(Debug)]
pub enum Failure {
    /// What was asked for is wrong or cannot work here: a flag, a file, a model. Exit code 2.
    Input(anyhow::Error),
    /// Something went wrong while doing it. Exit code 1.
    Runtime(anyhow::Error),
}

impl Failure {
    /// A [`Failure::Input`] that says `message`.
    pub fn input(message: impl fmt::Display) -> Self {
        Failure::Input(anyhow::anyhow!("{message}"))
    }

    /// A [`Failure::Runtime`] that says `message`.
    pub fn runtime(message: impl fmt::Display) -> Self {
        Failure::Runtime(anyhow::anyhow!("{message}"))
    }

    /// The exit code for it. A reader that has gone (`... | head -1`) is no failure, only the end.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Input(_) => ExitCode::from(2),
            Failure::Runtime(error) if is_broken_pipe(error) => ExitCode::SUCCESS,
            Failure::Runtime(_) => ExitCode::FAILURE,
        }
    }

    /// The line to print, or `None` when nobody is left to read it.
    pub fn line(&self) -> Option<String> {
        let (Failure::Input(error) | Failure::Runtime(error)) = self;
        if is_broken_pipe(error) {
            return None;
        }
        let chain = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
        Some(chain.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

impl From<std::io::Error> for Failure {
    /// Terminal and pipe errors; files that a user names get a message with their path instead.
    fn from(error: std::io::Error) -> Self {
        Failure::Runtime(error.into())
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::Failure;

    #[test]
    fn one_line_whatever_the_cause_says() {
        let error = anyhow::anyhow!("first\n  second").context("while reading");
        assert_eq!(Failure::Input(error).line().as_deref(), Some("while reading: first second"));
    }

    #[test]
    fn a_closed_pipe_is_silent() {
        let failure = Failure::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!(failure.line(), None);
        assert_eq!(format!("{:?}", failure.exit_code()), format!("{:?}", std::process::ExitCode::SUCCESS));
    }
}
