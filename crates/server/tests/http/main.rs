//! The server over real connections, with the real engine and a model that is a few lines long.

mod chat;
mod clients;
mod completions;
mod lifecycle;
mod properties;
mod storm;
mod support;
