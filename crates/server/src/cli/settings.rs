//! The second stage: what the user typed, completed by defaults and checked, becomes settings that never change.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use kv::QuotaRule;
use ops::residency::EvictionRule;
use ops::{DType, PAGE_TOKENS_ALLOWED};
use ops_cpu::{Isa, THREADS_MAX};

use super::failure::Failure;
use super::hub;
use super::ladder::LadderSettings;
use super::options::{
    ApiKey, CommonOptions, ComputeOptions, DTypeChoice, Device, EngineOptions, EvictionChoice, LogFormat,
    PrefixReuseChoice, ServerOptions,
};
use super::size::Size;
use super::sparse::SparseSettings;

/// Requests that may run or wait: tables have an entry for each.
const REQUESTS_MAX: usize = 1_000_000;
/// Tokens of a request or of a step: what 32 bits count.
const TOKENS_MAX: usize = u32::MAX as usize - 1;

/// Which model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelChoice {
    /// The one inside the binary.
    Demo,
    /// A directory of `transformers`.
    Directory(PathBuf),
    /// A name on the Hugging Face hub.
    Hub(String),
}

impl ModelChoice {
    /// Reads MODEL.
    ///
    /// # Errors
    /// When it is neither a directory nor a possible hub name.
    pub fn resolve(model: Option<&str>) -> Result<Self, Failure> {
        let Some(model) = model else { return Ok(ModelChoice::Demo) };
        let path = PathBuf::from(model);
        if path.is_dir() {
            Ok(ModelChoice::Directory(path))
        } else if path.exists() {
            Err(Failure::input(format!("{model} is a file; give the directory with config.json in it")))
        } else if hub::is_hub_name(model) {
            Ok(ModelChoice::Hub(model.to_owned()))
        } else {
            let form = "and no name on the hub, which looks like Qwen/Qwen3-0.6B";
            Err(Failure::input(format!("{model:?} is no directory here, {form}")))
        }
    }

    /// The name that clients see unless another is given: MODEL as typed.
    pub fn name(&self) -> String {
        match self {
            ModelChoice::Demo => "demo".into(),
            ModelChoice::Directory(path) => path.display().to_string(),
            ModelChoice::Hub(name) => name.clone(),
        }
    }
}

/// Where to compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComputeSettings {
    /// Threads that run kernels.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
}

impl ComputeSettings {
    /// Resolves `options` on this machine.
    ///
    /// # Errors
    /// A device or instruction set that is not there.
    pub fn resolve(options: ComputeOptions) -> Result<Self, Failure> {
        if options.device == Some(Device::Cuda) {
            return Err(Failure::input("this build has no CUDA backend; use --device cpu"));
        }
        // Follows the affinity of the process and the processor quota of its control group.
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        // A machine with more processors than that computes with as many as there may be.
        let threads = options.threads.unwrap_or_else(|| available().min(THREADS_MAX));
        let threads = within("threads", threads, 1..=THREADS_MAX)?;
        let isa = match options.isa {
            None => Isa::detect(),
            Some(name) => {
                let names = Isa::ALL.map(Isa::name).join(", ");
                let isa = Isa::ALL.into_iter().find(|isa| isa.name() == name);
                let isa = isa.ok_or_else(|| Failure::input(format!("--isa {name:?} is none of {names}")))?;
                if !isa.available() {
                    return Err(Failure::input(format!("--isa {name}: this processor does not have it")));
                }
                isa
            }
        };
        Ok(ComputeSettings { threads, isa })
    }
}

/// How to run a model.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Where.
    pub compute: ComputeSettings,
    /// Type of weights and KV; `None` is that on disk.
    pub dtype: Option<DType>,
    /// Tokens of prompt and answer; `None` is the model's limit.
    pub max_context: Option<usize>,
    /// Requests that run at once.
    pub max_num_seqs: usize,
    /// Prompt tokens per step.
    pub max_inject_tokens: usize,
    /// Tokens per page.
    pub page_tokens: usize,
    /// The KV pool; `None` is what requests can use and memory allows.
    pub dram: Option<Size>,
    /// The HBM tier; `None` where attention reads KV where it is.
    pub hbm: Option<Size>,
    /// Which pages give way in it.
    pub eviction: EvictionRule,
    /// How requests share it.
    pub quota_rule: QuotaRule,
    /// Whether requests for whose digests it has no room may wait with their KV in DRAM.
    pub parks: bool,
    /// Whether known beginnings of prompts are taken from the KV pool.
    pub prefix_cache: bool,
    /// Whether requests go on from the KV of sparse answers.
    pub reuses_answers: bool,
    /// Which mechanisms are at work.
    pub ladder: LadderSettings,
    /// What generated tokens attend to.
    pub sparse: SparseSettings,
}

impl EngineSettings {
    /// Resolves `options`; `max_num_seqs` is the default of the command.
    ///
    /// # Errors
    /// A value that cannot be.
    pub fn resolve(options: EngineOptions, max_num_seqs: usize) -> Result<Self, Failure> {
        let page_tokens = options.page_tokens.unwrap_or(16);
        if !PAGE_TOKENS_ALLOWED.contains(&page_tokens) {
            return Err(Failure::input(format!(
                "--page-tokens {page_tokens} is none of {PAGE_TOKENS_ALLOWED:?}"
            )));
        }
        let dtype = match options.dtype.unwrap_or(DTypeChoice::Auto) {
            DTypeChoice::Auto => None,
            DTypeChoice::Bf16 => Some(DType::Bf16),
            DTypeChoice::F16 => Some(DType::F16),
            DTypeChoice::F32 => Some(DType::F32),
        };
        let max_context =
            options.max_context.map(|tokens| within("max-context", tokens, 2..=TOKENS_MAX)).transpose()?;
        let eviction = options.eviction.map_or(EvictionRule::Bucketed, EvictionChoice::rule);
        let prefix_cache = !options.no_prefix_cache.unwrap_or(false);
        let reuses_answers = options.prefix_reuse == Some(PrefixReuseChoice::Fast);
        if reuses_answers && !prefix_cache {
            return Err(Failure::input(
                "--prefix-reuse fast: there is nothing to reuse with --no-prefix-cache; leave one of them out",
            ));
        }
        Ok(EngineSettings {
            compute: ComputeSettings::resolve(options.compute)?,
            dtype,
            max_context,
            max_num_seqs: within(
                "max-num-seqs",
                options.max_num_seqs.unwrap_or(max_num_seqs),
                1..=REQUESTS_MAX,
            )?,
            max_inject_tokens: within(
                "max-inject-tokens",
                options.max_inject_tokens.unwrap_or(512),
                1..=TOKENS_MAX,
            )?,
            page_tokens,
            dram: options.dram,
            hbm: options.hbm,
            eviction,
            parks: true,
            quota_rule: quota_rule(eviction, options.buffering.as_deref())?,
            prefix_cache,
            reuses_answers,
            ladder: LadderSettings::resolve(options.ladder, options.dram, options.hbm)?,
            sparse: SparseSettings::resolve(options.sparse)?,
        })
    }

    /// What the KV pool shall be, with the flag that says so, and what the HBM tier beside it: without offload the pool is in HBM, and
    /// there is no tier.
    pub fn memories(&self) -> (Option<Size>, &'static str, Option<Size>) {
        match self.ladder.offload {
            true => (self.dram, "--dram", self.hbm),
            false => (self.hbm, "--hbm", None),
        }
    }
}

fn quota_rule(eviction: EvictionRule, buffering: Option<&str>) -> Result<QuotaRule, Failure> {
    match buffering {
        None if eviction.shares_frames() => Ok(QuotaRule::Shared),
        Some(text) if eviction.shares_frames() => Err(Failure::input(format!(
            "--buffering {text}: there are no quotas with --eviction {}; leave it out, or choose another --eviction",
            eviction.name()
        ))),
        None | Some("auto") => Ok(QuotaRule::Adaptive),
        Some(text) => match text.parse() {
            Ok(ratio @ 0..=64) => Ok(QuotaRule::Fixed(ratio)),
            _ => {
                Err(Failure::input(format!("--buffering {text:?} is neither auto nor a number from 0 to 64")))
            }
        },
    }
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on, 0 for a free one.
    pub port: u16,
    /// Names of the model in the API; never empty, the first is the one in answers.
    pub served_model_names: Vec<String>,
    /// Keys of which clients must show one; empty lets everyone in.
    pub api_keys: Vec<ApiKey>,
    /// Origins of web pages that may call.
    pub cors_origins: Vec<String>,
    /// Bound of the waiting queue.
    pub max_waiting: usize,
    /// How long running requests may go on after SIGTERM.
    pub drain_timeout: Duration,
}

impl ServerSettings {
    /// Resolves `options` for a model that is called `model`.
    ///
    /// # Errors
    /// A value that cannot be.
    pub fn resolve(options: ServerOptions, model: &ModelChoice) -> Result<Self, Failure> {
        let names = options.served_model_name.unwrap_or_default();
        let served_model_names = if names.is_empty() { vec![model.name()] } else { names };
        let api_keys = options.api_key.unwrap_or_default();
        if served_model_names.iter().any(|name| name.trim().is_empty()) {
            return Err(Failure::input("--served-model-name is empty"));
        }
        if api_keys.iter().any(|key| key.0.trim().is_empty()) {
            return Err(Failure::input("--api-key is empty, which would let everyone in"));
        }
        let cors_origins = options.cors_origin.unwrap_or_default();
        if let Some(origin) = cors_origins.iter().find(|origin| !is_origin(origin)) {
            let form = "is no origin, which looks like https://chat.example or *";
            return Err(Failure::input(format!("--cors-origin {origin:?} {form}")));
        }
        Ok(ServerSettings {
            host: options.host.unwrap_or_else(|| "127.0.0.1".into()),
            port: options.port.unwrap_or(8000),
            served_model_names,
            api_keys,
            cors_origins,
            max_waiting: within("max-waiting", options.max_waiting.unwrap_or(256), 1..=REQUESTS_MAX)?,
            drain_timeout: Duration::from_secs(options.drain_timeout.unwrap_or(30)),
        })
    }
}

/// How to tell what happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// A filter of `tracing-subscriber`.
    pub filter: String,
    /// How lines look.
    pub format: LogFormat,
}

impl LogSettings {
    /// Resolves `options`; `level` is the default of the command.
    pub fn resolve(options: CommonOptions, level: &str) -> Self {
        LogSettings {
            filter: options.log_level.unwrap_or_else(|| level.into()),
            format: options.log_format.unwrap_or(LogFormat::Text),
        }
    }
}

/// Whether a browser could send this as `Origin`.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    text == "*" || host.is_some_and(|h| !h.is_empty() && h.chars().all(|c| c.is_ascii_graphic() && c != '/'))
}

fn within(flag: &str, value: usize, range: RangeInclusive<usize>) -> Result<usize, Failure> {
    let (least, most) = (range.start(), range.end());
    match value {
        _ if value < *least => Err(Failure::input(format!("--{flag} {value}: at least {least} is needed"))),
        _ if value > *most => Err(Failure::input(format!("--{flag} {value}: at most {most} is possible"))),
        _ => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(options: EngineOptions) -> Result<EngineSettings, String> {
        EngineSettings::resolve(options, 64).map_err(|failure| failure.line().unwrap_or_default())
    }

    #[test]
    fn defaults() {
        let settings = engine(EngineOptions::default()).expect("defaults resolve");
        assert_eq!((settings.max_num_seqs, settings.page_tokens, settings.prefix_cache), (64, 16, true));
        assert!(!settings.reuses_answers, "answers are exact");
        assert!(settings.compute.threads >= 1 && settings.compute.isa.available());
        let server =
            ServerSettings::resolve(ServerOptions::default(), &ModelChoice::Demo).expect("defaults resolve");
        assert_eq!((server.host.as_str(), server.port), ("127.0.0.1", 8000));
        assert_eq!(server.served_model_names, ["demo"]);
    }

    #[test]
    fn rules_of_eviction_come_with_those_of_quotas() {
        let rules = |eviction, buffering: Option<&str>| {
            let options =
                EngineOptions { eviction, buffering: buffering.map(str::to_owned), ..Default::default() };
            let settings = engine(options).expect("rules");
            (settings.eviction, settings.quota_rule)
        };
        assert_eq!(rules(None, None), (EvictionRule::Bucketed, QuotaRule::Adaptive));
        assert_eq!(rules(Some(EvictionChoice::Exact), Some("0")), (EvictionRule::Exact, QuotaRule::Fixed(0)));
        assert_eq!(rules(Some(EvictionChoice::Global), None), (EvictionRule::Global, QuotaRule::Shared));
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        let compute = |compute| EngineOptions { compute, ..Default::default() };
        let cases = [
            (EngineOptions { page_tokens: Some(12), ..Default::default() }, "--page-tokens 12"),
            (EngineOptions { max_num_seqs: Some(0), ..Default::default() }, "--max-num-seqs 0"),
            (EngineOptions { max_context: Some(0), ..Default::default() }, "--max-context 0"),
            (EngineOptions { max_context: Some(1), ..Default::default() }, "--max-context 1: at least 2"),
            (EngineOptions { max_inject_tokens: Some(0), ..Default::default() }, "--max-inject-tokens 0"),
            (
                EngineOptions { max_num_seqs: Some(99_999_999_999), ..Default::default() },
                "--max-num-seqs 99999999999: at most 1000000",
            ),
            (
                EngineOptions { buffering: Some("many".into()), ..Default::default() },
                "--buffering \"many\" is neither",
            ),
            (
                EngineOptions {
                    eviction: Some(EvictionChoice::Global),
                    buffering: Some("0".into()),
                    ..Default::default()
                },
                "--buffering 0: there are no quotas with --eviction global",
            ),
            (
                EngineOptions {
                    no_prefix_cache: Some(true),
                    prefix_reuse: Some(PrefixReuseChoice::Fast),
                    ..Default::default()
                },
                "--prefix-reuse fast: there is nothing to reuse with --no-prefix-cache",
            ),
            (compute(ComputeOptions { threads: Some(0), ..Default::default() }), "--threads 0"),
            (
                compute(ComputeOptions { threads: Some(5000), ..Default::default() }),
                "--threads 5000: at most 1024",
            ),
            (compute(ComputeOptions { isa: Some("sse".into()), ..Default::default() }), "scalar, avx2"),
            (compute(ComputeOptions { device: Some(Device::Cuda), ..Default::default() }), "no CUDA backend"),
        ];
        for (options, part) in cases {
            let error = engine(options).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
        for max_waiting in [0, 99_999_999_999_999] {
            let options = ServerOptions { max_waiting: Some(max_waiting), ..Default::default() };
            let error =
                ServerSettings::resolve(options, &ModelChoice::Demo).expect_err("no queue is so long");
            let line = error.line().unwrap_or_default();
            assert!(line.starts_with(&format!("--max-waiting {max_waiting}: ")), "{line}");
        }
        let no_key = ServerOptions { api_key: Some(vec![ApiKey(String::new())]), ..Default::default() };
        assert!(ServerSettings::resolve(no_key, &ModelChoice::Demo).is_err());
        for (origin, allowed) in [("*", true), ("https://a.b:1", true), ("a.b", false), ("http://a/", false)]
        {
            let options = ServerOptions { cors_origin: Some(vec![origin.into()]), ..Default::default() };
            assert_eq!(ServerSettings::resolve(options, &ModelChoice::Demo).is_ok(), allowed, "{origin}");
        }
    }

    #[test]
    fn models_are_told_apart() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("model.safetensors");
        std::fs::write(&file, "").expect("a file");
        let resolve = |model: &std::path::Path| ModelChoice::resolve(model.to_str());
        assert_eq!(resolve(directory.path()).ok(), Some(ModelChoice::Directory(directory.path().into())));
        assert_eq!(ModelChoice::resolve(Some("a/b")).ok(), Some(ModelChoice::Hub("a/b".into())));
        assert_eq!(ModelChoice::resolve(None).ok(), Some(ModelChoice::Demo));
        let line =
            |result: Result<ModelChoice, Failure>| result.err().and_then(|f| f.line()).unwrap_or_default();
        assert!(line(resolve(&file)).contains("is a file"));
        assert!(line(resolve(&directory.path().join("absent"))).contains("no directory here"));
    }
}
