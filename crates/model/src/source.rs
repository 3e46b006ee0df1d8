//! Where the files of a checkpoint come from.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use crate::Error;

/// The files of a checkpoint.
#[derive(Clone, Debug)]
pub enum Source {
    /// A directory as `transformers` writes it.
    Directory(PathBuf),
    /// Files inside the binary, by name.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// An open file of a [`Source`].
#[derive(Debug)]
pub(crate) enum SourceFile {
    OnDisk(File),
    Embedded(&'static [u8]),
}

impl Source {
    /// The bytes of file `name`, `None` when there is none.
    ///
    /// # Errors
    /// A name that leaves the checkpoint, anything but a regular file, a file larger than `bytes_max`, a failing read.
    pub fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Cow<'static, [u8]>>, Error> {
        let Some(file) = self.open(name)? else { return Ok(None) };
        let too_large = || Error::file(name, format!("larger than the {bytes_max} bytes allowed"));
        match file {
            SourceFile::Embedded(bytes) if bytes.len() as u64 > bytes_max => Err(too_large()),
            SourceFile::Embedded(bytes) => Ok(Some(Cow::Borrowed(bytes))),
            SourceFile::OnDisk(file) => {
                let mut bytes = Vec::new();
                file.take(bytes_max.saturating_add(1))
                    .read_to_end(&mut bytes)
                    .map_err(|e| Error::file(name, e))?;
                if bytes.len() as u64 > bytes_max { Err(too_large()) } else { Ok(Some(Cow::Owned(bytes))) }
            }
        }
    }

    /// [`Source::read`] of a file that must be there.
    ///
    /// # Errors
    /// As [`Source::read`], and when there is no such file.
    pub fn require(&self, name: &str, bytes_max: u64) -> Result<Cow<'static, [u8]>, Error> {
        self.read(name, bytes_max)?
            .ok_or_else(|| Error::file(name, format!("not found in {}", self.describe())))
    }

    /// Where the files are, for messages.
    pub fn describe(&self) -> String {
        match self {
            Source::Directory(path) => path.display().to_string(),
            Source::Embedded(_) => "the embedded model".into(),
        }
    }

    pub(crate) fn open(&self, name: &str) -> Result<Option<SourceFile>, Error> {
        check_name(name)?;
        let directory = match self {
            Source::Embedded(files) => {
                return Ok(files.iter().find(|f| f.0 == name).map(|f| SourceFile::Embedded(f.1)));
            }
            Source::Directory(directory) => directory,
        };
        let path = directory.join(name);
        // Opening a pipe would wait for its writer, so the kind of file is asked first. Symbolic links are followed:
        // the hub's cache consists of them.
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                File::open(&path).map(|f| Some(SourceFile::OnDisk(f))).map_err(|e| Error::file(name, e))
            }
            Ok(_) => Err(Error::file(name, "not a regular file")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::file(name, e)),
        }
    }
}

impl SourceFile {
    pub(crate) fn len(&self, name: &str) -> Result<u64, Error> {
        match self {
            SourceFile::Embedded(bytes) => Ok(bytes.len() as u64),
            SourceFile::OnDisk(file) => file.metadata().map(|m| m.len()).map_err(|e| Error::file(name, e)),
        }
    }
}

/// Refuses names that would leave the checkpoint: an index of shards may come from anyone.
fn check_name(name: &str) -> Result<(), Error> {
    let path = Path::new(name);
    let stays_inside = path.components().all(|c| matches!(c, Component::Normal(_)));
    if name.is_empty() || name.contains(['\\', '\0', ':']) || !stays_inside {
        return Err(Error::file(name, "the name leaves the directory of the model"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        let source = Source::Directory("/nowhere".into());
        for name in ["", "..", "../a", "a/../b", "/etc/passwd", "a\\b", "C:x", "a\0b", "./../a"] {
            let error = source.read(name, 10).unwrap_err().to_string();
            assert!(error.contains("leaves the directory"), "{name:?}: {error}");
        }
        assert!(source.read("shards/a.safetensors", 10).unwrap().is_none());
    }

    #[test]
    fn limits_and_kinds() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("eleven"), "12345678901").unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        let source = Source::Directory(dir.path().into());
        assert_eq!(source.read("eleven", 11).unwrap().unwrap().len(), 11);
        assert_eq!(
            source.read("eleven", 10).unwrap_err().to_string(),
            "eleven: larger than the 10 bytes allowed"
        );
        assert_eq!(source.read("folder", 10).unwrap_err().to_string(), "folder: not a regular file");
        assert!(source.require("absent", 10).unwrap_err().to_string().starts_with("absent: not found in "));
        let embedded = Source::Embedded(&[("a", b"12")]);
        assert_eq!(*embedded.require("a", 2).unwrap(), *b"12");
        assert!(embedded.read("a", 1).is_err());
        assert!(embedded.read("b", 1).unwrap().is_none());
    }

    #[cfg(unix)]
    #[test]
    fn symbolic_links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs")).unwrap();
        fs::create_dir_all(dir.path().join("snapshots/x")).unwrap();
        fs::write(dir.path().join("blobs/b"), "blob").unwrap();
        std::os::unix::fs::symlink("../../blobs/b", dir.path().join("snapshots/x/config.json")).unwrap();
        let source = Source::Directory(dir.path().join("snapshots/x"));
        assert_eq!(*source.require("config.json", 10).unwrap(), *b"blob");
    }
}
