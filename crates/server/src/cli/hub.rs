//! Models from the Hugging Face hub, in the cache that all its tools share.
//!
//! `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean for those tools.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::failure::Failure;
use super::size::Bytes;

/// Weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// Names the files of weights in several.
const INDEX: &str = "model.safetensors.index.json";
/// How often an interrupted download is taken up again.
const RETRIES: usize = 3;

/// Whether `name` has the form of a hub name, `owner/model`.
pub fn is_hub_name(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with(['.', '-'])
            && p.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    name.split_once('/').is_some_and(|(owner, model)| part(owner) && part(model))
}

/// The directory of model `name`, after downloading what is missing. Where the hub cannot be reached, a complete copy
/// in the cache will do.
///
/// # Errors
/// One line that says what failed and what would help.
pub fn fetch(name: &str) -> Result<PathBuf, Failure> {
    let repo = Repo::model(name.to_owned());
    let cache = cache()?;
    let cached = cache.repo(repo.clone());
    if offline() {
        return complete_copy(&cached).ok_or_else(|| {
            Failure::input(format!(
                "{name} is no directory here, not (completely) in {}, and HF_HUB_OFFLINE forbids downloading; give a \
                 local directory or unset it",
                cache.path().display()
            ))
        });
    }
    let endpoint = env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty());
    let endpoint = endpoint.map_or("https://huggingface.co".into(), |e| e.trim_end_matches('/').to_owned());
    let token = env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()).or_else(|| Cache::from_env().token());
    let api = ApiBuilder::from_cache(cache)
        .with_endpoint(endpoint.clone())
        .with_token(token)
        .with_retries(RETRIES)
        .with_user_agent("sparseserve", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|e| Failure::runtime(format!("cannot set up downloads: {e}")))?;
    match download(&api.repo(repo), &cached) {
        Ok(directory) => Ok(directory),
        Err(Refusal::Unreachable(cause)) => match complete_copy(&cached) {
            Some(directory) => {
                tracing::warn!("cannot reach {endpoint} ({cause}), so the copy in the cache is used");
                Ok(directory)
            }
            None => Err(Failure::runtime(format!(
                "{name} is no directory here, and {endpoint} cannot be reached to download it ({cause}); give a local \
                 directory, set HF_ENDPOINT to a mirror, or check the network"
            ))),
        },
        Err(Refusal::Status(404)) => Err(Failure::input(format!(
            "{name} is no directory here, and {endpoint} has no such model (404)"
        ))),
        Err(Refusal::Status(status @ (401 | 403))) => Err(Failure::input(format!(
            "{name} does not exist on {endpoint}, or is private or gated ({status}); set HF_TOKEN to a token that may \
             read it"
        ))),
        Err(Refusal::Status(status)) => {
            Err(Failure::runtime(format!("{endpoint} answered {status} for {name}; try again later")))
        }
        Err(Refusal::Unusable(cause)) => Err(Failure::input(format!("{name}: {cause}"))),
        Err(Refusal::Interrupted(cause)) => Err(Failure::runtime(format!(
            "downloading {name} failed: {cause}; run again to go on from there"
        ))),
    }
}

/// Why nothing could be downloaded.
#[derive(Debug)]
enum Refusal {
    Unreachable(String),
    Status(u16),
    Interrupted(String),
    Unusable(String),
}

impl Refusal {
    /// Before anything arrived.
    fn at_first(error: ApiError) -> Self {
        match Refusal::later(error) {
            Refusal::Interrupted(cause) => Refusal::Unreachable(cause),
            other => other,
        }
    }

    /// In the middle.
    fn later(error: ApiError) -> Self {
        match error {
            ApiError::TooManyRetries(last) => Refusal::later(*last),
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(status) => Refusal::Status(status),
                other => Refusal::Interrupted(other.to_string()),
            },
            other => Refusal::Interrupted(other.to_string()),
        }
    }
}

fn cache() -> Result<Cache, Failure> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
    match variable("HF_HUB_CACHE") {
        Some(path) => Ok(Cache::new(path.into())),
        None if variable("HF_HOME").is_some() || env::home_dir().is_some() => Ok(Cache::from_env()),
        None => Err(Failure::input("no home directory for the download cache; set HF_HOME")),
    }
}

fn offline() -> bool {
    let value = env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    ["1", "true", "yes", "on"].contains(&value.as_str())
}

fn download(api: &ApiRepo, cached: &CacheRepo) -> Result<PathBuf, Refusal> {
    let info = api.info().map_err(Refusal::at_first)?;
    if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(Refusal::Unusable(format!("the hub names an impossible commit, {:?}", info.sha)));
    }
    let directory = cached.pointer_path(&info.sha);
    let offered: BTreeSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let bring = |name: &str| bring(api, &directory, name);
    for name in offered.iter().filter(|name| is_small_file(name)) {
        bring(name)?;
    }
    let weights = if offered.contains(INDEX) {
        bring(INDEX)?;
        shards(&directory).ok_or_else(|| Refusal::Unusable(format!("{INDEX} names no files of weights")))?
    } else {
        BTreeSet::from([WEIGHTS.to_owned()])
    };
    if let Some(missing) = weights.difference(&offered).next() {
        return Err(Refusal::Unusable(format!("the model has no {missing}; only safetensors are read")));
    }
    weights.iter().try_for_each(|name| bring(name))?;
    // The branch may have moved while its files were on their way.
    cached.create_ref(&info.sha).map_err(|e| Refusal::Interrupted(e.to_string()))?;
    complete_copy(cached).ok_or_else(|| Refusal::Interrupted("the model changed meanwhile".into()))
}

/// Whether `name` is one of the small files that a model consists of.
fn is_small_file(name: &str) -> bool {
    let tokenizer = name.starts_with("tokenizer") && name.ends_with(".json") && !name.contains('/');
    tokenizer || ["config.json", "generation_config.json", "chat_template.jinja"].contains(&name)
}

/// Downloads `name` unless `directory` has it.
fn bring(api: &ApiRepo, directory: &Path, name: &str) -> Result<(), Refusal> {
    if directory.join(name).exists() {
        return Ok(());
    }
    let mut size = None;
    let path = api.download_with_progress(name, Bar::new(&mut size)).map_err(Refusal::later)?;
    let arrived = fs::metadata(&path).map(|m| m.len()).map_err(|e| Refusal::Interrupted(e.to_string()))?;
    match size {
        Some(size) if size != arrived => {
            // Or it would pass for the whole file next time. That it cannot be removed is no worse than this.
            let _ = fs::canonicalize(&path).and_then(fs::remove_file);
            let _ = fs::remove_file(&path);
            Err(Refusal::Interrupted(format!("{arrived} of {size} bytes of {name} arrived")))
        }
        _ => Ok(()),
    }
}

/// Files that the index in `directory` names; `None` if it names none, or one that is outside.
fn shards(directory: &Path) -> Option<BTreeSet<String>> {
    let index: Value = serde_json::from_slice(&fs::read(directory.join(INDEX)).ok()?).ok()?;
    let names = index.get("weight_map")?.as_object()?.values().map(|file| {
        let name = file.as_str()?;
        (name.ends_with(".safetensors") && !name.contains('/')).then(|| name.to_owned())
    });
    names.collect::<Option<BTreeSet<String>>>().filter(|names| !names.is_empty())
}

/// The directory of the cache that has every file of the model, if there is one.
fn complete_copy(cached: &CacheRepo) -> Option<PathBuf> {
    let directory = cached.get("config.json")?.parent()?.to_owned();
    let weights = match directory.join(INDEX).exists() {
        true => shards(&directory)?,
        false => BTreeSet::from([WEIGHTS.to_owned()]),
    };
    let has = |name: &str| directory.join(name).exists();
    (has("tokenizer.json") && weights.iter().all(|name| has(name))).then_some(directory)
}

/// A progress bar on a terminal, a line per file elsewhere. Tells its maker how many bytes there shall be.
struct Bar<'a> {
    bar: ProgressBar,
    size: &'a mut Option<u64>,
}

impl<'a> Bar<'a> {
    fn new(size: &'a mut Option<u64>) -> Self {
        Bar { bar: ProgressBar::new(0), size }
    }
}

impl Progress for Bar<'_> {
    /// Called again for each attempt.
    fn init(&mut self, size: usize, filename: &str) {
        let first = self.size.replace(size as u64).is_none();
        if first && !std::io::stderr().is_terminal() {
            eprintln!("downloading {filename}, {}", Bytes(size as u64));
        }
        let style = "{msg:30!} [{bar:30}] {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_length(size as u64);
        self.bar.set_position(0);
        self.bar.set_message(filename.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        for name in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B", "a/b"] {
            assert!(is_hub_name(name), "{name}");
        }
        for name in ["", "gpt2", "/a/b", "./a", "../a", "a/", "a/b/c", "a b/c", "~/m", "a/.b", "a/b\n"] {
            assert!(!is_hub_name(name), "{name}");
        }
    }

    #[test]
    fn only_files_that_are_needed() {
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            assert!(is_small_file(name), "{name}");
        }
        for name in ["README.md", "onnx/tokenizer.json", "tokenizer.model", "original/config.json", WEIGHTS] {
            assert!(!is_small_file(name), "{name}");
        }
    }

    #[test]
    fn an_index_cannot_name_files_elsewhere() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let named = |text: &str| {
            fs::write(directory.path().join(INDEX), text).expect("a file");
            shards(directory.path())
        };
        let two =
            named(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#);
        assert_eq!(two.map(|names| names.len()), Some(2));
        for text in ["", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": "../x.safetensors"}}"#] {
            assert_eq!(named(text), None, "{text}");
        }
    }
}
