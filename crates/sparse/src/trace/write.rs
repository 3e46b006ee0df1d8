//! The writing end of a trace.

use std::io::{self, Write};

use super::{Header, MAGIC, PAYLOAD_BYTES_MAX, Record, RowSelection, VERSION, checksum};

/// Writes records one after the other. `out` should be buffered: a record is three writes.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: W,
    payload: Vec<u8>,
}

impl<W: Write> TraceWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W, header: &Header) -> io::Result<Self> {
        let mut writer = TraceWriter { out, payload: Vec::new() };
        writer.out.write_all(&MAGIC)?;
        writer.out.write_all(&VERSION.to_le_bytes())?;
        for count in [header.num_layers, header.kv_heads, header.page_tokens] {
            varint(&mut writer.payload, u64::from(count));
        }
        writer.payload.extend_from_slice(header.note.as_bytes());
        writer.end()?;
        Ok(writer)
    }

    /// Begins the record of a layer in a step; rows and [`TraceWriter::end`] follow.
    pub(super) fn begin(&mut self, step: u64, layer: u32) {
        self.payload.clear();
        varint(&mut self.payload, step);
        varint(&mut self.payload, u64::from(layer));
    }

    /// Begins a row; its heads follow.
    pub(super) fn row(&mut self, request: u64, prompt_tokens: u32, position: u32, budget: u32) {
        varint(&mut self.payload, request);
        for value in [prompt_tokens, position, budget] {
            varint(&mut self.payload, u64::from(value));
        }
    }

    /// The pages of a head, ascending, and how many slots of them are selected.
    pub(super) fn head(&mut self, tokens: u32, pages: &[u32]) {
        varint(&mut self.payload, u64::from(tokens));
        varint(&mut self.payload, pages.len() as u64);
        let mut next = 0;
        for &page in pages {
            varint(&mut self.payload, u64::from(page - next));
            next = page + 1;
        }
    }

    /// Writes what was put together.
    pub(super) fn end(&mut self) -> io::Result<()> {
        let length = self.payload.len();
        if length > PAYLOAD_BYTES_MAX {
            return Err(io::Error::other(format!("a record of {length} bytes is too long for a trace")));
        }
        self.out.write_all(&(length as u32).to_le_bytes())?;
        self.out.write_all(&self.payload)?;
        self.out.write_all(&checksum(&self.payload).to_le_bytes())
    }

    /// Writes a record. Steps must not descend, layers of a step must ascend, and so must pages.
    ///
    /// # Errors
    /// Those of `out`.
    ///
    /// # Panics
    /// When pages do not ascend.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        self.begin(record.step, record.layer);
        for RowSelection { request, prompt_tokens, position, budget, heads } in &record.rows {
            self.row(*request, *prompt_tokens, *position, *budget);
            for head in heads {
                assert!(head.pages.is_sorted_by(|a, b| a < b), "pages ascend");
                self.head(head.tokens, &head.pages);
            }
        }
        self.end()
    }

    /// Where it goes.
    #[cfg(test)]
    pub(super) fn inner(&mut self) -> &mut W {
        &mut self.out
    }

    /// Hands everything to the system.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// LEB128: seven bits a byte, the lowest first, the top bit set in all but the last.
fn varint(to: &mut Vec<u8>, value: u64) {
    let mut rest = value;
    while rest >= 0x80 {
        to.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    to.push(rest as u8);
}
