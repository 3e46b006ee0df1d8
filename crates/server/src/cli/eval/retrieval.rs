//! `sparseserve eval retrieval`: needle questions under policies and budgets, asked as a client would ask them.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};

use engine::{Attended, Disconnected, Handle, Request, Sink, Sparse, Stopping, Update};
use indicatif::ProgressBar;
use ops::Random;
use ops::sample::SamplingParams;
use serde::Serialize;
use serde_json::json;
use sparse::{Budget, Served, Variant};

use super::tasks::{Context, Question, Task, context};
use crate::cli::commands::EvalRetrievalArgs;
use crate::cli::failure::Failure;
use crate::cli::load::{self, EngineThread, Prepared};
use crate::cli::log;
use crate::cli::options::ConfigFile;
use crate::cli::settings::{EngineSettings, LogSettings, ModelChoice};
use crate::cli::text::TextSide;

/// Questions that run at once.
const MAX_NUM_SEQS: usize = 16;
/// Tokens of an answer at most; the longest that is right has 7 of the built-in model's.
const ANSWER_TOKENS: u32 = 24;
/// Room for question and answer beside the text.
const QUESTION_TOKENS: usize = 96;
/// Depths that are told apart.
const DEPTHS: usize = 5;

/// What one policy answered under one budget.
#[derive(Clone, Debug, Default, Serialize)]
struct Cell {
    asked: usize,
    correct: usize,
    /// The same by depth of the fact, fifths of the text.
    by_depth: [(usize, usize); DEPTHS],
    attended_tokens: f64,
    steps: u64,
}

/// Which cell: task, tokens of text, number of the variant, number of the budget.
type Key = (Task, usize, usize, usize);

impl Cell {
    fn add(&mut self, correct: bool, depth: f64, attended: Option<Attended>) {
        let fifth = ((depth * DEPTHS as f64) as usize).min(DEPTHS - 1);
        let hit = usize::from(correct);
        (self.asked, self.correct) = (self.asked + 1, self.correct + hit);
        let (asked, correct) = &mut self.by_depth[fifth];
        (*asked, *correct) = (*asked + 1, *correct + hit);
        if let Some(attended) = attended {
            self.attended_tokens += attended.tokens;
            self.steps += u64::from(attended.steps);
        }
    }

    fn accuracy(&self) -> f64 {
        self.correct as f64 / self.asked.max(1) as f64
    }
}

/// Everything that is asked, and of whom.
struct Evaluation {
    handle: Handle,
    text: TextSide,
    variants: Vec<Variant>,
    budgets: Vec<Budget>,
    /// Whether an answer need only contain what is right.
    contains: bool,
    cells: BTreeMap<Key, Cell>,
}

/// Runs the command.
pub fn run(args: EvalRetrievalArgs) -> Result<(), Failure> {
    let file = ConfigFile::read(args.common.config.as_deref())?;
    let _log = log::start(&LogSettings::resolve(args.common.clone().or(file.common), "warn"))?;
    let choice = ModelChoice::resolve(args.model.as_deref().or(file.model.as_deref()))?;
    let mut engine = args.engine.clone().complete(file.engine);
    engine.sparse.policy.get_or_insert_with(|| "dense".into());
    let mut settings = EngineSettings::resolve(engine, MAX_NUM_SEQS)?;
    let (served, variants) = Served::variants(&args.compare).map_err(Failure::input)?;
    let budgets = args.budgets.iter().map(|text| text.parse()).collect::<Result<Vec<Budget>, _>>();
    let budgets = budgets.map_err(Failure::input)?;
    if args.lengths.is_empty() || budgets.is_empty() || args.contexts == 0 || args.questions == 0 {
        return Err(Failure::input("--lengths, --budgets, --contexts and --questions must be at least one"));
    }
    settings.sparse.served = served;
    let longest = args.lengths.iter().copied().fold(0, usize::max);
    let source = load::source(&choice)?;
    let text = TextSide::read(&source)?;
    let limit = model::ModelConfig::read(&source)?.context_limit();
    settings.max_context.get_or_insert((longest + QUESTION_TOKENS).min(limit));
    let prepared = Prepared::new(source, &settings)?;
    let max_context = prepared.max_context;
    let num_requests = args.questions * variants.len() * budgets.len();
    let engine = EngineThread::start(prepared, &settings, num_requests.max(1))?;
    engine.wait_until_loaded();

    let tasks = if args.tasks.is_empty() { Task::ALL.to_vec() } else { args.tasks.clone() };
    let mut evaluation = Evaluation {
        handle: engine.handle.clone(),
        text,
        variants,
        budgets,
        contains: args.contains,
        cells: BTreeMap::new(),
    };
    let bar = ProgressBar::new((tasks.len() * args.lengths.len() * args.contexts) as u64);
    for &length in &args.lengths {
        let tokens = length.min(max_context).saturating_sub(QUESTION_TOKENS);
        for &task in &tasks {
            for number in 0..args.contexts {
                let mut random = Random::keyed(args.seed, (length * 1000 + number) as u64);
                let tokenizer = &evaluation.text.tokenizer;
                let count = |text: &str| tokenizer.encode(text, false).map_or(text.len(), |ids| ids.len());
                let context = context(task, tokens, args.questions, &mut random, &count);
                evaluation.ask_all(task, length, &context)?;
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    let report = evaluation.report(&args, &choice.name());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report).map_err(Failure::runtime)?)
            .map_err(|e| Failure::input(format!("{}: {e}", path.display())))?;
    }
    let result = evaluation.print(&mut std::io::stdout().lock());
    drop(evaluation);
    engine.finish()?;
    Ok(result?)
}

impl Evaluation {
    /// Asks every question about a text under every policy and budget. The text is prefilled once, by the first question;
    /// the others find it in the prefix cache.
    fn ask_all(&mut self, task: Task, length: usize, context: &Context) -> Result<(), Failure> {
        let mut waiting = Vec::new();
        for (number, question) in context.questions.iter().enumerate() {
            let prompt = format!("{}\n{}", context.text, question.text);
            let prompt = self.text.tokenizer.encode(&prompt, true).map_err(Failure::input)?;
            if number == 0 {
                self.ask(prompt.clone(), None)?.wait()?;
            }
            for (v, variant) in self.variants.iter().enumerate() {
                for (b, budget) in self.budgets.iter().enumerate() {
                    // Dense attention has no budget.
                    if variant.method.is_none() && b > 0 {
                        continue;
                    }
                    let budget = budget.tokens(prompt.len());
                    let sparse = variant.method.map(|method| Sparse { method, budget });
                    waiting.push(((task, length, v, b), question, self.ask(prompt.clone(), sparse)?));
                }
            }
        }
        for (key, question, answer) in waiting {
            let (tokens, attended) = answer.wait()?;
            let correct = self.is_correct(&tokens, question)?;
            self.cells.entry(key).or_default().add(correct, question.depth, attended);
        }
        Ok(())
    }

    fn ask(&self, prompt: Vec<u32>, sparse: Option<Sparse>) -> Result<Answer, Failure> {
        let (sender, updates) = channel();
        let request = Request {
            prompt,
            sampling: SamplingParams { temperature: 0.0, ..Default::default() },
            stopping: Stopping {
                max_tokens: ANSWER_TOKENS,
                min_tokens: 0,
                end_tokens: self.text.defaults.end_tokens.clone(),
            },
            logprobs: None,
            prompt_logprobs: None,
            sparse,
            reuse: None,
            priority: 0,
        };
        self.handle.submit(request, Box::new(Updates(sender))).map_err(Failure::input)?;
        Ok(Answer { updates })
    }

    fn is_correct(&self, tokens: &[u32], question: &Question) -> Result<bool, Failure> {
        let text = self.text.tokenizer.decode(tokens, true).map_err(Failure::runtime)?;
        let exact = text.trim() == question.answer;
        Ok(exact || self.contains && text.contains(question.answer.trim_end_matches('.')))
    }

    /// One table per task and length: policies down, budgets across.
    fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let mut groups: Vec<(Task, usize)> = self.cells.keys().map(|k| (k.0, k.1)).collect();
        groups.dedup();
        for (task, length) in groups {
            let asked =
                self.cells.iter().find(|(k, _)| (k.0, k.1) == (task, length)).map_or(0, |c| c.1.asked);
            writeln!(out, "\n{}, {length} tokens, {asked} questions\n", task.name())?;
            let budgets: Vec<String> = self.budgets.iter().map(|b| format!(" {b} |")).collect();
            writeln!(out, "| policy |{}\n|---|{}", budgets.concat(), "---|".repeat(budgets.len()))?;
            for (v, variant) in self.variants.iter().enumerate() {
                let cells = (0..self.budgets.len()).map(|b| match self.cells.get(&(task, length, v, b)) {
                    Some(cell) => format!(" {:.3} |", cell.accuracy()),
                    None => " |".into(),
                });
                writeln!(out, "| {} |{}", variant.name, cells.collect::<String>())?;
            }
        }
        Ok(())
    }

    fn report(&self, args: &EvalRetrievalArgs, model: &str) -> serde_json::Value {
        let cells = self.cells.iter().map(|((task, length, v, b), cell)| {
            let variant = &self.variants[*v];
            json!({
                "task": task.name(),
                "length": length,
                "policy": variant.name,
                "budget": variant.method.map(|_| self.budgets[*b].to_string()),
                "asked": cell.asked,
                "correct": cell.correct,
                "accuracy": cell.accuracy(),
                "by_depth": cell.by_depth,
                "attended_tokens_per_step": cell.attended_tokens / cell.steps.max(1) as f64,
            })
        });
        json!({
            "model": model, "seed": args.seed, "contexts": args.contexts, "questions": args.questions,
            "cells": cells.collect::<Vec<_>>(),
        })
    }
}

/// An answer in the making.
struct Answer {
    updates: Receiver<Update>,
}

impl Answer {
    /// Its tokens, and what they attended to.
    fn wait(self) -> Result<(Vec<u32>, Option<Attended>), Failure> {
        let mut tokens = Vec::new();
        loop {
            match self.updates.recv() {
                Ok(Update::Token { token, .. }) => tokens.push(token),
                Ok(Update::PromptLogprobs(_)) => {}
                Ok(Update::Finished { usage, .. }) => return Ok((tokens, usage.attended)),
                Ok(Update::Failed(cause)) => return Err(Failure::runtime(cause)),
                Err(_) => return Err(Failure::runtime("the engine has stopped")),
            }
        }
    }
}

struct Updates(Sender<Update>);

impl Sink for Updates {
    fn send(&mut self, update: Update) -> Result<(), Disconnected> {
        self.0.send(update).map_err(|_| Disconnected)
    }
}
