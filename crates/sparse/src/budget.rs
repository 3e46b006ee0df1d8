//! How many tokens a step may attend to.

use std::str::FromStr;

use crate::Error;

/// Tokens attended to per step, layer and KV head at most, those always attended included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// As many.
    Tokens(u32),
    /// This share of the prompt, so that it is known when a request is admitted and never changes.
    Share(f64),
}

impl Budget {
    /// For a prompt of `prompt_tokens`.
    pub fn tokens(self, prompt_tokens: usize) -> u32 {
        match self {
            Budget::Tokens(tokens) => tokens,
            Budget::Share(share) => (share * prompt_tokens as f64).ceil() as u32,
        }
    }
}

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadBudget { value: text.into() };
        match text.strip_suffix('%') {
            None => text.parse().map(Budget::Tokens).map_err(|_| bad()),
            Some(percent) => {
                let percent: f64 = percent.parse().map_err(|_| bad())?;
                (0.0..=100.0).contains(&percent).then_some(Budget::Share(percent / 100.0)).ok_or_else(bad)
            }
        }
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Budget::Tokens(tokens) => write!(f, "{tokens}"),
            Budget::Share(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_shares() {
        assert_eq!("512".parse(), Ok(Budget::Tokens(512)));
        assert_eq!("12.5%".parse::<Budget>().map(|b| b.tokens(8000)), Ok(1000));
        assert_eq!("1%".parse::<Budget>().map(|b| b.tokens(1)), Ok(1));
        for bad in ["", "-1", "101%", "NaN%", "1e3", "5 %", "%", "4294967296"] {
            assert!(bad.parse::<Budget>().is_err(), "{bad}");
        }
        assert_eq!(Budget::Share(0.125).to_string(), "12.5%");
    }
}
