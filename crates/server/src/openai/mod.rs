//! OpenAI's wire format: request fields in, answers and errors out.
//!
//! The straight line: [`Fields`] takes a body apart, [`Params`] checks what both APIs share, `chat` and `completions`
//! make a prompt, [`Generation`] runs it in the engine and turns tokens into text, and `chat` and `completions` again
//! dress the text as an answer or a stream, in the same frame.

mod chat;
mod chat_prompt;
mod completions;
mod error;
mod fields;
mod frame;
mod generation;
mod logprobs;
mod models;
mod params;
mod sparse;
mod stream;
mod tokens;
mod usage;

pub use chat::chat_completions;
pub use completions::completions;
pub use error::ApiError;
pub use fields::Fields;
pub use generation::{Delta, Event, Finish, Generation, Reason};
pub use models::{model, models};
pub use params::Params;
pub use stream::{Chunks, respond};
pub use tokens::{detokenize, tokenize};
