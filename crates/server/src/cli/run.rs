//! `sparseserve run`: a chat in the terminal, or one answer for a pipe. The engine runs inside, without HTTP.

use std::io::{Read, Write};
use std::sync::Arc;

use engine::{Disconnected, FinishReason, Handle, Refusal, Request, Sink, Stopping, Update, Usage};
use ops::sample::SamplingParams;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};
use sparse::Budget;
use sparseserve::text::{Decoder, RenderInput, Sandbox};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::commands::RunArgs;
use super::failure::Failure;
use super::load::{self, EngineThread, Prepared};
use super::options::ConfigFile;
use super::settings::{EngineSettings, LogSettings, ModelChoice};
use super::sparse::SparseSettings;
use super::text::TextSide;
use super::{log, screen};

/// Runs the command.
pub fn run(args: RunArgs) -> Result<(), Failure> {
    let file = ConfigFile::read(args.common.config.as_deref())?;
    let _log = log::start(&LogSettings::resolve(args.common.clone().or(file.common), "warn"))?;
    let choice = ModelChoice::resolve(args.model.as_deref().or(file.model.as_deref()))?;
    let settings = EngineSettings::resolve(args.engine.clone().complete(file.engine), 1)?;
    check_sampling(&args)?;
    let prompt = match args.prompt.as_deref() {
        Some("-") => Some(read_stdin()?),
        prompt => prompt.map(str::to_owned),
    };
    let source = load::source(&choice)?;
    let text = TextSide::read(&source)?;
    let prepared = Prepared::new(source, &settings)?;
    let greeting = format!(
        "{}: {}, {} parameters, {}, {}\n/clear forgets the conversation, /exit ends it, Ctrl-C stops an answer",
        choice.name(),
        prepared.config.architecture,
        screen::parameters(model::num_parameters(&prepared.config)),
        prepared.dtype,
        screen::threads(prepared.device.threads),
    );
    let engine = EngineThread::start(prepared, &settings, 1)?;
    // The progress bar and the prompt would share a line.
    engine.wait_until_loaded();
    let sampling = sampling(&args, &text)?;
    let max_tokens = args.max_tokens.or(text.defaults.max_new_tokens).unwrap_or(u32::MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let template = text.template.clone().map(Sandbox::of_this_program).transpose()?;
    let handle = engine.handle.clone();
    let mut chat = Chat {
        handle,
        text,
        template,
        reuse: settings.reuses_answers.then_some(settings.sparse.budget),
        sparse: settings.sparse,
        sampling,
        max_tokens,
        runtime,
        messages: Vec::new(),
    };
    chat.system(args.system.as_deref())?;
    let result = match prompt {
        Some(prompt) => chat.answer_once(&prompt, args.json, &choice.name()),
        None => {
            eprintln!("{greeting}");
            chat.converse(args.system.as_deref())
        }
    };
    drop(chat);
    // What went wrong in the engine explains better why there is no answer.
    engine.finish()?;
    result
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|e| Failure::input(format!("standard input: {e}")))?;
    Ok(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
}

fn check_sampling(args: &RunArgs) -> Result<(), Failure> {
    let bad = |flag: &str, allowed: &str| Err(Failure::input(format!("--{flag} must be {allowed}")));
    if args.temperature.is_some_and(|t| !(0.0..=100.0).contains(&t)) {
        return bad("temperature", "between 0 and 100");
    }
    if args.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return bad("top-p", "above 0 and at most 1");
    }
    if args.max_tokens == Some(0) {
        return bad("max-tokens", "at least 1");
    }
    Ok(())
}

/// What the user says, else what the model says, else the distribution as it is.
fn sampling(args: &RunArgs, text: &TextSide) -> Result<SamplingParams, Failure> {
    let (own, neutral) = (&text.defaults, SamplingParams::default());
    let temperature = args.temperature.or(own.temperature).unwrap_or(neutral.temperature);
    let seed = match args.seed {
        Some(seed) => seed,
        // Nothing is drawn by lot, and nothing else that goes by the seed should differ from run to run.
        None if temperature == 0.0 => 0,
        None => getrandom::u64().map_err(|e| Failure::runtime(format!("no random numbers: {e}")))?,
    };
    Ok(SamplingParams {
        temperature,
        top_p: args.top_p.or(own.top_p).unwrap_or(neutral.top_p),
        top_k: args.top_k.or(own.top_k).unwrap_or(neutral.top_k),
        min_p: own.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: own.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        seed,
        ..neutral
    })
}

/// A conversation.
struct Chat {
    handle: Handle,
    text: TextSide,
    template: Option<Sandbox>,
    sparse: SparseSettings,
    /// The budget, where turns go on from the KV of sparse answers.
    reuse: Option<Budget>,
    sampling: SamplingParams,
    max_tokens: u32,
    runtime: tokio::runtime::Runtime,
    messages: Vec<Map<String, Value>>,
}

/// How an answer came out.
struct Answer {
    text: String,
    /// `None` when the user stopped it.
    end: Option<(FinishReason, Usage)>,
}

impl Chat {
    fn say(&mut self, role: &str, content: &str) {
        self.messages
            .push(Map::from_iter([("role".into(), role.into()), ("content".into(), content.into())]));
    }

    fn system(&mut self, content: Option<&str>) -> Result<(), Failure> {
        let Some(content) = content else { return Ok(()) };
        if self.template.is_none() {
            return Err(Failure::input("--system needs a model with a chat template"));
        }
        self.say("system", content);
        Ok(())
    }

    fn answer_once(&mut self, prompt: &str, as_json: bool, model: &str) -> Result<(), Failure> {
        self.say("user", prompt);
        let mut out = std::io::stdout().lock();
        let answer = self.answer(&mut |piece| {
            if as_json {
                return Ok(());
            }
            out.write_all(piece.as_bytes())?;
            out.flush()
        })?;
        let Some((reason, usage)) = answer.end else {
            return Err(Failure::runtime("interrupted"));
        };
        if as_json {
            let object = json!({
                "model": model,
                "text": answer.text,
                "finish_reason": match reason {
                    FinishReason::Length => "length",
                    FinishReason::EndToken(_) | FinishReason::Stopped => "stop",
                },
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.generated_tokens,
                    "total_tokens": usage.prompt_tokens + usage.generated_tokens,
                    "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                },
            });
            write!(out, "{object}")?;
        }
        writeln!(out)?;
        Ok(())
    }

    fn converse(&mut self, system: Option<&str>) -> Result<(), Failure> {
        let terminal = |e: ReadlineError| Failure::runtime(format!("terminal: {e}"));
        let mut editor = DefaultEditor::new().map_err(terminal)?;
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(terminal(error)),
            };
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => return Ok(()),
                "/clear" => {
                    self.messages.clear();
                    self.system(system)?;
                    continue;
                }
                command if command.starts_with('/') => {
                    eprintln!("{command} is unknown; there are /clear and /exit");
                    continue;
                }
                said => self.say("user", said),
            }
            // History is a convenience.
            let _ = editor.add_history_entry(&line);
            self.reply()?;
        }
    }

    /// Answers the last message and keeps the answer, or takes the message back when it cannot be answered.
    fn reply(&mut self) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let answer = self.answer(&mut |piece| {
            out.write_all(piece.as_bytes())?;
            out.flush()
        });
        match answer {
            Ok(answer) => {
                writeln!(out)?;
                if matches!(answer.end, Some((FinishReason::Length, _))) {
                    eprintln!("(cut at --max-tokens or at the end of the context)");
                }
                self.say("assistant", &answer.text);
                Ok(())
            }
            Err(Failure::Input(error)) => {
                self.messages.pop();
                eprintln!("{error:#} (/clear forgets the conversation)");
                Ok(())
            }
            Err(failure) => Err(failure),
        }
    }

    /// The tokens of the conversation. A model without a chat template continues the last message.
    fn prompt(&self) -> Result<Vec<u32>, Failure> {
        let tokenizer = &self.text.tokenizer;
        let tokens = match &self.template {
            None => {
                let last = self.messages.last().and_then(|m| m.get("content")).and_then(Value::as_str);
                tokenizer.encode(last.unwrap_or_default(), true)
            }
            Some(template) => {
                let messages = self.messages.clone();
                let input = RenderInput { messages, add_generation_prompt: true, variables: Map::new() };
                let text = self.runtime.block_on(template.render(&input));
                tokenizer.encode(&text.map_err(Failure::input)?, false)
            }
        };
        tokens.map_err(Failure::input)
    }

    /// Has the conversation answered, and shows the answer piece by piece. Ctrl-C stops it.
    fn answer(&mut self, show: &mut dyn FnMut(&str) -> std::io::Result<()>) -> Result<Answer, Failure> {
        let prompt = self.prompt()?;
        let end_tokens = self.text.defaults.end_tokens.clone();
        let mut decoder = Decoder::new(Arc::clone(&self.text.tokenizer), &prompt, true);
        let (sender, mut updates) = unbounded_channel();
        let sparse = self.sparse.method(prompt.len())?;
        let request = Request {
            prompt,
            sampling: self.sampling.clone(),
            stopping: Stopping { max_tokens: self.max_tokens, min_tokens: 0, end_tokens: end_tokens.clone() },
            logprobs: None,
            prompt_logprobs: None,
            sparse,
            reuse: self.reuse,
            priority: 0,
        };
        let id = self.handle.submit(request, Box::new(Channel(sender))).map_err(refused)?;
        let mut text = String::new();
        self.runtime.block_on(async {
            loop {
                let update = tokio::select! {
                    update = updates.recv() => update,
                    _ = tokio::signal::ctrl_c() => {
                        self.handle.abort(id);
                        return Ok(Answer { text, end: None });
                    }
                };
                let piece = match update {
                    Some(Update::Token { token, .. }) if end_tokens.contains(&token) => continue,
                    Some(Update::Token { token, .. }) => decoder.push(token),
                    Some(Update::PromptLogprobs(_)) => continue,
                    Some(Update::Finished { reason, usage }) => {
                        let rest = decoder.finish();
                        show(&rest)?;
                        return Ok(Answer { text: text + &rest, end: Some((reason, usage)) });
                    }
                    Some(Update::Failed(cause)) => return Err(Failure::runtime(cause)),
                    None => return Err(Failure::runtime("the engine has stopped")),
                };
                show(&piece)?;
                text += &piece;
            }
        })
    }
}

/// Requests that cannot be are the user's; those that came at the wrong time are not.
fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Invalid(_) | Refusal::NeverFits(_) => Failure::Input(refusal.into()),
        Refusal::QueueFull { .. } | Refusal::ShuttingDown => Failure::Runtime(refusal.into()),
    }
}

/// Carries updates from the engine's thread to the terminal.
struct Channel(UnboundedSender<Update>);

impl Sink for Channel {
    fn send(&mut self, update: Update) -> Result<(), Disconnected> {
        self.0.send(update).map_err(|_| Disconnected)
    }
}
