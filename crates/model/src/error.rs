//! What can be wrong with a checkpoint.

use std::fmt::Display;

/// Why a model was not loaded. Every message is one line: text that comes from files is escaped and shortened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or does not hold what it should.
    #[error("{file}: {cause}")]
    File {
        /// The file, relative to the checkpoint.
        file: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A model that we do not know.
    #[error("config.json: architecture {found} is not supported; supported are {supported}")]
    Architecture {
        /// What `config.json` names.
        found: String,
        /// What could be loaded.
        supported: String,
    },
    /// The checkpoint lacks a tensor.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor {name} has shape {found:?}, but config.json asks for {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// By the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that we cannot read.
    #[error("tensor {name} has dtype {found}, expected F32, F16 or BF16")]
    TensorDType {
        /// Its name.
        name: String,
        /// In the file.
        found: String,
    },
    /// A tensor that the architecture has no use for, so that the answers would be those of another model.
    #[error("tensor {name} is not one of {architecture}'s: is the checkpoint quantized or of another model?")]
    UnexpectedTensor {
        /// Its name.
        name: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// The device refused.
    #[error(transparent)]
    Backend(#[from] ops::Error),
}

impl Error {
    /// `file` is faulty because of `cause`.
    pub(crate) fn file(file: &str, cause: impl Display) -> Self {
        Error::File { file: one_line(file), cause: one_line(&cause.to_string()) }
    }

    /// Tensor `name` of the file is none of `architecture`'s.
    pub(crate) fn unexpected_tensor(name: &str, architecture: &'static str) -> Self {
        Error::UnexpectedTensor { name: one_line(name), architecture }
    }

    /// `config.json` is faulty because of `cause`.
    pub(crate) fn config(cause: impl Display) -> Self {
        Error::file("config.json", cause)
    }
}

/// `text` without control characters and of bounded length: files may hold anything, terminals and logs must not.
pub(crate) fn one_line(text: &str) -> String {
    const CHARS_MAX: usize = 300;
    let mut line: String = text
        .chars()
        .take(CHARS_MAX)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        line.push('…');
    }
    line
}
