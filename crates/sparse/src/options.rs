//! Options of policies, as names and values that users write.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::Error;

/// An option, for lists and help.
#[derive(Clone, Copy, Debug)]
pub struct OptionDoc {
    /// What users write.
    pub name: &'static str,
    /// Its value when it is not given.
    pub default: &'static str,
    /// What it does, with its unit.
    pub help: &'static str,
}

/// Values by name, not yet understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads `name=value` pairs, separated by commas.
    ///
    /// # Errors
    /// What is no pair.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
        let pair = |pair: &str| match pair.split_once('=') {
            Some((name, value)) => Ok((name.trim().to_owned(), value.trim().to_owned())),
            None => Err(Error::NoPair { text: pair.into() }),
        };
        pairs.map(pair).collect()
    }

    /// These, with those of `others` in their place where both have one.
    pub fn overridden_by(&self, others: &Options) -> Options {
        let mut all = self.clone();
        all.0.extend(others.0.clone());
        all
    }

    /// The name of one of them, if there are any.
    pub fn first(&self) -> Option<&str> {
        self.0.keys().next().map(String::as_str)
    }

    /// The value of one of them.
    pub(crate) fn get(&self, option: &str) -> Option<&str> {
        self.0.get(option).map(String::as_str)
    }

    /// Takes a whole number out, at least `least` and at most `most`.
    pub(crate) fn number<N: FromStr + PartialOrd + std::fmt::Display + Copy>(
        &mut self,
        option: &'static str,
        default: N,
        least: N,
        most: N,
    ) -> Result<N, Error> {
        let Some(value) = self.0.remove(option) else { return Ok(default) };
        match value.parse() {
            Ok(number) if (least..=most).contains(&number) => Ok(number),
            _ => Err(Error::BadValue { option, value, allowed: format!("a number from {least} to {most}") }),
        }
    }

    /// Takes a share out, a percentage with at most one decimal, in thousandths.
    pub(crate) fn permille(&mut self, option: &'static str, default: u32) -> Result<u32, Error> {
        let Some(value) = self.0.remove(option) else { return Ok(default) };
        let digits = |text: &str| {
            let plain = !text.is_empty() && text.len() <= 3 && text.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| text.parse::<u32>().ok()).flatten()
        };
        let parsed = value.strip_suffix('%').and_then(|percent| match percent.split_once('.') {
            None => digits(percent).map(|whole| 10 * whole),
            Some((whole, tenth)) if tenth.len() == 1 => Some(10 * digits(whole)? + digits(tenth)?),
            Some(_) => None,
        });
        match parsed {
            Some(permille @ 0..=1000) => Ok(permille),
            _ => {
                let allowed = "a percentage from 0% to 100%, with at most one decimal".into();
                Err(Error::BadValue { option, value, allowed })
            }
        }
    }

    /// Takes a text out that is not empty.
    pub(crate) fn text(&mut self, option: &'static str, default: &str) -> Result<String, Error> {
        let value = self.0.remove(option).unwrap_or_else(|| default.into());
        if value.is_empty() {
            return Err(Error::BadValue { option, value, allowed: "something".into() });
        }
        Ok(value)
    }

    /// Takes a choice out; the first is the default.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        option: &'static str,
        choices: &[(&'static str, T)],
    ) -> Result<T, Error> {
        let Some(value) = self.0.remove(option) else { return Ok(choices[0].1) };
        let found = choices.iter().find(|(name, _)| *name == value);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names = choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
            Error::BadValue { option, value, allowed: names }
        })
    }
}

/// As [`Options::parse`] reads them, in the order of their names.
impl std::fmt::Display for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pairs: Vec<String> = self.0.iter().map(|(name, value)| format!("{name}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Options {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Options(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}
