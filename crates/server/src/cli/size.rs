//! Amounts of memory as people write them.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// An amount of memory: bytes, or a share of what an option says.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "SizeInFile")]
pub enum Size {
    /// Bytes.
    Bytes(u64),
    /// Percent, in `(0, 100]`: of the memory limit for `--dram`, of the KV in DRAM for `--hbm`.
    Percent(f64),
}

impl Size {
    /// The size in bytes where a share is one of `whole_bytes`.
    pub fn of(self, whole_bytes: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes,
            Size::Percent(percent) => (whole_bytes as f64 * percent / 100.0) as u64,
        }
    }
}

/// A configuration file may hold a plain number of bytes, unquoted.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeInFile {
    Bytes(u64),
    Text(String),
    /// For a message that says what would do.
    Other(toml::Value),
}

impl TryFrom<SizeInFile> for Size {
    type Error = String;

    fn try_from(value: SizeInFile) -> Result<Self, String> {
        match value {
            SizeInFile::Bytes(bytes) => Ok(Size::Bytes(bytes)),
            SizeInFile::Text(text) => text.parse(),
            SizeInFile::Other(value) => Err(unreadable(&value.to_string())),
        }
    }
}

/// Units by suffix, lower case. One letter means the binary unit, as in container tools.
const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

fn unreadable(text: &str) -> String {
    format!("`{text}` is not a size; write 512MiB, 4GiB, 4GB, 60% or a number of bytes")
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unreadable = || unreadable(text);
        let trimmed = text.trim();
        let digits =
            trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (number, unit) = trimmed.split_at(digits);
        let value: f64 = number.parse().map_err(|_| unreadable())?;
        let unit = unit.trim().to_ascii_lowercase();
        if unit == "%" {
            let in_range = value > 0.0 && value <= 100.0;
            return if in_range { Ok(Size::Percent(value)) } else { Err(unreadable()) };
        }
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(unreadable)?;
        // Whole numbers stay exact; a fraction of a unit does not need to be.
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(*factor).ok_or_else(unreadable)?,
            Err(_) => (value * *factor as f64) as u64,
        };
        Ok(Size::Bytes(bytes))
    }
}

/// Prints bytes in the largest binary unit below them, with at most two decimals: `1.50 GiB`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) if self.0.is_multiple_of(*size) => write!(f, "{} {unit}", self.0 / size),
            Some((unit, size)) => write!(f, "{:.2} {unit}", self.0 as f64 / *size as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let cases = [
            ("0", Size::Bytes(0)),
            ("4096", Size::Bytes(4096)),
            ("4096B", Size::Bytes(4096)),
            ("512MiB", Size::Bytes(512 << 20)),
            ("512 mib", Size::Bytes(512 << 20)),
            ("4GiB", Size::Bytes(4 << 30)),
            ("4g", Size::Bytes(4 << 30)),
            ("4GB", Size::Bytes(4_000_000_000)),
            ("1.5GiB", Size::Bytes(3 << 29)),
            ("2TiB", Size::Bytes(2 << 40)),
            ("60%", Size::Percent(60.0)),
            ("12.5 %", Size::Percent(12.5)),
        ];
        for (text, size) in cases {
            assert_eq!(text.parse(), Ok(size), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_the_forms_that_work() {
        for text in ["", "GiB", "-1", "4XB", "0%", "101%", "nan", "1e9", "1.2.3GiB", "99999999999TiB"] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.contains("512MiB"), "{error}");
        }
    }

    #[test]
    fn a_share_is_of_the_limit() {
        assert_eq!(Size::Percent(25.0).of(8 << 30), 2 << 30);
        assert_eq!(Size::Bytes(7).of(8 << 30), 7);
    }

    #[test]
    fn bytes_are_printed_in_readable_units() {
        let shown = [0, 1023, 1024, 1536, 512 << 20, 3 << 29, 5 << 40].map(|b| Bytes(b).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1 KiB", "1.50 KiB", "512 MiB", "1.50 GiB", "5 TiB"]);
    }
}
