//! The server over real connections, with the real engine and a model that is a few lines long.

mod bounds;
mod chat;
mod completions;
mod faults;
mod lifecycle;
mod sdk;
mod sparse;
mod support;
mod templates;
