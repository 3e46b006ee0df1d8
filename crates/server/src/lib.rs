//! SparseServe, the server: everything that knows HTTP, the OpenAI wire format and text. The engine below it knows
//! token ids only.
//!
//! A request passes through [`http`] (routes, keys, shutdown), [`openai`] (parameters in, answers out) and [`text`]
//! (chat template and tokenizer on the way in, decoder and stop strings on the way out). [`app`] is what they share.
#![forbid(unsafe_code)]

pub mod app;
pub mod http;
pub mod openai;
pub mod text;
