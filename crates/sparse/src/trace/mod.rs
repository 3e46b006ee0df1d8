//! Selection traces: which pages each KV head selected in each step, as a small binary file (`docs/selection-trace.md`).
//!
//! A trace is what a cache of pages is asked for, so eviction rules and sizes can be compared offline, on the same demand.
//!
//! * `write.rs` and `read.rs`: the two ends of the format. `recorder.rs`: what a running model writes. `player.rs`:
//!   a trace in the place of a policy.
//!
//! ```text
//! file    := magic version frame(header) frame(record)*
//! frame   := u32 payload bytes, payload, u32 FNV-1a of the payload               (little-endian)
//! header  := layers kv_heads page_tokens note                                    (varints; note is UTF-8 to the end)
//! record  := step layer row*                                                     (rows to the end)
//! row     := request prompt_tokens position budget head{kv_heads}
//! head    := tokens num_pages [first (gap - 1)*]                                 (pages ascending)
//! ```

mod player;
mod read;
mod recorder;
#[cfg(test)]
mod tests;
mod write;

use std::io;

pub use player::Player;
pub use read::TraceReader;
pub use recorder::Recorder;
pub use write::TraceWriter;

const MAGIC: [u8; 8] = *b"SPARSTRC";
const VERSION: u32 = 1;
/// Bytes of a payload at most: 64 requests of 128K tokens that select every page in 128 KV heads take less.
const PAYLOAD_BYTES_MAX: usize = 1 << 27;
/// Layers and KV heads at most, so that what is derived from them stays small.
const COUNT_MAX: u32 = 1 << 12;
/// Tokens per page at most.
const PAGE_TOKENS_MAX: u32 = 1 << 12;

/// What all records of a trace have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Layers of the model, dense ones too.
    pub num_layers: u32,
    /// KV heads of each.
    pub kv_heads: u32,
    /// Tokens per page.
    pub page_tokens: u32,
    /// What was recorded, for people.
    pub note: String,
}

impl Header {
    fn shape(&self) -> String {
        let Header { num_layers, kv_heads, page_tokens, .. } = self;
        format!("{num_layers} layers, {kv_heads} KV heads and pages of {page_tokens} tokens")
    }
}

/// What the rows of a step selected in a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Number of the step, counting those in which a row could select.
    pub step: u64,
    /// Layer.
    pub layer: u32,
    /// Its rows, without those that attended to everything.
    pub rows: Vec<RowSelection>,
}

/// What a row selected in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowSelection {
    /// Number of the request, counted from the start of the recording; see [`Recorder`].
    pub request: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Position of the row; its context has one token more.
    pub position: u32,
    /// Tokens that it might attend to.
    pub budget: u32,
    /// By KV head.
    pub heads: Vec<HeadSelection>,
}

/// What a row selected for a KV head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeadSelection {
    /// Slots selected.
    pub tokens: u32,
    /// Pages with a selected slot, ascending: page `i` holds positions `i * page_tokens..(i + 1) * page_tokens`.
    pub pages: Vec<u32>,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file.
    #[error("cannot read the trace: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("this is no selection trace; --record-selection writes one")]
    NotATrace,
    /// Made by another version.
    #[error("the trace has format {found}, this program reads {VERSION}; record it again")]
    Version {
        /// Its format.
        found: u32,
    },
    /// It ends within a record.
    #[error(
        "the trace is cut off after {records} whole records, at byte {at}: the recording was interrupted; record it \
         again, or cut the file to {whole} bytes"
    )]
    CutOff {
        /// Records before.
        records: u64,
        /// Where it ends.
        at: u64,
        /// Where the last whole record ends.
        whole: u64,
    },
    /// Of a model with another shape.
    #[error(
        "the trace is of {found}, here there are {expected}; record one with this model and --page-tokens"
    )]
    OtherModel {
        /// Its shape.
        found: String,
        /// That of the model at hand.
        expected: String,
    },
    /// Without a row.
    #[error("nothing was selected while the trace was recorded; ask with a budget below the context")]
    Empty,
    /// It says what cannot be.
    #[error("the trace is damaged in the record at byte {at}: {what}; copy or record it again")]
    Damaged {
        /// Where the record begins.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// FNV-1a, 32 bits (Fowler, Noll, Vo): finds damage, not forgery.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}
