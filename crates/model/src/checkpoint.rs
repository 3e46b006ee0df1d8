//! Tensors of a checkpoint: one safetensors file or several with an index.
//!
//! The format (<https://huggingface.co/docs/safetensors>): eight bytes of header length, a JSON header
//! `{name: {dtype, shape, data_offsets}}`, then the tensors without gaps. The header is parsed here rather than by the
//! `safetensors` crate, whose types it shares, because that wants the whole file mapped and keeps one of two tensors of
//! the same name. Tensors are mapped one by one and unmapped once they are packed, so that loading needs little more
//! memory than the packed model.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;

use memmap2::{Mmap, MmapOptions};
use ops::{DType, WeightView};
use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::Error;
use crate::source::{Source, SourceFile};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INDEX_BYTES_MAX: u64 = 16 << 20;
/// A header takes about 120 bytes per tensor.
const HEADER_BYTES_MAX: u64 = 16 << 20;
const LENGTH_BYTES: u64 = 8;

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(String, SourceFile)>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    bytes: Range<u64>,
}

/// A tensor whose bytes are in reach while this lives.
#[derive(Debug)]
pub struct TensorData {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Checkpoint {
    /// Reads the headers of all weight files of `source`.
    ///
    /// # Errors
    /// No weights, a file that is truncated or whose header is not sound, an index that does not fit its files.
    pub fn open(source: &Source) -> Result<Self, Error> {
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new() };
        if let Some(file) = source.open(WEIGHTS)? {
            checkpoint.tensors = read_header(WEIGHTS, &file, 0)?;
            checkpoint.files.push((WEIGHTS.into(), file));
            return Ok(checkpoint);
        }
        let Some(index) = source.read(INDEX, INDEX_BYTES_MAX)? else {
            let place = source.describe();
            return Err(Error::file(WEIGHTS, format!("neither it nor {INDEX} is in {place}")));
        };
        let index: Index = serde_json::from_slice(&index).map_err(|e| Error::file(INDEX, e))?;
        let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, file) in index.weight_map {
            by_file.entry(file).or_default().push(tensor);
        }
        for (name, tensors) in by_file {
            let file = source
                .open(&name)?
                .ok_or_else(|| Error::file(&name, format!("{INDEX} names it, but it is missing")))?;
            let mut header = read_header(&name, &file, checkpoint.files.len())?;
            for tensor in tensors {
                let entry = header.remove(&tensor).ok_or_else(|| {
                    Error::file(&name, format!("lacks tensor {tensor:?}, which {INDEX} places there"))
                })?;
                checkpoint.tensors.insert(tensor, entry);
            }
            checkpoint.files.push((name, file));
        }
        Ok(checkpoint)
    }

    /// Names of all tensors, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks that tensor `name` exists with this shape in a type that we read; gives that type and its bytes on disk.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorDType`].
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(DType, u64), Error> {
        let (entry, dtype) = self.find(name, shape)?;
        Ok((dtype, entry.bytes.end - entry.bytes.start))
    }

    /// Tensor `name`, which must be `[rows, cols]`, or `[cols]` where `shape` has one entry.
    ///
    /// # Errors
    /// As [`Checkpoint::check`], and when the file cannot be mapped.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorData, Error> {
        let (entry, dtype) = self.find(name, shape)?;
        let (file_name, file) = &self.files[entry.file];
        let bytes = match file {
            // The header was checked against the length of the file.
            SourceFile::Embedded(bytes) => {
                Bytes::Embedded(&bytes[entry.bytes.start as usize..entry.bytes.end as usize])
            }
            SourceFile::OnDisk(file) => {
                Bytes::Mapped(map(file, entry.bytes.clone()).map_err(|e| Error::file(file_name, e))?)
            }
        };
        let (rows, cols) = match *shape {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => unreachable!("models have matrices and vectors"),
        };
        Ok(TensorData { dtype, rows, cols, bytes })
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(&Entry, DType), Error> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })?;
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            return Err(Error::TensorShape { name: name.into(), expected, found });
        }
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(Error::TensorDType { name: name.into(), found: format!("{other:?}") }),
        };
        Ok((entry, dtype))
    }
}

impl TensorData {
    /// What a backend takes.
    pub fn view(&self) -> WeightView<'_> {
        let bytes = match &self.bytes {
            Bytes::Mapped(map) => &map[..],
            Bytes::Embedded(bytes) => bytes,
        };
        WeightView { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes }
    }
}

#[allow(unsafe_code)] // The only place of this crate: a file cannot be mapped without.
fn map(file: &File, bytes: Range<u64>) -> std::io::Result<Mmap> {
    let mut options = MmapOptions::new();
    options.offset(bytes.start).len((bytes.end - bytes.start) as usize);
    // SAFETY: the mapping is private and read-only, lies within the length that the file had when its header was
    // checked, and is only read as bytes, for which every value is valid. It lives while one tensor is packed. What
    // remains is what every program that maps weights asks of its user: that nobody rewrites or truncates the
    // checkpoint while it is loaded.
    unsafe { options.map(file) }
}

/// `model.safetensors.index.json`.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// Reads and checks the header of `file`: every tensor has the bytes that its shape needs, and together they tile the
/// rest of the file.
fn read_header(name: &str, file: &SourceFile, file_index: usize) -> Result<BTreeMap<String, Entry>, Error> {
    let fault = |cause: String| Error::file(name, cause);
    let file_bytes = file.len(name)?;
    let mut prefix = match file {
        SourceFile::OnDisk(file) => Prefix::OnDisk(file),
        SourceFile::Embedded(bytes) => Prefix::Embedded(bytes),
    };
    let mut length = [0; LENGTH_BYTES as usize];
    prefix
        .read_exact(&mut length)
        .map_err(|_| fault(format!("truncated: {file_bytes} bytes hold no header")))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(fault(format!(
            "claims a header of {header_bytes} bytes, more than the {HEADER_BYTES_MAX} allowed"
        )));
    }
    if header_bytes > file_bytes - LENGTH_BYTES {
        return Err(fault(format!("truncated: a header of {header_bytes} bytes in a file of {file_bytes}")));
    }
    let mut header = vec![0; header_bytes as usize];
    prefix.read_exact(&mut header).map_err(|e| fault(format!("cannot read its header: {e}")))?;
    let Header(mut infos) =
        serde_json::from_slice(&header).map_err(|e| fault(format!("its header is not sound: {e}")))?;

    infos.sort_by_key(|(_, info)| info.data_offsets);
    let data_start = LENGTH_BYTES + header_bytes;
    let data_bytes = file_bytes - data_start;
    let mut tensors = BTreeMap::new();
    let mut end_before = 0;
    for (tensor, info) in infos {
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if start != end_before || end < start {
            let kind = if end < start { "end before they start" } else { "overlap another or leave a gap" };
            return Err(fault(format!("the data offsets {start}..{end} of tensor {tensor:?} {kind}")));
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
        if bits.is_none_or(|bits| !bits.is_multiple_of(8) || (bits / 8) as u64 != end - start) {
            return Err(fault(format!(
                "tensor {tensor:?} of shape {:?} and dtype {:?} does not fill its {} bytes",
                info.shape,
                info.dtype,
                end - start
            )));
        }
        if end > data_bytes {
            return Err(fault(format!("truncated: tensor {tensor:?} ends at byte {end} of {data_bytes}")));
        }
        end_before = end;
        let bytes = data_start + start..data_start + end;
        let entry = Entry { file: file_index, dtype: info.dtype, shape: info.shape, bytes };
        if tensors.insert(tensor.clone(), entry).is_some() {
            return Err(fault(format!("has two tensors named {tensor:?}")));
        }
    }
    if end_before != data_bytes {
        return Err(fault(format!("has {} bytes after its last tensor", data_bytes - end_before)));
    }
    Ok(tensors)
}

/// The beginning of a file.
enum Prefix<'a> {
    OnDisk(&'a File),
    Embedded(&'a [u8]),
}

impl Read for Prefix<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Prefix::OnDisk(file) => file.read(out),
            Prefix::Embedded(bytes) => bytes.read(out),
        }
    }
}

/// The entries of a header in their order, duplicates included.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut infos = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        infos.push((name, map.next_value::<TensorInfo>()?));
                    }
                }
                Ok(Header(infos))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of `header` and `data_bytes` bytes of data, opened.
    fn open(header: &str, data_bytes: usize) -> Result<Checkpoint, Error> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + data_bytes, 0);
        open_bytes(&file)
    }

    fn open_bytes(file: &[u8]) -> Result<Checkpoint, Error> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(WEIGHTS), file).unwrap();
        Checkpoint::open(&Source::Directory(dir.path().into()))
    }

    fn refused(result: Result<Checkpoint, Error>, text: &str) {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with("model.safetensors: ") && error.contains(text), "{error:?} lacks {text:?}");
        assert!(!error.contains('\n'), "{error}");
    }

    const A: &str = r#""a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}"#;

    #[test]
    fn a_sound_file() {
        let b = r#""b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},"__metadata__":{"format":"pt"}"#;
        let checkpoint = open(&format!("{{{b},{A}}}   "), 28).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        let a = checkpoint.tensor("a", &[2, 3]).unwrap();
        assert_eq!((a.view().rows, a.view().cols, a.view().bytes.len()), (2, 3, 24));
        assert_eq!(checkpoint.check("b", &[2]).unwrap(), (DType::Bf16, 4));
        let missing = checkpoint.tensor("c", &[1]).unwrap_err().to_string();
        assert_eq!(missing, "tensor c is missing");
        let shape = checkpoint.tensor("a", &[3, 2]).unwrap_err().to_string();
        assert_eq!(shape, "tensor a has shape [2, 3], but config.json asks for [3, 2]");
    }

    #[test]
    fn faults_of_headers() {
        refused(open_bytes(b"1234"), "truncated: 4 bytes hold no header");
        refused(open_bytes(&u64::MAX.to_le_bytes()), "claims a header of 18446744073709551615 bytes");
        refused(open_bytes(&100u64.to_le_bytes()), "truncated: a header of 100 bytes in a file of 8");
        refused(open("[1, 2]", 0), "expected an object of tensors");
        refused(open("{", 0), "its header is not sound: EOF");
        refused(open(&format!("{{{A}}}"), 23), "truncated: tensor \"a\" ends at byte 24 of 23");
        refused(open(&format!("{{{A}}}"), 25), "has 1 bytes after its last tensor");
        refused(open(&format!("{{{A},{A}}}"), 24), "overlap another");
        let empty_twice = r#""e":{"dtype":"F32","shape":[0],"data_offsets":[24,24]}"#;
        refused(open(&format!("{{{A},{empty_twice},{empty_twice}}}"), 24), "two tensors named \"e\"");
        let overlap = r#""b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}"#;
        refused(open(&format!("{{{A},{overlap}}}"), 24), "overlap another or leave a gap");
        let gap = r#""b":{"dtype":"F32","shape":[2],"data_offsets":[28,36]}"#;
        refused(
            open(&format!("{{{A},{gap}}}"), 36),
            "offsets 28..36 of tensor \"b\" overlap another or leave a gap",
        );
        refused(open(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}"#, 0), "-8");
        refused(open(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), "data offsets 8..0");
        let huge = r#"{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}"#;
        refused(open(huge, 4), "does not fill its 4 bytes");
        refused(open(r#"{"a":{"dtype":"X7","shape":[1],"data_offsets":[0,4]}}"#, 4), "X7");
        refused(
            open("{\"a\nb\u{1b}[31m\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4),
            "control",
        );
    }

    #[test]
    fn dtypes_that_are_not_weights() {
        let checkpoint = open(r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#, 4).unwrap();
        let error = checkpoint.tensor("a", &[4]).unwrap_err().to_string();
        assert_eq!(error, "tensor a has dtype I8, expected F32, F16 or BF16");
    }

    #[test]
    fn faults_of_indices() {
        let dir = tempfile::tempdir().unwrap();
        let open = |index: &str| {
            std::fs::write(dir.path().join(INDEX), index).unwrap();
            Checkpoint::open(&Source::Directory(dir.path().into())).unwrap_err().to_string()
        };
        let header = format!("{{{A}}}");
        let mut shard = (header.len() as u64).to_le_bytes().to_vec();
        shard.extend_from_slice(header.as_bytes());
        shard.extend_from_slice(&[0; 24]);
        std::fs::write(dir.path().join("s.safetensors"), shard).unwrap();
        for outside in ["../s.safetensors", "/etc/passwd"] {
            let error = open(&format!(r#"{{"weight_map":{{"a":"{outside}"}}}}"#));
            assert!(error.contains("leaves the directory"), "{error}");
        }
        let error = open(r#"{"weight_map":{"a":"t.safetensors"}}"#);
        assert!(error.starts_with("t.safetensors: ") && error.contains("is missing"), "{error}");
        let error = open(r#"{"weight_map":{"b":"s.safetensors"}}"#);
        assert!(error.contains("lacks tensor \"b\""), "{error}");
        assert!(open("{}").contains("weight_map"));
    }

    #[test]
    fn nothing_to_load() {
        let dir = tempfile::tempdir().unwrap();
        let error = Checkpoint::open(&Source::Directory(dir.path().into())).unwrap_err().to_string();
        assert!(error.contains("neither it nor model.safetensors.index.json is in "), "{error}");
    }
}
