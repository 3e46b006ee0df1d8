//! The policies that a server offers.

use ops::sparse::{DigestKind, DigestSpec, Method};

use crate::{Error, Options, Policy, Setup, auto};

/// A policy with options, as somebody compares it with others.
#[derive(Clone, Debug)]
pub struct Variant {
    /// As it was asked for.
    pub name: String,
    /// How it selects; `None` attends to everything.
    pub method: Option<Method>,
}

/// Policies with the server's options, the first of them for requests that name none.
///
/// The digests of all of them are made for every request, so a cached prompt serves whatever the next request asks for.
#[derive(Clone, Debug)]
pub struct Served {
    policies: Vec<Offer>,
    digests: Vec<DigestSpec>,
    gate: Option<String>,
}

/// A policy on offer.
#[derive(Clone, Debug)]
struct Offer {
    /// As requests call it: the policy's name, or `auto`.
    name: &'static str,
    policy: &'static Policy,
    options: Options,
    /// Shorter prompts are attended to whole.
    dense_below: usize,
}

/// How the answer to a request attends, once the length of its prompt is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    policy: &'static str,
    method: Option<Method>,
    dense_below: usize,
}

impl Choice {
    /// Attends to everything.
    pub const DENSE: Choice = Choice { policy: crate::dense::DENSE.name, method: None, dense_below: 0 };

    /// For a prompt of so many tokens: the policy's name, and its method, `None` for everything.
    pub fn for_prompt(&self, prompt_tokens: usize) -> (&'static str, Option<Method>) {
        match self.method {
            Some(_) if prompt_tokens < self.dense_below => (crate::dense::DENSE.name, None),
            method => (self.policy, method),
        }
    }
}

/// The gate that comes with a model, where a file is asked for.
pub const GATE_OF_MODEL: &str = "model";

impl Served {
    /// Offers the policies called `names`, the first by default. `options` are those of the first; the others have their
    /// defaults.
    ///
    /// # Errors
    /// Names and options that do not exist.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, options: &Options) -> Result<Self, Error> {
        let mut served = Served { policies: Vec::new(), digests: Vec::new(), gate: None };
        for name in names {
            let first = served.policies.is_empty();
            let own = if first { options.clone() } else { Options::default() };
            if name == auto::AUTO {
                // Whoever asks for what it would choose shall get it.
                let chosen = Options::parse(auto::OPTIONS)?.overridden_by(&own);
                served.offer_once(
                    auto::AUTO,
                    Policy::named(auto::POLICY)?,
                    chosen.clone(),
                    auto::DENSE_BELOW,
                )?;
                served.offer_once(auto::POLICY, Policy::named(auto::POLICY)?, chosen, 0)?;
                served.offer_once(Choice::DENSE.policy, &crate::dense::DENSE, Options::default(), 0)?;
            } else {
                let policy = Policy::named(name)?;
                served.offer_once(policy.name, policy, own, 0)?;
            }
        }
        Ok(served)
    }

    fn offer_once(
        &mut self,
        name: &'static str,
        policy: &'static Policy,
        options: Options,
        dense_below: usize,
    ) -> Result<(), Error> {
        if self.policies.iter().all(|offer| offer.name != name) {
            self.offer(Offer { name, policy, options, dense_below })?;
        }
        Ok(())
    }

    /// Policies with options of their own, `name:option=value:option=value` each, side by side for a comparison.
    ///
    /// # Errors
    /// Names and options that do not exist.
    pub fn variants(specs: &[String]) -> Result<(Self, Vec<Variant>), Error> {
        let mut served = Served { policies: Vec::new(), digests: Vec::new(), gate: None };
        let mut setups = Vec::new();
        for spec in specs {
            let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
            let (policy, options) = (Policy::named(name)?, Options::parse(&options.replace(':', ","))?);
            let offer = Offer { name: policy.name, policy, options, dense_below: 0 };
            setups.push((spec.clone(), served.offer(offer)?));
        }
        let variant = |(name, setup)| Ok(Variant { name, method: served.place(setup)? });
        let variants = setups.into_iter().map(variant).collect::<Result<_, _>>()?;
        Ok((served, variants))
    }

    /// Nothing but dense attention.
    pub fn dense() -> Self {
        let (policy, options) = (&crate::dense::DENSE, Options::default());
        let dense = Offer { name: policy.name, policy, options, dense_below: 0 };
        Served { policies: vec![dense], digests: Vec::new(), gate: None }
    }

    fn offer(&mut self, offer: Offer) -> Result<Setup, Error> {
        let setup = offer.policy.setup(&offer.options)?;
        if let Some(digest) = setup.digest {
            if let DigestKind::Gate { .. } = digest.kind {
                let file = offer.options.get("gate").unwrap_or(GATE_OF_MODEL).to_owned();
                if let Some(other) = self.gate.replace(file.clone()).filter(|other| *other != file) {
                    return Err(Error::TwoGates { one: other, other: file });
                }
            }
            if self.index_of(digest).is_none() {
                self.digests.push(digest.with_copy(DigestSpec::copies(&self.digests)));
            }
        }
        self.policies.push(offer);
        Ok(setup)
    }

    /// The file with the gate that a policy on offer needs, or [`GATE_OF_MODEL`].
    pub fn gate(&self) -> Option<&str> {
        self.gate.as_deref()
    }

    /// Digests that the device must keep.
    pub fn digests(&self) -> &[DigestSpec] {
        &self.digests
    }

    /// Consecutive tokens of a prompt that requests share as a whole or not at all, on pages of `page_tokens`: a multiple of what
    /// each of the digests asks for.
    pub fn shared_together(&self, page_tokens: usize) -> usize {
        let wanted = self.digests.iter().map(|d| d.shared_together(page_tokens));
        wanted.fold(page_tokens, |all, one| all / greatest_divisor(all, one) * one)
    }

    /// Names, the default first.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.policies.iter().map(|offer| offer.name)
    }

    /// Names with the options that differ from their defaults, as [`Served::variants`] reads them, the default first.
    pub fn specs(&self) -> Vec<String> {
        let spec = |Offer { policy, options, .. }: &Offer| match options.first() {
            None => policy.name.to_owned(),
            Some(_) => format!("{}:{}", policy.name, options.to_string().replace(',', ":")),
        };
        self.policies.iter().filter(|offer| offer.name == offer.policy.name).map(spec).collect()
    }

    /// The methods of all policies with the server's options: what a device must have memory for.
    ///
    /// # Panics
    /// Never: the options were checked.
    pub fn methods(&self) -> Vec<Method> {
        let setups = self.policies.iter().map(|offer| offer.policy.setup(&offer.options));
        setups.filter_map(|setup| self.place(setup.ok()?).ok()?).collect()
    }

    /// How a request attends that asks for the policy `name`, or for none, with `options` of its own on top of the server's.
    ///
    /// # Errors
    /// A policy that is not offered, options that it does not have or that need other digests.
    pub fn method(&self, name: Option<&str>, options: &Options) -> Result<Choice, Error> {
        let found = match name {
            None => self.policies.first(),
            Some(name) => self.policies.iter().find(|offer| offer.name == name),
        };
        let Some(Offer { policy, options: own, dense_below, .. }) = found else {
            let asked = name.unwrap_or_default();
            let name = if asked == auto::AUTO { asked } else { Policy::named(asked)?.name }.to_owned();
            let offered = self.names().collect::<Vec<_>>().join(", ");
            return Err(Error::NotServed { name, offered });
        };
        // Memory was sized for the server's options.
        let Setup { digest, method: served } = policy.setup(own)?;
        let setup = policy.setup(&own.overridden_by(options))?;
        if let (Some(one), Some(other)) = (digest, setup.digest) {
            let is_fp8 = |d: DigestSpec| matches!(d.kind, DigestKind::Fp8(_));
            if is_fp8(one) != is_fp8(other) {
                return Err(Error::Fixed { what: "the option digest" });
            }
        }
        let asked = self.place(setup)?;
        if asked.map(|m| m.partition_tokens) != served.map(|m| m.partition_tokens) {
            return Err(Error::Fixed { what: "the option partition" });
        }
        if options.get("gate").is_some_and(|file| self.gate() != Some(file)) {
            return Err(Error::Fixed { what: "the option gate" });
        }
        Ok(Choice { policy: policy.name, method: asked, dense_below: *dense_below })
    }

    /// The method with its digests by their number on this server.
    fn place(&self, setup: Setup) -> Result<Option<Method>, Error> {
        let Setup { digest, method } = setup;
        let (Some(digest), Some(method)) = (digest, method) else { return Ok(method) };
        let what = match digest.kind {
            DigestKind::Cluster { .. } => {
                "an option that says how keys are clustered (span, partition, sinks)"
            }
            _ => "the option partition",
        };
        let index = self.index_of(digest).ok_or(Error::Fixed { what })?;
        let rule = self.digests[index].copy().map_or(method.rule, |copy| method.rule.with_copy(copy));
        Ok(Some(Method { score: method.score.with_digests(index as u16), rule, ..method }))
    }

    /// Which of the digests `digest` is, as a policy asks for it: it does not number copies of pages.
    fn index_of(&self, digest: DigestSpec) -> Option<usize> {
        self.digests.iter().position(|d| d.with_copy(0) == digest)
    }
}

/// Of two numbers, neither 0 (Euclid).
fn greatest_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use ops::sparse::{Rule, Score, TwoSided};

    use super::*;

    fn options(pairs: &[(&str, &str)]) -> Options {
        pairs.iter().copied().collect()
    }

    #[test]
    fn requests_choose_among_what_is_offered() {
        let served = Served::new(["arkvale", "quest", "dense"], &options(&[("window", "96")])).unwrap();
        assert_eq!(served.digests().len(), 2);
        assert_eq!(served.specs(), ["arkvale:window=96", "quest", "dense"]);
        let variants = Served::variants(&served.specs()).unwrap();
        assert_eq!(variants.0.methods(), served.methods(), "specs say all");
        let default = served.method(None, &Options::default()).unwrap().method.unwrap();
        assert_eq!((default.always.recent_tokens, default.score), (96, Score::Digest { digests: 0 }));
        let quest = served.method(Some("quest"), &options(&[("group", "max")])).unwrap().method.unwrap();
        assert_eq!(quest.score, Score::Digest { digests: 1 });
        assert_eq!(served.method(Some("dense"), &Options::default()).unwrap(), Choice::DENSE);
        let refused = |name, pairs: &[(&str, &str)]| {
            served.method(Some(name), &options(pairs)).unwrap_err().to_string()
        };
        assert_eq!(
            refused("streaming", &[]),
            "this server does not offer the policy \"streaming\"; it offers arkvale, quest, dense (--policies)"
        );
        assert!(refused("que", &[]).starts_with("there is no policy \"que\"; there are dense, streaming"));
        let random = Served::new(["random"], &Options::default()).unwrap();
        let finer = random.method(None, &options(&[("partition", "8")])).unwrap_err();
        assert!(finer.to_string().starts_with("the option partition is fixed"), "{finer}");
        assert!(refused("quest", &[("partition", "32")]).starts_with("the option partition is fixed"));
        assert!(refused("quest", &[("digest", "fp8")]).starts_with("the option digest is fixed"));
        let small = Served::new(["quest"], &options(&[("digest", "fp8")])).unwrap();
        assert_eq!(small.digests()[0].kind, DigestKind::Fp8(TwoSided::MinMax));
        assert!(small.method(None, &options(&[("digest", "fp8"), ("group", "max")])).is_ok());
        assert!(small.method(None, &options(&[("digest", "same")])).is_err());
        assert_eq!(refused("dense", &[("a", "1")]), "the policy dense has no option \"a\"; it has none");
        assert_eq!(
            refused("quest", &[("group", "sum")]),
            "the option group is \"sum\"; it must be mean or max or query-mean"
        );
        assert_eq!(
            refused("arkvale", &[("window", "-1")]),
            "the option window is \"-1\"; it must be a number from 0 to 1048576"
        );
    }

    #[test]
    fn clusters_are_fixed_and_what_becomes_of_them_is_not() {
        let served = Served::new(["retroinfer"], &options(&[("span", "256")])).unwrap();
        assert_eq!(served.shared_together(16), 256);
        let method = |pairs: &[(&str, &str)]| served.method(None, &options(pairs));
        let rule = method(&[("estimate", "0%")]).unwrap().method.unwrap().rule;
        assert_eq!(rule, Rule::Clusters { span_tokens: 256, estimate_permille: 0, copy: 0 });
        assert_eq!(method(&[("window", "100")]).unwrap().method.unwrap().always.recent_tokens, 100);
        for pairs in [[("span", "512")], [("sinks", "8")], [("partition", "32")]] {
            let error = method(&pairs).unwrap_err().to_string();
            assert!(error.starts_with("an option that says how keys are clustered"), "{error}");
        }
        let error = method(&[("span", "100")]).unwrap_err().to_string();
        assert_eq!(
            error,
            "the option span is \"100\"; it must be a multiple of 64 and of partition, from 64 to 4096"
        );
        for bad in ["0.5", "23.25%", "101%", "100.1%", "-1%", "%", ".5%", "5.%", "+5%"] {
            let error = method(&[("estimate", bad)]).unwrap_err().to_string();
            assert!(error.starts_with("the option estimate is"), "{error}");
        }
        let estimate = |text| match method(&[("estimate", text)]).unwrap().method.unwrap().rule {
            Rule::Clusters { estimate_permille, .. } => estimate_permille,
            other => panic!("{other:?}"),
        };
        assert_eq!(["0%", "7%", "0.4%", "100.0%"].map(estimate), [0, 70, 4, 1000]);
        assert_eq!(Served::new(["quest"], &Options::default()).unwrap().shared_together(16), 16);
    }

    #[test]
    fn auto_is_dense_for_short_prompts() {
        let served = Served::new(["auto", "quest"], &Options::default()).unwrap();
        assert_eq!(served.names().collect::<Vec<_>>(), ["auto", "arkvale", "dense", "quest"]);
        assert_eq!(served.specs(), ["arkvale:partition=16:sinks=16:window=16", "dense", "quest"]);
        let choice = served.method(None, &Options::default()).unwrap();
        assert_eq!(choice.for_prompt(auto::DENSE_BELOW - 1), ("dense", None));
        let (name, method) = choice.for_prompt(auto::DENSE_BELOW);
        assert_eq!((name, method.unwrap().partition_tokens), ("arkvale", 16));
        let named = served.method(Some("arkvale"), &Options::default()).unwrap();
        assert_eq!(named.for_prompt(1), choice.for_prompt(auto::DENSE_BELOW), "who asks for it gets it");
        assert_eq!(auto::BUDGET.tokens(auto::DENSE_BELOW), 1024);
        let finer = Served::new(["auto"], &options(&[("partition", "32")])).unwrap();
        assert_eq!(finer.digests()[0].partition_tokens, 32);
    }

    #[test]
    fn a_server_has_one_gate() {
        let served = Served::new(["quest", "seerattention"], &Options::default()).unwrap();
        assert_eq!(served.gate(), Some(GATE_OF_MODEL));
        let method = |pairs: &[(&str, &str)]| served.method(Some("seerattention"), &options(pairs));
        let likely = method(&[("threshold", "0.25"), ("gate", "model")]).unwrap().method.unwrap();
        assert_eq!((likely.score, likely.rule), (Score::Gate { digests: 1 }, Rule::Threshold(0.25)));
        assert_eq!(method(&[("threshold", "0")]).unwrap().method.unwrap().rule, Rule::Top);
        let error = |pairs: &[(&str, &str)]| method(pairs).unwrap_err().to_string();
        assert!(error(&[("gate", "/etc/passwd")]).starts_with("the option gate is fixed"));
        for bad in ["2", "-0.1", "NaN", "half"] {
            let line = format!("the option threshold is {bad:?}; it must be a number from 0 to 1");
            assert_eq!(error(&[("threshold", bad)]), line);
        }
        assert_eq!(error(&[("gate", "")]), "the option gate is \"\"; it must be something");
        assert_eq!(Served::new(["quest"], &Options::default()).unwrap().gate(), None);
        let two = ["seerattention:gate=a", "seerattention:gate=b:partition=64"].map(str::to_owned);
        let error = Served::variants(&two).unwrap_err().to_string();
        assert_eq!(error, "the option gate is \"a\" and \"b\"; a server has one gate");
        let (served, variants) =
            Served::variants(&["quest", "seerattention:gate=a"].map(str::to_owned)).unwrap();
        assert_eq!((served.gate(), served.digests().len(), variants.len()), (Some("a"), 2, 2));
    }

    #[test]
    fn every_default_is_what_the_documentation_says() {
        for policy in crate::POLICIES {
            let plain = policy.setup(&Options::default()).unwrap();
            for option in policy.options {
                let named = policy.setup(&options(&[(option.name, option.default)])).unwrap();
                assert_eq!(named, plain, "{} {}", policy.name, option.name);
            }
        }
    }
}
