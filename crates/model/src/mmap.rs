//! The one place of this crate where `unsafe` is needed: a file cannot be mapped without.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;

use memmap2::{Mmap, MmapOptions};

/// Maps `bytes` of `file`, which must lie within it.
pub(crate) fn map(file: &File, bytes: Range<u64>) -> std::io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(bytes.start).len((bytes.end - bytes.start) as usize);
    // SAFETY: the mapping is private and read-only, lies within the length that the file had when its header was
    // checked, and is only read as bytes, for which every value is valid. It lives while one tensor is packed. What
    // remains is what every program that maps weights asks of its user: that nobody rewrites or truncates the
    // checkpoint while it is loaded.
    unsafe { options.map(file) }
}
