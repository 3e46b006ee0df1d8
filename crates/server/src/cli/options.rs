//! What the user typed: flags, `SPARSESERVE_*` variables and the configuration file, each option in the same words.
//! Nothing is interpreted here; [`super::settings`] does that.
//!
//! A flag wins over its variable, a variable over the file, the file over the default.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ops::residency::EvictionRule;
use serde::{Deserialize, Deserializer};

use super::commands::ServeArgs;
use super::failure::Failure;
use super::ladder::LadderOptions;
use super::size::Size;

/// Where to look for more options, and how to tell what happens.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Configuration and log")]
pub struct CommonOptions {
    /// Read options from this TOML file, named like the flags without dashes before them
    #[arg(long, value_name = "FILE.toml", env = "SPARSESERVE_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// error, warn, info, debug or trace, also per crate: `warn,engine=debug` [default: info; run, bench: warn]
    #[arg(long, value_name = "LEVEL", env = "SPARSESERVE_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// How log lines look [default: text]
    #[arg(long, value_enum, env = "SPARSESERVE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Where to compute.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Device")]
pub struct ComputeOptions {
    /// Device to run on [default: auto]
    #[arg(long, value_enum, env = "SPARSESERVE_DEVICE")]
    pub device: Option<Device>,
    /// Threads that compute [default: the processors that this process may use]
    #[arg(long, env = "SPARSESERVE_THREADS")]
    pub threads: Option<usize>,
    /// Instruction set: avx512, avx2 or scalar [default: the best that the processor has]
    #[arg(long, env = "SPARSESERVE_ISA")]
    pub isa: Option<String>,
}

/// How to run a model.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Engine")]
pub struct EngineOptions {
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeOptions,
    /// Type of weights and KV [default: auto, as on disk]
    #[arg(long, value_enum, env = "SPARSESERVE_DTYPE")]
    pub dtype: Option<DTypeChoice>,
    /// Tokens of prompt and answer together [default: the model's limit]
    #[arg(long, value_name = "TOKENS", env = "SPARSESERVE_MAX_CONTEXT")]
    pub max_context: Option<usize>,
    /// Requests that run at once [default: 64; run: 1]
    #[arg(long, value_name = "REQUESTS", env = "SPARSESERVE_MAX_NUM_SEQS")]
    pub max_num_seqs: Option<usize>,
    /// Prompt tokens that one step computes at most [default: 512]
    #[arg(long, value_name = "TOKENS", env = "SPARSESERVE_MAX_INJECT_TOKENS")]
    pub max_inject_tokens: Option<usize>,
    /// Tokens per KV page: 8, 16, 32 or 64 [default: 16]
    #[arg(long, value_name = "TOKENS", env = "SPARSESERVE_PAGE_TOKENS")]
    pub page_tokens: Option<usize>,
    /// DRAM for the KV cache: 4GiB, 4GB, 60% of the memory limit [default: what requests can use and memory allows]
    #[arg(long, value_name = "SIZE", env = "SPARSESERVE_DRAM")]
    pub dram: Option<Size>,
    /// HBM for KV, apart from DRAM: 512MiB, or 10% of the KV in DRAM (with --offload false: of the memory limit). On a CPU an arena
    /// plays its part [default, and where it would hold all of the KV: attention reads KV where it is]
    #[arg(long, value_name = "SIZE", env = "SPARSESERVE_HBM")]
    pub hbm: Option<Size>,
    /// Which pages give way in HBM [default: bucketed]
    #[arg(long, value_enum, env = "SPARSESERVE_EVICTION")]
    pub eviction: Option<EvictionChoice>,
    /// HBM of a request beyond what one step needs: auto follows its misses, N is a multiple of a step's need, 0 is nothing
    /// beyond it; not with --eviction global [default: auto]
    #[arg(long, value_name = "auto|N", env = "SPARSESERVE_BUFFERING")]
    pub buffering: Option<String>,
    /// Compute every prompt, even where its beginning is known
    #[arg(long, env = "SPARSESERVE_NO_PREFIX_CACHE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true", value_parser = boolean, value_name = "BOOL")]
    pub no_prefix_cache: Option<bool>,
    /// What the next turn of a chat does about a sparse answer: compute it again, or go on from its KV [default: exact]
    #[arg(long, value_enum, env = "SPARSESERVE_PREFIX_REUSE")]
    pub prefix_reuse: Option<PrefixReuseChoice>,
    #[command(flatten)]
    #[serde(flatten)]
    pub ladder: LadderOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub sparse: SparseOptions,
}

/// What generated tokens attend to.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Sparse attention")]
pub struct SparseOptions {
    /// What generated tokens attend to unless a request says otherwise: dense, streaming, random, quest, arkvale,
    /// shadowkv, retroinfer, seerattention, replay (for benches of caches, not for serve), or auto: dense for prompts below 8192 tokens, else arkvale
    /// [default: auto; bench, eval: dense]
    #[arg(long, value_name = "NAME", env = "SPARSESERVE_POLICY")]
    pub policy: Option<String>,
    /// More policies that requests may ask for, repeatable or separated by commas [default: none]
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "SPARSESERVE_POLICIES")]
    #[serde(deserialize_with = "one_or_many")]
    pub policies: Option<Vec<String>>,
    /// Tokens that a generated token attends to per layer and KV head at most, or a share of the prompt: 1024, 12.5%
    /// [default: 12.5% with --policy auto, else 1024]
    #[arg(long, value_name = "TOKENS|%", env = "SPARSESERVE_BUDGET")]
    #[serde(deserialize_with = "text_or_number")]
    pub budget: Option<String>,
    /// An option of --policy, repeatable or separated by commas: docs/policies says which there are
    #[arg(long, value_name = "NAME=VALUE", value_delimiter = ',', env = "SPARSESERVE_POLICY_OPT")]
    #[serde(deserialize_with = "one_or_many")]
    pub policy_opt: Option<Vec<String>>,
    /// Share of generated tokens whose selection is compared with dense attention, each in one layer: 0.01 [default: 0]
    #[arg(long, value_name = "SHARE", env = "SPARSESERVE_GUARD_RATE")]
    pub guard_rate: Option<f64>,
    /// Attention mass, of 1, that a selection must cover; else the budget of its request doubles, at most twice, and after that it
    /// attends to everything [default: 0.5]
    #[arg(long, value_name = "SHARE", env = "SPARSESERVE_GUARD_MASS")]
    pub guard_mass: Option<f64>,
    /// Keys that such checks may read per generated token of a request [default: 1MiB]
    #[arg(long, value_name = "SIZE", env = "SPARSESERVE_GUARD_BYTES")]
    pub guard_bytes: Option<Size>,
    /// Write which pages each KV head selects in each step to this file, for `bench cache`; slows steps down
    #[arg(long, value_name = "FILE", env = "SPARSESERVE_RECORD_SELECTION")]
    pub record_selection: Option<PathBuf>,
}

/// How to serve.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Server")]
pub struct ServerOptions {
    /// Address to listen on; 0.0.0.0 opens it to the network [default: 127.0.0.1]
    #[arg(long, env = "SPARSESERVE_HOST")]
    pub host: Option<String>,
    /// Port to listen on, 0 for a free one [default: 8000]
    #[arg(long, env = "SPARSESERVE_PORT")]
    pub port: Option<u16>,
    /// Name of the model in the API, repeatable or separated by commas [default: MODEL as given]
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "SPARSESERVE_SERVED_MODEL_NAME")]
    #[serde(deserialize_with = "one_or_many")]
    pub served_model_name: Option<Vec<String>>,
    /// Ask clients for this key, repeatable or separated by commas [default: none]
    #[arg(
        long,
        value_name = "KEY",
        value_delimiter = ',',
        env = "SPARSESERVE_API_KEY",
        hide_env_values = true
    )]
    #[serde(deserialize_with = "one_or_many")]
    pub api_key: Option<Vec<ApiKey>>,
    /// Let web pages of this origin call, repeatable or separated by commas, `*` for all [default: none]
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', env = "SPARSESERVE_CORS_ORIGIN")]
    #[serde(deserialize_with = "one_or_many")]
    pub cors_origin: Option<Vec<String>>,
    /// Requests that may wait before new ones get 429 [default: 256]
    #[arg(long, value_name = "REQUESTS", env = "SPARSESERVE_MAX_WAITING")]
    pub max_waiting: Option<usize>,
    /// Seconds that running requests get to finish after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS", env = "SPARSESERVE_DRAIN_TIMEOUT")]
    pub drain_timeout: Option<u64>,
}

/// `--device`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The best that this build and machine have
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

/// `--dtype`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DTypeChoice {
    /// As on disk
    Auto,
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
    /// IEEE single
    F32,
}

/// `--eviction`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EvictionChoice {
    /// The request's own pages that it needed longest ago, by age up to 63 steps
    Bucketed,
    /// The request's own pages that it needed longest ago
    Exact,
    /// Whoever's pages were needed longest ago: one LRU over all requests, without quotas
    Global,
}

impl EvictionChoice {
    /// As devices know it.
    pub fn rule(self) -> EvictionRule {
        match self {
            EvictionChoice::Bucketed => EvictionRule::Bucketed,
            EvictionChoice::Exact => EvictionRule::Exact,
            EvictionChoice::Global => EvictionRule::Global,
        }
    }
}

/// `--prefix-reuse`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PrefixReuseChoice {
    /// Compute it again: answers are the same as without a prefix cache
    Exact,
    /// Go on from the KV of an answer to a request of the same policy, options and budget
    Fast,
}

/// `--log-format`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object per line
    Json,
}

/// A key that clients must show. Never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ApiKey(pub String);

impl From<String> for ApiKey {
    fn from(key: String) -> Self {
        ApiKey(key)
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// `512` as well as `"12.5%"`.
fn text_or_number<'de, D: Deserializer<'de>>(file: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a string or a whole number")]
    enum TextOrNumber {
        Text(String),
        Number(u64),
    }
    Ok(Some(match TextOrNumber::deserialize(file)? {
        TextOrNumber::Text(text) => text,
        TextOrNumber::Number(number) => number.to_string(),
    }))
}

/// A value in a file may stand for a list of one.
fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(file: D) -> Result<Option<Vec<T>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum OneOrMany<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(Some(match OneOrMany::deserialize(file)? {
        OneOrMany::One(value) => vec![value],
        OneOrMany::Many(values) => values,
    }))
}

/// The value of a switch; an empty variable is one that is not set.
fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("write true or false".into()),
    }
}

/// The value of a switch that is on unless somebody says otherwise.
pub fn switched_on(text: &str) -> Result<bool, String> {
    if text.is_empty() { Ok(true) } else { boolean(text) }
}

/// A configuration file: the options of `serve`, of which other commands take those that they have.
#[derive(Clone, Debug, Default)]
pub struct ConfigFile {
    pub model: Option<String>,
    pub server: ServerOptions,
    pub engine: EngineOptions,
    pub common: CommonOptions,
}

impl ConfigFile {
    /// Reads the file that `--config` names, or nothing.
    ///
    /// # Errors
    /// When it cannot be read, is no TOML, has a value of the wrong type, or keys that no option has.
    pub fn read(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(Self::default()) };
        let shown = path.display();
        let text =
            std::fs::read_to_string(path).map_err(|e| Failure::input(format!("cannot read {shown}: {e}")))?;
        Self::parse(&text).map_err(|e| Failure::input(format!("{shown}: {e}")))
    }

    /// The same from its text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
        let known = known_keys();
        let unknown: Vec<String> =
            table.keys().filter(|key| !known.contains(key)).map(|key| format!("`{key}`")).collect();
        if !unknown.is_empty() {
            return Err(format!("unknown {}; known are {}", unknown.join(", "), known.join(", ")));
        }
        fn part<'de, T: Deserialize<'de>>(table: &toml::Table) -> Result<T, String> {
            T::deserialize(table.clone()).map_err(|e| e.to_string())
        }
        let model = match table.get("model") {
            None => None,
            Some(toml::Value::String(name)) => Some(name.clone()),
            Some(_) => return Err("`model` is not a string".into()),
        };
        Ok(ConfigFile { model, server: part(&table)?, engine: part(&table)?, common: part(&table)? })
    }
}

/// Keys that a file may have: the long flags of `serve`, and its model.
fn known_keys() -> Vec<String> {
    let command = ServeArgs::augment_args(clap::Command::new("serve"));
    let flags = command.get_arguments().filter_map(|arg| arg.get_long()).filter(|&long| long != "config");
    std::iter::once("model").chain(flags).map(String::from).collect()
}

impl CommonOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        CommonOptions {
            config: self.config,
            log_level: self.log_level.or(file.log_level),
            log_format: self.log_format.or(file.log_format),
        }
    }
}

impl ComputeOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        ComputeOptions {
            device: self.device.or(file.device),
            threads: self.threads.or(file.threads),
            isa: self.isa.or(file.isa),
        }
    }
}

impl EngineOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        EngineOptions {
            compute: self.compute.or(file.compute),
            dtype: self.dtype.or(file.dtype),
            max_context: self.max_context.or(file.max_context),
            max_num_seqs: self.max_num_seqs.or(file.max_num_seqs),
            max_inject_tokens: self.max_inject_tokens.or(file.max_inject_tokens),
            page_tokens: self.page_tokens.or(file.page_tokens),
            dram: self.dram.or(file.dram),
            hbm: self.hbm.or(file.hbm),
            eviction: self.eviction.or(file.eviction),
            buffering: self.buffering.or(file.buffering),
            no_prefix_cache: self.no_prefix_cache.or(file.no_prefix_cache),
            prefix_reuse: self.prefix_reuse.or(file.prefix_reuse),
            ladder: self.ladder.or(file.ladder),
            sparse: self.sparse.or(file.sparse),
        }
    }

    /// The same, and completed from the preset that one of them names.
    pub fn complete(self, file: Self) -> Self {
        let options = self.or(file);
        match options.ladder.preset {
            None => options,
            Some(preset) => preset.complete(options),
        }
    }
}

impl SparseOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        SparseOptions {
            policy: self.policy.or(file.policy),
            policies: self.policies.or(file.policies),
            budget: self.budget.or(file.budget),
            policy_opt: self.policy_opt.or(file.policy_opt),
            guard_rate: self.guard_rate.or(file.guard_rate),
            guard_mass: self.guard_mass.or(file.guard_mass),
            guard_bytes: self.guard_bytes.or(file.guard_bytes),
            record_selection: self.record_selection.or(file.record_selection),
        }
    }
}

impl ServerOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        ServerOptions {
            host: self.host.or(file.host),
            port: self.port.or(file.port),
            served_model_name: self.served_model_name.or(file.served_model_name),
            api_key: self.api_key.or(file.api_key),
            cors_origin: self.cors_origin.or(file.cors_origin),
            max_waiting: self.max_waiting.or(file.max_waiting),
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::commands::Cli;
    use crate::cli::ladder::TransferChoice;
    use crate::cli::presets::Preset;

    #[test]
    fn flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_serve_has_its_variable() {
        let command = ServeArgs::augment_args(clap::Command::new("serve"));
        for arg in command.get_arguments() {
            let variable = arg.get_env().and_then(|v| v.to_str()).unwrap_or_default();
            let expected = format!("SPARSESERVE_{}", arg.get_id().as_str().to_uppercase());
            assert_eq!(variable, expected);
        }
    }

    #[test]
    fn a_file_sets_every_option() {
        let text = r#"
            model = "dir"
            host = "::1"
            port = 1
            served-model-name = ["a", "b"]
            api-key = ["k"]
            cors-origin = ["*"]
            max-waiting = 2
            drain-timeout = 3
            device = "cpu"
            threads = 4
            isa = "scalar"
            dtype = "bf16"
            max-context = 5
            max-num-seqs = 6
            max-inject-tokens = 7
            page-tokens = 8
            dram = "60%"
            hbm = "10%"
            eviction = "exact"
            buffering = "auto"
            no-prefix-cache = true
            prefix-reuse = "fast"
            preset = "spin"
            offload = false
            transfer = "per-page"
            emulate-link = "25,4"
            prefill = "segmented"
            admission = "working-set"
            working-set-steps = 5
            max-skips = 6
            max-prefills = 7
            policy = "quest"
            policies = ["dense"]
            budget = 9
            policy-opt = "x"
            guard-rate = 1
            guard-mass = 0.25
            guard-bytes = "2MiB"
            record-selection = "trace"
            log-level = "debug"
            log-format = "json"
        "#;
        let file = ConfigFile::parse(text).expect("valid");
        assert_eq!(text.matches('=').count(), known_keys().len(), "the text above sets every key");
        assert_eq!(file.model.as_deref(), Some("dir"));
        assert_eq!(file.server.port, Some(1));
        assert_eq!(file.server.drain_timeout, Some(3));
        assert_eq!(file.engine.compute.threads, Some(4));
        assert_eq!(
            (file.engine.dram, file.engine.hbm),
            (Some(Size::Percent(60.0)), Some(Size::Percent(10.0)))
        );
        assert_eq!(file.engine.eviction, Some(EvictionChoice::Exact));
        assert_eq!(file.engine.buffering.as_deref(), Some("auto"));
        assert_eq!(file.engine.no_prefix_cache, Some(true));
        assert_eq!(file.engine.prefix_reuse, Some(PrefixReuseChoice::Fast));
        assert_eq!(
            (file.engine.ladder.preset, file.engine.ladder.offload),
            (Some(Preset::Spin), Some(false))
        );
        assert_eq!(file.engine.ladder.transfer, Some(TransferChoice::PerPage));
        assert_eq!(file.engine.ladder.emulate_link.as_deref(), Some("25,4"));
        assert_eq!(file.engine.ladder.max_prefills, Some(7));
        assert_eq!(file.engine.sparse.policy.as_deref(), Some("quest"));
        assert_eq!(file.engine.sparse.budget.as_deref(), Some("9"));
        assert_eq!((file.engine.sparse.guard_rate, file.engine.sparse.guard_mass), (Some(1.0), Some(0.25)));
        assert_eq!(file.engine.sparse.guard_bytes, Some(Size::Bytes(2 << 20)));
        assert_eq!(file.common.log_format, Some(LogFormat::Json));
        assert!(!format!("{file:?}").contains("\"k\""), "keys are never printed");
    }

    #[test]
    fn a_list_of_one_needs_no_brackets() {
        let text = "api-key = \"k\"\nserved-model-name = \"a\"\ncors-origin = \"*\"\n";
        let server = ConfigFile::parse(text).expect("valid").server;
        assert_eq!(server.api_key, Some(vec![ApiKey("k".into())]));
        assert_eq!(
            (server.served_model_name, server.cors_origin),
            (Some(vec!["a".into()]), Some(vec!["*".into()]))
        );
        assert_eq!(ConfigFile::parse("").expect("valid").server.api_key, None);
    }

    #[test]
    fn switches_are_true_or_false() {
        assert_eq!(["1", "Yes", "off", ""].map(boolean), [Ok(true), Ok(true), Ok(false), Ok(false)]);
        assert!(boolean("maybe").is_err());
        assert_eq!(["", "0"].map(switched_on), [Ok(true), Ok(false)]);
    }

    #[test]
    fn files_that_are_wrong_say_why() {
        let error = |text: &str| ConfigFile::parse(text).expect_err(text);
        let unknown = error("prot = 1\nport = 2\n[engine]\nx = 1\n");
        assert!(unknown.starts_with("unknown `engine`, `prot`; known are model, "), "{unknown}");
        assert!(error("port = 'x'").contains("port"), "{}", error("port = 'x'"));
        assert!(error("dram = '4XB'").contains("512MiB"));
        assert!(error("dram = -1").contains("`-1` is not a size"), "{}", error("dram = -1"));
        assert!(error("api-key = 1").contains("a string or a list of strings"), "{}", error("api-key = 1"));
        assert!(error("port = ").contains("line 1"));
        assert!(error("model = 1").contains("model"));
    }

    #[test]
    fn typed_wins_over_file() {
        let typed = ServerOptions { port: Some(1), ..Default::default() };
        let file = ServerOptions { port: Some(2), host: Some("h".into()), ..Default::default() };
        let merged = typed.or(file);
        assert_eq!((merged.port, merged.host.as_deref()), (Some(1), Some("h")));
    }
}
