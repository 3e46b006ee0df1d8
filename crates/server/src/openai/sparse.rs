//! `sparse` in a request body: what its generated tokens attend to.

use std::collections::BTreeMap;

use engine::Sparse;
use serde_json::{Map, Value};
use sparse::{Budget, Choice, Options};

use super::{ApiError, Fields};
use crate::app::App;

/// Options that a request may give at most.
const OPTIONS_MAX: usize = 32;

/// How the tokens of an answer attend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SparseParams {
    choice: Choice,
    budget: Budget,
    /// Whether it goes on from answers to others that ask for the same.
    reuses_answers: bool,
    /// Whether the answer's usage tells what was attended to.
    pub receipt: bool,
}

impl SparseParams {
    /// Takes the field out of a request body.
    ///
    /// # Errors
    /// 400 for a policy, option or budget that there is not, 422 for a wrong type.
    pub fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        let given: Option<Map<String, Value>> = fields.take("sparse")?;
        let mut own = Fields::nested(given.unwrap_or_default(), "sparse");
        let policy: Option<String> = own.take("policy")?;
        let options = take_options(&mut own)?;
        let budget = match own.take::<Value>("budget")? {
            None => app.budget,
            Some(Value::String(text)) => text.parse().map_err(|e| refused("sparse.budget", e))?,
            Some(value) => value.to_string().parse().map_err(|e| refused("sparse.budget", e))?,
        };
        let dense = own.take("dense")?.unwrap_or(false);
        let receipt = own.take("receipt")?.unwrap_or(false);
        own.finish()?;
        // What is overridden must exist, too.
        let asked = app.policies.method(policy.as_deref(), &options).map_err(|e| refused("sparse", e))?;
        let choice = if dense { Choice::DENSE } else { asked };
        Ok(SparseParams { choice, budget, reuses_answers: app.reuses_answers, receipt })
    }

    /// What the engine is told for a prompt of `prompt_tokens`.
    pub fn request(&self, prompt_tokens: usize) -> Option<Sparse> {
        let (_, method) = self.choice.for_prompt(prompt_tokens);
        method.map(|method| Sparse { method, budget: self.budget.tokens(prompt_tokens) })
    }

    /// The budget as it was asked for, where KV of answers is reused.
    pub fn reuse(&self) -> Option<Budget> {
        self.reuses_answers.then_some(self.budget)
    }

    /// The budget in tokens for such a prompt.
    pub fn budget_tokens(&self, prompt_tokens: usize) -> u32 {
        self.budget.tokens(prompt_tokens)
    }

    /// The name of the policy for such a prompt.
    pub fn policy(&self, prompt_tokens: usize) -> &'static str {
        self.choice.for_prompt(prompt_tokens).0
    }
}

/// `options`: an object of strings, numbers and booleans.
fn take_options(fields: &mut Fields) -> Result<Options, ApiError> {
    let param = "sparse.options";
    let given: BTreeMap<String, Value> = fields.take("options")?.unwrap_or_default();
    super::params::check_count(param, given.len(), OPTIONS_MAX)?;
    let option = |(name, value): (String, Value)| match value {
        Value::String(text) => Ok((name, text)),
        Value::Number(_) | Value::Bool(_) => Ok((name, value.to_string())),
        _ => {
            let message = format!("`{param}.{name}` must be a string, a number or a boolean");
            Err(ApiError::mistyped(param, message))
        }
    };
    given.into_iter().map(option).collect()
}

fn refused(param: &str, error: sparse::Error) -> ApiError {
    ApiError::invalid(param, error.to_string())
}
