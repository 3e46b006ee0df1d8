//! The reading end of a trace. It believes nothing: a length is memory only once that many bytes were there.

use std::io::{self, Read};

use super::{
    COUNT_MAX, HeadSelection, Header, MAGIC, PAGE_TOKENS_MAX, PAYLOAD_BYTES_MAX, Record, RowSelection,
    TraceError, VERSION, checksum,
};

/// Reads the records of a trace one after the other, and checks them.
#[derive(Debug)]
pub struct TraceReader<R: Read> {
    input: R,
    header: Header,
    payload: Vec<u8>,
    /// Bytes read.
    at: u64,
    records: u64,
    /// Step and layer of the last record.
    last: Option<(u64, u32)>,
}

impl<R: Read> TraceReader<R> {
    /// Reads the header from `input`, which should be buffered.
    ///
    /// # Errors
    /// What is no trace of this format.
    pub fn new(input: R) -> Result<Self, TraceError> {
        let header = Header { num_layers: 0, kv_heads: 0, page_tokens: 0, note: String::new() };
        let mut reader = TraceReader { input, header, payload: Vec::new(), at: 0, records: 0, last: None };
        let mut start = [0; MAGIC.len()];
        if reader.fill(&mut start)? < start.len() || start != MAGIC {
            return Err(TraceError::NotATrace);
        }
        let found = reader.word()?.ok_or(TraceError::NotATrace)?;
        if found != VERSION {
            return Err(TraceError::Version { found });
        }
        let start = reader.at;
        if !reader.frame()? {
            return Err(TraceError::CutOff { records: 0, at: start, whole: start });
        }
        let header = Payload { rest: &reader.payload }.header();
        reader.header = header.map_err(|what| TraceError::Damaged { at: start, what })?;
        Ok(reader)
    }

    /// What all records have in common.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next record, `None` at the end.
    ///
    /// # Errors
    /// A trace that is cut off or damaged; nothing can be read after that.
    pub fn read(&mut self) -> Result<Option<Record>, TraceError> {
        let start = self.at;
        if !self.frame()? {
            return Ok(None);
        }
        let record = Payload { rest: &self.payload }.record(&self.header);
        let record = record.map_err(|what| TraceError::Damaged { at: start, what })?;
        let (step, layer) = (record.step, record.layer);
        if self.last.is_some_and(|last| (step, layer) <= last) {
            return Err(TraceError::Damaged { at: start, what: "it does not follow the one before it" });
        }
        (self.last, self.records) = (Some((step, layer)), self.records + 1);
        Ok(Some(record))
    }

    /// Reads a frame into `payload`; `false` at the end of the file.
    fn frame(&mut self) -> Result<bool, TraceError> {
        let whole = self.at;
        let records = self.records;
        let cut_off = |at| TraceError::CutOff { records, at, whole };
        let mut length = [0; 4];
        match self.fill(&mut length)? {
            0 => return Ok(false),
            4 => {}
            _ => return Err(cut_off(self.at)),
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > PAYLOAD_BYTES_MAX {
            return Err(TraceError::Damaged { at: whole, what: "it is longer than any record" });
        }
        self.payload.clear();
        // Grows with what there is, not with what the length says.
        let taken = self.input.by_ref().take(length as u64).read_to_end(&mut self.payload)?;
        self.at += taken as u64;
        if taken < length {
            return Err(cut_off(self.at));
        }
        let Some(sum) = self.word()? else { return Err(cut_off(self.at)) };
        if sum != checksum(&self.payload) {
            return Err(TraceError::Damaged { at: whole, what: "its checksum is another" });
        }
        Ok(true)
    }

    fn word(&mut self) -> Result<Option<u32>, TraceError> {
        let mut bytes = [0; 4];
        Ok((self.fill(&mut bytes)? == bytes.len()).then(|| u32::from_le_bytes(bytes)))
    }

    /// Reads as much of `to` as there is.
    fn fill(&mut self, to: &mut [u8]) -> Result<usize, TraceError> {
        let mut done = 0;
        while done < to.len() {
            match self.input.read(&mut to[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.at += done as u64;
        Ok(done)
    }
}

/// What is left of a payload.
struct Payload<'a> {
    rest: &'a [u8],
}

impl Payload<'_> {
    fn header(&mut self) -> Result<Header, &'static str> {
        let mut counts = [0; 3];
        for (count, most) in counts.iter_mut().zip([COUNT_MAX, COUNT_MAX, PAGE_TOKENS_MAX]) {
            *count = self.number()?;
            if *count == 0 || *count > most {
                return Err("layers, KV heads or tokens per page cannot be as many");
            }
        }
        let [num_layers, kv_heads, page_tokens] = counts;
        let note = std::str::from_utf8(self.rest).map_err(|_| "its note is no UTF-8")?.to_owned();
        Ok(Header { num_layers, kv_heads, page_tokens, note })
    }

    fn record(&mut self, header: &Header) -> Result<Record, &'static str> {
        let (step, layer) = (self.varint()?, self.number()?);
        if layer >= header.num_layers {
            return Err("the model has no such layer");
        }
        let mut rows = Vec::new();
        while !self.rest.is_empty() {
            rows.push(self.row(header)?);
        }
        Ok(Record { step, layer, rows })
    }

    fn row(&mut self, header: &Header) -> Result<RowSelection, &'static str> {
        let request = self.varint()?;
        let (prompt_tokens, position, budget) = (self.number()?, self.number()?, self.number()?);
        if position < prompt_tokens {
            return Err("a token of a prompt does not select");
        }
        let heads = (0..header.kv_heads).map(|_| self.head(position, header.page_tokens));
        let heads = heads.collect::<Result<_, _>>()?;
        Ok(RowSelection { request, prompt_tokens, position, budget, heads })
    }

    fn head(&mut self, position: u32, page_tokens: u32) -> Result<HeadSelection, &'static str> {
        let (tokens, num_pages) = (self.number()?, self.number()?);
        // Each page takes a byte at least.
        if num_pages as usize > self.rest.len() {
            return Err("it names more pages than it has");
        }
        let last = u64::from(position / page_tokens);
        let mut pages = Vec::with_capacity(num_pages as usize);
        let mut next = 0;
        for _ in 0..num_pages {
            let page = u64::from(self.number()?) + next;
            if page > last {
                return Err("a page lies beyond the context");
            }
            next = page + 1;
            pages.push(page as u32);
        }
        if tokens < num_pages || u64::from(tokens) > u64::from(num_pages) * u64::from(page_tokens) {
            return Err("so many tokens do not lie in so many pages");
        }
        Ok(HeadSelection { tokens, pages })
    }

    fn number(&mut self) -> Result<u32, &'static str> {
        u32::try_from(self.varint()?).map_err(|_| "a number is out of range")
    }

    fn varint(&mut self) -> Result<u64, &'static str> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or("it ends within a number")?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                return Err("a number is out of range");
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number is out of range")
    }
}
