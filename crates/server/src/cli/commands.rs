//! The commands and their own arguments; what several of them share is in [`super::options`].

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::eval::Task;
use super::options::{CommonOptions, ComputeOptions, EngineOptions, EvictionChoice, ServerOptions};
use super::size::Size;

/// An LLM server for long contexts.
#[derive(Debug, Parser)]
#[command(name = "sparseserve", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model through the OpenAI API
    Serve(ServeArgs),
    /// Chat with a model in the terminal
    Run(RunArgs),
    /// Tell what a model is: architecture, sizes, KV bytes per token, tokenizer, template
    Inspect(InspectArgs),
    /// Measure this machine
    Bench(BenchArgs),
    /// Measure how well sparse policies answer, and what they select
    Eval(EvalArgs),
}

const MODEL_HELP: &str =
    "A Hugging Face directory, a hub name (Qwen/Qwen3-0.6B), or nothing for the built-in demo model";

/// `sparseserve serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[arg(help = MODEL_HELP, env = "SPARSESERVE_MODEL")]
    pub model: Option<String>,
    #[command(flatten)]
    pub server: ServerOptions,
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub common: CommonOptions,
}

/// `sparseserve run`
#[derive(Debug, Args)]
pub struct RunArgs {
    #[arg(help = MODEL_HELP, env = "SPARSESERVE_MODEL")]
    pub model: Option<String>,
    /// Answer this once and exit; `-` reads it from standard input
    #[arg(short, long)]
    pub prompt: Option<String>,
    /// With --prompt: print one JSON object with text and usage
    #[arg(long, requires = "prompt")]
    pub json: bool,
    /// System message
    #[arg(long)]
    pub system: Option<String>,
    /// Softness of the choice, 0 for the likeliest token [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the likeliest tokens that hold this share of the probability [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep this many of the likeliest tokens, 0 for all [default: the model's]
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Tokens to generate at most [default: what the context allows]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Key of the random stream [default: another one each time]
    #[arg(long)]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub common: CommonOptions,
}

/// `sparseserve inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    #[arg(help = MODEL_HELP, env = "SPARSESERVE_MODEL")]
    pub model: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `sparseserve bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: Bench,
}

/// What `bench` measures.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Kernels, as a share of what this machine can do at most
    Kernels(BenchKernelsArgs),
    /// A whole model's prefill and decode, as a share of what its bytes and operations allow
    Engine(Box<BenchEngineArgs>),
    /// What caches of pages would have hit, by eviction rule and size, for selections that were recorded
    Cache(BenchCacheArgs),
    /// Bytes of the tables that lead from pages to frames, for a large model, beside flat tables
    Metadata(BenchMetadataArgs),
}

/// `sparseserve bench kernels`
#[derive(Debug, Args)]
pub struct BenchKernelsArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: ComputeOptions,
}

/// `sparseserve bench engine`
#[derive(Debug, Args)]
pub struct BenchEngineArgs {
    #[arg(help = MODEL_HELP, env = "SPARSESERVE_MODEL")]
    pub model: Option<String>,
    /// Tokens of context that each sequence has when decoding begins
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub context: usize,
    /// Sequences that decode together
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Write the KV of the context directly, with random values of this seed, instead of prefilling it
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub filled: u64,
    /// Decode steps to time
    #[arg(long, default_value_t = 64)]
    pub steps: usize,
    /// Also time the prefill of a prompt of this length
    #[arg(long, value_name = "TOKENS")]
    pub prefill_tokens: Option<usize>,
    /// Take selections from this trace of --record-selection instead of the policy's
    #[arg(long, value_name = "TRACE")]
    pub replay_selection: Option<PathBuf>,
    /// Also tell what each operation of a decode step takes
    #[arg(long)]
    pub profile: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub common: CommonOptions,
}

/// `sparseserve bench cache`
#[derive(Debug, Args)]
pub struct BenchCacheArgs {
    /// What --record-selection wrote
    #[arg(value_name = "TRACE")]
    pub trace: PathBuf,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
}

/// `sparseserve bench metadata`
#[derive(Debug, Args)]
pub struct BenchMetadataArgs {
    /// Layers
    #[arg(long, default_value_t = 80)]
    pub layers: usize,
    /// KV heads
    #[arg(long, default_value_t = 8)]
    pub kv_heads: usize,
    /// Channels per head
    #[arg(long, default_value_t = 128)]
    pub head_dim: usize,
    /// Tokens per page: 8, 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub page_tokens: usize,
    /// Tokens of context of each request
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "32768,131072")]
    pub contexts: Vec<usize>,
    /// Requests at once
    #[arg(long, value_delimiter = ',', default_value = "8,32")]
    pub requests: Vec<usize>,
    /// HBM for cached pages
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "8GiB,24GiB,64GiB")]
    pub hbm: Vec<Size>,
    /// Which pages give way in HBM
    #[arg(long, value_enum, default_value = "bucketed")]
    pub eviction: EvictionChoice,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `sparseserve eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What to evaluate.
    #[command(subcommand)]
    pub what: Eval,
}

/// What `eval` evaluates.
#[derive(Debug, Subcommand)]
pub enum Eval {
    /// Answers to questions about facts in long texts, under policies and budgets
    Retrieval(Box<EvalRetrievalArgs>),
    /// What a policy selects from tensors in a file, and what attention makes of it
    Selection(EvalSelectionArgs),
}

/// `sparseserve eval retrieval`
#[derive(Debug, Args)]
pub struct EvalRetrievalArgs {
    #[arg(help = MODEL_HELP, env = "SPARSESERVE_MODEL")]
    pub model: Option<String>,
    /// Policies to compare, separated by commas; options follow after colons: quest:partition=32:dense-layers=1
    #[arg(
        long,
        value_name = "POLICY",
        value_delimiter = ',',
        default_value = "dense,streaming,random,quest,arkvale,shadowkv"
    )]
    pub compare: Vec<String>,
    /// Budgets to try, in tokens or as shares of the prompt
    #[arg(long, value_name = "TOKENS|%", value_delimiter = ',', default_value = "64,128,256,512,1024")]
    pub budgets: Vec<String>,
    /// Tokens of text
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "8192")]
    pub lengths: Vec<usize>,
    /// Kinds of questions [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub tasks: Vec<Task>,
    /// Texts per kind and length
    #[arg(long, default_value_t = 10)]
    pub contexts: usize,
    /// Questions per text
    #[arg(long, default_value_t = 10)]
    pub questions: usize,
    /// Of texts and questions
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Accept an answer that contains the right one
    #[arg(long)]
    pub contains: bool,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub common: CommonOptions,
}

/// `sparseserve eval selection`
#[derive(Debug, Args)]
pub struct EvalSelectionArgs {
    /// Tensors k and v [tokens, kv_heads, head_dim] after RoPE and q [q_heads, head_dim], f32; metadata prompt_tokens,
    /// rope_theta where a gate needs it, and policy, budget and options where no flag gives them. k_pre and q_pre are not read:
    /// as in serving, what was before RoPE is had by the inverse rotation
    #[arg(value_name = "IN.safetensors")]
    pub input: PathBuf,
    /// Where indptr, indices, out, out_dense, lse and lse_dense go; one list of indices per KV head, or one for all of them with
    /// scope=layer
    #[arg(long, value_name = "OUT.safetensors")]
    pub out: PathBuf,
    /// The policy
    #[arg(long, value_name = "NAME")]
    pub policy: Option<String>,
    /// Tokens to attend to at most, or a share of the prompt
    #[arg(long, value_name = "TOKENS|%")]
    pub budget: Option<String>,
    /// An option of the policy, repeatable or separated by commas
    #[arg(long, value_name = "NAME=VALUE", value_delimiter = ',')]
    pub policy_opt: Option<Vec<String>>,
    /// Tokens per page: 8, 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub page_tokens: usize,
}
